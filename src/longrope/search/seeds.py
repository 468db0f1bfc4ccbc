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
    """Seeds of a recovery: the original RoPE, the row that the weights were trained with, and those between.

    Between them, because fine-tuning has moved the model from one towards the other.
    """
    trained = last_row(loaded.meaning, loaded.meaning.rows[-1].up_to)
    found = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        row = RopeFactors(
            up_to=target,
            rescale=tuple((trained.vector**share).tolist()),
            start_tokens=trained.start_tokens if share == 1.0 else 0,
            attention_factor=trained.attention_factor**share,
        )
        name = {0.0: "original", 1.0: "own"}.get(share, f"between-{share:g}")
        found.append((name, row if space.holds(row) else _repaired(row, space)))
    return found + given(loaded, space, target, init)


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

    choices: start tokens of the search; a seed with others gets `start`. Equal ones come once.
    """
    found: Seeds = []
    known: set[str] = set()
    for name, row in seeds:
        tried = dict(factors)
        if searched and name.partition("-")[0] in ("own", "init", "between"):
            tried["own"] = row.attention_factor
        for rule, value in tried.items():
            kept = row.start_tokens if row.start_tokens in choices else start
            factors_of = row.with_values(attention_factor=value, start_tokens=kept)
            if factors_of.key not in known:
                known.add(factors_of.key)
                found.append((f"{name}+{rule}" if len(tried) > 1 else name, factors_of))
    return found
