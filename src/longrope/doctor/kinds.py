"""What kind of value stands under the keys that the checks compute with: they look at configurations that are typed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from longrope.errors import UserError, shown

_NUMBERS = (
    "max_position_embeddings original_max_position_embeddings hidden_size num_attention_heads head_dim kv_channels "
    "rope_theta rotary_emb_base partial_rotary_factor rotary_pct rotary_dim sliding_window factor attention_factor "
    "short_mscale long_mscale mscale mscale_all_dim beta_fast beta_slow low_freq_factor high_freq_factor"
).split()
_NAMES = ("model_type", "rope_type", "type")
_LISTS_OF_NAMES = ("layer_types", "architectures")
_OBJECTS = ("rope_parameters", "rope_scaling")


def _number(value: object) -> bool:
    # An infinity and what is no number are told by a check; here it matters that a float holds it.
    return not isinstance(value, bool) and (
        isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)
    )


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _object(value: object) -> bool:
    return isinstance(value, Mapping)


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(_NUMBERS, (_number, "it is a number")),
    **dict.fromkeys(_NAMES, (lambda value: isinstance(value, str), "it is a name")),
    **dict.fromkeys(_LISTS_OF_NAMES, (_names, "it is a list of names")),
    **dict.fromkeys(_OBJECTS, (_object, "it is an object")),
}


def check_kinds(config: Mapping[str, Any]) -> None:
    """Raise UserError for a value of the wrong kind in the language model's part of a config.json; null is none."""
    _check(config, "")
    for key in _OBJECTS:
        scaling = config.get(key) or {}
        _check(scaling, f"{key}.")
        for kind, inner in scaling.items():
            if isinstance(inner, Mapping):  # of each type of layer
                _check(inner, f"{key}.{kind}.")


def _check(data: Mapping[str, Any], where: str) -> None:
    for key, (good, rule) in _KINDS.items():
        value = data.get(key)
        if value is not None and not good(value):
            raise UserError(f"config: {where}{key}", got=shown(value), rule=rule, do="correct config.json")
