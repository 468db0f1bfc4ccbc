"""The whole story on the embedded model: search, compare, export, check, report. Readable top to bottom."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longrope.checkpoint import TINY, LoadOptions
from longrope.describe import metrics
from longrope.documents import Document, hold_out, read_sources
from longrope.evaluate.recorded import measure_methods
from longrope.export.run import export
from longrope.factors import FactorTable
from longrope.model import LoadedModel, load_model
from longrope.report import write_report
from longrope.runs import CHECKPOINT, FACTORS, REPORT, RunFolder, fresh_run_path
from longrope.search.driver import SearchWindows, run_config, run_search
from longrope.search.loop import OnProgress
from longrope.search.settings import BUDGET, SearchSettings
from longrope.windows import choose_windows

logger = logging.getLogger(__name__)

RATIO = 8
"""Of the length that is extended to, to the original one."""
SEARCH_WINDOWS, UNSEEN_WINDOWS = 8, 24
"""Of the target length, and of each measured one."""
# The same operations on the same device: only a half-precision kernel may differ between two calls.
MOST_LOGIT_GAP = {"torch.float32": 1e-5}
METHODS = ("none", "pi", "ntk", "dynamic-ntk", "yarn", "yarn+su", "llama3", "llama3+su")
"""What the search is compared with; without the last, the best that needs no search, its gain would look larger."""


@dataclass(frozen=True)
class Demo:
    """What the demonstration made: its run folder, the table, the measurements, the page, the exported checkpoint."""

    run: Path
    table: FactorTable
    metrics: dict[str, Any]
    report: Path
    checkpoint: Path
    logit_gap: float


def demo(
    *,
    documents: Sequence[str] = ("stdlib",),
    evaluations: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    options: LoadOptions | None = None,
    on_progress: OnProgress | None = None,
    on_stage: Callable[[str], None] = logger.info,
) -> Demo:
    """Extend the embedded model to eight times its window on documents of this machine, and show what came of it.

    Raises UserError for bad input.
    """
    path = Path(out) if out is not None else fresh_run_path("demo")
    loaded = load_model(TINY, options)
    original, target = loaded.rope.original_length, RATIO * loaded.rope.original_length
    searched, held = _split(documents, loaded)
    windows = choose_windows(searched, loaded.tokenizer, length=target, count=SEARCH_WINDOWS, seed=seed)
    unseen = {
        length: choose_windows(held, loaded.tokenizer, length=length, count=UNSEEN_WINDOWS, seed=seed)
        for length in [original * 2**power for power in range(4)]
    }
    chosen = SearchWindows(windows, unseen=unseen[target])
    settings = SearchSettings(to=target, evaluations=evaluations, seed=seed)
    config = run_config("demo", loaded, settings, chosen)
    checkpoint = path / CHECKPOINT
    with RunFolder.open(path, config, budget_keys=BUDGET) as run:
        if run.finished:
            on_stage(f"{path} is finished")
            measured = run.metrics()
            page, gap = path / REPORT, float(measured["logit_gap"])
            return Demo(path, FactorTable.load(path / FACTORS), measured, page, checkpoint, gap)
        on_stage(f"{TINY}: trained on {original} tokens, to be extended to {target}")
        on_stage(f"searching on {len(windows)} windows of {target} tokens")
        table = run_search(run, loaded, settings, chosen, on_progress=on_progress)

        on_stage(f"measuring {len(METHODS) + 1} methods at {len(unseen)} lengths on documents the search has not seen")
        results = measure_methods(loaded, unseen, METHODS, {"longrope": table}, run)
        measured = metrics("demo", loaded, config["settings"], results)
        run.save_metrics(measured)

        on_stage("exporting a checkpoint, and loading it with stock transformers")
        shutil.rmtree(checkpoint, ignore_errors=True)  # of a demo that was interrupted here
        export(loaded, table, checkpoint, window="long")
        gap = logit_gap(loaded, table, checkpoint)
        if gap > MOST_LOGIT_GAP.get(str(loaded.model.dtype), 0.05):
            raise RuntimeError(f"the exported checkpoint's logits differ by {gap:g} from ours")
        measured["logit_gap"] = gap
        run.save_metrics(measured)
        report = write_report(path)
        run.finish()
    return Demo(path, table, measured, report, checkpoint, gap)


def _split(documents: Sequence[str], loaded: LoadedModel) -> tuple[list[Document], list[Document]]:
    """Documents to search on and documents held out; `tiny` was trained on neither share of stdlib."""
    if list(documents) == ["stdlib"]:
        return read_sources(documents, share="search"), read_sources(documents, share="unseen")
    return hold_out(read_sources(documents, share="search", tokenizer=loaded.tokenizer))


@torch.no_grad()
def logit_gap(loaded: LoadedModel, table: FactorTable, checkpoint: Path) -> float:
    """Largest difference between our logits with the long row and those of the folder in stock transformers."""
    stock: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=loaded.model.dtype, attn_implementation=loaded.model.config._attn_implementation
    )
    stock = stock.to(loaded.device).eval()
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (1, table.rows[-1].up_to), generator=rng).to(loaded.device)
    with loaded.patch() as patch:
        patch.install(table.rows[-1])
        gaps = [
            (loaded.model(input_ids=ids[:, :length]).logits - stock(input_ids=ids[:, :length]).logits).abs().max()
            for length in (table.original_length, table.rows[-1].up_to)
        ]
    return float(max(gaps))
