"""Where a search starts: the baselines, the checkpoint's own scaling, vectors of the space's own, and those given."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from longrope.baselines import RULES, attention_factor
from longrope.factors import FactorTable, RopeFactors, last_row
from longrope.model import LoadedModel
from longrope.search.space import Space, check_seed

logger = logging.getLogger(__name__)

PAPER = ("pi", "ntk", "yarn")
"""The baselines that LongRoPE starts from."""
ALL = ("pi", "ntk", "ntk-cd", "yarn", "llama3")
"""Those that our own searches start from."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the way from one row to another, where a recovery starts."""

Seeds = list[tuple[str, RopeFactors]]
"""Factors by name."""


def vectors(
    loaded: LoadedModel,
    space: Space,
    target: int,
    names: Sequence[str],
    init: Sequence[FactorTable],
    rng: np.random.Generator,
) -> Seeds:
    """Seeds by name, with the attention and start tokens of their method; clipped where the space is smaller.

    They multiply what the weights were trained with. Raises UserError when a given vector lies outside the bounds. The
    checkpoint's own scaling then is no seed.
    """
    found = [(name, loaded.multiplier(name, target)) for name in names]
    found = [(name, row if space.holds(row) else _repaired(row, space)) for name, row in found]
    found += [(name, RopeFactors(up_to=target, rescale=tuple(vector.tolist()))) for name, vector in space.openings(rng)]
    own = last_row(loaded.meaning, target) if loaded.under is None else loaded.under
    if set(own.rescale) != {1.0}:
        own = relative(own, loaded.trained)
        if space.holds(own):
            found.append(("own", own.with_values(up_to=target)))
        else:
            told = "the checkpoint's own scaling, up to %g, is outside this search: it is no seed"
            logger.info(told, max(own.rescale))
    return found + given(loaded, space, target, init)


def recovery(loaded: LoadedModel, space: Space, target: int, init: Sequence[FactorTable]) -> Seeds:
    """Seeds of a recovery: the original RoPE, the table's longest row, and those between.

    Between them, because fine-tuning has moved the model from one towards the other. Where the table has rows about the
    target, first those: its own with the next longer one, else the shorter and the longer, and what is between; of all
    these only as they are, with no other attention factor.
    """
    rows = loaded.meaning.rows
    unscaled = rows[-1].with_values(rescale=(1.0,) * len(rows[-1].rescale), attention_factor=1.0, start_tokens=0)
    names = {0.0: "original", 1.0: "own"}
    found = [(names.get(share, f"between-{share:g}"), between(unscaled, rows[-1], share)) for share in SHARES]
    if about := rows_about(loaded.meaning, target):
        found = [(f"row-{share:g}", between(*about, share)) for share in SHARES]
        found += [(f"row-last-{share:g}", between(unscaled, rows[-1], share)) for share in SHARES]
    found = [(name, row if space.holds(row) else _repaired(row, space)) for name, row in found]
    return [(name, row.with_values(up_to=target)) for name, row in found] + given(loaded, space, target, init)


def rows_about(table: FactorTable, target: int) -> tuple[RopeFactors, RopeFactors] | None:
    """The longest row up to a length and the shortest beyond; None without both, and for the first and the last."""
    shorter, longer = ([row for row in table.rows if (row.up_to > target) == beyond] for beyond in (False, True))
    if not shorter or not longer or (set(shorter[-1].rescale) == {1.0} and longer[0] is table.rows[-1]):
        return None
    return shorter[-1], longer[0]


def between(first: RopeFactors, second: RopeFactors, share: float) -> RopeFactors:
    """A row at a share of the way from one to another, on a logarithmic scale; at 0 and 1 exactly these."""
    if share in (0.0, 1.0):
        return (first, second)[int(share)]
    rescale = first.vector ** (1 - share) * second.vector**share
    attention_factor = first.attention_factor ** (1 - share) * second.attention_factor**share
    return RopeFactors(second.up_to, tuple(rescale.tolist()), attention_factor=attention_factor)


def given(loaded: LoadedModel, space: Space, target: int, init: Sequence[FactorTable]) -> Seeds:
    """The seeds of --init. Raises UserError for one outside the bounds."""
    found = []
    for table in init:
        row = relative(last_row(table, target), loaded.trained)
        check_seed(space, row, table.model or "a vector")
        if list(row.rescale) != sorted(row.rescale):
            logger.info("a vector given by --init is not ascending: it is sorted, since the search keeps that order")
            row = row.with_values(rescale=tuple(sorted(row.rescale)))
        found.append(("init", row.with_values(up_to=target)))
    return found


def relative(row: RopeFactors, trained: RopeFactors) -> RopeFactors:
    """What a row multiplies those that the weights were trained with by."""
    if set(trained.rescale) == {1.0} and trained.attention_factor == 1.0:
        return row
    ratio = row.attention_factor / trained.attention_factor
    return row.with_values(rescale=tuple((row.vector / trained.vector).tolist()), attention_factor=ratio)


def _repaired(row: RopeFactors, space: Space) -> RopeFactors:
    return row.with_values(rescale=tuple(space.repair(row.vector).tolist()))


def attention_factors(rule: str, ratio: float, original_length: int) -> dict[str, float]:
    """The attention factors that seeds are tried with, by rule: that of a rule or number, or all three of `search`."""
    rules = RULES if rule == "search" else (rule,)
    found: dict[str, float] = {}
    for name in rules:
        value = attention_factor(name, ratio, original_length)
        if value not in found.values():
            found[name] = value
    return found


def with_attention(
    seeds: Seeds, factors: dict[str, float], choices: Sequence[int], start: int, *, searched: bool
) -> Seeds:
    """Each seed with each attention factor; a seed of its own scaling also with its own, where that is searched.

    A row of a table has its own alone, where it is searched: it was found with it. choices: start tokens of the search;
    a seed with others gets `start`. Equal ones come once.
    """
    found: Seeds = []
    known: set[str] = set()
    for name, row in seeds:
        kind = name.partition("-")[0]
        tried = {} if searched and kind == "row" else dict(factors)
        if searched and kind in ("own", "init", "between", "row"):
            tried["own"] = row.attention_factor
        for rule, value in tried.items():
            kept = row.start_tokens if row.start_tokens in choices else start
            factors_of = row.with_values(attention_factor=value, start_tokens=kept)
            if factors_of.key not in known:
                known.add(factors_of.key)
                found.append((f"{name}+{rule}" if len(tried) > 1 else name, factors_of))
    return found
