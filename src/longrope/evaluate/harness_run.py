"""`longrope evaluate harness` as a run: lm-eval's answers on disk as they come, its metrics as one result."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrope import __version__
from longrope.checkpoint import LoadOptions, load_options, taken
from longrope.describe import describe_model, describe_options, metrics, tokenizer_hash
from longrope.evaluate.harness import Prepared, check_tasks, harness, prepare
from longrope.evaluate.methods import Result
from longrope.evaluate.run import table_of
from longrope.factors import FactorTable
from longrope.model import LoadedModel, as_loaded
from longrope.modes import apart
from longrope.runs import METRICS, RunFolder, command_line

logger = logging.getLogger(__name__)

_ANSWERS = "answers"


@dataclass(frozen=True)
class HarnessSettings:
    """What is asked and how: `harness`'s keywords of the same names."""

    tasks: Sequence[str] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    include_path: str | Path | None = None
    chat: bool = False
    unsafe_code: bool = False
    seed: int | None = None

    @classmethod
    def taken(cls, keywords: dict[str, Any]) -> HarnessSettings:
        """Those that are among some keywords, which are taken out of them. Raises UserError for tasks not known."""
        given = cls(**taken(cls, keywords))
        check_tasks(given.tasks, given.include_path)
        return given

    def prepared(self) -> Prepared:
        """The tasks, loaded."""
        return prepare(self.tasks, self.include_path, unsafe_code=self.unsafe_code)

    def told(self) -> dict[str, Any]:
        """What results depend on, for config.json."""
        folder = str(self.include_path) if self.include_path else None
        said = {"tasks": list(self.tasks), "limit": self.limit, "num_fewshot": self.num_fewshot, "seed": self.seed}
        return {**said, "chat": self.chat, "include_path": folder, "batch_size": self.batch_size}


@apart
def evaluate_harness(
    model: str | Path | LoadedModel,
    *,
    factors: FactorTable | str | Path | None = None,
    out: str | Path | None = None,
    options: LoadOptions | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """lm-eval's tasks on one model; the document that --json prints.

    Writes a run folder where `out` names one; resumed, answers that are there are not asked for again. For the
    result's value see `harness`. keywords: the fields of HarnessSettings and LoadOptions.
    Raises UserError for bad input.
    """
    given = HarnessSettings.taken(keywords)
    options = load_options(options, keywords)
    if factors == "none":
        options = replace(options, own_factors=False)
    loaded = as_loaded(model, options)
    table = table_of(loaded, factors)
    told = {"factors": [row.key for row in table.rows] if table else None}
    return harness_run("evaluate harness", loaded, {"factors" if table else "none": table}, given, told, out=out)


def harness_run(
    command: str,
    loaded: LoadedModel,
    tables: Mapping[str, FactorTable | None],
    given: HarnessSettings,
    told: Mapping[str, Any],
    *,
    length: int | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """A result for each of some tables, or the checkpoint as it is (None), by name; what metrics.json holds.

    told: what results depend on beside the settings. length: of the longest prompt of any, which results stand under;
    by default where the factors end. Raises UserError for bad input.
    """
    told = {**given.told(), **told, **describe_options(loaded), "tokenizer": tokenizer_hash(loaded.tokenizer)}
    prepared = given.prepared()
    hashes = prepared.hashes()

    def measured(answers: Path | None) -> dict[str, Any]:
        results = []
        for number, (name, table) in enumerate(tables.items()):
            kept = None if answers is None else answers if len(tables) == 1 else answers.with_name(f"{_ANSWERS}-{name}")
            # lm-eval's tasks hold what was asked of them: others for each table.
            tasks = given.prepared() if number else prepared
            found = harness(loaded, table, answers=kept, max_length=length, prepared=tasks, **vars(given))
            value = math.nan if found["value"] is None else found["value"]
            results.append(Result(name, found["max_length"], value, 0, None, None, found))
        return metrics(command, loaded, told, results, "harness", items=hashes)

    if out is None:
        return measured(None)
    config = {
        "command": command,
        "longrope": __version__,
        "model": describe_model(loaded),
        "settings": told,
        "items": hashes,
        "ignored": {"command_line": command_line()},
    }
    with RunFolder.open(Path(out), config) as run:
        if run.finished:
            measured_before = run.metrics()
            logger.info("%s is finished: its measurements are in %s", out, Path(out) / METRICS)
            return measured_before
        run.save_metrics(measured(run.path / _ANSWERS))
        run.finish()
        return run.metrics()
