"""What non-uniformity gives on a model: the study that LongRoPE opens with (arXiv 2402.13753, section 2.3).

Perplexity at one target length when groups of pairs are interpolated or left alone, when start tokens keep their
unscaled angle, and with each rule of the attention factor. Nothing is searched: the factors are listed here, and
measured as those of any method are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from longrope.baselines import RULES
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.files import finite_or_none
from longrope.model import LoadedModel

START_TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Values of n-hat that are measured."""
_GROUPS = 8
_OF_ATTENTION = ("pi", "ntk", "yarn")
_OF_START_TOKENS = ("pi", "ntk")

_Line = list[int | float | str | None]


@dataclass(frozen=True)
class Entry:
    """One line of a study: where it stands, and the factors whose perplexities follow, by label.

    study: `whole`, `groups`, `start_tokens` or `attention`. place: (method,); (first pair, last pair); (start tokens,
    method); (rule, method).
    """

    study: str
    place: tuple[int | str, ...]
    factors: Mapping[str, RopeFactors] = field(default_factory=dict)


def studies(
    loaded: LoadedModel, target: int, *, table: FactorTable | None = None, groups: int | None = None
) -> list[Entry]:
    """All three studies at a target length in tokens, as lines.

    whole: nothing rescaled and position interpolation by s = target / original length. groups: neighbouring pairs,
    8 groups by default (fewer where the model has fewer pairs): only these interpolated by s, and all but these.
    start_tokens: PI, NTK and the table's row for the target, if a table is given, with 0 to 256 of them. attention:
    PI, NTK and YaRN under each rule. Raises UserError for a target that extends nothing, or that many groups.
    """
    original, pairs = loaded.rope.original_length, loaded.rope.shape.pairs
    if target <= original:
        rule = f"what stretches nothing shows nothing: the original length is {original}"
        raise UserError("--lengths", got=target, rule=rule, do="give a longer one")
    if groups is not None and not 1 <= groups <= pairs:
        rule = f"the model has {pairs} pairs, at least one for each group"
        raise UserError("--groups", got=groups, rule=rule, do=f"give 1 to {pairs}")
    plain = loaded.trained.with_values(up_to=target)
    stretched = loaded.baseline("pi", target)
    lines = [Entry("whole", ("none",), {"none": plain}), Entry("whole", ("pi",), {"pi": stretched})]
    for group in np.array_split(np.arange(pairs), groups or min(_GROUPS, pairs)):
        first, last = int(group[0]), int(group[-1])
        both = {
            f"only pairs {first}-{last}": _mixed(plain, stretched, first, last),
            f"all but pairs {first}-{last}": _mixed(stretched, plain, first, last),
        }
        lines.append(Entry("groups", (first, last), both))
    of_start = {name: loaded.baseline(name, target) for name in _OF_START_TOKENS}
    if table is not None:
        of_start["factors"] = table.row_for(target).with_values(up_to=target)
    for name, row in of_start.items():
        for kept in (kept for kept in START_TOKENS if kept < target):
            factors = {f"{name}, {kept} start tokens": row.with_values(start_tokens=kept)}
            lines.append(Entry("start_tokens", (kept, name), factors))
    for name in _OF_ATTENTION:
        for rule in RULES:
            factors = {f"{name}, attention factor {rule}": loaded.baseline(f"{name}+{rule}", target)}
            lines.append(Entry("attention", (rule, name), factors))
    return lines


def _mixed(most: RopeFactors, group: RopeFactors, first: int, last: int) -> RopeFactors:
    """Factors `most`, but those of `group` at pairs first to last. Not monotone, which a search would not allow."""
    rescale = most.rescale[:first] + group.rescale[first : last + 1] + most.rescale[last + 1 :]
    return most.with_values(rescale=rescale)


def rows(lines: Sequence[Entry]) -> dict[str, RopeFactors]:
    """What has to be measured, each distinct row of factors once, under its first label."""
    found = {row.key: (label, row) for entry in reversed(lines) for label, row in reversed(list(entry.factors.items()))}
    order = dict.fromkeys(row.key for entry in lines for row in entry.factors.values())
    return {found[key][0]: found[key][1] for key in order}


def collect(lines: Sequence[Entry], values: Mapping[str, float]) -> dict[str, list[_Line]]:
    """The studies with the perplexities of `rows` by label: details of a result, JSON as they are.

    {"whole": [[method, ppl]], "groups": [[first, last, ppl of only these, ppl of all but these]],
    "start_tokens": [[start tokens, method, ppl]], "attention": [[rule, method, ppl]]}; None where one is not finite.
    """
    by_key = {row.key: values[label] for label, row in rows(lines).items()}
    details: dict[str, list[_Line]] = {}
    for entry in lines:
        measured = [finite_or_none(by_key[row.key]) for row in entry.factors.values()]
        details.setdefault(entry.study, []).append([*entry.place, *measured])
    return details
