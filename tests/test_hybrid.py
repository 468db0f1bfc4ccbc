"""Whole searches on a real small model: no worse than any seed, repeatable, and resumed from wherever they were cut."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import evaluation_lines, write_checkpoint, write_documents
from longrope.checkpoint import LoadOptions
from longrope.documents import read_sources
from longrope.evaluate.perplexity import measure
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel, load_model
from longrope.search.driver import SearchWindows, choose_search_windows, make_problem, make_space, search
from longrope.search.settings import SearchSettings
from longrope.windows import Window
from models import ORIGINAL

TARGET = 6 * ORIGINAL  # room for a needle's prompt


@dataclass(frozen=True)
class Case:
    """A search by its settings, which also name it."""

    settings: dict[str, Any]

    @property
    def all(self) -> SearchSettings:
        return SearchSettings(**({"to": TARGET, "windows": 3, "gradient_windows": 4} | self.settings))


CASES = {
    "hybrid": Case({}),
    "gradient": Case({"method": "gradient"}),
    "the search windows alone": Case({"gradient_windows": 0, "windows": 1}),
    "su": Case({"attention_factor": "su"}),
    "longrope2": Case({"space": "longrope2"}),
    "start tokens": Case({"start_tokens": "search"}),
    "needle": Case({"objective": "needle"}),
    "race": Case({"method": "evolution", "race": True, "gradient_windows": None, "evaluations": 80}),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("ground")
    write_documents(folder / "texts", count=8)
    model = write_checkpoint(folder / "model", initializer_range=0.25)
    return load_model(str(model), LoadOptions(device="cpu", dtype="float32"))


def texts(loaded: LoadedModel) -> str:
    return str(Path(loaded.name).parent / "texts")


def searched(loaded: LoadedModel, name: str, out: Path) -> FactorTable:
    given = {"to": TARGET, "windows": 3, "gradient_windows": 4} | CASES[name].settings
    return search(loaded, documents=[texts(loaded)], out=out, **given)


@pytest.fixture(scope="module")
def runs(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of every case."""
    folder = tmp_path_factory.mktemp("runs")
    for name in CASES:
        searched(loaded, name, folder / name)
    return {name: folder / name for name in CASES}


def chosen(loaded: LoadedModel, name: str) -> SearchWindows:
    documents = read_sources([texts(loaded)], share="search", tokenizer=loaded.tokenizer)
    return choose_search_windows(loaded, CASES[name].all, documents)


def measured(loaded: LoadedModel, windows: list[Window], factors: RopeFactors) -> float:
    """Perplexity of the scored tokens by the measurement that `evaluate` makes."""
    with loaded.patch() as patch:
        patch.install(factors)
        return measure(loaded, windows).value


@pytest.mark.parametrize("name", CASES)
def test_a_search_ends_no_worse_than_the_best_seed_on_all_windows(
    loaded: LoadedModel, runs: dict[str, Path], name: str
) -> None:
    windows = list(chosen(loaded, name).search)
    table = FactorTable.load(runs[name] / "factors.json")
    seeds = make_problem(loaded, CASES[name].all, chosen(loaded, name)).seeds
    best = min(measured(loaded, windows, row) for _, row in seeds)
    found = measured(loaded, windows, table.rows[-1])
    assert found == pytest.approx(table.provenance["value"], rel=1e-5)
    assert found <= best * (1 + 1e-6)
    if name != "the search windows alone":
        assert found < best, "and better"


@pytest.mark.parametrize("name", CASES)
def test_what_a_search_returns_is_in_its_space_and_on_a_grid(
    loaded: LoadedModel, runs: dict[str, Path], name: str
) -> None:
    row = FactorTable.load(runs[name] / "factors.json").rows[-1]
    space, settings = make_space(loaded, CASES[name].all), CASES[name].all
    seeds = make_problem(loaded, settings, chosen(loaded, name)).seeds
    assert space.holds(row)
    assert (np.diff(row.rescale) >= 0).all()
    assert np.array_equal(row.vector, row.vector.round(4)) or row.rescale in {seed.rescale for _, seed in seeds}
    assert row.start_tokens in settings.start_choices
    if not settings.searches_attention:
        assert row.attention_factor in {seed.attention_factor for _, seed in seeds}


