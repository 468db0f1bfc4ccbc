"""What stands around a model's own `generate`: lengths known before it starts, padding, and prompts that are long."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from longrope.errors import UserError
from longrope.lengths import format_length
from longrope.runtime.caches import CACHE, CACHE_NAMES, given_cache, make_cache, makes_its_own
from longrope.runtime.room import check_room

if TYPE_CHECKING:
    from longrope.runtime.switch import Switch

logger = logging.getLogger(__name__)

# Settings of `generate` under which transformers runs the prompt by itself, whatever its length
_PROMPT_IS_ITS_OWN = ("assistant_model", "inputs_embeds", "custom_generate", "position_ids", "token_type_ids")
# Settings that are looked at here, which a call may give one by one
_SETTINGS = tuple(GenerationConfig().to_dict())  # type: ignore[no-untyped-call]


def generate(
    switch: Switch,
    own: Callable[..., Any],
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' `generate` of a model with a switch; takes and returns what that does.

    Prompts that are padded on the right are moved to it and back: their next token follows the last of the text.
    A prompt of one row that is longer than a chunk is run by chunks, into a cache with room for all that may come.
    Raises UserError for a prompt that with its new tokens is beyond the table, or beyond the memory.
    """
    with switch.lock:
        return _generate(switch, own, inputs, generation_config, *args, **kwargs)


