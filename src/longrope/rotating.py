"""Which layers rotate, as far as a configuration says it; `patch.global_layers_turn` measures it where weights are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longrope.errors import shown

# Classes whose local layers alone rotate; of some every layer does where they have no window
_WITHOUT_WINDOW_ALL_TURN = ("exaone4", "exaone_moe", "kolibri1")
_GLOBAL_UNTURNED = ("llama4_text", "cohere2", "cohere2_moe", "afmoe", "flint", "lara_mini", *_WITHOUT_WINDOW_ALL_TURN)
# Classes of which no layer rotates
_NEVER_TURNED = ("nemotron_h", "jamba")


def said_to_turn_globally(text: Mapping[str, Any]) -> bool:
    """Whether, as far as its class is known, the layers of a text config that see the whole text rotate.

    text: a parsed config.json, or `to_dict()` of a configuration.
    """
    family, kept = text.get("model_type"), text.get("no_rope_layers")
    if family in _WITHOUT_WINDOW_ALL_TURN and text.get("sliding_window", 0) is None:
        return True
    return family not in _GLOBAL_UNTURNED or (isinstance(kept, list) and bool(kept) and all(kept))


def never_turned(text: Mapping[str, Any]) -> str:
    """Why no layer of a text config rotates, as far as its class is known; empty where some do."""
    family = text.get("model_type")
    if family in _NEVER_TURNED:
        return f"no layer of {family} rotates"
    position = text.get("position_embedding_type")
    if family == "granitemoehybrid" and position != "rope":
        return f"no layer of {family} rotates with position_embedding_type {shown(position)}"
    if family == "zamba2" and not text.get("use_mem_rope"):
        return f"no layer of {family} rotates without use_mem_rope"
    if family == "falcon" and text.get("alibi"):
        return f"no layer of {family} rotates with alibi"
    return ""
