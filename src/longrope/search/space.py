"""The search space of LongRoPE (arXiv 2402.13753, table 4), and its operators as pure functions of (rng, arrays)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from longrope.baselines import Vector
from longrope.errors import UserError
from longrope.factors import RopeFactors

STEP = 0.01
"""Of the paper's grid."""
# Of rescale factors: the paper's, and finer ones for long original lengths, where its own turns fast pairs too far.
GRIDS = (STEP, 0.001, 0.0001)
# n-hat of the paper's table 4.
START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@dataclass(frozen=True)
class Chart:
    """Free coordinates x (F,) of a part of a space: log lambda = matrix @ x, x non-decreasing within low and high.

    Non-decreasing coordinates give non-decreasing rescale factors, so that bounds and monotony hold by construction.
    """

    matrix: Vector
    first: int
    low: float
    high: float

    def coordinates(self, vector: Vector) -> Vector:
        """The nearest coordinates (F,) of rescale factors (P,)."""
        return self.project(np.log(vector[self.first :]))

    def vector(self, coordinates: Vector) -> Vector:
        """Rescale factors (P,) of coordinates (F,)."""
        return np.asarray(np.exp(self.matrix @ coordinates), dtype=np.float64)

    def project(self, coordinates: Vector) -> Vector:
        """The nearest (least squares) coordinates that are non-decreasing and within the bounds."""
        return np.clip(isotonic(coordinates), np.log(self.low), np.log(self.high))


def isotonic(values: Vector) -> Vector:
    """The nearest non-decreasing sequence in least squares: neighbours that fall are pooled (Barlow et al. 1972)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, many), (right, few) = pools[-2:]
            pools[-2:] = [((left * many + right * few) / (many + few), many + few)]
    return np.repeat([mean for mean, _ in pools], [size for _, size in pools])


class Space(Protocol):
    """Where rescale vectors are searched: LongRoPE's space, or LongRoPE2's.

    pairs: P. start_tokens: values of n-hat that are tried. high: the largest rescale factor. step: of the grid.
    """

    @property
    def pairs(self) -> int: ...  # noqa: D102
    @property
    def start_tokens(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def high(self) -> float: ...  # noqa: D102
    @property
    def step(self) -> float: ...  # noqa: D102
    @property
    def bounds(self) -> str:
        """Where the factors of a member are, in words."""
        ...

    def with_step(self, step: float) -> Space:
        """The same space on another grid."""
        ...

    def repair(self, vector: Vector) -> Vector:
        """The nearest member on the grid; a member is unchanged."""
        ...

    def holds(self, factors: RopeFactors) -> bool:
        """Whether a vector has the right length and lies within the bounds, up to rounding."""
        ...

    def mutate(self, rng: np.random.Generator, vector: Vector, probability: float) -> Vector:
        """A member in which each free factor was drawn anew with `probability`."""
        ...

    def crossover(self, rng: np.random.Generator, mother: Vector, father: Vector) -> Vector:
        """A member that has each free factor from either parent."""
        ...

    def chart(self, vector: Vector) -> Chart:
        """Coordinates in which a gradient moves on from a member."""
        ...

    def openings(self, rng: np.random.Generator) -> list[tuple[str, Vector]]:
        """Vectors of the space's own to start from, beside the baselines, with their names."""
        ...


@dataclass(frozen=True)
class LongRope:
    """Vectors of `pairs` rescale factors in [1, high], non-decreasing, on a grid of `step`; and start tokens.

    high = max(1.25 s, 1 + s), so that the paper's bound and that of its authors' code both fit. Where an extension
    multiplies what weights were trained with, this is the space of what it is multiplied by.
    """

    pairs: int
    ratio: float
    start_tokens: tuple[int, ...] = START_TOKENS
    step: float = STEP

    @property
    def high(self) -> float:
        """Upper bound of a rescale factor, on the grid."""
        return float(np.floor(max(1.25 * self.ratio, 1 + self.ratio) / STEP + 1e-9) * STEP)

    @property
    def bounds(self) -> str:
        """Where the factors of a member are, in words."""
        return f"within 1 and {self.high:g}"

    def with_step(self, step: float) -> LongRope:
        """The same space on another grid."""
        return replace(self, step=step)

    def repair(self, vector: Vector) -> Vector:
        """The vector sorted, rounded to the grid and clipped: always a member, and a member is unchanged."""
        return on_grid(np.clip(np.sort(vector), 1.0, self.high), self.step)

    def holds(self, factors: RopeFactors) -> bool:
        """Whether a vector has the right length and lies within the bounds, up to rounding."""
        fits = len(factors.rescale) == self.pairs
        return fits and min(factors.rescale) >= 1 and max(factors.rescale) <= self.high + STEP / 2

    def mutate(self, rng: np.random.Generator, vector: Vector, probability: float) -> Vector:
        """Each factor, with `probability`, drawn anew between its (already mutated) left and its right neighbour.

        Local, monotone by construction and over after one pass; the paper leaves the law open, this is its authors'
        code without its repetitions.
        """
        return self.repair(mutate_between(rng, vector, probability, 0, 1.0, self.high))

    def crossover(self, rng: np.random.Generator, mother: Vector, father: Vector) -> Vector:
        """Each factor from either parent with equal chance, then repaired."""
        return self.repair(np.where(rng.random(self.pairs) < 0.5, mother, father))

    def chart(self, vector: Vector) -> Chart:
        """Every log factor is a coordinate of its own."""
        return Chart(np.eye(self.pairs), 0, 1.0, self.high)

    def openings(self, rng: np.random.Generator) -> list[tuple[str, Vector]]:
        """None: the paper starts from the baselines."""
        return []


def on_grid(vector: Vector, step: float) -> Vector:
    """Rounded to multiples of step, to the last digit as JSON would have them."""
    return np.asarray(np.round(np.round(vector / step) * step, 6), dtype=np.float64)


def grid_of(vector: Vector) -> float:
    """The coarsest grid that a vector lies on; the finest where it lies on none."""
    return next((step for step in GRIDS if np.array_equal(on_grid(vector, step), vector)), GRIDS[-1])


def mutate_between(
    rng: np.random.Generator, vector: Vector, probability: float, first: int, low: float, high: float
) -> Vector:
    """Each factor from `first` on, with `probability`, drawn anew between its mutated left and its right neighbour.

    low and high bound the first and the last.
    """
    mutant = vector.copy()
    for index in first + np.flatnonzero(rng.random(len(vector) - first) < probability):
        left = mutant[index - 1] if index > first else low
        right = mutant[index + 1] if index + 1 < len(vector) else high
        mutant[index] = rng.uniform(left, max(left, right))
    return mutant


def check_seed(space: Space, factors: RopeFactors, name: str) -> None:
    """Raise UserError when a vector given as a seed lies outside the bounds."""
    if not space.holds(factors):
        low, high = min(factors.rescale), max(factors.rescale)
        raise UserError(
            "--init",
            got=f"{name} with {len(factors.rescale)} rescale factors from {low:g} to {high:g}",
            rule=f"a seed has {space.pairs} of them {space.bounds}",
            do="give factors of this model for a ratio of at most this search's",
        )


def mutate_start(rng: np.random.Generator, start: int, probability: float, space: Space) -> int:
    """Start tokens, with `probability` drawn anew from the list."""
    return int(rng.choice(space.start_tokens)) if rng.random() < probability else start
