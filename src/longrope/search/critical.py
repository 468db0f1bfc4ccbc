"""The search space of LongRoPE2 (arXiv 2502.20082, section 3.2): from the real critical dimension on, NTK below."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from longrope.baselines import RopeShape, Vector, critical_dimension
from longrope.factors import RopeFactors
from longrope.search.space import START_TOKENS, STEP, Chart, mutate_between, on_grid

_TURNS = 10  # of a pair in the original window: where the search of the critical dimension begins
_CLOSE = 0.02  # of the factors below the critical pair to NTK's: two rounding steps


@dataclass(frozen=True)
class LongRope2:
    """Non-decreasing rescale factors in [s, 2s] from a critical pair c on, and lambda_c^(i/c) for i < c.

    c lies between the pair that turns ten times in the original window and the theoretical critical pair, both
    included, and is part of what is searched. shape: the model's RoPE.
    """

    shape: RopeShape
    ratio: float
    start_tokens: tuple[int, ...] = START_TOKENS
    step: float = STEP

    @property
    def pairs(self) -> int:
        """P."""
        return self.shape.pairs

    @property
    def low(self) -> float:
        """s: the least rescale factor from the critical pair on."""
        return self.ratio

    @property
    def high(self) -> float:
        """2s."""
        return 2 * self.low

    @property
    def bounds(self) -> str:
        """Where the factors of a member are, in words."""
        first, last = self.critical_pairs[0], self.critical_pairs[-1]
        return f"within {self.low:g} and {self.high:g} from a pair of {first} to {last} on, and NTK's below it"

    @property
    def critical_pairs(self) -> tuple[int, ...]:
        """What c may be: ceil((d/2) log_b(L / 20 pi)) .. ceil((d/2) log_b(L / 2 pi)), within the model's pairs."""
        first, last = (math.ceil(critical_dimension(self.shape, turns)) for turns in (_TURNS, 1))
        first, last = (max(0, min(max(pair, 1), self.pairs - 1)) for pair in (first, last))
        return tuple(range(first, last + 1))

    def with_step(self, step: float) -> LongRope2:
        """The same space on another grid."""
        return replace(self, step=step)

    def critical_pair(self, vector: Vector) -> int:
        """The c of a vector: that of the member nearest to it, of equals the lowest."""
        # Bounds included: NTK below c is also NTK below any lower pair, only that it is less than s from there on.
        gaps = [np.abs(self._repair(vector, pair) - vector).max() for pair in self.critical_pairs]
        return self.critical_pairs[int(np.argmin(gaps))]

    def repair(self, vector: Vector) -> Vector:
        """The nearest member with the critical pair that fits best: sorted, in the bounds, on the grid, NTK below."""
        ordered = np.sort(vector)
        return self._repair(ordered, self.critical_pair(ordered))

    def _repair(self, vector: Vector, pair: int) -> Vector:
        above = np.clip(np.sort(vector[pair:]), self.low, self.high)
        bounded = np.concatenate([np.ones(pair), on_grid(above, self.step)])
        return on_grid(self._expand(bounded, pair), self.step)

    def _expand(self, vector: Vector, pair: int) -> Vector:
        """The vector with NTK below a critical pair (its base is set by that pair)."""
        below = np.arange(self.pairs) < pair
        return np.where(below, vector[pair] ** (np.arange(self.pairs) / max(pair, 1)), vector)

    def holds(self, factors: RopeFactors) -> bool:
        """Whether a vector is a member, up to rounding."""
        if len(factors.rescale) != self.pairs:
            return False
        return bool(np.abs(self.repair(factors.vector) - factors.vector).max() <= _CLOSE)

    def mutate(self, rng: np.random.Generator, vector: Vector, probability: float) -> Vector:
        """Algorithm 2: factors from c on drawn anew between their neighbours with `probability`; c as often by one."""
        pair = self.critical_pair(vector)
        if rng.random() < probability:
            steps = [each for each in self.critical_pairs if abs(each - pair) == 1] or [pair]
            moved = int(rng.choice(steps))
            # Pairs that come above c start from the factor of the old one, not from NTK's below it.
            vector = np.where(np.arange(self.pairs) < pair, vector[pair], vector)
            pair = moved
        return self._repair(mutate_between(rng, vector, probability, pair, self.low, self.high), pair)

    def crossover(self, rng: np.random.Generator, mother: Vector, father: Vector) -> Vector:
        """The critical pair of the mother; each factor from it on from either parent with equal chance."""
        pair = self.critical_pair(mother)
        both = np.where(rng.random(self.pairs) < 0.5, mother, np.maximum(father, self.low))
        return self._repair(both, pair)

    def chart(self, vector: Vector) -> Chart:
        """Log factors from c on are coordinates; that of c also sets those below."""
        pair = self.critical_pair(vector)
        matrix = np.zeros((self.pairs, self.pairs - pair))
        matrix[pair:] = np.eye(self.pairs - pair)
        matrix[:pair, 0] = np.arange(pair) / max(pair, 1)
        return Chart(matrix, pair, self.low, self.high)

    def openings(self, rng: np.random.Generator) -> list[tuple[str, Vector]]:
        """Algorithm 1: for every c, a whole s0 from [s, 2s] at and beyond it; and s itself, YaRN's plateau."""
        found = []
        for pair in self.critical_pairs:
            drawn = float(rng.integers(math.ceil(self.low), math.floor(self.high) + 1))
            for name, value in (("ntk", self.low), ("drawn", drawn)):
                found.append((f"{name}-{pair}", self._repair(np.full(self.pairs, value), pair)))
        return found
