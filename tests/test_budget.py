"""Limits of a search: it ends well with the best so far, never beyond its limit, and a larger one goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import TARGET, evaluation_lines, longrope, refused, write_checkpoint, write_documents
from longrope.baselines import baseline
from longrope.checkpoint import LoadOptions
from longrope.factors import FactorTable
from longrope.model import LoadedModel, load_model
from longrope.runs import RunFolder
from longrope.search.driver import SearchWindows, make_budget, search
from longrope.search.settings import SearchSettings
from longrope.windows import Window

WINDOWS = 3
EVALUATION = WINDOWS * TARGET


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `model` and documents `texts`."""
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts", count=8)
    return folder


@pytest.fixture(scope="module")
def loaded(ground: Path) -> LoadedModel:
    return load_model(str(ground / "model"), LoadOptions(device="cpu", dtype="float32"))


def searched(loaded: LoadedModel, out: Path, **keywords: Any) -> FactorTable:
    documents = [str(Path(loaded.name).parent / "texts")]
    chosen = (
        {"windows": WINDOWS} | ({} if keywords.get("method") == "evolution" else {"gradient_windows": 4}) | keywords
    )
    return search(loaded, to=TARGET, documents=documents, out=out, **chosen)


def complete(run: Path) -> dict[tuple[Any, ...], float]:
    """The perplexity of every candidate that all windows were run for, by the losses in evaluations.jsonl."""
    known: dict[tuple[Any, ...], dict[int, float]] = {}
    for line in evaluation_lines(run):
        if "gradient" not in line and "unrounded" not in line["origin"]:
            key = (*line["rescale"], line["start_tokens"], line["attention_factor"])
            known.setdefault(key, {}).update(zip(line["windows"], line["losses"], strict=True))
    scored = WINDOWS * (TARGET - 1)
    return {
        key: math.exp(sum(found.values()) / scored)
        for key, found in known.items()
        if all(window in found for window in range(WINDOWS))
    }


def is_best_of(table: FactorTable, run: Path) -> bool:
    row, found = table.rows[-1], complete(run)
    best = min(found.values())
    return (
        found[(*row.rescale, row.start_tokens, row.attention_factor)] == pytest.approx(best, rel=1e-12)
        and table.provenance["value"] == pytest.approx(best, rel=1e-12)
        and FactorTable.load(run / "factors.json") == table
        and (run / "DONE").exists()
    )


METHODS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "gradient": {"method": "gradient"},
    "evolution": {"method": "evolution"},
    "race": {"method": "evolution", "race": True},
    "start tokens": {"start_tokens": "search"},
    "longrope2": {"space": "longrope2"},
}


@pytest.mark.parametrize("evaluations", [1, 2, 4, 9, 25])
@pytest.mark.parametrize("method", METHODS)
def test_at_its_limit_of_evaluations_a_search_returns_the_best_so_far(
    loaded: LoadedModel, tmp_path: Path, method: str, evaluations: int
) -> None:
    table = searched(loaded, tmp_path / "run", evaluations=evaluations, **METHODS[method])
    assert is_best_of(table, tmp_path / "run")
    spent = sum(line["tokens"] for line in evaluation_lines(tmp_path / "run"))
    assert evaluations * EVALUATION - 3 * EVALUATION < spent <= evaluations * EVALUATION
    if method == "evolution":
        assert len(evaluation_lines(tmp_path / "run")) == evaluations


def test_the_first_that_is_evaluated_is_a_good_baseline_on_all_windows(loaded: LoadedModel, tmp_path: Path) -> None:
    table = searched(loaded, tmp_path / "run", evaluations=1)
    (line,) = evaluation_lines(tmp_path / "run")
    assert (line["origin"], line["windows"]) == ("yarn+su", [0, 1, 2])
    assert table.rows[-1] == baseline("yarn+su", loaded.rope.shape, TARGET)
    grown, direct = (searched(loaded, tmp_path / name, evaluations=25) for name in ("run", "direct"))
    assert grown == direct
    assert evaluation_lines(tmp_path / "run") == evaluation_lines(tmp_path / "direct")


@pytest.mark.parametrize("extra", [0, 1, TARGET - 1, TARGET, 5 * TARGET + 7])
@pytest.mark.parametrize("method", ["hybrid", "evolution"])
def test_token_passes_are_never_more_than_allowed(loaded: LoadedModel, tmp_path: Path, method: str, extra: int) -> None:
    limit = EVALUATION + extra
    table = searched(loaded, tmp_path / "run", token_passes=limit, **METHODS[method])
    assert is_best_of(table, tmp_path / "run")
    assert sum(line["tokens"] for line in evaluation_lines(tmp_path / "run")) <= limit


def test_the_smaller_of_two_limits_counts(loaded: LoadedModel, tmp_path: Path) -> None:
    for name, evaluations, passes in (("a", 2, 10**9), ("b", 99, 2 * EVALUATION)):
        searched(loaded, tmp_path / name, method="evolution", evaluations=evaluations, token_passes=passes)
        assert len(evaluation_lines(tmp_path / name)) == 2


@pytest.mark.parametrize("method", METHODS)
def test_hours_that_are_over_at_once_still_give_a_result(loaded: LoadedModel, tmp_path: Path, method: str) -> None:
    table = searched(loaded, tmp_path / "run", hours=1e-9, **METHODS[method])
    assert is_best_of(table, tmp_path / "run")
    assert len(complete(tmp_path / "run")) == 1, "not a task more than a result takes"


