"""Paired differences: closed forms, the benchmark's own published numbers, and what pairing is for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope.evaluate.intervals import paired_share_interval
from longrope.evaluate.paired import (
    Difference,
    against_best,
    perplexity_difference,
    records_difference,
    share_difference,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "search"
RNG = np.random.default_rng(0)
LOSSES, COUNTS = RNG.normal(300, 40, 30), np.full(30, 100)
DOCUMENTS = [str(index // 2) for index in range(30)]


def test_equal_inputs_differ_by_nothing() -> None:
    assert perplexity_difference(LOSSES, LOSSES, COUNTS, DOCUMENTS) == Difference(0.0, 0.0, 0.0)
    same = share_difference([True, False, True], [True, False, True])
    assert same.value == 0.0
    assert same.low == -same.high, "three tries tell little"
    assert same.high > 0.3


@pytest.mark.parametrize("documents", [DOCUMENTS, ["one"] * 30])
def test_a_constant_shift_a_token_is_a_factor_without_spread(documents: list[str]) -> None:
    """However much windows differ from one another: ours is 5% more perplexed in each."""
    found = perplexity_difference(LOSSES + COUNTS * math.log(1.05), LOSSES, COUNTS, documents)
    assert (found.value, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05), abs=1e-9)


def test_tokens_weigh_the_difference() -> None:
    found = perplexity_difference([10.0, 30.0], [9.0, 30.0], [10, 30], ["a", "b"])
    assert found.value == pytest.approx(math.exp(1 / 40) - 1)
    # Gaps of 1 and 0 where 10/40 and 30/40 are the mean's: both are 3/4 off, and t of one degree is 12.7.
    half = 12.7062 * math.sqrt(2 * 2 * 0.75**2) / 40
    assert (found.low, found.high) == pytest.approx(tuple(np.expm1([1 / 40 - half, 1 / 40 + half])))


def test_an_interval_over_documents_is_that_of_the_central_limit() -> None:
    gaps = np.random.default_rng(1).normal(0.01, 0.02, 400)
    found = perplexity_difference(300 + 100 * gaps, np.full(400, 300.0), np.full(400, 100), [*map(str, range(400))])
    half = 1.96 * gaps.std() / 20
    expected = np.expm1([gaps.mean() - half, gaps.mean() + half])
    assert (found.low, found.high) == pytest.approx(expected, abs=0.15 * half)


def test_windows_of_one_document_are_resampled_together() -> None:
    shifts = np.tile([10.0, -10.0], 15)  # every document has one of each
    found = perplexity_difference(LOSSES + shifts, LOSSES, COUNTS, DOCUMENTS)
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)
    alone = perplexity_difference(LOSSES + shifts, LOSSES, COUNTS, [*map(str, range(30))])
    assert alone.low < -0.01 < 0.01 < alone.high


def test_shares_differ_by_what_is_found_more_with_the_spread_of_the_items_that_changed() -> None:
    ours, theirs = [True] * 70 + [False] * 30, [True] * 50 + [False] * 50
    found = share_difference(ours, theirs)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 100)  # the central limit
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.02)


def test_a_value_that_is_not_finite_has_no_difference() -> None:
    found = perplexity_difference([math.nan, 1.0], [1.0, 1.0], [1, 1], ["a", "b"])
    assert all(math.isnan(value) for value in (found.value, found.low, found.high))


def test_one_item_tells_nothing_apart() -> None:
    one = perplexity_difference([11.0], [10.0], [10], ["a"])
    assert one.value > 0
    assert math.isnan(one.low)
    found = share_difference([True], [False])
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low < 0
    assert not one.is_clear
    assert not found.is_clear


def test_ten_found_and_ten_lost_are_clear() -> None:
    assert share_difference([True] * 10, [False] * 10).is_clear
    assert not share_difference([True] * 10, [True] * 8 + [False] * 2).is_clear


def test_scores_are_means_over_tasks() -> None:
    tasks = ["a"] * 3 + ["b"] * 1000
    gaps = np.r_[[0.5] * 3, np.tile([0.0, 0.2], 500)]
    found = share_difference(gaps, np.zeros(1003), tasks)
    assert found.value == pytest.approx((0.5 + 0.1) / 2)
    few = 4 / (1 / 3 + 1 / 1000)
    assert (found.low, found.high) == pytest.approx(paired_share_interval(0.3, 0.0, few)), "the three of a task decide"


def test_the_best_is_what_the_others_are_held_against() -> None:
    records = {
        name: [{"loss": 10.0 + gap, "count": 10, "document": document} for document in "ab"]
        for name, gap in (("low", 0.0), ("high", 1.0), ("broken", math.inf))
    }
    values = {"low": math.e, "high": math.exp(1.1), "broken": math.inf}
    lowest = against_best(values, records, lower=True)
    assert {name: best for name, (best, _) in lowest.items()} == {"high": "low"}
    assert lowest["high"][1].value == pytest.approx(math.expm1(0.1))
    assert {name: best for name, (best, _) in against_best(values, records, lower=False).items()} == {"low": "high"}
    assert against_best({"broken": math.nan}, records, lower=True) == {}


def test_records_of_perplexity_and_of_retrieval() -> None:
    ours: list[dict[str, Any]] = [
        {"loss": 11.0, "count": 10, "document": "a"},
        {"loss": 30.0, "count": 30, "document": "b"},
    ]
    theirs = [{**record, "loss": record["loss"] - 1} for record in ours]
    assert records_difference(ours, theirs).value == pytest.approx(math.exp(2 / 40) - 1)
    assert math.isnan(records_difference([{**ours[0], "loss": None}, ours[1]], theirs).value)
    keys = [{"depth": 0.1, "found": True}, {"depth": 0.5, "found": False}]
    assert records_difference(keys, keys[::-1]).value == 0
    assert records_difference(keys, [{**key, "found": False} for key in keys]).value == 0.5


def test_the_numbers_of_the_search_benchmark_stay_as_they_were_published() -> None:
    cells = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("tiny-8x-*-seed0.json")}
    published = json.loads((RESULTS / "summary.json").read_text())["rows"]
    [row] = [
        row for row in published if (row["model"], row["ratio"], row["method"], row["seed"]) == ("tiny", 8, "hybrid", 0)
    ]
    ours, first = cells["tiny-8x-hybrid-seed0"], cells["tiny-8x-evolution-seed0"]
    losses = ours["unseen"]["losses"], first["unseen"]["losses"]
    found = perplexity_difference(*losses, ours["unseen"]["counts"], ours["windows"]["unseen"]["documents"])
    assert vars(found) == row["against algorithm 1"]
    assert str(Difference(-0.01234, -0.02, 0.5)) == "-1.23% (-2.00 to +50.00)"
