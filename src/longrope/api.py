"""Factors on a transformers model, for people's own code: `longrope.load` and `longrope.apply`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from longrope.checkpoint import LoadOptions
from longrope.configs import rope_config
from longrope.convert import factors_file, read_factors
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.model import load_model
from longrope.patch import Patch

logger = logging.getLogger(__name__)

Factors = FactorTable | RopeFactors | Mapping[str, Any] | str | Path


def as_factors(given: Factors) -> FactorTable | RopeFactors:
    """Factors from a table, a row, a parsed factors.json, or a path. Raises UserError when they are none of these."""
    if isinstance(given, FactorTable | RopeFactors):
        return given
    if isinstance(given, Mapping):
        return FactorTable.from_dict(given)
    return read_factors(factors_file(given))


def apply(model: PreTrainedModel, factors: Factors, *, original_length: int | None = None) -> Patch:
    """Put factors on a model that is already loaded; the returned handle's `undo()` takes them off.

    A table is used by the length of each sequence, a single row at every length. A sequence that grows past a boundary
    of the table inside a cache is refused, not answered wrongly. A sliding window that every layer has is widened to
    the longest length, until `undo`. Raises UserError for factors of another model.
    """
    wanted = as_factors(factors)
    rope = rope_config(model.config.get_text_config().to_dict(), original_length=original_length)
    if isinstance(wanted, FactorTable):
        wanted.check_model(rope_theta=rope.rope_theta, rotary_dim=rope.rotary_dim, original_length=rope.original_length)
    patch = Patch(model, rope.shape)
    try:
        patch.install(wanted)
    except UserError:
        patch.undo()
        raise
    note = patch.widen_window(wanted.rows[-1].up_to if isinstance(wanted, FactorTable) else wanted.up_to)
    if note:
        logger.info(note)
    return patch


def load(model: str | PreTrainedModel, factors: Factors | None = None, **options: Any) -> PreTrainedModel:
    """A transformers model whose RoPE is the factor table: MODEL as every command takes it, or one already loaded.

    factors: by default the factors.json beside the weights. `options` are the fields of LoadOptions.
    Raises UserError when the model cannot be loaded or the factors are not its own.
    """
    if isinstance(model, PreTrainedModel):
        if factors is None:
            raise UserError("factors", got="none", rule="a model already loaded needs them", do="give a factors.json")
        apply(model, factors)
        return model
    loaded = load_model(model, LoadOptions(**options))
    wanted = as_factors(factors) if factors is not None else loaded.table
    if wanted is None:
        raise UserError("factors", got="none", rule=f"{model} has no factors.json of its own", do="give a factors.json")
    loaded.check(wanted)
    loaded.widen_window(wanted.rows[-1].up_to if isinstance(wanted, FactorTable) else wanted.up_to)
    loaded.patch().install(wanted)
    return loaded.model
