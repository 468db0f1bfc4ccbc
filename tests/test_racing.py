"""Races find what evaluating everything would find, and ask for less."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from longrope.factors import RopeFactors
from longrope.search.archive import Archive
from longrope.search.evolution import Candidate, Evolution, EvolutionSettings
from longrope.search.racing import (
    RaceSettings,
    evolve,
    paired_spread,
    race_to_be_best,
    race_to_be_parent,
    race_to_beat,
)
from longrope.search.space import LongRope
from longrope.search.tasks import Outcome, Task
from stepping import Answer, Asked, follow, losses

COUNT = 100  # scored tokens of a window


def candidate(number: int) -> Candidate:
    return Candidate(RopeFactors(up_to=512, rescale=(1.0 + number / 100,)), "test", 0)


def index_of(factors: RopeFactors) -> int:
    return round((factors.rescale[0] - 1) * 100)


def by_table(table: np.ndarray) -> Answer:
    """Losses (K, N) of candidate number k on each window."""
    return lambda task: losses(*(float(table[index_of(task.factors), window]) for window in task.windows))


def full_values(table: np.ndarray, counts: Sequence[int]) -> list[float]:
    """What evaluating every candidate on every window gives; what failed is infinite."""
    return [math.exp(row.sum() / sum(counts)) if np.isfinite(row).all() else math.inf for row in table]


tables = st.tuples(st.integers(1, 7), st.integers(1, 5)).flatmap(
    lambda shape: arrays(
        np.float64, shape, elements=st.one_of(st.floats(0, 50), st.integers(0, 3).map(float), st.just(math.nan))
    )
)


@given(tables, st.integers(1, 2))
@settings(deadline=None)
def test_a_race_to_be_best_finds_the_best_that_evaluating_all_would(table: np.ndarray, keep: int) -> None:
    counts = [COUNT] * table.shape[1]
    archive, asked = Archive(counts), Asked()
    runners = [candidate(number) for number in range(len(table))]
    follow(race_to_be_best(runners, archive, keep), archive, by_table(table), asked)
    wanted = sorted(value for value in full_values(table, counts) if value < math.inf)[:keep]
    assert [value for value, _ in sorted(archive.complete(), key=lambda pair: pair[0])][:keep] == pytest.approx(wanted)
    if wanted:
        assert archive.best is not None
        assert archive.best[0] == pytest.approx(full_values(table, counts)[index_of(archive.best[1])])
    else:
        assert archive.best is None
    for each in runners:
        tried = asked.windows_of(each.factors.key)
        assert sorted(set(tried)) == sorted(tried), "no window twice"


@pytest.mark.parametrize(("keep", "bound"), [(1, 8.0), (2, 12.0)])
def test_a_race_to_be_best_asks_for_fewer_windows_when_losses_differ(keep: int, bound: float) -> None:
    table = np.outer([4.0, 1.0, 3.0, 9.0, 1.5], np.ones(8))
    archive, asked = Archive([COUNT] * 8), Asked()
    runners = [candidate(number) for number in range(5)]
    follow(race_to_be_best(runners, archive, keep), archive, by_table(table), asked)
    # Dropped as soon as windows of its own cost as much as all eight of the keep-th best.
    wanted = {number: math.ceil(bound / loss) for number, loss in enumerate(table[:, 0]) if 8 * loss > bound}
    wanted |= {0: 8, 1: 8} | ({4: 8} if keep == 2 else {})  # the first runs whole whatever it is worth
    assert {number: len(asked.windows_of(candidate(number).factors.key)) for number in range(5)} == wanted
    assert asked.windows == sum(wanted.values()) < 40


def test_the_first_candidate_of_a_race_to_be_best_is_complete_before_any_other_begins() -> None:
    table, archive, asked = np.ones((3, 4)), Archive([COUNT] * 4), Asked()
    follow(race_to_be_best([candidate(number) for number in range(3)], archive), archive, by_table(table), asked)
    assert [each.task for each in asked.rounds[0]] == [Task(candidate(0).factors, (0, 1, 2, 3))]


def with_parents(table: np.ndarray, parents: int, seed: int = 0) -> tuple[Evolution, Archive]:
    """An evolution that was told the first rows of a table of losses, and wants `parents` of them."""
    archive = Archive([COUNT] * table.shape[1])
    evolution = Evolution(
        LongRope(1, 8.0), [], EvolutionSettings(parents=parents, iterations=3), np.random.default_rng(seed)
    )
    told = [candidate(number) for number in range(parents)]
    for each in told:
        archive.add(Task(each.factors, archive.everything), by_table(table)(Task(each.factors, archive.everything)))
    evolution.tell([(each, archive.value(each.factors) or math.nan) for each in told])
    return evolution, archive


def raced(
    table: np.ndarray, parents: int, seed: int = 0, race: RaceSettings | None = None
) -> tuple[list[float], Asked, list[Candidate], Archive]:
    """A race of the rows of a table after its first `parents`, which are the parents."""
    evolution, archive = with_parents(table, parents, seed)
    children, asked = [candidate(number) for number in range(parents, len(table))], Asked()
    steps = race_to_be_parent(children, archive, evolution, race or RaceSettings())
    return follow(steps, archive, by_table(table), asked), asked, children, archive


NOISE = np.random.default_rng(3).normal(0, 4, size=(12, 8))
"""Of losses of about 200 nats a window: 0.04 a token."""


def test_a_child_that_is_clearly_worse_is_dropped_after_one_window() -> None:
    table = 200 + NOISE
    table[10] += 60
    table[11] -= 40
    values, asked, children, archive = raced(table, 10)
    assert [len(asked.windows_of(each.factors.key)) for each in children] == [1, 8]
    assert math.isnan(values[0])
    assert values[1] == pytest.approx(full_values(table, archive.counts.tolist())[11])
    assert archive.value(children[0].factors) is None


@pytest.mark.parametrize("seed", range(5))
def test_survivors_are_complete_and_parents_of_the_next_generation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    own = np.concatenate([rng.normal(-4, 1, (8, 1)), rng.normal(-3, 4, (32, 1))])
    table = 200 + own + rng.normal(0, 20, (1, 8)) + rng.normal(0, 1, (40, 8))
    values, asked, children, archive = raced(table, 8, seed)
    everything = full_values(table, archive.counts.tolist())
    complete = {index_of(each.factors) for each in children if len(asked.windows_of(each.factors.key)) == 8}
    last = sorted(everything[:8] + [everything[number] for number in complete])[7]
    for each, value in zip(children, values, strict=True):
        number = index_of(each.factors)
        survives = number in complete and everything[number] <= last
        assert math.isnan(value) != survives, "told are those, and only those, that become parents"
        if survives:
            assert value == pytest.approx(everything[number])
    wanted = {number for number in range(8, 40) if everything[number] <= sorted(everything)[7]}
    found = {index_of(each.factors) for each, value in zip(children, values, strict=True) if not math.isnan(value)}
    assert len(found & wanted) >= 0.6 * len(wanted) > 0
    assert min(wanted, key=lambda number: everything[number]) in found
    assert asked.windows < 0.5 * 8 * len(children)
    orders = {tuple(asked.windows_of(each.factors.key)) for each in children}
    longest = max(orders, key=len)
    assert all(order == longest[: len(order)] for order in orders), "all on the same windows, in one order"
    assert sorted(longest) == list(range(8))


def test_the_order_of_windows_is_drawn_anew() -> None:
    table = np.full((4, 8), 100.0)
    orders = {tuple(raced(table, 2, seed)[1].windows_of(candidate(2).factors.key)) for seed in range(4)}
    assert len(orders) == 4


@given(arrays(np.float64, 12, elements=st.integers(0, 50_000).map(lambda value: value / 1000)))
@settings(deadline=None)
def test_on_windows_that_are_all_alike_the_decision_is_that_of_all_windows_after_the_first(row: np.ndarray) -> None:
    table = np.outer(row, np.ones(4))
    values, asked, children, archive = raced(table, 4)
    everything, last = full_values(table, archive.counts.tolist()), sorted(row)[3]
    for each, value in zip(children, values, strict=True):
        number = index_of(each.factors)
        if row[number] <= last:
            assert value == everything[number]
        else:
            assert math.isnan(value)
            assert len(asked.windows_of(each.factors.key)) == 1


def test_the_spread_is_that_of_paired_differences_a_token() -> None:
    rng = np.random.default_rng(0)
    window, own = rng.normal(0, 50, 6), rng.normal(0, 5, (3, 6))
    difference = Archive([COUNT] * 6).differences
    assert paired_spread(difference(np.zeros((0, 6)), window)) == 0
    assert paired_spread(difference(window + np.full((3, 1), 7.0), window)) == pytest.approx(0, abs=1e-12)
    wanted = math.sqrt(sum(float(np.var(row, ddof=1)) for row in own) / 3) / COUNT
    assert paired_spread(difference(window + own, window)) == pytest.approx(wanted)


def test_windows_that_are_compared_together_are_one_difference_and_never_in_two_pieces() -> None:
    archive = Archive([100, 5] * 6, [1.0, 20.0] * 6, together=2)
    assert archive.pieces == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert all(len(piece) % 2 == 0 for piece in Archive([COUNT] * 40, together=2).pieces)
    assert [window for piece in Archive([COUNT] * 40, together=2).pieces for window in piece] == list(range(40))
    rng = np.random.default_rng(0)
    losses, others = rng.normal(100, 3, 12), rng.normal(100, 3, 12)
    expected = [(losses[i] + losses[i + 1] - others[i] - others[i + 1]) / 200 for i in range(0, 12, 2)]
    np.testing.assert_allclose(archive.differences(losses, others), expected)
    losses[3] = np.nan
    assert np.isnan(archive.differences(losses, others)).tolist() == [False, True, False, False, False, False]


def test_who_must_be_further_ahead_is_dropped_sooner() -> None:
    table = 200 + np.random.default_rng(1).normal(0, 3, (40, 8))
    asked = [raced(table, 8, race=RaceSettings(ahead))[1].windows for ahead in (-1e9, -2.0, 0.0, 1.0, 1e9)]
    assert asked[0] == 8 * 32
    assert asked[4] == 32
    assert asked == sorted(asked, reverse=True)
    assert len(set(asked)) == 5


def test_a_place_among_the_parents_is_taken_from_candidates_too() -> None:
    table = np.outer([100.0, 101.0, 102.0, 90.0, 91.0, 92.0, 101.5], np.ones(4))
    values, asked, children, _ = raced(table, 3)
    assert [math.isnan(value) for value in values] == [False, False, False, True]
    assert [len(asked.windows_of(each.factors.key)) for each in children] == [4, 4, 4, 1]


def test_nobody_is_raced_before_there_are_enough_parents() -> None:
    table = np.outer([100.0, 100.0, 900.0, 100.0], np.ones(4))
    evolution, archive = with_parents(table, 2)
    object.__setattr__(evolution, "settings", EvolutionSettings(parents=3))
    children, asked = [candidate(2), candidate(3)], Asked()
    values = follow(race_to_be_parent(children, archive, evolution, RaceSettings()), archive, by_table(table), asked)
    assert [len(each) for each in asked.rounds] == [2]
    assert [each.task.windows for each in asked.proposals] == [(0, 1, 2, 3)] * 2
    assert values == pytest.approx(full_values(table, archive.counts.tolist())[2:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_never_wins_nor_stays(bad: float) -> None:
    table = 200 + NOISE
    table[10] -= 50
    table[10, 3] = table[11, :] = bad
    values, asked, children, archive = raced(table, 10)
    assert all(math.isnan(value) for value in values)
    assert len(asked.windows_of(children[1].factors.key)) == 1
    assert archive.best is not None
    assert index_of(archive.best[1]) < 10


def beaten(table: np.ndarray) -> tuple[Asked, Archive]:
    """Rows of a table after the first against the first, which is the best so far."""
    archive, asked = Archive([COUNT] * table.shape[1]), Asked()
    first = Task(candidate(0).factors, archive.everything)
    archive.add(first, by_table(table)(first))
    children = [candidate(number) for number in range(1, len(table))]
    follow(race_to_beat(children, archive), archive, by_table(table), asked)
    return asked, archive


def test_who_lags_behind_the_best_is_dropped_after_two_windows_and_who_leads_is_complete() -> None:
    table = 200 + NOISE[:4]
    table[1] += 50
    table[2] = table[0] - 1
    table[3] -= 50
    asked, archive = beaten(table)
    assert [len(asked.windows_of(candidate(number).factors.key)) for number in (1, 2, 3)] == [2, 8, 8]
    assert archive.best is not None
    assert index_of(archive.best[1]) == 3


@pytest.mark.parametrize("seed", range(3))
def test_a_race_to_beat_drops_by_the_standard_error_of_the_mean_of_what_is_left(seed: int) -> None:
    table = 200 + np.random.default_rng(seed).normal(0, 3, (9, 8))
    asked, _ = beaten(table)
    for number in range(1, 9):
        done = 2
        while done < 8:
            seen = (table[number] - table[0])[:done]
            # The variance of a mean of k of N without replacement: s^2 (1/k - 1/N).
            error = math.sqrt(((seen - seen.mean()) ** 2).sum() / (done - 1) * (1 / done - 1 / 8))
            if seen.mean() > error:
                break
            done += 1
        assert asked.windows_of(candidate(number).factors.key) == list(range(done))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_candidate_that_fails_is_out_of_a_race_to_beat_at_once(bad: float) -> None:
    table = 200 + NOISE[:3]
    table[1, 0] = table[2, 3] = bad
    table[2] -= 50
    asked, archive = beaten(table)
    assert [len(asked.windows_of(candidate(number).factors.key)) for number in (1, 2)] == [1, 4]
    assert archive.best is not None
    assert index_of(archive.best[1]) == 0


def test_with_one_window_every_race_is_the_evaluation() -> None:
    table = np.array([[5.0], [3.0], [9.0], [math.nan]])
    everything = full_values(table, [COUNT])
    archive, asked = Archive([COUNT]), Asked()
    follow(race_to_be_best([candidate(number) for number in range(4)], archive), archive, by_table(table), asked)
    assert asked.windows == 4
    assert archive.best is not None
    assert archive.best[0] == everything[1]
    values, asked, _, _ = raced(table, 1)
    assert values == [*everything[1:3], math.inf]
    assert asked.windows == 3
    asked, archive = beaten(table)
    assert asked.windows == 3
    assert archive.best is not None
    assert index_of(archive.best[1]) == 1


PAIRS = 8
SPACE = LongRope(PAIRS, 8.0, start_tokens=(0, 2, 8))
START = [("pi", RopeFactors(up_to=512, rescale=(8.0,) * PAIRS))]
WINDOWS = tuple(range(8))
HARD = np.random.default_rng(0).uniform(0.7, 1.3, 8)


def bowl(task: Task) -> Outcome:
    """The distance to lambda_i = 1 + i / 2, on windows of which some are harder."""
    distance = float(((task.factors.vector - 1 - np.arange(PAIRS) / 2) ** 2).sum()) + task.factors.start_tokens / 8
    return losses(*(float(COUNT * HARD[window] * (1 + distance / 20)) for window in task.windows))


def an_evolution(seed: int = 0) -> Evolution:
    sizes = EvolutionSettings(population=32, mutations=6, crossovers=6, parents=4, iterations=40)
    return Evolution(SPACE, START, sizes, np.random.default_rng(seed))


def test_without_a_race_an_evolution_asks_what_algorithm_1_does_and_nothing_else() -> None:
    plain, wanted = an_evolution(), []
    while not plain.finished:
        generation = plain.ask()
        wanted.append([each.factors.key for each in generation])
        means = [np.mean(bowl(Task(each.factors, WINDOWS)).losses) / COUNT for each in generation]
        plain.tell([(each, math.exp(mean)) for each, mean in zip(generation, means, strict=True)])
    archive, asked = Archive([COUNT] * 8), Asked()
    follow(evolve(an_evolution(), archive), archive, bowl, asked)
    assert [[each.task.factors.key for each in one] for one in asked.rounds] == wanted
    assert {each.task.windows for each in asked.proposals} == {WINDOWS}


def test_a_raced_evolution_descends_as_far_for_less() -> None:
    found = []
    for race in (None, RaceSettings()):
        archive, asked = Archive([COUNT] * 8), Asked()
        follow(evolve(an_evolution(), archive, race), archive, bowl, asked)
        assert archive.best is not None
        found.append((asked.windows, archive.best[0]))
        wins = Task(archive.best[1], WINDOWS)
        assert archive.best[0] == pytest.approx(math.exp(sum(bowl(wins).losses) / (8 * COUNT))), "on all windows"
    (whole, value), (raced_windows, raced_value) = found
    assert raced_windows < 0.8 * whole
    assert raced_value < 1.01 * value


@pytest.mark.parametrize(("windows", "sizes"), [(1, [1]), (8, [1] * 8), (9, [2] + [1] * 7), (256, [32] * 8)])
def test_windows_are_run_in_eight_pieces_at_most(windows: int, sizes: list[int]) -> None:
    archive = Archive([COUNT] * windows)
    assert [len(piece) for piece in archive.pieces] == sizes
    assert [window for piece in archive.pieces for window in piece] == list(range(windows))


def test_many_windows_are_raced_by_pieces_and_who_lags_is_dropped_after_the_first() -> None:
    table = 200 + np.random.default_rng(3).normal(0, 3, (3, 64))
    table[1] += 50
    table[2] = table[0] - 1
    asked, archive = beaten(table)
    assert [len(asked.windows_of(candidate(number).factors.key)) for number in (1, 2)] == [8, 64]
    assert {len(each.task.windows) for each in asked.proposals} == {8}
    assert archive.best is not None
    assert index_of(archive.best[1]) == 2
