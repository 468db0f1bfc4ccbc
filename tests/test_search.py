"""Algorithm 1: its operators, its bookkeeping, and the run that resumes to the same file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from longrope.baselines import RopeShape, baseline
from longrope.errors import UserError
from longrope.factors import RopeFactors
from longrope.runs import RunFolder
from longrope.search.archive import Archive
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.loop import Budget, Loop, Progress
from longrope.search.racing import evolve
from longrope.search.settings import SearchSettings
from longrope.search.space import START_TOKENS, LongRope, check_seed, mutate_start
from longrope.search.tasks import Outcome, Proposal, Steps, Task

SHAPE = RopeShape(10000.0, 32, 64)
SPACE = LongRope(16, 8.0)


def is_member(vector: np.ndarray, space: LongRope) -> bool:
    on_grid = np.allclose(vector, np.round(vector, 2), atol=1e-12)
    return bool(on_grid and (np.diff(vector) >= 0).all() and vector[0] >= 1 and vector[-1] <= space.high)


def test_the_upper_bound_admits_the_papers_and_its_codes() -> None:
    assert LongRope(16, 8.0).high == 10.0  # 1.25 s
    assert LongRope(16, 4.0).high == 5.0  # 1.25 s = 1 + s
    assert LongRope(16, 2.0).high == 3.0  # 1 + s


vectors = arrays(np.float64, 16, elements=st.floats(-5, 50, allow_nan=False))


@given(vectors)
def test_repair_gives_a_member_and_leaves_a_member_alone(vector: np.ndarray) -> None:
    repaired = SPACE.repair(vector)
    assert is_member(repaired, SPACE)
    assert (SPACE.repair(repaired) == repaired).all()


@given(vectors, vectors, st.integers(0, 2**32))
@settings(deadline=None)
def test_operators_end_in_members(mother: np.ndarray, father: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mother, father = SPACE.repair(mother), SPACE.repair(father)
    assert is_member(SPACE.mutate(rng, mother, 0.3), SPACE)
    assert is_member(SPACE.crossover(rng, mother, father), SPACE)


def test_a_mutation_changes_about_the_share_of_factors_it_is_told_to() -> None:
    rng = np.random.default_rng(0)
    parent = SPACE.repair(np.linspace(1, 8, 16))
    changed = np.mean([(SPACE.mutate(rng, parent, 0.3) != parent).mean() for _ in range(500)])
    assert 0.25 < changed < 0.32  # a draw may round to the old value
    assert (SPACE.mutate(rng, parent, 0.0) == parent).all()


def test_a_crossover_of_ordered_parents_takes_every_factor_from_one_of_them() -> None:
    low, high = np.full(16, 2.0), np.full(16, 3.0)
    child = SPACE.crossover(np.random.default_rng(0), low, high)
    assert set(child) == {2.0, 3.0}


def test_start_tokens_mutate_within_the_papers_list() -> None:
    rng = np.random.default_rng(0)
    drawn = {mutate_start(rng, 0, 1.0, SPACE) for _ in range(1000)}
    assert drawn == set(START_TOKENS)


def seeds() -> list[tuple[str, RopeFactors]]:
    return [(name, baseline(name, SHAPE, 512)) for name in ("pi", "ntk", "yarn")]


def bowl(factors: RopeFactors) -> float:
    """A closed-form objective whose minimum is lambda_i = 1 + i/3, n-hat 8."""
    wanted = 1 + np.arange(16) / 3
    return float(((factors.vector - wanted) ** 2).sum() + abs(factors.start_tokens - 8) / 8 + 1)


def evolution(settings: EvolutionSettings | None = None, seed: int = 0) -> Evolution:
    return Evolution(SPACE, seeds(), settings or EvolutionSettings(), np.random.default_rng(seed))


def run_through(strategy: Evolution) -> list[str]:
    asked = []
    while not strategy.finished:
        generation = strategy.ask()
        asked += [candidate.factors.key for candidate in generation]
        strategy.tell([(candidate, bowl(candidate.factors)) for candidate in generation])
    return asked


def test_the_sizes_are_the_papers_and_halve_from_512k() -> None:
    paper = EvolutionSettings.for_length(256 * 1024)
    assert (paper.population, paper.mutations, paper.crossovers, paper.parents) == (64, 16, 16, 32)
    assert (paper.probability, paper.iterations, paper.evaluations) == (0.3, 40, 1344)
    half = EvolutionSettings.for_length(512 * 1024)
    assert (half.population, half.mutations, half.crossovers, half.parents) == (32, 8, 8, 32)


def test_the_first_population_is_the_seeds_and_their_mutants() -> None:
    first = evolution().ask()
    assert [candidate.origin for candidate in first[:4]] == ["pi", "ntk", "yarn", "mutation"]
    assert len(first) == 64
    for candidate, (_, seed) in zip(first, seeds(), strict=False):
        assert np.allclose(candidate.factors.vector, seed.vector, atol=0.005)


def test_a_whole_search_never_asks_twice_and_descends() -> None:
    strategy = evolution()
    asked = run_through(strategy)
    assert len(asked) == len(set(asked)) == 1344
    assert strategy.best is not None
    start = min(bowl(factors) for _, factors in seeds())
    assert strategy.best[0] < 0.3 * start
    assert strategy.best[1].factors.start_tokens == 8


def test_the_generator_decides_the_search() -> None:
    assert run_through(evolution(seed=1)) == run_through(evolution(seed=1))
    assert run_through(evolution(seed=1)) != run_through(evolution(seed=2))


def test_not_a_number_never_wins_and_never_is_a_parent() -> None:
    strategy = evolution()
    first = strategy.ask()
    strategy.tell([(candidate, math.nan if index % 2 else 1.0 + index) for index, candidate in enumerate(first)])
    assert strategy.best is not None
    assert strategy.best[0] == 1.0
    assert all(math.isfinite(value) for value, _ in strategy.parents)


def test_a_search_of_nothing_but_nan_ends_without_a_winner() -> None:
    strategy = evolution()
    while not strategy.finished:
        strategy.tell([(candidate, math.nan) for candidate in strategy.ask()])
    assert strategy.best is None


def test_a_space_of_few_vectors_is_used_up_without_a_hang() -> None:
    space = LongRope(1, 1.01, start_tokens=(0,))
    seed = RopeFactors(up_to=512, rescale=(1.0,))
    strategy = Evolution(space, [("pi", seed)], EvolutionSettings(), np.random.default_rng(0))
    asked = []
    while not strategy.finished:
        generation = strategy.ask()
        asked += [candidate.factors.key for candidate in generation]
        strategy.tell([(candidate, 1.0) for candidate in generation])
    assert 1 < len(asked) == len(set(asked)) <= 102  # 1.00 .. 2.01


CONFIG = {"command": "search", "settings": {"evaluations": None}}
TOKENS = 512


class ClosedForm:
    """Does tasks by a formula of the factors, on one window of a single scored token; stops after some."""

    count = 1

    def __init__(self, formula: Callable[[RopeFactors], float] = bowl, stop_after: int | None = None) -> None:
        self.formula, self.stop_after, self.done = formula, stop_after, 0

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        for index, task in enumerate(tasks):
            if self.done == self.stop_after:
                raise KeyboardInterrupt
            self.done += 1
            value = self.formula(task.factors)
            yield index, Outcome((math.log(value) if value > 0 else value,), TOKENS, 0.0)

    def __enter__(self) -> ClosedForm:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def search(path: Path, total: int, stop_after: int | None = None) -> tuple[list[dict[str, object]], int]:
    """A search in a run folder; how many candidates were really evaluated. May be cut after some evaluations."""
    workers = ClosedForm(stop_after=stop_after)
    with RunFolder.open(path, CONFIG) as run:
        with contextlib.suppress(KeyboardInterrupt):
            follow(run, workers, total)
        lines = [
            {key: value for key, value in line.items() if key not in ("seconds", "elapsed")}
            for line in run.evaluations()
        ]
    return lines, workers.done


def follow(run: RunFolder, workers: ClosedForm, total: int) -> Archive:
    archive = Archive([1])
    budget = Budget(evaluation=TOKENS, expected=1344, evaluations=total)
    Loop(run, archive, workers, [TOKENS], budget).go(evolve(evolution(), archive))
    return archive


def test_progress_is_told_in_parts_of_an_evaluation_where_tasks_are_parts_of_one(tmp_path: Path) -> None:
    """As the page and the view of a run tell it: 1.5, which is no 2."""
    archive, told = Archive([1]), list[Progress]()
    budget = Budget(evaluation=2 * TOKENS, expected=1344, evaluations=2)
    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        Loop(run, archive, ClosedForm(), [TOKENS], budget).go(evolve(evolution(), archive), told.append)
    assert [each.done for each in told] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_progress_counts_a_task_that_is_asked_for_twice_once(tmp_path: Path) -> None:
    """The limit counts it twice, so that a resumed search ends where one that was not cut does."""
    told = list[Progress]()
    task = Task(RopeFactors(up_to=512, rescale=(1.0,) * 16), (0,))

    def asking() -> Steps[None]:
        for iteration in range(2):
            yield [Proposal(task, "pi", iteration)]

    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        budget = Budget(evaluation=TOKENS, expected=9, evaluations=9)
        loop = Loop(run, Archive([1]), ClosedForm(), [TOKENS], budget)
        loop.go(asking(), told.append)
        assert sum(line["tokens"] for line in run.evaluations()) == TOKENS
    assert (told[-1].done, loop.spent) == (1.0, 2 * TOKENS)


@pytest.mark.parametrize("stop_after", [0, 1, 63, 64, 65, 150])
def test_an_interrupted_search_goes_on_as_if_it_never_was(tmp_path: Path, stop_after: int) -> None:
    whole, _ = search(tmp_path / "whole", 200)
    search(tmp_path / "cut", 200, stop_after)
    resumed, evaluated = search(tmp_path / "cut", 200)
    assert resumed == whole
    assert evaluated == 200 - stop_after


def test_a_half_written_line_costs_one_evaluation_and_nothing_else(tmp_path: Path) -> None:
    whole, _ = search(tmp_path / "whole", 100)
    search(tmp_path / "cut", 100, 70)
    lines = tmp_path / "cut" / "evaluations.jsonl"
    lines.write_bytes(lines.read_bytes()[:-9])
    resumed, evaluated = search(tmp_path / "cut", 100)
    assert (resumed, evaluated) == (whole, 31)


def test_a_larger_budget_continues_the_same_search(tmp_path: Path) -> None:
    whole, _ = search(tmp_path / "whole", 150)
    search(tmp_path / "grown", 40)
    grown, evaluated = search(tmp_path / "grown", 150)
    assert (grown, evaluated) == (whole, 110)


def test_a_failed_evaluation_is_recorded_as_null_and_not_repeated(tmp_path: Path) -> None:
    def broken(factors: RopeFactors) -> float:
        return -math.inf if factors.rescale[0] > 1 else math.nan

    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        assert follow(run, ClosedForm(broken), 64).best is None
        assert [line["value"] for line in run.evaluations()] == [None] * 64
    json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[0])
    _, evaluated = search(tmp_path / "run", 64)
    assert evaluated == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": 64}, "--to: got 64 tokens; the target is longer than the model's original length of 64"),
        ({"method": "magic"}, "--method: got 'magic'; it is one of evolution, gradient, hybrid"),
        ({"objective": "joy"}, "--objective: got 'joy'; it is one of perplexity, needle"),
        ({"space": "deep"}, "--space: got 'deep'; it is one of longrope, longrope2"),
        ({"needle_depth": "end"}, "--needle-depth: got 'end'; it is one of start, spread"),
        ({"race": True}, "--race: got --method hybrid; it is a choice of evolution; hybrid always races"),
        ({"hours": 0.0}, "--hours: got 0.0; it is a number above 0"),
        ({"token_passes": 0}, "--token-passes: got 0; it is at least 1"),
        ({"gradient_windows": -1}, "--gradient-windows: got -1; it is at least 0"),
        (
            {"gradient_windows": 4, "method": "evolution"},
            "--gradient-windows: got --method evolution; it takes no gradients; leave it out",
        ),
        ({"evaluations": 0}, "--evaluations: got 0; it is at least 1"),
        ({"windows": -1}, "--windows: got -1; it is at least 1"),
        ({"start_tokens": "some"}, "--start-tokens: got 'some'; it is a number of tokens below the target, or search"),
        ({"start_tokens": "512"}, "--start-tokens: got '512'"),
        ({"attention_factor": "-1"}, "--attention-factor: got '-1'; it is su, yarn, none, search or a positive number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        SearchSettings(**({"to": 512} | changes)).check(64)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_a_seed_outside_the_bounds_is_refused() -> None:
    with pytest.raises(UserError, match=r"--init: got mine with 16 rescale factors from 1 to 99; a seed has"):
        check_seed(SPACE, RopeFactors(up_to=512, rescale=(1.0,) * 15 + (99.0,)), "mine")