@pytest.mark.parametrize("method", ["hybrid", "race"])
@pytest.mark.parametrize("limit", ["evaluations", "token_passes", "hours"])
def test_a_larger_limit_continues_the_same_search(loaded: LoadedModel, tmp_path: Path, method: str, limit: str) -> None:
    unit = {"evaluations": 1, "token_passes": EVALUATION, "hours": 0}[limit]
    smaller, larger = (8 * unit, 30 * unit) if unit else (1e-9, 1.0)
    rest = METHODS[method] | ({"evaluations": 30} if limit == "hours" else {})
    searched(loaded, tmp_path / "grown", **rest, **{limit: smaller})
    before = (tmp_path / "grown" / "evaluations.jsonl").read_bytes()
    assert searched(loaded, tmp_path / "grown", **rest, **{limit: smaller}) is not None, "finished: nothing is done"
    assert (tmp_path / "grown" / "evaluations.jsonl").read_bytes() == before
    grown = searched(loaded, tmp_path / "grown", **rest, **{limit: larger})
    direct = searched(loaded, tmp_path / "direct", **rest, **{limit: larger})
    assert (tmp_path / "grown" / "evaluations.jsonl").read_bytes().startswith(before)
    assert evaluation_lines(tmp_path / "grown") == evaluation_lines(tmp_path / "direct")
    assert grown == direct
    assert (tmp_path / "grown" / "factors.json").read_bytes() == (tmp_path / "direct" / "factors.json").read_bytes()


def test_a_limit_below_one_evaluation_is_refused(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["search", ground / "model", "--to", TARGET, "-d", ground / "texts", "--dtype", "float32", "-q"]
    given = [*command, "--windows", WINDOWS, "--gradient-windows", 0]
    for method in ("hybrid", "evolution"):
        assert refused(*given, "--token-passes", EVALUATION - 1, "--method", method) == (
            "--token-passes: got 575; one evaluation of all search windows takes 576; "
            "give at least 576, or fewer --windows"
        )
        ran = longrope(*given, "--token-passes", EVALUATION, "--method", method, "--out", method)
        assert ran.code == 0, ran.err
        assert is_best_of(FactorTable.load(tmp_path / method / "factors.json"), tmp_path / method)


def test_the_default_evolution_is_the_papers(loaded: LoadedModel, tmp_path: Path) -> None:
    """Start tokens searched, the attention factor that of its authors' code, no race, 1,344 evaluations."""
    searched(loaded, tmp_path / "run", method="evolution", evaluations=80)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    wanted = {"start_tokens": "search", "attention_factor": "su", "race": False, "space": "longrope"}
    assert {key: config["settings"][key] for key in wanted} == wanted
    found = evaluation_lines(tmp_path / "run")
    assert [line["origin"] for line in found[:4]] == ["pi", "ntk", "yarn", "mutation"]
    assert {tuple(line["windows"]) for line in found} == {tuple(range(WINDOWS))}
    assert {line["attention_factor"] for line in found} == {math.sqrt(1 + math.log(4) / math.log(TARGET / 4))}
    assert len({line["start_tokens"] for line in found}) > 5
    assert [line["iteration"] for line in found] == [0] * 64 + [1] * 16
    settings = SearchSettings(to=TARGET, method="evolution")
    assert make_budget(settings, SearchWindows([]), 3).expected == 1344


def test_a_run_whose_hours_are_over_ends_with_the_same_result_when_it_is_killed_while_that_is_measured(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    class Killed(BaseException):
        pass

    def die(self: RunFolder, result: dict[str, Any]) -> None:
        plain(self, result)
        raise Killed

    plain = RunFolder.log_result
    for _ in range(3):  # on its way, and while its result is measured
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "log_result", die)
            with pytest.raises(Killed):
                searched(loaded, run, hours=1e-9)
        before, factors = (run / "evaluations.jsonl").read_bytes(), (run / "factors.json").read_bytes()
    table = searched(loaded, run, hours=1e-9)
    assert (run / "evaluations.jsonl").read_bytes() == before
    assert (run / "factors.json").read_bytes() == factors
    results = json.loads((run / "metrics.json").read_text())["results"]
    (told,) = (result["value"] for result in results if result["method"] == "longrope")
    assert told == pytest.approx(table.provenance["value"], rel=1e-6)
    assert table == FactorTable.load(run / "factors.json")


def test_a_race_costs_at_most_what_algorithm_1_does() -> None:
    windows = SearchWindows([Window("d", "0", 0, np.arange(64))] * 3)
    raced, plain = (
        make_budget(SearchSettings(to=64, method="evolution", race=race), windows, 1) for race in (True, False)
    )
    assert (raced.total, plain.total) == (1344, 1344)
    assert raced.tokens == 1344 * 3 * 64


def test_a_budget_that_ends_before_the_best_seed_is_told_and_goes_on_to_it(tmp_path: Path) -> None:
    command = ["search", "tiny", "--to", "1k", "-d", "stdlib", "--windows", 2, "--threads", 1]
    command += ["--out", tmp_path / "run", "--json"]
    first = longrope(*command, "--evaluations", 1)
    values = {each["method"]: each["value"] for each in first.document["results"]}
    best = min(values, key=values.__getitem__)
    assert best != "longrope"
    told = f"{best} is at {values[best]:.4f} on the search windows, what was found at {values['longrope']:.4f}"
    assert told in first.err
    more = longrope(*command, "--evaluations", 12)
    values = {each["method"]: each["value"] for each in more.document["results"]}
    assert min(values.values()) > 0.999 * values["longrope"]
    assert "on the search windows, what was found" not in more.err
