"""Factors on a transformers model, for people's own code: `longrope.load` and `longrope.apply`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longrope.checkpoint import LoadOptions, in_config
from longrope.configs import rope_config, table_from_config
from longrope.convert import as_table
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel, check_turns, decoder_of, load_model
from longrope.patch import Patch, check_frequencies
from longrope.runtime.applied import Applied
from longrope.runtime.chunks import CHUNK
from longrope.runtime.switch import check_class

logger = logging.getLogger(__name__)

Factors = FactorTable | RopeFactors | Mapping[str, Any] | str | Path
"""What `apply` and `load` take: a table, a row, a parsed factors.json, or a path."""


def as_factors(given: Factors) -> FactorTable | RopeFactors:
    """Factors from a table, a row, a parsed factors.json, or a path. Raises UserError when they are none of these."""
    if isinstance(given, FactorTable | RopeFactors):
        return given
    if isinstance(given, Mapping):
        return FactorTable.from_dict(given)
    return as_table(given)


def apply(
    model: PreTrainedModel,
    factors: Factors,
    *,
    original_length: int | None = None,
    policy: str = "exact",
    chunk: int = CHUNK,
) -> Applied:
    """Put factors on a model that is already loaded; the returned handle's `undo()` takes them off.

    A table is used by the length of each sequence, a single row at every length up to its own. Forward passes and
    `generate` are exact also where keys are cached: what comes out is what a pass over the whole text so far gives.
    original_length: in tokens, where the configuration does not say it right. policy: `exact`, `ahead` or `fixed`.
    chunk: tokens of a pass over a long prompt. A sliding window that every layer has is widened to the longest length,
    until `undo`. The table becomes part of the model's configuration, so that `save_pretrained` keeps it and
    `load` finds it. Raises UserError for factors of another model, for a model that carries some, and for one that
    cannot be extended, which is tried out on a few tokens.
    """
    wanted = as_factors(factors)
    check_class(model)
    text = model.config.get_text_config().to_dict()
    rope = rope_config(text, original_length=original_length)
    own = table_from_config(text, original_length=original_length).rows[0]
    if isinstance(wanted, FactorTable):
        wanted.check_model(rope_theta=rope.rope_theta, rotary_dim=rope.rotary_dim, original_length=rope.original_length)
    Patch(model, rope.shape).undo()  # says of itself what cannot be patched
    ids = _a_few_tokens(model)
    with _evaluating(model):
        model(input_ids=ids, use_cache=False)  # after which a scaling that follows the length is that of short texts
        check_frequencies(model, rope.rope_theta, own)
        with Patch(model, rope.shape) as patch:
            check_turns(model, decoder_of(model), patch, own, ids)
    patch = Patch(model, rope.shape)
    try:
        applied = Applied(model, patch, rope.shape, wanted, policy=policy, chunk=chunk)
    except BaseException:
        patch.undo()
        raise
    note = patch.widen_window(wanted.rows[-1].up_to if isinstance(wanted, FactorTable) else wanted.up_to)
    if note:
        logger.info(note)
    return applied


def _a_few_tokens(model: PreTrainedModel) -> Tensor:
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    ids = torch.arange(1, 8, device="cpu" if device.type == "meta" else device)[None]  # meta: offloaded
    return ids % int(model.config.get_text_config().vocab_size)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients, dropout, and randomness that the caller would miss."""
    training = [module for module in model.modules() if module.training]
    cast(Any, model).eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def load(
    model: str | Path | PreTrainedModel,
    factors: Factors | None = None,
    *,
    policy: str = "exact",
    chunk: int = CHUNK,
    **options: Any,
) -> PreTrainedModel:
    """A transformers model whose RoPE is the factor table: MODEL as every command takes it, or one already loaded.

    factors: by default the factors.json beside the weights, or the table in the model's configuration. policy, chunk:
    as in `apply`. `options` are the fields of LoadOptions.
    Raises UserError when the model cannot be loaded or the factors are not its own.
    """
    if isinstance(model, PreTrainedModel):
        wanted = factors if factors is not None else in_config(model.config)
        if wanted is None:
            raise UserError("factors", got="none", rule="a model already loaded needs them", do="give a factors.json")
        original = options.pop("original_length", None)
        if options:
            raise TypeError(f"a model already loaded takes no {sorted(options)[0]!r}")
        apply(model, wanted, policy=policy, chunk=chunk, original_length=original)
        return model
    if not isinstance(model, str | Path):
        check_class(model)
    loaded = load_model(model, LoadOptions(**options))
    switched(loaded, factors, policy=policy, chunk=chunk)
    return loaded.model


def switched(loaded: LoadedModel, factors: Factors | None, *, policy: str = "exact", chunk: int = CHUNK) -> Applied:
    """Factors on a loaded model as in `load`; the handle takes them off."""
    wanted = as_factors(factors) if factors is not None else loaded.table
    if wanted is None:
        got, rule = "none", f"{loaded.name} has no factors.json of its own"
        raise UserError("factors", got=got, rule=rule, do="give a factors.json")
    loaded.check(wanted)
    loaded.widen_window(wanted.rows[-1].up_to if isinstance(wanted, FactorTable) else wanted.up_to)
    patch = loaded.patch()
    try:
        return Applied(loaded.model, patch, loaded.rope.shape, wanted, policy=policy, chunk=chunk)
    except BaseException:
        patch.undo()
        raise
