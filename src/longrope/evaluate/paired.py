"""Paired differences of two methods on the same items: what the items have in common does not blur them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from longrope.evaluate.intervals import effective_tries, mean_interval, paired_share_interval

if TYPE_CHECKING:
    from longrope.evaluate.measures import Record


@dataclass(frozen=True)
class Difference:
    """A difference with its paired 95% interval.

    Not a number where a value is not finite; nor is the interval of perplexities where there is one item.
    """

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{100 * self.value:+.2f}% ({100 * self.low:+.2f} to {100 * self.high:+.2f})"


def perplexity_difference(
    ours: ArrayLike, theirs: ArrayLike, counts: ArrayLike, documents: Sequence[str]
) -> Difference:
    """Relative difference in perplexity, ours / theirs - 1, of summed losses (N,) in nats over the same `counts` (N,).

    It is exp of the difference in mean loss, less 1. Independent are documents; windows where there is one document.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if not np.isfinite(gaps).all():
        return Difference(math.nan, math.nan, math.nan)
    counted = np.asarray(counts, dtype=np.float64)
    units = documents if len(set(documents)) > 1 else [str(index) for index in range(len(gaps))]
    low, high = mean_interval(gaps, counted, units) or (math.nan, math.nan)
    return Difference(*(math.expm1(min(each, 700.0)) for each in (gaps.sum() / counted.sum(), low, high)))


def share_difference(ours: ArrayLike, theirs: ArrayLike, groups: Sequence[str] | None = None) -> Difference:
    """Difference of two shares or mean scores between 0 and 1, ours - theirs, on the same items (N,).

    groups: the task of each item; then it is of means over tasks.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if not np.isfinite(gaps).all():
        return Difference(math.nan, math.nan, math.nan)
    of = np.zeros(len(gaps), dtype=np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(of)
    better, worse = (float(np.mean(np.bincount(of, weights=np.maximum(sign * gaps, 0)) / sizes)) for sign in (1, -1))
    return Difference(better - worse, *paired_share_interval(better, worse, effective_tries(sizes.tolist())))


def records_difference(ours: Sequence[Record], theirs: Sequence[Record]) -> Difference:
    """Of the records of two methods on the same items: relative in perplexity, else of what was found or scored."""
    if "count" in ours[0]:
        mine, others = ([_number(each["loss"]) for each in records] for records in (ours, theirs))
        counts, documents = [each["count"] for each in ours], [each["document"] for each in ours]
        assert counts == [each["count"] for each in theirs], "the same items"
        return perplexity_difference(mine, others, counts, documents)
    if "score" in ours[0]:
        tasks = [each["task"] for each in ours]
        return share_difference([each["score"] for each in ours], [each["score"] for each in theirs], tasks)
    return share_difference([each["found"] for each in ours], [each["found"] for each in theirs])


def against_best(
    values: Mapping[str, float], records: Mapping[str, Sequence[Record]], *, lower: bool
) -> dict[str, tuple[str, Difference]]:
    """The best method and the difference from it, of every other method that has a value; items are the same for all.

    values, records: by method. lower: the lowest value is the best.
    """
    finite = {method: value for method, value in values.items() if math.isfinite(value)}
    if not finite:
        return {}
    best = (min if lower else max)(finite, key=lambda method: finite[method])
    others = [method for method in finite if method != best]
    return {method: (best, records_difference(records[method], records[best])) for method in others}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
