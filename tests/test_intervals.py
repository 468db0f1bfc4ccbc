"""Intervals hold what they say: closed forms, and how often they hold the truth in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.evaluate.intervals import (
    effective_tries,
    mean_interval,
    paired_share_interval,
    share_interval,
    student_t,
)

SIMULATIONS = 4000


def test_students_quantiles() -> None:
    """One and two degrees of freedom have closed forms; beyond the table the expansion goes on from it."""
    assert student_t(1) == pytest.approx(math.tan(math.pi * 0.475), abs=1e-3)
    assert student_t(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), abs=1e-4)
    assert student_t(31) == pytest.approx(2.0395, abs=1e-4)
    assert student_t(120) == pytest.approx(1.9799, abs=1e-4)
    assert student_t(10**9) == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize("documents", [2, 3, 5, 8, 30])
def test_an_interval_over_documents_holds_the_mean_as_often_as_it_says(documents: int) -> None:
    """Each document has its own mean and two windows, which have it in common."""
    rng = np.random.default_rng(documents)
    units = [str(index // 2) for index in range(2 * documents)]
    held = 0
    for _ in range(SIMULATIONS):
        means = np.repeat(rng.normal(2.0, 0.3, documents), 2) + rng.normal(0, 0.05, 2 * documents)
        interval = mean_interval(100 * means, np.full(2 * documents, 100.0), units)
        assert interval is not None
        held += interval[0] <= 2.0 <= interval[1]
    assert held / SIMULATIONS == pytest.approx(0.95, abs=0.012)


def test_an_interval_of_one_document_and_of_what_is_not_finite_is_none() -> None:
    assert mean_interval(np.array([1.0, 2.0]), np.array([1.0, 1.0]), ["a", "a"]) is None
    assert mean_interval(np.array([1.0, math.nan]), np.array([1.0, 1.0]), ["a", "b"]) is None


@given(st.integers(1, 200).flatmap(lambda tries: st.tuples(st.integers(0, tries), st.just(tries))))
def test_a_shares_interval_solves_wilsons_equation_and_mirrors(drawn: tuple[int, int]) -> None:
    found, tries = drawn
    share = found / tries
    low, high = share_interval(share, tries)
    for end in (low, high):
        if 0 < end < 1:
            assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / tries, rel=1e-6, abs=1e-12)
    assert share_interval(1 - share, tries) == pytest.approx((1 - high, 1 - low))


def test_all_or_nothing_found_is_no_point() -> None:
    square = 1.959964**2
    assert share_interval(1.0, 10) == pytest.approx((10 / (10 + square), 1.0))
    assert share_interval(0.0, 10) == pytest.approx((0.0, square / (10 + square)))


@pytest.mark.parametrize(("more", "less", "tries"), [(0.3, 0.1, 10), (0.5, 0.0, 20), (0.05, 0.05, 30), (0.2, 0.1, 200)])
def test_a_paired_difference_of_shares_holds_the_truth_as_often_as_it_says(
    more: float, less: float, tries: int
) -> None:
    rng = np.random.default_rng(tries)
    drawn = rng.multinomial(tries, [more, less, 1 - more - less], SIMULATIONS)
    held = 0
    for better, worse, _ in drawn:
        low, high = paired_share_interval(better / tries, worse / tries, tries)
        held += low <= more - less <= high
    assert held / SIMULATIONS > 0.93, "shares of few tries are a coarse grid"


def test_groups_of_unequal_size_tell_as_much_as_the_small_ones() -> None:
    assert effective_tries([20, 20, 20]) == pytest.approx(60)
    assert effective_tries([3, 1000]) < 13