def _generate(
    switch: Switch,
    own: Callable[..., Any],
    inputs: Tensor | None,
    generation_config: GenerationConfig | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    settings = {key: value for key, value in kwargs.items() if hasattr(GenerationConfig, key) or key in _SETTINGS}
    config, _ = switch.model._prepare_generation_config(generation_config, **settings)
    given = ids if ids is not None else kwargs.get("inputs_embeds")
    if given is None:  # transformers begins with BOS
        given = torch.zeros(1, 1, dtype=torch.long)
    mask = kwargs.get("attention_mask")
    mask = _padding(ids, config) if mask is None and ids is not None else mask
    shift = _right_padding(mask) if ids is not None else None
    if shift is not None and mask is not None:
        ids, mask = _rolled(ids, shift), _rolled(mask, shift)
        kwargs["attention_mask"] = mask
        positions = kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = _rolled(positions.expand(len(ids), -1), shift)
    flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    lengths = [given.shape[1]] * len(given) if flat is None else flat.sum(1).tolist()
    reach = switch.table.rows[-1].up_to
    if not _is_limited(generation_config, switch.model.generation_config, kwargs):
        # transformers would end at max_position_embeddings, the length of training
        columns = given.shape[1] if ids is not None else 0
        config.max_new_tokens, config.max_length = None, reach - max(lengths) + columns
        if generation_config is None:
            kwargs["max_length"] = config.max_length
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.max_length = config.max_length
    new = _new_tokens(config, given.shape[1] if ids is not None else 0)
    _check_reach(switch, max(lengths), new)
    least = [min(reach, length + new) for length in lengths] if switch.policy == "ahead" else lengths
    try:
        with switch.at_least(least):
            if ids is not None and _is_long(switch, ids, flat, config, kwargs):
                prefilled = _prefilled(switch, ids, least[0], new, config, kwargs)
                kwargs = {name: each for name, each in kwargs.items() if name not in CACHE_NAMES} | {CACHE: prefilled}
            result = own(ids, generation_config, *args, **kwargs)
    finally:
        switch.patch.use_rows(None)  # of a pass that was broken off
    if shift is None:
        return result
    columns, sequences = ids.shape[1], result if isinstance(result, Tensor) else result.sequences
    shift = shift.repeat_interleave(len(sequences) // len(ids)).to(sequences.device)
    restored = torch.cat([_rolled(sequences[:, :columns], -shift), sequences[:, columns:]], 1)
    if isinstance(result, Tensor):
        return restored
    result.sequences = restored
    return result


def _padding(ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """The mask that transformers infers where none is given: of a padding token that does not end texts too."""
    pad, ends = config.pad_token_id, config.eos_token_id
    if not isinstance(pad, int) or pad in (ends if isinstance(ends, list) else [ends]) or not bool((ids == pad).any()):
        return None
    return (ids != pad).long()


def _right_padding(mask: Tensor | None) -> Tensor | None:
    """Columns (B,) of padding on the right of each row, None where there are none."""
    if mask is None or mask.ndim != 2:
        return None
    padding = mask.shape[1] - 1 - torch.arange(mask.shape[1], device=mask.device).mul(mask != 0).amax(1)
    return padding if bool(padding.any()) else None


def _rolled(rows: Tensor, shift: Tensor) -> Tensor:
    """Rows (B, T), each rolled to the right by its own shift (B,)."""
    columns = torch.arange(rows.shape[1], device=rows.device)[None]
    return rows.gather(1, (columns - shift.to(rows.device)[:, None]) % rows.shape[1])


def _is_limited(generation_config: Any, own: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether anything says how long a text may become."""
    sources: list[Any] = [generation_config, own]
    named = ("max_new_tokens", "max_length")
    return any(getattr(each, name, None) is not None for each in sources for name in named) or any(
        kwargs.get(name) is not None for name in named
    )


def _new_tokens(config: GenerationConfig, columns: int) -> int:
    """The most tokens that are going to be added to so many."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    return max(0, int(config.max_length or 0) - columns)


def _check_reach(switch: Switch, prompt: int, new: int) -> None:
    end = switch.table.rows[-1].up_to
    if prompt >= end:
        switch.table.row_for(prompt + 1)  # raises
    if prompt + new > end:
        raise UserError(
            "max_new_tokens",
            got=f"{new} tokens after a prompt of {prompt}",
            rule=f"the factor table ends at {end}",
            do=f"ask for at most {end - prompt} new tokens, or search factors for a longer target",
        )


def _is_long(
    switch: Switch, ids: Tensor, mask: Tensor | None, config: GenerationConfig, kwargs: dict[str, Any]
) -> bool:
    """Whether a prompt is run by chunks here: one text without padding, for a single sequence in a dynamic cache."""
    cache = given_cache(kwargs)
    cached = 0 if cache is None else int(cache.get_seq_length())
    if makes_its_own(switch.model):
        return False
    if len(ids) > 1 or ids.shape[1] - cached <= switch.chunk or (mask is not None and not bool(mask.all())):
        return False
    if any(kwargs.get(name) is not None for name in _PROMPT_IS_ITS_OWN) or (cache is not None and cache.is_compileable):
        return False
    if config.output_hidden_states or config.output_attentions or config.use_cache is False:
        return False
    many = (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1
    others = [getattr(config, name, None) for name in ("prompt_lookup_num_tokens", "prefill_chunk_size")]
    known = config.cache_implementation in (None, "dynamic", "offloaded", "quantized")
    return known and not many and not any(others)


def _prefilled(
    switch: Switch, ids: Tensor, length: int, new: int, config: GenerationConfig, kwargs: dict[str, Any]
) -> Cache:
    """A cache with all tokens of a prompt (1, T) but the last, run chunk by chunk under the row of `length`."""
    kwargs.pop("cache_implementation", None)
    described, text = (
        kwargs.pop("cache_config", None) or config.cache_config or {},
        switch.model.config.get_text_config(),
    )
    capacity = ids.shape[1] + new
    cache: Cache | None = given_cache(kwargs)
    if cache is None:
        cache = make_cache(config.cache_implementation, text, capacity, described)
    cached = int(cache.get_seq_length())
    check_room(switch, cache, capacity - cached)
    device = switch.model.get_input_embeddings().weight.device
    ids = ids if device.type == "meta" else ids.to(device)
    logger.debug("a prompt of %s tokens, by %d", format_length(ids.shape[1]), switch.chunk)
    with torch.no_grad():
        for _ in switch.fill(cache, ids[:, cached:-1], length):
            pass
    return cache
