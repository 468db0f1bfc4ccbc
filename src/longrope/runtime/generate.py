"""What stands around a model's own `generate`: lengths known before it starts, padding, and prompts that are long."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from longrope.errors import UserError
from longrope.lengths import format_length
from longrope.runtime.caches import make_cache
from longrope.runtime.room import check_room

if TYPE_CHECKING:
    from longrope.runtime.switch import Switch

logger = logging.getLogger(__name__)

# Settings of `generate` under which transformers runs the prompt by itself, whatever its length
_PROMPT_IS_ITS_OWN = ("past_key_values", "assistant_model", "inputs_embeds", "custom_generate")


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
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    config = generation_config or switch.model.generation_config
    if ids is None:
        with switch.at_least(None):
            return own(None, generation_config, *args, **kwargs)
    mask = kwargs.get("attention_mask")
    mask = _padding(switch, ids, config, kwargs) if mask is None else mask
    shift = _right_padding(mask)
    if shift is not None and mask is not None:
        ids, mask = _rolled(ids, shift), _rolled(mask, shift)
        kwargs["attention_mask"] = mask
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    new = _new_tokens(config, kwargs, ids.shape[1])
    _check_reach(switch, max(lengths), new)
    least = [length + new for length in lengths] if switch.policy == "ahead" and new is not None else lengths
    with switch.at_least(least):
        if _is_long(switch, ids, mask, config, kwargs):
            kind = kwargs.pop("cache_implementation", config.cache_implementation)
            described = kwargs.pop("cache_config", config.cache_config)
            capacity = ids.shape[1] + (new or 0)
            cache = make_cache(kind, switch.model.config.get_text_config(), capacity, described or {})
            kwargs["past_key_values"] = _fill(switch, cache, ids, least[0], capacity)
        result = own(ids, generation_config, *args, **kwargs)
    if shift is None:
        return result
    columns, sequences = ids.shape[1], result if isinstance(result, Tensor) else result.sequences
    shift = shift.repeat_interleave(len(sequences) // len(ids)).to(sequences.device)
    restored = torch.cat([_rolled(sequences[:, :columns], -shift), sequences[:, columns:]], 1)
    if isinstance(result, Tensor):
        return restored
    result.sequences = restored
    return result


def _padding(switch: Switch, ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that transformers infers where none is given: of a padding token that does not end texts too."""
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    ends = kwargs.get("eos_token_id", config.eos_token_id)
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


def _new_tokens(config: GenerationConfig, kwargs: dict[str, Any], prompt: int) -> int | None:
    """The most tokens that are going to be added, None where nothing says it."""
    new = kwargs.get("max_new_tokens", config.max_new_tokens)
    if new is not None:
        return int(new)
    longest = kwargs.get("max_length", config.max_length)
    return None if longest is None else max(0, int(longest) - prompt)


def _check_reach(switch: Switch, prompt: int, new: int | None) -> None:
    end = switch.table.rows[-1].up_to
    if prompt >= end:
        switch.table.row_for(prompt + 1)  # raises
    if new is not None and prompt + new > end:
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

    def setting(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    if len(ids) > 1 or ids.shape[1] <= switch.chunk or (mask is not None and not bool(mask.all())):
        return False
    if any(kwargs.get(name) is not None for name in _PROMPT_IS_ITS_OWN):
        return False
    many = (setting("num_beams") or 1) > 1 or (setting("num_return_sequences") or 1) > 1
    others = [setting(name) for name in ("prompt_lookup_num_tokens", "prefill_chunk_size", "assistant_early_exit")]
    known = setting("cache_implementation") in (None, "dynamic", "offloaded", "quantized")
    return not many and not any(others) and setting("use_cache") is not False and known


def _fill(switch: Switch, cache: Cache, ids: Tensor, length: int, capacity: int) -> Cache:
    """Put all tokens of a prompt (1, T) but the last into a cache, chunk by chunk, under the row of `length`."""
    ids = ids.to(switch.model.get_input_embeddings().weight.device)
    check_room(switch, cache, capacity)
    logger.debug("a prompt of %s tokens, by %d", format_length(ids.shape[1]), switch.chunk)
    with torch.no_grad():
        for _ in switch.fill(cache, ids[:, :-1], length):
            pass
    return cache
