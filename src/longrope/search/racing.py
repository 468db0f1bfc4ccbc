"""Candidates raced by pieces of the windows: what cannot win is dropped before all windows are paid for.

A piece is one window, or several where there are many windows (`archive.in_pieces`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longrope.factors import RopeFactors
from longrope.search.archive import Archive, Losses
from longrope.search.evolution import Candidate, Evolution
from longrope.search.tasks import Proposal, Steps, Task


@dataclass(frozen=True)
class RaceSettings:
    """How far ahead of the last parent a candidate must be to stay, in standard errors of their difference.

    Above 0, because the last places among the parents are not worth what finding out exactly would cost.
    """

    ahead: float = 0.25


def whole(candidates: Sequence[Candidate], archive: Archive) -> Steps[list[float]]:
    """Values of candidates, each on all search windows at once."""
    tasks = [Task(candidate.factors, archive.everything) for candidate in candidates]
    yield [Proposal(task, each.origin, each.iteration) for task, each in zip(tasks, candidates, strict=True)]
    return [_value(archive, candidate) for candidate in candidates]


def _value(archive: Archive, candidate: Candidate) -> float:
    value = archive.value(candidate.factors)
    return float("nan") if value is None else value


def race_to_be_best(candidates: Sequence[Candidate], archive: Archive, keep: int = 1) -> Steps[None]:
    """Find the best `keep` of some candidates, exactly as if all were evaluated on all windows.

    The first candidate comes first, on all windows, so that there is a result from the start; then one piece of each
    other, and the best by it run to their end. From then on a candidate is dropped as soon as its loss so far exceeds
    the whole loss of the keep-th best complete one: losses are not negative, so that it could not become better.
    """
    likely, *others = candidates
    if not _complete(archive, likely.factors):
        yield [Proposal(Task(likely.factors, archive.everything), likely.origin, likely.iteration)]
    first, *rest = archive.pieces
    if others:
        yield [Proposal(Task(each.factors, first), each.origin, each.iteration) for each in others]
    ordered = sorted(others, key=lambda each: archive.losses(each.factors)[list(first)].sum())
    if rest and ordered:
        left = tuple(window for piece in rest for window in piece)
        yield [Proposal(Task(each.factors, left), each.origin, each.iteration) for each in ordered[:keep]]
    alive = ordered[keep:]
    for piece in rest:
        totals = sorted(archive.losses(each.factors).sum() for each in candidates if _complete(archive, each.factors))
        bound = totals[keep - 1] if len(totals) >= keep else np.inf
        alive = [each for each in alive if np.nansum(archive.losses(each.factors)) < bound]
        if not alive:
            return
        yield [Proposal(Task(each.factors, piece), each.origin, each.iteration) for each in alive]


def _complete(archive: Archive, factors: RopeFactors) -> bool:
    return not np.isnan(archive.losses(factors)).any()


def race_to_beat(candidates: Sequence[Candidate], archive: Archive) -> Steps[None]:
    """Candidates against the best so far, piece by piece; one that lags behind it, by more than chance, is dropped.

    The spread is that of the candidates' differences on the windows that were run. Nothing is dropped after a single
    window, from which no spread can be told.
    """
    assert archive.best is not None, "a race needs somebody to beat"
    rival = archive.losses(archive.best[1])
    alive = list(candidates)
    for piece in archive.pieces:
        yield [Proposal(Task(each.factors, piece), each.origin, each.iteration) for each in alive]
        alive = [each for each in alive if not _lags(archive, archive.losses(each.factors), rival)]
        if not alive:
            return


def _lags(archive: Archive, losses: Losses, rival: Losses) -> bool:
    if np.isinf(losses).any():
        return True  # it failed on a window, so that its value is infinite
    differences = archive.differences(losses, rival)
    seen = differences[~np.isnan(differences)]
    if len(seen) < 2:
        return False
    error = np.std(seen, ddof=1) * np.sqrt(1 / len(seen) - 1 / len(differences))
    return bool(np.mean(seen) > error)


def race_to_be_parent(
    candidates: Sequence[Candidate], archive: Archive, evolution: Evolution, settings: RaceSettings
) -> Steps[list[float]]:
    """Values of a generation's candidates, NaN for those that were dropped because they would not become parents.

    After each piece, taken in an order drawn anew, parents and candidates are ranked by their loss on the windows so
    far; a candidate stays when it is ahead of the last place that makes a parent, by `ahead` standard errors of a
    paired difference, which shrink to nothing at the last piece. Until there are as many parents as there may be, all
    windows are run.
    """
    parents = np.array([archive.losses(candidate.factors) for _, candidate in evolution.parents])
    places = evolution.settings.parents
    if len(parents) < places or len(archive.counts) < 2 * archive.together:
        return (yield from whole(candidates, archive))
    spread = paired_spread(archive.differences(parents[:-1], parents[-1]))
    pieces, seen = archive.pieces, list[int]()
    alive = list(candidates)
    for index in evolution.rng.permutation(len(pieces)):
        yield [Proposal(Task(each.factors, pieces[index]), each.origin, each.iteration) for each in alive]
        seen.extend(pieces[index])
        counts = archive.counts[seen].sum()
        means = [float(archive.losses(each.factors)[seen].sum() / counts) for each in alive]
        last_place = np.sort(np.append(parents[:, seen].sum(1) / counts, means))[places - 1]
        margin = settings.ahead * spread * np.sqrt(archive.together * (1 / len(seen) - 1 / len(archive.counts)))
        alive = [each for each, mean in zip(alive, means, strict=True) if mean <= last_place - margin]
        if not alive:
            break
    survived = {id(each) for each in alive}
    return [_value(archive, each) if id(each) in survived else float("nan") for each in candidates]


def paired_spread(differences: Losses) -> float:
    """Standard deviation over windows of differences in loss a token, those (K, N) of K others to a rival, pooled."""
    if not len(differences):
        return 0.0
    return float(np.sqrt(np.mean(np.var(differences, axis=1, ddof=1))))


def evolve(evolution: Evolution, archive: Archive, race: RaceSettings | None = None) -> Steps[None]:
    """A whole evolution; with `race`, children are raced against the last parent."""
    while not evolution.finished:
        generation = evolution.ask()
        if not generation:
            evolution.tell([])
            continue
        if race is None:
            values = yield from whole(generation, archive)
        else:
            values = yield from race_to_be_parent(generation, archive, evolution, race)
        evolution.tell(list(zip(generation, values, strict=True)))
