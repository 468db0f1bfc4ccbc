"""95% intervals in closed form: of a mean over documents, of a share, of a difference of shares on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from longrope.baselines import Vector

_Z = 1.959964
# Student's t, two-sided 95%, by degrees of freedom from 1 on.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def student_t(degrees: int) -> float:
    """The two-sided 95% quantile; beyond 30 degrees of freedom by the first terms of Cornish and Fisher's expansion."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    return _Z + (_Z**3 + _Z) / (4 * degrees) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)


def mean_interval(sums: Vector, counts: Vector, units: Sequence[str]) -> tuple[float, float] | None:
    """Of sum over counts, where items of one unit (a document) are not independent; None with fewer than two units.

    Student's interval of the ratio, with the variance between units. With few documents it is wide, as it has to be: a
    bootstrap over five covers 84% of what it says.
    """
    groups = np.unique(np.asarray(units), return_inverse=True)[1]
    summed, counted = np.bincount(groups, weights=sums), np.bincount(groups, weights=counts)
    size = len(summed)
    if size < 2 or not np.isfinite(summed).all():
        return None
    mean = float(summed.sum() / counted.sum())
    spread = float(np.sqrt(np.sum((summed - mean * counted) ** 2) * size / (size - 1)) / counted.sum())
    half = student_t(size - 1) * spread
    return mean - half, mean + half


def share_interval(share: float, tries: float) -> tuple[float, float]:
    """Of a share of so many tries (Wilson 1927): it stays within 0 and 1 and is no point at 0% or 100%.

    For scores between 0 and 1 it is wide enough, because none vary more than shares of the same mean.
    """
    spread = _Z * _Z / tries
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / tries + spread / (4 * tries))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))  # also after rounding


def paired_share_interval(better: float, worse: float, tries: float) -> tuple[float, float]:
    """Of better - worse, the shares of so many tries that one of two methods found alone (Bonett and Price 2012)."""
    more, less = (better * tries + 1) / (tries + 2), (worse * tries + 1) / (tries + 2)
    half = _Z * math.sqrt((more + less - (more - less) ** 2) / (tries + 2))
    return max(-1.0, more - less - half), min(1.0, more - less + half)


def effective_tries(sizes: Sequence[int]) -> float:
    """Tries that tell as much of a mean over groups of these sizes: all of them where the sizes are equal."""
    return len(sizes) ** 2 / sum(1 / size for size in sizes)
