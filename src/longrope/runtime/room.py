"""Whether a text fits into the memory, said before its first token is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from longrope.errors import UserError
from longrope.lengths import format_length
from longrope.memory import free_memory

if TYPE_CHECKING:
    from longrope.runtime.switch import Switch

# Tokens that are run to learn what one takes in the cache.
_PROBE = 8
# Of the free memory, what a cache and the activations of a chunk may take.
_SHARE = 0.9


def bytes_a_token(cache: Any, reach: int = 0) -> dict[torch.device, float]:
    """Bytes of keys and values that each further token adds, in layers that keep a text of `reach` tokens whole.

    By device: the layers of a model may lie on several.
    """
    full = [layer for layer in layers_with_keys(cache) if getattr(layer, "sliding_window", reach) >= reach]
    tokens, found = max(1, cache.get_seq_length()), dict[torch.device, float]()
    for part in (part for layer in full for part in (layer.keys, layer.values)):
        found[part.device] = found.get(part.device, 0.0) + part.nbytes / tokens
    return found


def layers_with_keys(cache: Any) -> list[Any]:
    """The layers of a cache that hold keys of tokens.

    Of a hybrid's other layers some hold a state of one size, and some nothing at all.
    """
    return [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]


def chunk_bytes(config: Any, chunk: int) -> int:
    """Generous bytes of activations of a chunk: a layer's inner states, and those between layers, in float32."""
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide = max(wide) if isinstance(wide, list | tuple) else wide  # Gemma 3n has one for each layer
    return int(4 * chunk * (3 * wide + 8 * config.hidden_size))


@torch.no_grad()
def check_room(switch: Switch, cache: Cache, tokens: int) -> None:
    """Raise UserError, with the length that fits, unless a cache of so many tokens does.

    What a token takes is that of a dynamic cache; a quantized one takes the part of it that its 8 bits or fewer are,
    and one that is offloaded lies in host memory, but for two layers.
    """
    model = switch.model
    first, config = model.get_input_embeddings().weight.device, model.config.get_text_config()
    probe = DynamicCache(config=config)
    for _ in switch.fill(probe, torch.zeros(1, min(_PROBE, tokens), dtype=torch.long, device=first), 1):
        pass
    wanted, chunk = bytes_a_token(probe, tokens), chunk_bytes(config, min(switch.chunk, tokens))
    size = layers_with_keys(probe)[0].keys.element_size() if isinstance(cache, QuantizedCache) else 1
    wanted = {device: each / size for device, each in wanted.items()}
    room = {device: _SHARE * free_memory(device) - chunk for device in wanted}
    if getattr(cache, "offloading", False):
        host = _SHARE * free_memory(torch.device("cpu"))
        wanted = {first: sum(wanted.values())}
        room = {first: min(room.get(first, host) * len(probe.layers) / 2, host)}
    if not wanted:
        return
    device = min(wanted, key=lambda each: room[each] / max(wanted[each], 1e-9))  # the first to be full
    each, left = wanted[device], max(0, room[device])
    if each * tokens <= room[device]:
        return
    fits = int(left / max(each, 1e-9))
    kept = "keep the cache in host memory, or quantise it" if device.type != "cpu" else "quantise the cache"
    raise UserError(
        "memory",
        got=f"a cache of {format_length(tokens)} tokens, {each * tokens / 2**30:.1f} GiB",
        rule=f"{left / 2**30:.1f} GiB are free for it",
        do=f"use at most {format_length(fits)} tokens here, or {kept}" if fits else "use a machine with more memory",
    )