@pytest.mark.parametrize("name", ["hybrid", "start tokens", "race"])
def test_the_same_search_again_is_the_same_to_the_last_byte(
    loaded: LoadedModel, runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    searched(loaded, name, tmp_path / "again")
    assert evaluation_lines(tmp_path / "again") == evaluation_lines(runs[name])
    for file in ("factors.json", "metrics.json"):
        assert (tmp_path / "again" / file).read_bytes() == (runs[name] / file).read_bytes()


def cut(run: Path, count: int, into: Path, rest: bytes = b"") -> Path:
    """A copy of a run as it was after some tasks; `rest` is of a line that was being written."""
    into.mkdir()
    shutil.copy(run / "config.json", into)
    kept = (run / "evaluations.jsonl").read_bytes().splitlines(keepends=True)[:count]
    (into / "evaluations.jsonl").write_bytes(b"".join(kept) + rest)
    return into


def goes_on(loaded: LoadedModel, name: str, whole: Path, folder: Path, count: int) -> None:
    kept = (whole / "evaluations.jsonl").read_bytes().splitlines(keepends=True)[:count]
    searched(loaded, name, folder)
    assert (folder / "factors.json").read_bytes() == (whole / "factors.json").read_bytes()
    assert (folder / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    assert (folder / "evaluations.jsonl").read_bytes().startswith(b"".join(kept)), "nothing was done again"
    assert evaluation_lines(folder) == evaluation_lines(whole), "and only what was missing"


# Shares of a search: among the seeds, in the descent, in the polish, before its last task, at its end.
CUTS = (0.0, 0.03, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0)
FEW_CUTS = (0.2, 0.6, 0.97)
OTHERS = ("gradient", "start tokens", "needle", "su", "race")


@pytest.mark.parametrize(
    ("name", "share"), [*product(("hybrid", "longrope2"), CUTS), *product(OTHERS, FEW_CUTS)], ids=str
)
def test_a_search_cut_anywhere_goes_on_to_the_same_end(
    loaded: LoadedModel, runs: dict[str, Path], tmp_path: Path, name: str, share: float
) -> None:
    count = round(share * len(evaluation_lines(runs[name])))
    goes_on(loaded, name, runs[name], cut(runs[name], count, tmp_path / "cut"), count)


def test_a_line_that_was_being_written_is_done_again(
    loaded: LoadedModel, runs: dict[str, Path], tmp_path: Path
) -> None:
    rest = (runs["hybrid"] / "evaluations.jsonl").read_bytes().splitlines()[60][:-5]
    goes_on(loaded, "hybrid", runs["hybrid"], cut(runs["hybrid"], 60, tmp_path / "cut", rest), 60)


def test_a_hybrid_search_descends_polishes_and_races(runs: dict[str, Path]) -> None:
    found = evaluation_lines(runs["hybrid"])
    origins = [line["origin"] for line in found]
    assert {"pi+none", "yarn+su", "yarn+yarn", "polish"} <= set(origins)
    descent = next(origin for origin in origins if origin.startswith("descent from"))
    gradients = [line for line in found if "gradient" in line]
    assert {line["origin"] for line in gradients} == {descent}
    assert {window for line in gradients for window in line["windows"]} <= set(range(3, 7)), "windows of their own"
    assert all(len(line["gradient"]) == len(line["rescale"]) + 1 for line in gradients)
    assert all(line["tokens"] == 3 * TARGET * len(line["windows"]) for line in gradients)
    assert all(line["tokens"] == TARGET * len(line["windows"]) for line in found if "gradient" not in line)
    assert origins.count("pi+none") < 3, "a hopeless seed is not run on every window"
    best = min(line["value"] for line in found if line["value"] is not None and "unrounded" not in line["origin"])
    assert FactorTable.load(runs["hybrid"] / "factors.json").provenance["value"] == best


def test_start_tokens_are_tried_when_they_are_asked_for(runs: dict[str, Path]) -> None:
    asked = {
        line["start_tokens"] for line in evaluation_lines(runs["start tokens"]) if line["origin"] == "start tokens"
    }
    assert len(asked) >= 12
    assert {line["start_tokens"] for line in evaluation_lines(runs["hybrid"])} == {0}


def test_a_raced_evolution_runs_only_some_windows_of_some_and_all_of_the_winner(runs: dict[str, Path]) -> None:
    found = evaluation_lines(runs["race"])
    tried: dict[tuple[float, ...], set[int]] = {}
    for line in found:
        tried.setdefault((*line["rescale"], line["start_tokens"]), set()).update(line["windows"])
    assert {len(each) for each in tried.values()} >= {1, 3}
    row = FactorTable.load(runs["race"] / "factors.json").rows[-1]
    assert tried[(*row.rescale, row.start_tokens)] == {0, 1, 2}
    assert {len(line["windows"]) for line in found if line["iteration"] == 0} == {3}, "no race among the first"
