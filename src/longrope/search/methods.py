"""The searches, each as a generator of tasks: `evolution` (Algorithm 1), `gradient` and `hybrid`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from longrope.baselines import RopeShape, Vector
from longrope.factors import RopeFactors
from longrope.search.archive import Archive
from longrope.search.descent import DescentSettings, batch_size, descend, step_sizes
from longrope.search.evolution import Candidate, Evolution, EvolutionSettings
from longrope.search.racing import RaceSettings, evolve, race_to_be_best, race_to_beat
from longrope.search.seeds import Seeds
from longrope.search.space import Space, grid_of
from longrope.search.tasks import Steps

METHODS = ("evolution", "gradient", "hybrid")
"""What `--method` may be."""
# Seeds that `gradient` descends from; `hybrid` descends from the best.
_DESCENTS = 2
# The seed that is evaluated first: it is rarely far from the best.
_LIKELY = ("yarn+su", "yarn")


@dataclass(frozen=True)
class PolishSettings:
    """The short evolution around what a descent found."""

    iterations: int = 4
    children: int = 8
    parents: int = 4
    probability: float = 0.3
    """Share of coordinates that a child changes."""
    share: float = 0.25
    """Of the descent's largest step, the standard deviation of a change."""
    attention_spread: float = 0.01
    """Standard deviation of the logarithm of what the attention factor is multiplied by."""


@dataclass(frozen=True)
class Problem:
    """What every method is given: the space, the seeds, the model's RoPE, and the windows that gradients use."""

    space: Space
    seeds: Seeds
    shape: RopeShape
    pool: tuple[int, ...]
    search_attention: bool


def evolution(problem: Problem, settings: EvolutionSettings, archive: Archive, race: bool, seed: int) -> Steps[None]:
    """Algorithm 1 as printed; `race` drops children that cannot become parents before all windows are paid for."""
    spread = 0.03 if problem.search_attention else 0.0
    rng = np.random.default_rng(seed)
    strategy = Evolution(problem.space, problem.seeds, settings, rng, attention_spread=spread)
    yield from evolve(strategy, archive, RaceSettings() if race else None)


def gradient(problem: Problem, settings: DescentSettings, archive: Archive, seed: int) -> Steps[None]:
    """Descent from the best seeds, and the start tokens around the result."""
    yield from _from_best_seeds(problem, settings, archive, seed, _DESCENTS)
    yield from _start_tokens(problem, archive)


def hybrid(
    problem: Problem, settings: DescentSettings, polish: PolishSettings, archive: Archive, seed: int
) -> Steps[None]:
    """All seeds with each attention factor, descent from the best, start tokens, and a short evolution around it.

    The archive's best is never worse than the best seed on all windows.
    """
    yield from _from_best_seeds(problem, settings, archive, seed, 1)
    yield from _start_tokens(problem, archive)
    yield from _polish(problem, settings, polish, archive, np.random.default_rng((seed, 1)))


def expected_evaluations(method: str, seeds: int, starts: int, windows: int, settings: DescentSettings) -> int:
    """About the most that gradient or hybrid take, in evaluations of all windows."""
    descents = _DESCENTS if method == "gradient" else 1
    polish = PolishSettings()
    short = polish.iterations * polish.children if method == "hybrid" else 0
    return math.ceil(seeds + descents * settings.passes(windows) + starts - 1 + short)


def gradient_windows(method: str, windows: int, settings: DescentSettings) -> int:
    """Windows that the descents of a search differentiate at most, where there are so many search windows."""
    descents = {"evolution": 0, "gradient": _DESCENTS, "hybrid": 1}[method]
    return descents * settings.steps * batch_size(windows)


def _from_best_seeds(
    problem: Problem, settings: DescentSettings, archive: Archive, seed: int, descents: int
) -> Steps[None]:
    ordered = sorted(problem.seeds, key=lambda seed: seed[0] not in _LIKELY)
    candidates = [Candidate(row, name, 0) for name, row in ordered]
    yield from race_to_be_best(candidates, archive, keep=descents)
    ranked = sorted((value, index) for index, row in enumerate(problem.seeds) if (value := _known(archive, row[1])))
    starts: Seeds = []
    for _, index in ranked:
        name, row = problem.seeds[index]
        if len(starts) < descents and all(row.rescale != other.rescale for _, other in starts):
            starts.append((name, row))
    for number, (name, row) in enumerate(starts):
        rng = np.random.default_rng((seed, 0, number))
        origin = f"descent from {name}"
        sizes = settings if problem.search_attention else replace(settings, attention_step=0.0)
        yield from descend(row, problem.space, problem.shape, archive, problem.pool, sizes, rng, origin=origin)


def _known(archive: Archive, row: RopeFactors) -> float | None:
    value = archive.value(row)
    return value if value is not None and math.isfinite(value) else None


def _start_tokens(problem: Problem, archive: Archive) -> Steps[None]:
    """The list of start tokens tried around the best."""
    if archive.best is None or len(problem.space.start_tokens) == 1:
        return
    _, best = archive.best
    tried = [best.with_values(start_tokens=start) for start in problem.space.start_tokens]
    candidates = [Candidate(row, "start tokens", 0) for row in (best, *tried) if row is best or row.key != best.key]
    yield from race_to_be_best(candidates, archive)  # the best, which is known on all windows, is what they must beat


def _polish(
    problem: Problem, descent: DescentSettings, settings: PolishSettings, archive: Archive, rng: np.random.Generator
) -> Steps[None]:
    """A few generations of small changes to the best candidates, raced against the best."""
    known = {row.key for _, row in archive.complete()}
    for iteration in range(settings.iterations):
        parents = [row for _, row in sorted(archive.complete(), key=lambda pair: pair[0])[: settings.parents]]
        if not parents:
            return
        children = []
        for _ in range(settings.children):
            parent = parents[int(rng.integers(len(parents)))]
            child = _neighbour(problem, descent, settings, parent, rng)
            if child.key not in known:
                known.add(child.key)
                children.append(Candidate(child, "polish", iteration))
        if children:
            yield from race_to_beat(children, archive)


def _neighbour(
    problem: Problem, descent: DescentSettings, settings: PolishSettings, parent: RopeFactors, rng: np.random.Generator
) -> RopeFactors:
    space = problem.space.with_step(grid_of(parent.vector))  # a coarser one would cost more than a change gains
    chart = space.chart(parent.vector)
    sizes = settings.share * step_sizes(chart, parent.vector, problem.shape, descent)
    x = chart.coordinates(np.maximum(parent.vector, 1.0))
    chosen: Vector = (rng.random(len(x)) < settings.probability) * rng.standard_normal(len(x))
    child = parent.with_values(rescale=tuple(space.repair(chart.vector(chart.project(x + sizes * chosen)))))
    if problem.search_attention:
        spread = math.exp(settings.attention_spread * rng.standard_normal())
        child = child.with_values(attention_factor=round(parent.attention_factor * spread, 4))
    if len(problem.space.start_tokens) > 1 and rng.random() < settings.probability:
        child = child.with_values(start_tokens=int(rng.choice(problem.space.start_tokens)))
    return child
