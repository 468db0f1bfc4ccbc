"""LongRoPE2's space: its critical pairs by the paper's table, its members, its operators and its coordinates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from longrope.baselines import RopeShape, Vector, ntk, yarn
from longrope.errors import UserError
from longrope.factors import RopeFactors
from longrope.search.critical import LongRope2
from longrope.search.space import STEP, Chart, LongRope, Space, check_seed, isotonic

SHAPE = RopeShape(500.0, 32, 256)  # 16 pairs, of which 4 .. 10 may be critical
SPACES = [LongRope2(SHAPE, 8.0), LongRope2(SHAPE, 21 + 1 / 3), LongRope2(SHAPE, 12.0)]
PAIRS = SHAPE.pairs


@pytest.mark.parametrize(
    ("shape", "first", "last"),
    [
        # d, b and L of the paper's table 1, with its d_tcd / 2 and the pair of ten turns.
        (RopeShape(1e4, 96, 2048), 19, 31),  # Phi3-mini
        (RopeShape(5e5, 128, 8192), 24, 35),  # LLaMA3-8B
        (RopeShape(1e4, 128, 4096), 30, 46),  # LLaMA2-7B
        (RopeShape(1e4, 128, 2048), 25, 41),
        (RopeShape(1e4, 128, 8192), 34, 50),
    ],
)
def test_critical_pairs_are_those_of_the_papers_models(shape: RopeShape, first: int, last: int) -> None:
    pairs = LongRope2(shape, 16.0).critical_pairs
    assert pairs == tuple(range(first, last + 1))
    turns = shape.original_length / shape.periods
    assert turns[first - 1] > 10 >= turns[first]
    assert turns[last - 1] > 1 >= turns[last]


def test_critical_pairs_stay_within_the_pairs_there_are() -> None:
    assert LongRope2(RopeShape(1e4, 8, 10**9), 2.0).critical_pairs == (3,)  # every pair turns more than once
    assert LongRope2(RopeShape(1e4, 8, 40), 2.0).critical_pairs == (1,)  # no pair turns ten times
    assert LongRope2(RopeShape(1e4, 2, 40), 2.0).critical_pairs == (0,)


def is_member(vector: Vector, space: LongRope2, pair: int) -> bool:
    """By the definition: within [s, 2s] from c on, lambda_c^(i / c) below, non-decreasing, on the grid."""
    index = np.arange(space.pairs)
    low, high = space.ratio, 2 * space.ratio
    return bool(
        np.allclose(vector, np.round(vector, 2), atol=1e-9)
        and (np.diff(vector) >= 0).all()
        and vector[pair] >= low - STEP / 2 - 1e-9
        and vector[-1] <= high + STEP / 2 + 1e-9
        and np.allclose(vector[:pair], vector[pair] ** (index[:pair] / pair), atol=STEP / 2 + 1e-9)
    )


def member(space: LongRope2, pair: int, above: Vector) -> Vector:
    """The member that has these factors (in [0, 1] of what is allowed) from a critical pair on."""
    tail = np.round(space.low * (1 + np.sort(above)[pair:]), 2)
    head = tail[0] ** (np.arange(pair) / pair)
    return np.round(np.concatenate([head, tail]), 2)


spaces = st.sampled_from(SPACES)
critical = st.sampled_from(SPACES[0].critical_pairs)
shares = arrays(np.float64, PAIRS, elements=st.floats(0, 1))
anything = arrays(np.float64, PAIRS, elements=st.floats(0.01, 200))


@given(spaces, critical, shares)
@settings(deadline=None)
def test_a_member_stays_as_it_is_and_its_critical_pair_is_found_again(
    space: LongRope2, pair: int, above: Vector
) -> None:
    vector = member(space, pair, above)
    assert is_member(vector, space, pair), "or the test is wrong"
    assert (space.repair(vector) == vector).all()
    found = space.critical_pair(vector)
    assert found <= pair
    assert is_member(vector, space, found), "one that fits as well"
    assert space.holds(RopeFactors(up_to=512, rescale=tuple(vector)))


@pytest.mark.parametrize("pair", SPACES[0].critical_pairs)
def test_the_critical_pair_of_a_step_is_its_own(pair: int) -> None:
    space = SPACES[0]
    assert space.critical_pair(member(space, pair, np.zeros(PAIRS))) == pair  # s itself: below is less


@given(spaces, anything)
@settings(deadline=None)
def test_repair_gives_a_member_and_leaves_it_alone(space: LongRope2, vector: Vector) -> None:
    repaired = space.repair(vector)
    assert is_member(repaired, space, space.critical_pair(repaired))
    assert (space.repair(repaired) == repaired).all()


@given(spaces, critical, critical, shares, shares, st.integers(0, 2**32))
@settings(deadline=None)
def test_operators_end_in_members(
    space: LongRope2, first: int, second: int, above: Vector, others: Vector, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mother, father = member(space, first, above), member(space, second, others)
    mutant = space.mutate(rng, mother, 0.3)
    assert is_member(mutant, space, space.critical_pair(mutant))
    assert abs(space.critical_pair(space.mutate(rng, mother, 0.0)) - space.critical_pair(mother)) == 0
    child = space.crossover(rng, mother, father)
    assert is_member(child, space, space.critical_pair(mother))


def test_a_mutation_without_a_chance_changes_nothing_and_one_with_it_moves_the_critical_pair_by_one() -> None:
    space, rng = SPACES[0], np.random.default_rng(0)
    pairs = space.critical_pairs
    for pair in pairs:
        parent = member(space, pair, np.linspace(0, 0.05, PAIRS))
        assert (space.mutate(rng, parent, 0.0) == parent).all()
        moved = {space.critical_pair(space.mutate(rng, parent, 1.0)) - pair for _ in range(60)}
        assert moved <= {-1, 0, 1}
        assert (1 in moved, -1 in moved) == (pair < pairs[-1], pair > pairs[0])


def test_a_crossover_takes_every_factor_from_the_critical_pair_on_from_one_of_the_parents() -> None:
    space, rng = SPACES[0], np.random.default_rng(0)
    first, last = space.critical_pairs[0], space.critical_pairs[-1]
    low, high = member(space, last, np.full(PAIRS, 0.25)), member(space, first, np.full(PAIRS, 0.75))
    seen = [space.crossover(rng, low, high) for _ in range(200)]
    assert {value for child in seen for value in child[last:]} == {10.0, 14.0}
    # Of the father's share of the factors that count: sorting brings none from below the critical pair.
    share = np.mean([(child[last:] == 14.0).mean() for child in seen])
    assert 0.4 < share < 0.6
    seen = [space.crossover(rng, high, low) for _ in range(200)]
    assert {value for child in seen for value in child[last:]} == {10.0, 14.0}
    for child in seen:
        assert is_member(child, space, first)


def test_openings_have_every_critical_pair_with_the_ratio_and_with_a_whole_factor_up_to_twice_it() -> None:
    for space in SPACES:
        drawn: dict[int, set[float]] = {}
        for seed in range(200):
            openings = dict(space.openings(np.random.default_rng(seed)))
            assert len(openings) == 2 * len(space.critical_pairs)
            for pair in space.critical_pairs:
                for name in (f"ntk-{pair}", f"drawn-{pair}"):
                    assert is_member(openings[name], space, pair)
                    assert len(set(openings[name][pair:])) == 1
                assert openings[f"ntk-{pair}"][-1] == pytest.approx(space.ratio, abs=STEP / 2)
                drawn.setdefault(pair, set()).add(openings[f"drawn-{pair}"][-1])
        low, high = math.ceil(space.low), math.floor(space.high)
        assert all(found == {float(each) for each in range(low, high + 1)} for found in drawn.values())


def test_others_than_members_are_refused() -> None:
    space = SPACES[0]
    pair = space.critical_pairs[2]
    vector = member(space, pair, np.full(PAIRS, 0.5))

    def holds(changed: Vector) -> bool:
        return space.holds(RopeFactors(up_to=512, rescale=tuple(changed)))

    assert holds(vector)
    assert holds(vector + np.where(np.arange(PAIRS) == PAIRS - 1, 0.004, 0)), "rounded otherwise"
    assert not holds(vector[:-1])
    assert not holds(vector * 2)  # above 2s
    assert not holds(np.full(PAIRS, 8.0))  # position interpolation: not NTK below
    assert not holds(np.ones(PAIRS))
    assert not holds(yarn(SHAPE, 8.0))
    assert not holds(ntk(SHAPE, 8.0))  # less than s from c on
    below = vector.copy()
    below[1] += 0.1
    assert not holds(below)
    falling = vector.copy()
    falling[-1] -= 1
    assert not holds(falling)
    with pytest.raises(UserError, match=r"^--init: got pi with 16 rescale factors from 8 to 8; a seed has"):
        check_seed(space, RopeFactors(up_to=512, rescale=(8.0,) * PAIRS), "pi")


# Coordinates


def charts() -> list[tuple[Space, Vector]]:
    rng = np.random.default_rng(0)
    found: list[tuple[Space, Vector]] = [(LongRope(PAIRS, 8.0), np.sort(rng.uniform(1, 10, PAIRS)).round(2))]
    return found + [
        (space, member(space, pair, rng.random(PAIRS))) for space in SPACES for pair in space.critical_pairs
    ]


@pytest.mark.parametrize(("space", "vector"), charts())
def test_the_coordinates_of_a_member_give_it_back(space: Space, vector: Vector) -> None:
    chart = space.chart(vector)
    back = chart.vector(chart.coordinates(vector))
    assert np.allclose(back, vector, atol=STEP / 2 + 1e-9), "up to the rounding of factors below the critical pair"
    assert (space.repair(back) == vector).all()


@pytest.mark.parametrize(("space", "vector"), charts())
def test_the_matrix_of_a_chart_is_the_derivative_of_log_lambda(space: Space, vector: Vector) -> None:
    chart = space.chart(vector)
    x, step = chart.coordinates(vector), 1e-6
    for index in range(len(x)):
        by = step * (np.arange(len(x)) == index)
        slope = (np.log(chart.vector(x + by)) - np.log(chart.vector(x - by))) / (2 * step)
        assert np.allclose(slope, chart.matrix[:, index], atol=1e-8)


@given(
    st.sampled_from([chart[0].chart(chart[1]) for chart in charts()]),
    arrays(np.float64, PAIRS, elements=st.floats(-10, 10)),
)
@settings(deadline=None)
def test_projected_coordinates_give_factors_in_the_bounds_that_ascend(chart: Chart, wild: Vector) -> None:
    x = chart.project(wild[chart.first :])
    assert (np.diff(x) >= 0).all()
    assert (x >= math.log(chart.low)).all()
    assert (x <= math.log(chart.high)).all()
    vector = chart.vector(x)
    assert (np.diff(vector) >= -1e-9).all()
    assert (vector >= 1).all()
    assert (vector[chart.first :] >= chart.low - 1e-9).all()
    assert (vector <= chart.high + 1e-9).all()


values = arrays(np.float64, st.integers(1, 9), elements=st.floats(-3, 3))


@given(values)
@settings(deadline=None)
def test_isotonic_is_the_min_max_formula(given_values: Vector) -> None:
    """Of isotonic regression: max over a <= i of min over b >= i of the mean of a .. b."""
    count = len(given_values)
    wanted = [
        max(min(given_values[a : b + 1].mean() for b in range(i, count)) for a in range(i + 1)) for i in range(count)
    ]
    assert np.allclose(isotonic(given_values), wanted, atol=1e-12)


@given(values)
@settings(deadline=None)
def test_a_projection_is_the_nearest_point(wild: Vector) -> None:
    """p is the nearest of a convex set when (x - p)(q - p) <= 0 at its corners q: the steps from low to high."""
    chart = Chart(np.eye(len(wild)), 0, 1.5, 4.0)
    p, low, high = chart.project(wild), math.log(1.5), math.log(4.0)
    for start in range(len(wild) + 1):
        corner = np.where(np.arange(len(wild)) < start, low, high)
        assert (wild - p) @ (corner - p) <= 1e-9
