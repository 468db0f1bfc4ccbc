"""Gradient descent on the rescale vector and the attention factor, through the frozen model.

The loss is smooth in every factor, but on very different scales: a pair of period T turns by 2 pi L / T radians over
the original length L, and its factor matters on the scale on which that angle changes by about one radian. So each
step is bounded in radians: no pair turns by more than about `radians` further or less at a distance of L.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from longrope.baselines import RopeShape, Vector
from longrope.factors import RopeFactors
from longrope.search.archive import Archive, in_pieces
from longrope.search.space import GRIDS, Chart, Space
from longrope.search.tasks import Proposal, Steps, Task

logger = logging.getLogger(__name__)

# Rounding may cost this share of the loss; if it costs more, a finer grid is tried.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class DescentSettings:
    """Sizes of a descent; the defaults suit all models and ratios that were tried."""

    steps: int = 48
    radians: float = 2.0
    """About the most a step turns a pair further or less, at a distance of the original length."""
    log_step: float = 0.1
    """About the most a step changes the logarithm of a rescale factor."""
    attention_step: float = 0.02
    """About the most a step changes the logarithm of the attention factor; 0 leaves it."""
    check_every: int = 8
    """Steps between evaluations of the rounded vector on all search windows."""
    patience: int = 3
    """Checks without a gain of `tolerance` after which it ends."""
    tolerance: float = 5e-4
    """Share of the loss that counts as a gain."""

    def passes(self, windows: int) -> float:
        """What a whole descent costs, in evaluations of all windows."""
        return self.steps * 3 * batch_size(windows) / windows + self.steps // self.check_every + 4


def batch_size(windows: int) -> int:
    """Windows of one step: a quarter of the search windows."""
    return max(1, windows // 4)


@dataclass
class Adam:
    """Adam (arXiv 1412.6980) without its learning rate: `direction` gives steps of about 1 in every coordinate."""

    size: int
    betas: tuple[float, float] = (0.8, 0.95)
    count: int = 0
    mean: Vector = field(default_factory=lambda: np.zeros(0))
    square: Vector = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.mean, self.square = np.zeros(self.size), np.zeros(self.size)

    def direction(self, gradient: Vector) -> Vector:
        """The step to be subtracted, (size,)."""
        first, second = self.betas
        self.count += 1
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient**2
        mean, square = self.mean / (1 - first**self.count), self.square / (1 - second**self.count)
        return np.asarray(mean / (np.sqrt(square) + 1e-12), dtype=np.float64)


def step_sizes(chart: Chart, vector: Vector, shape: RopeShape, settings: DescentSettings) -> Vector:
    """The size of a step in each coordinate (F,): one of it turns no pair by more than `radians` at a distance of L."""
    turns = 2 * math.pi * shape.original_length / (shape.periods * vector)
    reach = (np.abs(chart.matrix) * turns[:, None]).max(0)
    return np.asarray(np.minimum(settings.log_step, settings.radians / np.maximum(reach, 1e-12)))


def descend(
    start: RopeFactors,
    space: Space,
    shape: RopeShape,
    archive: Archive,
    pool: Sequence[int],
    settings: DescentSettings,
    rng: np.random.Generator,
    *,
    origin: str = "descent",
) -> Steps[None]:
    """Descend from some factors; the vectors that count are evaluated on all search windows and in the archive.

    pool: windows that gradients are taken on, in random batches of `batch_size` that share none until few are left;
    those that the archive compares together are in a batch together.
    """
    chart, fine = space.chart(start.vector), space.with_step(fine_enough(shape, start.vector, settings))
    matrix = chart.matrix
    x, m = chart.coordinates(np.maximum(start.vector, 1.0)), math.log(start.attention_factor)
    by_x, by_m = Adam(len(x)), Adam(1)
    groups = np.reshape(pool, (-1, archive.together))
    size, waiting = min(batch_size(len(archive.counts) // archive.together), len(groups)), list[int]()
    best, rival, start_x, best_x, best_m = archive.value(start) or math.inf, start, x, x, m
    stale, scale, path = 0, 1.0, list[Vector]()
    moves = settings.attention_step > 0

    def at(coordinates: Vector, log_factor: float) -> RopeFactors:
        factor = math.exp(log_factor) if moves else start.attention_factor
        return start.with_values(rescale=tuple(chart.vector(coordinates).tolist()), attention_factor=factor)

    for step in range(settings.steps):
        if len(waiting) < size:
            waiting = [int(index) for index in rng.permutation(len(groups))]
        batch = sorted(int(window) for _ in range(size) for window in groups[waiting.pop()])
        here = at(x, m)
        outcomes = yield [Proposal(Task(here, piece, gradient=True), origin, step) for piece in in_pieces(batch)]
        by_rescale = sum((np.array(each.gradient.rescale) for each in outcomes if each.gradient), np.zeros(len(matrix)))
        by_factor = sum(each.gradient.attention_factor for each in outcomes if each.gradient)
        if not np.isfinite([*by_rescale, by_factor]).all():
            logger.warning("the %s ends at step %d: a gradient is not finite", origin, step)
            break
        fade = scale * min(1.0, 2 * (1 - step / settings.steps))
        sizes = step_sizes(chart, here.vector, shape, settings)
        by_log = matrix.T @ (by_rescale * here.vector)
        x = chart.project(x - fade * sizes * by_x.direction(by_log))
        if moves:
            by_log_m = np.array([by_factor * here.attention_factor])
            m -= fade * settings.attention_step * float(by_m.direction(by_log_m)[0])
        path.append(np.append(x, m))
        if (step + 1) % settings.check_every == 0:
            here = rounded(at(x, m), fine, moves)
            value = yield from evaluate(here, archive, f"{origin} check", step)
            stale = 0 if math.log(value) < math.log(best) * (1 - settings.tolerance) else stale + 1
            if value < best:
                best, best_x, best_m, rival = value, x, m, here
            elif lags(archive, here, rival):  # the steps are too large here: again from the best, with half of them
                x, m, scale, path = best_x, best_m, scale / 2, []
                by_x, by_m = Adam(len(x)), Adam(1)
            if stale == settings.patience:
                break
    candidates = [] if best_x is start_x else [at(best_x, best_m)]
    if path:
        mean = np.mean(path[-max(1, settings.steps // 3) :], axis=0)
        candidates.append(at(mean[:-1], float(mean[-1])))
    values = []
    for factors in candidates:
        values.append((yield from evaluate(rounded(factors, fine, moves), archive, f"{origin} end", settings.steps)))
    if values:
        exact = candidates[int(np.argmin(values))]
        yield from refine(exact, fine, archive, origin, settings.steps, moves)


def refine(exact: RopeFactors, space: Space, archive: Archive, origin: str, iteration: int, moved: bool) -> Steps[None]:
    """Check that rounding to the grid of a space makes factors no worse, and try finer grids when it does.

    moved: whether the attention factor was, see `rounded`.
    """
    yield by_piece(exact, archive, f"{origin} unrounded", iteration, may_win=False)
    unrounded = archive.value(exact)
    if unrounded is None or not math.isfinite(unrounded):
        return
    value = archive.value(rounded(exact, space, moved))
    for step in GRIDS:
        if value is not None and math.log(value) <= math.log(unrounded) * (1 + _ROUNDING):
            return
        if step < space.step:
            finer = rounded(exact, space.with_step(step), moved)
            value = yield from evaluate(finer, archive, f"{origin} finer", iteration)


def lags(archive: Archive, factors: RopeFactors, rival: RopeFactors) -> bool:
    """Whether factors are worse than others by more than a standard error of the difference over all windows."""
    differences = archive.differences(archive.losses(factors), archive.losses(rival))
    if not np.isfinite(differences).all() or len(differences) < 2:
        return False
    return bool(differences.mean() > differences.std(ddof=1) / math.sqrt(len(differences)))


def fine_enough(shape: RopeShape, vector: Vector, settings: DescentSettings) -> float:
    """The coarsest grid on which rounding turns no pair by more than half a step of the descent, at a distance of L."""
    turns = (2 * math.pi * shape.original_length / (shape.periods * vector**2)).max()
    return next((step for step in GRIDS if turns * step / 2 <= settings.radians / 2), GRIDS[-1])


def rounded(factors: RopeFactors, space: Space, moved: bool) -> RopeFactors:
    """Factors on the grid of a space; where the attention factor was moved, that to four digits."""
    attention_factor = round(factors.attention_factor, 4) if moved else factors.attention_factor
    return factors.with_values(rescale=tuple(space.repair(factors.vector).tolist()), attention_factor=attention_factor)


def evaluate(factors: RopeFactors, archive: Archive, origin: str, iteration: int) -> Steps[float]:
    """The value of factors on all search windows, infinite when they fail."""
    if archive.value(factors) is None:
        yield by_piece(factors, archive, origin, iteration)
    value = archive.value(factors)
    return math.inf if value is None else value


def by_piece(
    factors: RopeFactors, archive: Archive, origin: str, iteration: int, *, may_win: bool = True
) -> list[Proposal]:
    """One task a piece of the search windows, so that workers share a single candidate."""
    return [Proposal(Task(factors, piece), origin, iteration, may_win) for piece in archive.pieces]
