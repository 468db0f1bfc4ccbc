"""Algorithm 1 of LongRoPE (arXiv 2402.13753) as printed: the evolutionary search, and the baseline of any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longrope.baselines import Vector
from longrope.factors import RopeFactors
from longrope.search.space import Space, mutate_start

# A child that is already known is drawn again, this often at most; then its place stays empty.
_DRAWS = 20
_HALF_FROM = 512 * 1024
_RACED_ITERATIONS = 60


@dataclass(frozen=True)
class EvolutionSettings:
    """Sizes of Algorithm 1; the defaults are the paper's up to 256k."""

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32
    probability: float = 0.3
    iterations: int = 40

    @classmethod
    def for_length(cls, target: int, *, race: bool = False) -> EvolutionSettings:
        """The paper's sizes for a target length: half of population and children from 512k on.

        A raced generation costs about half: then there are half as many generations more.
        """
        iterations = _RACED_ITERATIONS if race else cls.iterations
        if target >= _HALF_FROM:
            return cls(population=32, mutations=8, crossovers=8, iterations=iterations)
        return cls(iterations=iterations)

    @property
    def evaluations(self) -> int:
        """Evaluations of a whole search; the last children are scored too, as in the authors' code."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


@dataclass(frozen=True)
class Candidate:
    """A point of the search space: factors, and where they come from (`yarn`, `mutation`, `crossover`, ...)."""

    factors: RopeFactors
    origin: str
    iteration: int


class Evolution:
    """Ask for the candidates of a generation, evaluate them in any order, tell all values, ask again.

    A pure function of its arguments, the generator's state and the values told: telling the same values again makes
    the same search, which is how a run is resumed. attention_spread: standard deviation of the logarithm of what a
    mutation multiplies the attention factor by; 0, as in the paper, leaves it.
    """

    def __init__(
        self,
        space: Space,
        seeds: Sequence[tuple[str, RopeFactors]],
        settings: EvolutionSettings,
        rng: np.random.Generator,
        *,
        attention_spread: float = 0.0,
    ) -> None:
        self.space, self.settings, self.rng = space, settings, rng
        self.attention_spread = attention_spread
        self.iteration = 0
        self.scored: list[tuple[float, Candidate]] = []
        self._known: set[str] = set()
        self._seeds = [
            (name, factors.with_values(rescale=tuple(space.repair(factors.vector)))) for name, factors in seeds
        ]

    @property
    def seeds(self) -> list[str]:
        """Names of the vectors that the first population starts from."""
        return [name for name, _ in self._seeds]

    @property
    def finished(self) -> bool:
        """Whether all iterations were asked for and told."""
        return self.iteration > self.settings.iterations

    @property
    def best(self) -> tuple[float, Candidate] | None:
        """The lowest value told and its candidate; of equals the first."""
        return self.parents[0] if self.scored else None

    @property
    def parents(self) -> list[tuple[float, Candidate]]:
        """Top-k of everything told so far."""
        return sorted(self.scored, key=lambda pair: pair[0])[: self.settings.parents]

    def ask(self) -> list[Candidate]:
        """The next generation's new candidates; none that was asked for before. Empty when the search is over."""
        if self.finished:
            return []
        return self._first_population() if self.iteration == 0 else self._children()

    def tell(self, results: Sequence[tuple[Candidate, float]]) -> None:
        """Values of the generation last asked for; one that is not finite is the worst, and never a parent."""
        for candidate, value in results:
            if math.isfinite(value):
                self.scored.append((value, candidate))
        self.iteration += 1

    def _first_population(self) -> list[Candidate]:
        population = [Candidate(factors, name, 0) for name, factors in self._seeds if self._is_new(factors)]
        while len(population) < self.settings.population:
            child = self._new(lambda: self._mutant(self._pick([factors for _, factors in self._seeds])))
            if child is None:
                break
            population.append(Candidate(child, "mutation", 0))
        return population

    def _children(self) -> list[Candidate]:
        parents = [candidate.factors for _, candidate in self.parents]
        if not parents:
            return []
        mutants = [self._new(lambda: self._mutant(self._pick(parents))) for _ in range(self.settings.mutations)]
        crossed = [self._new(lambda: self._cross(parents)) for _ in range(self.settings.crossovers)]
        return [
            Candidate(child, origin, self.iteration)
            for origin, children in (("mutation", mutants), ("crossover", crossed))
            for child in children
            if child is not None
        ]

    def _pick(self, parents: Sequence[RopeFactors]) -> RopeFactors:
        return parents[int(self.rng.integers(len(parents)))]

    def _mutant(self, parent: RopeFactors) -> RopeFactors:
        probability = self.settings.probability
        rescale = self.space.mutate(self.rng, parent.vector, probability)
        child = self._child(parent, rescale, mutate_start(self.rng, parent.start_tokens, probability, self.space))
        if self.attention_spread and self.rng.random() < probability:
            spread = math.exp(self.attention_spread * self.rng.standard_normal())
            child = child.with_values(attention_factor=round(parent.attention_factor * spread, 4))
        return child

    def _cross(self, parents: Sequence[RopeFactors]) -> RopeFactors:
        mother, father = self._pick(parents), self._pick(parents)
        rescale = self.space.crossover(self.rng, mother.vector, father.vector)
        child = self._child(mother, rescale, self._pick((mother, father)).start_tokens)
        if self.attention_spread:
            child = child.with_values(attention_factor=self._pick((mother, father)).attention_factor)
        return child

    def _child(self, parent: RopeFactors, rescale: Vector, start_tokens: int) -> RopeFactors:
        return parent.with_values(rescale=tuple(rescale), start_tokens=start_tokens)

    def _new(self, draw: Callable[[], RopeFactors]) -> RopeFactors | None:
        """A drawn child that was never asked for; None when the draws find only known ones."""
        for _ in range(_DRAWS):
            child = draw()
            if self._is_new(child):
                return child
        return None

    def _is_new(self, factors: RopeFactors) -> bool:
        if factors.key in self._known:
            return False
        self._known.add(factors.key)
        return True
