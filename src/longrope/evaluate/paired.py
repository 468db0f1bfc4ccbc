"""Paired differences of two methods on the same items: what the items have in common does not blur them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from longrope.evaluate.measures import Record

Vector = NDArray[np.float64]

_RESAMPLES = 5000


@dataclass(frozen=True)
class Difference:
    """A difference with its paired 95% interval; not a number where a value is not finite."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.2f}% ({100 * self.low:+.2f} to {100 * self.high:+.2f})"


def perplexity_difference(
    ours: ArrayLike, theirs: ArrayLike, counts: ArrayLike, documents: Sequence[str], *, seed: int = 0
) -> Difference:
    """Relative difference in perplexity, ours / theirs - 1, of summed losses (N,) in nats over the same `counts` (N,).

    It is exp of the difference in mean loss, less 1. Resampled are documents, whose windows are not independent;
    windows where there is one document.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    counted = np.asarray(counts, dtype=np.float64)
    several = len(set(documents)) > 1
    units = np.unique(np.asarray(documents), return_inverse=True)[1] if several else np.arange(len(gaps))
    return _bootstrap(gaps, counted, units, seed, np.expm1)


def share_difference(ours: ArrayLike, theirs: ArrayLike, *, seed: int = 0) -> Difference:
    """Difference of two shares, ours - theirs, of what was found or scored (N,) on the same items.

    Resampled are items.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return _bootstrap(gaps, np.ones_like(gaps), np.arange(len(gaps)), seed, np.asarray)


def records_difference(ours: Sequence[Record], theirs: Sequence[Record], *, seed: int = 0) -> Difference:
    """Of the records of two methods on the same items: of perplexity, else of the share found."""
    if "count" in ours[0]:
        mine, others = ([_number(each["loss"]) for each in records] for records in (ours, theirs))
        counts, documents = [each["count"] for each in ours], [each["document"] for each in ours]
        assert counts == [each["count"] for each in theirs], "the same items"
        return perplexity_difference(mine, others, counts, documents, seed=seed)
    return share_difference([each["found"] for each in ours], [each["found"] for each in theirs], seed=seed)


def _bootstrap(
    gaps: Vector, counts: Vector, units: NDArray[np.int64], seed: int, scale: Callable[[Vector], Vector]
) -> Difference:
    """The mean gap a count on a scale, with its 95% percentile bootstrap over units."""
    if not np.isfinite(gaps).all():
        return Difference(math.nan, math.nan, math.nan)
    summed, counted = np.bincount(units, weights=gaps), np.bincount(units, weights=counts)
    draws = np.random.default_rng(seed).integers(len(summed), size=(_RESAMPLES, len(summed)))
    low, high = np.quantile(scale(summed[draws].sum(1) / counted[draws].sum(1)), [0.025, 0.975])
    return Difference(float(scale(gaps.sum() / counts.sum())), float(low), float(high))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
