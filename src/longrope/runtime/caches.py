"""A cache that has room from the start: no token's keys are ever copied for the sake of the next one's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, QuantizedCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from longrope.errors import UserError

CACHE_NAMES = ("cache", "past_key_values")
"""What passes and `generate` take a cache by: the first from transformers 5.24 on, the second before."""
CACHE = next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)
"""The one of this transformers, by which they return it, too."""


def given_cache(given: Mapping[str, Any]) -> Any:
    """The cache among what a forward pass or `generate` is given, by its name of any transformers; None without."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward pass or `generate` returned, as a field or in a tuple; None without."""
    found = getattr(output, CACHE, None)
    if found is None and isinstance(output, tuple):
        found = next((each for each in output if isinstance(each, Cache)), None)
    return found


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values (B, H, T, D) of one layer as views of tensors that have room for `capacity` tokens.

    Beyond that they grow by half; a stock layer copies all of them for every token.
    """

    def __init__(self, capacity: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in keys and values (B, H, t, D); returns all of them so far."""
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            # Rotated keys are float32 then, and attention would cast all of them anew for every chunk and token.
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        room = self._room_for(key_states, value_states, start, end)
        # A pass that is differentiated needs the tensors of the passes before as they were
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states)
        for whole, states in zip(room, (key_states, value_states), strict=True):
            whole[:, :, start:end] = states
        self.keys, self.values = (whole[:, :, :end] for whole in room)
        return self.keys, self.values

    def _room_for(self, keys: Tensor, values: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Tensors with room for `end` tokens that hold the first `start`."""
        if self._room is not None and self._fits(keys, start, end):
            return self._room
        old, self._room = self._room, None
        if old is None or end > old[0].shape[-2]:
            self.capacity = max(self.capacity, end if start == 0 else end + end // 2)
        room = []
        for states, held in ((keys, self.keys), (values, self.values)):
            shape = (*states.shape[:-2], self.capacity, states.shape[-1])
            with torch.inference_mode(False):  # so that passes in and out of inference mode may write to it
                whole = torch.empty(shape, dtype=states.dtype, device=states.device)
            if start and held is not None:
                whole[:, :, :start] = held
            room.append(whole)
        self._room = room[0], room[1]
        return self._room

    def _fits(self, states: Tensor, start: int, end: int) -> bool:
        """Whether what is held stands in the room, and the room suffices: a reordered cache has tensors of its own."""
        assert self._room is not None, "asked for it"
        whole = self._room[0]
        held = not start or (self.keys is not None and self.keys.data_ptr() == whole.data_ptr())
        alike = whole.shape[:2] == states.shape[:2] and (whole.dtype, whole.device) == (states.dtype, states.device)
        return held and alike and end <= whole.shape[-2]


class RoomyCache(DynamicCache):
    """transformers' dynamic cache with room for `capacity` tokens in the layers that see the whole text."""

    def __init__(self, config: PretrainedConfig, capacity: int) -> None:
        super().__init__(config=config)
        self.layers = [RoomyLayer(capacity) if _sees_all(layer, capacity) else layer for layer in self.layers]


def _sees_all(layer: Any, tokens: int) -> bool:
    """Whether a layer of a dynamic cache keeps all of a text of so many tokens; a window that was widened does."""
    return type(layer) is DynamicLayer or (
        type(layer) is DynamicSlidingWindowLayer and bool(layer.sliding_window >= tokens)
    )


def make_cache(kind: str | None, config: PretrainedConfig, capacity: int, described: Mapping[str, Any]) -> Cache:
    """A cache for a text of `capacity` tokens, of the kinds that transformers' `cache_implementation` names.

    None and `dynamic` are one with room from the start; `offloaded` and `quantized` are transformers' own, of which
    `described` is the `cache_config`. Raises UserError when the package of a quantization is not there.
    """
    if kind == "offloaded":
        return DynamicCache(config=config, offloading=True)
    if kind != "quantized":
        return RoomyCache(config, capacity)
    settings = {"backend": "quanto"} | dict(described) | {"config": config}
    try:
        return QuantizedCache(**settings)
    except (ImportError, ValueError) as error:
        rule = " ".join(str(error).split())
        do = "install the backend's package, or choose another cache"
        raise UserError("cache", got=f"quantized by {settings['backend']}", rule=rule, do=do) from None


def makes_its_own(model: Any) -> bool:
    """Whether a class takes no cache but one of its own kind, which it makes itself (MiniMax)."""
    return not getattr(model, "_supports_default_dynamic_cache", lambda: True)()


def _is_general(cache: Any) -> bool:
    """Whether a cache is one of transformers' or ours, which hold nothing beside their layers."""
    return type(cache).__module__ in (Cache.__module__, __name__)


def empty(cache: Any) -> None:
    """Take all tokens out of a cache.

    A class's own kind may hold states beside its layers, which transformers' `reset` leaves as they are: it becomes a
    new one. Raises UserError for a kind that cannot be made anew.
    """
    if _is_general(cache):
        cache.reset()
        return
    try:
        new = type(cache)()
    except TypeError:
        got, rule = (
            f"a {type(cache).__name__}",
            "a text that passes a boundary has its cache made again",
        )
        do = "use the policy ahead or fixed, or no cache"
        raise UserError("cache", got=got, rule=rule, do=do) from None
    vars(cache).clear()
    vars(cache).update(vars(new))


def by_place(cache: Any) -> bool:
    """Whether keys stand where their tokens do, so that those of one sequence can take the place of the old ones."""
    if not _is_general(cache):
        return False
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer, StaticLayer)
    return not getattr(cache, "offloading", False) and all(type(layer) in kinds for layer in cache.layers)


def put_rows(cache: Any, alone: Any, rows: Tensor) -> bool:
    """Put the keys of some sequences, made again, into a cache; False where they do not stand in the same places."""
    pairs = [pair for pair in zip(cache.layers, alone.layers, strict=True) if pair[0].is_initialized]
    for old, new in pairs:
        static = type(old) is StaticLayer
        if not static and old.keys.shape[1:] != new.keys.shape[1:]:
            return False
    for old, new in pairs:
        places = slice(0, new.keys.shape[2])
        for name in ("keys", "values"):
            held, made = getattr(old, name), getattr(new, name)
            if type(old) is StaticLayer or type(old) is RoomyLayer:
                held[rows.to(held.device), :, places] = made
            else:  # a tensor that the caller may hold, or that inference mode made
                held = held.clone()
                held[rows.to(held.device), :, places] = made
                setattr(old, name, held)
    return True
