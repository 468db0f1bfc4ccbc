"""The search space of LongRoPE (arXiv 2402.13753, table 4), and its operators as pure functions of (rng, arrays)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longrope.errors import UserError
from longrope.factors import RopeFactors

Vector = NDArray[np.float64]

STEP = 0.01
# n-hat of the paper's table 4.
START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@dataclass(frozen=True)
class Space:
    """Vectors of `pairs` rescale factors in [1, high], non-decreasing, on a grid of 0.01; and start tokens.

    high = max(1.25 s, 1 + s), so that the paper's bound and that of its authors' code both fit; times `trained`, the
    largest factor that the weights were trained with, 1 for an unscaled checkpoint.
    """

    pairs: int
    ratio: float
    start_tokens: tuple[int, ...] = START_TOKENS
    trained: float = 1.0

    @property
    def high(self) -> float:
        """Upper bound of a rescale factor, on the grid."""
        return float(np.floor(max(1.25 * self.ratio, 1 + self.ratio) * self.trained / STEP + 1e-9) * STEP)

    def repair(self, vector: Vector) -> Vector:
        """The vector sorted, rounded to the grid and clipped: always a member, and a member is unchanged."""
        rounded = np.round(np.sort(vector) / STEP) * STEP
        return np.asarray(np.round(np.clip(rounded, 1.0, self.high), 2), dtype=np.float64)

    def holds(self, factors: RopeFactors) -> bool:
        """Whether a vector has the right length and lies within the bounds, up to rounding."""
        fits = len(factors.rescale) == self.pairs
        return fits and min(factors.rescale) >= 1 and max(factors.rescale) <= self.high + STEP / 2

    def check(self, factors: RopeFactors, name: str) -> None:
        """Raise UserError when a vector given as a seed lies outside the bounds."""
        if not self.holds(factors):
            low, high = min(factors.rescale), max(factors.rescale)
            raise UserError(
                "--init",
                got=f"{name} with {len(factors.rescale)} rescale factors from {low:g} to {high:g}",
                rule=f"a seed has {self.pairs} of them within 1 and {self.high:g}",
                do="give factors of this model for a ratio of at most this search's",
            )


def mutate(rng: np.random.Generator, vector: Vector, probability: float, space: Space) -> Vector:
    """Each factor, with `probability`, drawn anew between its (already mutated) left and its right neighbour.

    Local, monotone by construction and over after one pass; the paper leaves the law open, this is its authors' code
    without its repetitions.
    """
    mutant = vector.copy()
    for index in np.flatnonzero(rng.random(space.pairs) < probability):
        low = mutant[index - 1] if index else 1.0
        high = mutant[index + 1] if index + 1 < space.pairs else space.high
        mutant[index] = rng.uniform(low, high)
    return space.repair(mutant)


def crossover(rng: np.random.Generator, mother: Vector, father: Vector, space: Space) -> Vector:
    """Each factor from either parent with equal chance, then repaired."""
    return space.repair(np.where(rng.random(space.pairs) < 0.5, mother, father))


def mutate_start(rng: np.random.Generator, start: int, probability: float, space: Space) -> int:
    """Start tokens, with `probability` drawn anew from the list."""
    return int(rng.choice(space.start_tokens)) if rng.random() < probability else start
