"""A configuration as the checks of the doctor look at it, and the register that they are in."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from longrope.baselines import su_attention_factor
from longrope.configs import rope_config
from longrope.doctor.kinds import check_kinds
from longrope.errors import UserError
from longrope.factors import FactorTable

# Classes with a RoPE for each type of layer, which take a flat `rope_scaling` for that of the global layers
BY_TYPE = ("gemma3", "gemma3_text", "olmo3")
# Classes whose stock `generate` makes its cache again at the boundary
SWITCHING = ("phi3", "phimoe", "phi4_multimodal")


@dataclass(frozen=True)
class Folder:
    """What lies beside a config.json: the table of factors.json and the tokenizer's settings, where there are any."""

    table: FactorTable | None = None
    tokenizer: Mapping[str, Any] | None = None


class View:
    """A configuration as the checks look at it. text: the language model's part, which checks may change to mend it."""

    def __init__(self, config: Mapping[str, Any], folder: Folder | None = None) -> None:
        self.config = copy.deepcopy(dict(config))
        nested = self.config.get("text_config")
        self.text: dict[str, Any] = nested if isinstance(nested, dict) else self.config
        self.folder = folder or Folder()
        check_kinds(self.text)

    def rope(self, key: str) -> dict[str, Any] | None:
        """The flat dict under a key: of the layers that see the whole text, where each type has its own."""
        value = self.text.get(key)
        if not isinstance(value, dict):
            return None
        inner = value.get("full_attention")
        return inner if isinstance(inner, dict) else value

    @property
    def ropes(self) -> list[tuple[str, dict[str, Any]]]:
        """Both places of RoPE parameters that are there, the one that transformers prefers first."""
        found = [(key, self.rope(key)) for key in ("rope_scaling", "rope_parameters")]
        return [(key, rope) for key, rope in found if rope is not None]

    @property
    def used(self) -> dict[str, Any]:
        """The parameters that transformers uses."""
        return self.ropes[0][1] if self.ropes else {}

    @property
    def kind(self) -> str:
        """default, longrope, ...; `su` is longrope."""
        kind = self.used.get("rope_type") or self.used.get("type") or "default"
        return "longrope" if kind == "su" else str(kind)

    @property
    def by_type(self) -> bool:
        """Whether each type of layer has a RoPE of its own."""
        value = self.text.get("rope_parameters")
        if isinstance(value, dict):
            return isinstance(value.get("full_attention"), dict)
        return self.family in BY_TYPE

    @property
    def null_theta(self) -> bool:
        """Whether the base that transformers takes is there, and null. GPT-NeoX's class reads another key."""
        if self.family == "gpt_neox":
            return False
        place = self.used if "rope_theta" in self.used else self.text
        return place.get("rope_theta", 0) is None

    @property
    def family(self) -> str:
        """The model_type."""
        return str(self.text.get("model_type") or self.config.get("model_type") or "")

    @property
    def longest(self) -> int | None:
        """max_position_embeddings."""
        return _whole(self.text.get("max_position_embeddings"))

    @property
    def original(self) -> int | None:
        """The original length as transformers finds it: the top level wins."""
        top = _whole(self.text.get("original_max_position_embeddings"))
        return top or _whole(self.used.get("original_max_position_embeddings"))

    @property
    def pairs(self) -> int | None:
        """Rotated pairs of a head, None where the configuration does not say."""
        try:
            return rope_config(without_scaling(self.text)).rotary_dim // 2
        except UserError:
            return None

    def lists(self) -> list[tuple[str, Any]]:
        """short_factor and long_factor, where they are."""
        return [(key, self.used[key]) for key in ("short_factor", "long_factor") if key in self.used]

    @property
    def ratio(self) -> float | None:
        """max / original."""
        return self.longest / self.original if self.longest and self.original else None

    @property
    def standard(self) -> float | None:
        """The attention factor that the lengths give: sqrt(1 + ln s / ln L)."""
        if self.ratio is None or not self.original:
            return None
        return su_attention_factor(max(1.0, self.ratio), self.original)

    @property
    def attention(self) -> float | None:
        """The attention factor that transformers uses."""
        given = self.used.get("attention_factor")
        return float(given) if isinstance(given, int | float) else self.standard

    @property
    def two_regimes(self) -> bool:
        """Whether short and long factors differ."""
        lists = dict(self.lists())
        return self.kind == "longrope" and len(lists) == 2 and lists["short_factor"] != lists["long_factor"]


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**63 else None


def positive(value: object) -> TypeGuard[float]:
    """Whether something is a finite, positive number, which a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def without_scaling(text: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the same RoPE without its scaling."""
    kept = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_parameters")}
    shape: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = text.get(key)
        inner = value.get("full_attention", value) if isinstance(value, dict) else {}
        for name in ("partial_rotary_factor", "rope_theta", "mrope_section"):
            if isinstance(inner, dict) and inner.get(name) is not None:
                shape[name] = inner[name]
    kept |= {"rope_parameters": {"rope_type": "default", **shape}}
    kept.pop("original_max_position_embeddings", None)
    return kept


Look = Callable[[View], Iterator[str]]
"""Yields what it finds, a sentence each."""
Mend = Callable[[View], None]
"""Changes the configuration so that the check finds nothing more."""


@dataclass(frozen=True)
class Check:
    """Something that is looked for: severity, what to do, how it looks, and what mends it where anything does."""

    name: str
    severity: str | Callable[[View], str]
    do: str
    look: Look
    mend: Mend | None


CHECKS: list[Check] = []
"""All checks, in the order in which their modules are imported."""


def check(
    name: str, severity: str | Callable[[View], str], do: str, mend: Mend | None = None
) -> Callable[[Look], Look]:
    """Register a check that yields what it finds."""

    def register(look: Look) -> Look:
        CHECKS.append(Check(name, severity, do, look, mend))
        return look

    return register
