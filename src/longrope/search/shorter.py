"""What a search at a shorter length found, carried over to a target that is too dear to search at."""

from __future__ import annotations

import math

from longrope.factors import RopeFactors
from longrope.model import LoadedModel
from longrope.search.archive import Archive
from longrope.search.evolution import Candidate
from longrope.search.racing import race_to_be_best
from longrope.search.seeds import Seeds
from longrope.search.space import Space
from longrope.search.tasks import Steps

_BESIDE = ("llama3", "yarn", "ntk")


def carried_over(found: RopeFactors, ratio: float, wanted: float, space: Space) -> RopeFactors:
    """Factors found for an extension by `ratio` for one by `wanted`: all to the power ln wanted / ln ratio.

    That keeps what a pair is stretched by between none (a power of 1 is 1) and by all of the ratio (which becomes the
    whole of the wanted one), as PI, NTK and llama3's bands do when their ratio changes; the attention factor goes with
    them. Clipped to the space.
    """
    power = math.log(wanted) / math.log(ratio)
    vector = space.repair(found.vector**power)
    return found.with_values(rescale=tuple(vector.tolist()), attention_factor=round(found.attention_factor**power, 4))


def candidates(loaded: LoadedModel, found: RopeFactors, ratio: float, wanted: float, space: Space, to: int) -> Seeds:
    """What is decided between at the target: factors carried over, with their attention factor or the one they had, and
    baselines with it."""
    lifted = carried_over(found, ratio, wanted, space).with_values(up_to=to)
    made = [
        ("carried over", lifted),
        ("carried over, m as found", lifted.with_values(attention_factor=found.attention_factor)),
    ]
    for name in _BESIDE:
        row = loaded.multiplier(name, to)
        made.append((name, row.with_values(attention_factor=lifted.attention_factor)))
    return list({row.key: (name, row) for name, row in reversed(made)}.values())[::-1]


def decide(seeds: Seeds, archive: Archive) -> Steps[None]:
    """The best of a few, on all windows of the target length."""
    yield from race_to_be_best([Candidate(row, name, 0) for name, row in seeds], archive)
