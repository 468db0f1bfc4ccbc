"""What a search at a shorter length found, carried over to a target that is too dear to search at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longrope.factors import RopeFactors
from longrope.model import LoadedModel
from longrope.search.archive import Archive
from longrope.search.evolution import Candidate
from longrope.search.racing import race_to_be_best
from longrope.search.seeds import Seeds
from longrope.search.space import Space
from longrope.search.tasks import Steps

_BESIDE = ("llama3", "yarn")


def carried_over(found: RopeFactors, ratio: float, wanted: float, space: Space) -> RopeFactors:
    """Factors found for an extension by `ratio` for one by `wanted`: all to the power ln wanted / ln ratio.

    That keeps what a pair is stretched by between none (a power of 1 is 1) and by all of the ratio (which becomes the
    whole of the wanted one), as PI and NTK do when their ratio changes. Clipped to the space. The attention factor is
    the one that was found.
    """
    power = math.log(wanted) / math.log(ratio)
    return found.with_values(rescale=tuple(space.repair(found.vector**power).tolist()))


def candidates(
    loaded: LoadedModel,
    found: RopeFactors,
    ratio: float,
    space: Space,
    to: int,
    rules: Sequence[float],
    *,
    searched: bool,
) -> Seeds:
    """What is decided between at the target: factors carried over, and baselines.

    rules: attention factors of the target by rule, no change of it first; the carried-over factors are tried with each
    and, where it was searched, with the one that was found (how it grows with the length is not known). The baselines
    have the first.
    """
    lifted = carried_over(found, ratio, to / loaded.trained.up_to, space).with_values(up_to=to)
    tried = [*([found.attention_factor] if searched else []), *rules]
    made = [("carried over", lifted.with_values(attention_factor=factor)) for factor in dict.fromkeys(tried)]
    for name in _BESIDE:
        row = loaded.multiplier(name, to)
        made.append((name, row.with_values(attention_factor=rules[0], start_tokens=found.start_tokens)))
    return made


def decide(seeds: Seeds, archive: Archive) -> Steps[None]:
    """The best of a few, on all windows of the target length."""
    yield from race_to_be_best([Candidate(row, name, 0) for name, row in seeds], archive)
