"""What a search costs and where it ends: Algorithm 1 of the paper, its race, and our methods, cell by cell.

    python benchmarks/search.py                     # every cell that is not there yet, then the table and the plot
    python benchmarks/search.py --only tiny-8x      # the missing cells whose name begins so
    python benchmarks/search.py --table             # no search: the table and the plot of the cells that are there

Each cell is one search of one model at one ratio with one seed, a JSON under benchmarks/results/search, written when
the search has ended; a search that was interrupted goes on. So the benchmark may take days and several machines. The
second model, `novels`, is trained by tools/pretrain.py; docs/search.md gives the command.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, machine, today, versions, write_results
from longrope.checkpoint import TINY, LoadOptions
from longrope.documents import Document, read_sources
from longrope.evaluate.perplexity import Perplexity, measure
from longrope.factors import RopeFactors, last_row
from longrope.files import read_lines
from longrope.model import LoadedModel, load_model
from longrope.search.driver import SearchWindows, search_windows
from longrope.search.settings import SearchSettings
from longrope.windows import Window, choose_windows, fingerprint, spare_windows
from search_table import show

CELLS = RESULTS / "search"
WINDOWS = {4: 8, 8: 8, 16: 4, 32: 2}
UNSEEN = 32
STEMS = ("pi", "ntk", "ntk-cd", "dynamic-ntk", "yarn", "yarn-rcd", "llama3")
BASELINES = ("none", *STEMS, *(f"{stem}+su" for stem in STEMS))
ALGORITHM_1 = {"method": "evolution", "attention_factor": "su"}


@dataclass(frozen=True)
class Cell:
    """One search of the table."""

    model: str
    ratio: int
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.model}-{self.ratio}x-{self.method}-seed{self.seed}"


METHODS: dict[str, dict[str, Any]] = {
    "evolution": ALGORITHM_1,
    "race": ALGORITHM_1 | {"race": True, "evaluations": 672},  # half of Algorithm 1, which is what it is judged by
    "hybrid": {},
    "further-windows": {"gradient_windows": 64},  # hybrid, with gradients on windows that are not searched on
}
DEFAULT = "hybrid"
CASES = ((TINY, 8), ("novels", 8), (TINY, 4), (TINY, 16), (TINY, 32))
SEEDS = (0, 1, 2)


def cells() -> Iterator[Cell]:
    """Every cell of the table: ours with three seeds, Algorithm 1 and its race with three at 8x of `tiny`."""
    for model, ratio in CASES:
        yield Cell(model, ratio, "baselines")
        first = (model, ratio) == CASES[0]
        yield from (Cell(model, ratio, DEFAULT, seed) for seed in SEEDS)
        yield from (Cell(model, ratio, "evolution", seed) for seed in (SEEDS if first else SEEDS[:1]))
        yield from (Cell(model, ratio, "race", seed) for seed in (SEEDS if first else ()))
        if WINDOWS[ratio] >= 4:  # with fewer it is the default
            yield from (Cell(model, ratio, "further-windows", seed) for seed in SEEDS)


@dataclass(frozen=True)
class Places:
    """Where the second model and its documents are, and where runs go."""

    novels: Path
    corpus: Path
    runs: Path


@cache
def loaded_model(name: str, places: Places) -> LoadedModel:
    """A model of the table, with one thread: what a search ends at depends on the number of threads."""
    return load_model(TINY if name == TINY else str(places.novels), LoadOptions(device="cpu", threads=1))


@cache
def windows(cell_model: str, ratio: int, places: Places) -> tuple[list[Window], list[Window]]:
    """Search windows and unseen ones, the same for every seed and method."""
    loaded = loaded_model(cell_model, places)
    length = ratio * loaded.rope.original_length
    first, second = (
        choose_windows(documents, loaded.tokenizer, length=length, count=count, seed=0)
        for documents, count in zip(sources(cell_model, places), (WINDOWS[ratio], UNSEEN), strict=True)
    )
    return first, second


@cache
def sources(cell_model: str, places: Places) -> tuple[list[Document], list[Document]]:
    """Documents to search on and unseen ones."""
    if cell_model == TINY:
        return read_sources(["stdlib"], share="search"), read_sources(["stdlib"], share="unseen")
    return read_sources([str(places.corpus / "validation")]), read_sources([str(places.corpus / "test")])


def run_cell(cell: Cell, places: Places) -> dict[str, Any]:
    """The JSON of a cell: what was searched, what it cost, where it ended, and the losses of each unseen window."""
    loaded = loaded_model(cell.model, places)
    searched, unseen = windows(cell.model, cell.ratio, places)
    target = len(searched[0].ids)
    found = baselines(loaded, searched, unseen) if cell.method == "baselines" else search(cell, loaded, places)
    return {
        "cell": cell.name,
        **asdict(cell),
        "length": target,
        "weights": loaded.fingerprint,
        "windows": {"search": described(searched), "unseen": described(unseen)},
        **found,
        "date": today(),
        "machine": machine(),
        "threads": 1,
        "versions": versions(),
    }


def described(chosen: Sequence[Window]) -> dict[str, Any]:
    return {"hash": fingerprint(chosen), "count": len(chosen), "documents": [window.sha256[:16] for window in chosen]}


def losses(measured: Perplexity) -> dict[str, Any]:
    """A perplexity with what paired differences are made of."""
    return {"value": measured.value, "losses": measured.losses.tolist(), "counts": measured.counts.tolist()}


def measured(loaded: LoadedModel, row: RopeFactors | None, chosen: Sequence[Window]) -> dict[str, Any]:
    with loaded.patch() as patch:
        patch.install(row)
        return losses(measure(loaded, chosen))


def baselines(loaded: LoadedModel, searched: Sequence[Window], unseen: Sequence[Window]) -> dict[str, Any]:
    target = len(searched[0].ids)
    rows = {name: None if name == "none" else loaded.baseline(name, target) for name in BASELINES}
    return {
        "search": {name: measured(loaded, row, searched) for name, row in rows.items()},
        "unseen": {name: measured(loaded, row, unseen) for name, row in rows.items()},
    }


def search(cell: Cell, loaded: LoadedModel, places: Places) -> dict[str, Any]:
    searched, unseen = windows(cell.model, cell.ratio, places)
    target = len(searched[0].ids)
    settings = SearchSettings(to=target, seed=cell.seed, **METHODS[cell.method])
    out = places.runs / cell.name
    further = spare(cell, searched, settings, places) if settings.method != "evolution" else []
    table = search_windows(loaded, settings, SearchWindows(searched, further), out=out)
    evaluations = read_lines(out / "evaluations.jsonl")
    row = last_row(table, target)
    return {
        "settings": asdict(settings),
        "evaluation_tokens": sum(len(window.ids) for window in searched),
        "token_passes": sum(line["tokens"] for line in evaluations),
        "recomputed": sum(line.get("recomputed", 0) for line in evaluations),
        "seconds": sum(line["seconds"] for line in evaluations),
        "curve": curve(evaluations),
        "factors": {
            "rescale": list(row.rescale),
            "start_tokens": row.start_tokens,
            "attention_factor": row.attention_factor,
        },
        "search": measured(loaded, row, searched),
        "unseen": measured(loaded, row, unseen),
    }


def spare(cell: Cell, searched: Sequence[Window], settings: SearchSettings, places: Places) -> list[Window]:
    """Further windows of the searched documents, for gradients."""
    loaded, documents = loaded_model(cell.model, places), sources(cell.model, places)[0]
    count, length = settings.further_windows(len(searched)), len(searched[0].ids)
    return spare_windows(documents, loaded.tokenizer, length=length, count=count, seed=cell.seed, taken=searched)


def curve(evaluations: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(token-passes so far, best value so far) wherever the best falls."""
    spent, best, points = 0, math.inf, []
    for line in evaluations:
        spent += line["tokens"]
        may_win = not line["origin"].endswith("unrounded")
        if may_win and line["value"] is not None and line["value"] < best:
            best = line["value"]
            points.append((spent, best))
    return points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="cells whose names begin so")
    parser.add_argument("--table", action="store_true", help="no search: only the table and the plot")
    parser.add_argument("--out", type=Path, default=CELLS, metavar="FOLDER", help="where the cells are")
    parser.add_argument("--novels", type=Path, default=Path("runs/novels/model"), help="the second model")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="its documents: validation/ and test/")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="where searches can go on from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    places = Places(args.novels, args.corpus, args.runs)
    for cell in cells():
        path = args.out / f"{cell.name}.json"
        if args.table or path.exists() or not any(cell.name.startswith(start) for start in args.only):
            continue
        print(cell.name, file=sys.stderr)
        write_results(path, run_cell(cell, places))
    return show(args.out)


if __name__ == "__main__":
    sys.exit(main())
