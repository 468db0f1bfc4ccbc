"""The methods LongRoPE is compared with, each as a rescale vector and an attention factor.

Notation: d rotary dimension, pairs i = 0 .. d/2 - 1, base b, T_i = 2 pi b^(2i/d) the period of pair i, s the extension
ratio L'/L. A rescale factor divides the frequency of its pair; 1 leaves it, s is position interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longrope.errors import UserError
from longrope.factors import RopeFactors

Vector = NDArray[np.float64]
"""Rescale factors, or other numbers, one a pair."""
RULES = ("none", "su", "yarn")
"""Of the attention factor, beside a number: none is 1, su that of LongRoPE's code, yarn that of YaRN."""
_LARGEST_BASE = 1e30


@dataclass(frozen=True)
class RopeShape:
    """What a baseline needs to know of a model: its base, rotary dimension and original length."""

    rope_theta: float
    rotary_dim: int
    original_length: int

    def __post_init__(self) -> None:
        if not 1 < self.rope_theta <= _LARGEST_BASE:
            rule = "a RoPE base is a finite number above 1"
            rule += f", and at most {_LARGEST_BASE:g}" if 1 < self.rope_theta < math.inf else ""
            raise UserError("rope_theta", got=self.rope_theta, rule=rule, do="correct the model's config.json")

    @property
    def pairs(self) -> int:
        """Number of rotated pairs, d/2."""
        return self.rotary_dim // 2

    @property
    def index(self) -> Vector:
        """Pair indices 0 .. d/2 - 1."""
        return np.arange(self.pairs, dtype=np.float64)

    @property
    def periods(self) -> Vector:
        """T_i: tokens for one full turn of pair i."""
        return 2 * math.pi * self.rope_theta ** (2 * self.index / self.rotary_dim)

    def pair_with_turns(self, turns: float) -> float:
        """The (real) pair index whose period fits `turns` times into the original length."""
        turns_of_first = self.original_length / (2 * math.pi * turns)
        return self.rotary_dim * math.log(turns_of_first) / (2 * math.log(self.rope_theta))


def critical_dimension(shape: RopeShape, periods: float = 1.0) -> float:
    """i* = (d/2) log_b(L / 2 pi): beyond this pair one turn is longer than the training window.

    As a real pair index (arXiv 2310.05209; LongRoPE2, arXiv 2502.20082, gives twice its ceiling as a dimension).
    `periods` = 10 gives LongRoPE2's lower bound, ten turns in the window.
    """
    return shape.pair_with_turns(periods)


def position_interpolation(shape: RopeShape, ratio: float) -> Vector:
    """lambda_i = s (arXiv 2306.15595)."""
    return np.full(shape.pairs, ratio)


def ntk(shape: RopeShape, ratio: float) -> Vector:
    """NTK-aware: base b s^(d/(d-2)), that is lambda_i = s^(2i/(d-2)): 1 at the first pair, s at the last."""
    return _power_of_last(shape, ratio)


def dynamic_ntk(shape: RopeShape, ratio: float, stretch: float | None = None) -> Vector:
    """transformers' dynamic NTK with factor = s: alpha = s l/L - (s - 1), l the current length.

    `stretch` is l/L, s by default: alpha = s^2 - s + 1 at the target length.
    """
    stretch = ratio if stretch is None else stretch
    return _power_of_last(shape, ratio * max(stretch, 1.0) - (ratio - 1))


def _power_of_last(shape: RopeShape, last: float) -> Vector:
    # With a single pair there is nothing between the first and the last: it is the last.
    return last ** (2 * shape.index / (shape.rotary_dim - 2)) if shape.pairs > 1 else np.array([last])


def ntk_critical(shape: RopeShape, ratio: float) -> Vector:
    """NTK by critical dimension: lambda_i = s^(i/i*), so that pair i* is interpolated exactly (arXiv 2310.05209)."""
    return ratio ** (shape.index / max(critical_dimension(shape), 1.0))


def yarn_published(shape: RopeShape, ratio: float, fast: float = 32.0, slow: float = 1.0) -> Vector:
    """YaRN as printed (arXiv 2309.00071): frequencies blended linearly in the number of turns r = L/T_i."""
    turns = shape.original_length / shape.periods
    return _blend(np.clip((turns - slow) / (fast - slow), 0.0, 1.0), ratio)


def yarn(
    shape: RopeShape,
    ratio: float,
    fast: float = 32.0,
    slow: float = 1.0,
    *,
    high: float | None = None,
    truncate: bool = True,
) -> Vector:
    """YaRN as everyone implements it: frequencies blended linearly in the pair index, from lo to hi.

    lo and hi are the pairs with `fast` and `slow` turns in the original window, rounded outwards (`truncate`).
    `high` sets hi instead: the pair from which on lambda = s.
    """
    low = shape.pair_with_turns(fast)
    top = shape.pair_with_turns(slow) if high is None else high
    if truncate:
        low, top = math.floor(low), math.ceil(top)
    low, top = max(low, 0), min(top, shape.rotary_dim - 1)
    if low == top:
        top += 0.001  # the same guard against a division by zero as in transformers
    kept = 1 - np.clip((shape.index - low) / (top - low), 0.0, 1.0)
    return _blend(kept, ratio)


def _blend(kept: Vector, ratio: float) -> Vector:
    """Rescale factors of frequencies that keep a share `kept` and are interpolated for the rest."""
    return 1.0 / ((1.0 - kept) / ratio + kept)


def yarn_critical(shape: RopeShape, ratio: float, dimension: float | None = None) -> Vector:
    """YaRN with a given critical dimension (a pair index; the theoretical one by default): lambda = s from it on."""
    return yarn(shape, ratio, high=critical_dimension(shape) if dimension is None else dimension)


def llama3(shape: RopeShape, ratio: float, low: float = 1.0, high: float = 4.0) -> Vector:
    """Llama 3.1's scaling: short periods kept, long ones interpolated, linear in turns between `high` and `low`.

    Where these are equal, as in Llama 4 Scout, there is nothing between.
    """
    turns = shape.original_length / shape.periods
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else (turns > low).astype(np.float64)
    return _blend(smooth, ratio)


def su_attention_factor(ratio: float, original_length: int) -> float:
    """sqrt(1 + ln s / ln L), 1 where nothing is extended: the attention factor of LongRoPE's code."""
    return math.sqrt(1 + math.log(ratio) / math.log(original_length)) if ratio > 1 and original_length > 1 else 1.0


def yarn_attention_factor(ratio: float) -> float:
    """0.1 ln s + 1, 1 where nothing is extended (arXiv 2309.00071, eq. 22)."""
    return 0.1 * math.log(ratio) + 1 if ratio > 1 else 1.0


def attention_factor(rule: str, ratio: float, original_length: int) -> float:
    """The attention factor of a rule: su, yarn, none, or a number. Raises UserError for anything else."""
    if rule == "su":
        return su_attention_factor(ratio, original_length)
    if rule == "yarn":
        return yarn_attention_factor(ratio)
    if rule == "none":
        return 1.0
    try:
        value = float(rule)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        rules = "it is su, yarn, none or a positive number"
        raise UserError("--attention-factor", got=repr(rule), rule=rules, do="choose one of them")
    return value


@dataclass(frozen=True)
class Method:
    """A baseline by name: its rescale vector, and the rule of its own attention factor."""

    vector: Callable[[RopeShape, float], Vector]
    own_attention: str = "none"


METHODS: dict[str, Method] = {
    "pi": Method(position_interpolation),
    "ntk": Method(ntk),
    "ntk-cd": Method(ntk_critical),
    "dynamic-ntk": Method(dynamic_ntk),
    "yarn": Method(yarn, own_attention="yarn"),
    "yarn-paper": Method(yarn_published, own_attention="yarn"),
    "yarn-rcd": Method(yarn_critical, own_attention="yarn"),
    "llama3": Method(llama3),
}
"""The baselines by name."""


def baseline(
    name: str, shape: RopeShape, target: int, length: int | None = None, trained: int | None = None
) -> RopeFactors:
    """Factors of a method set up for a target length; `NAME+su` replaces its own attention factor by su.

    trained: the length that su counts from, by default the original one.

    Only dynamic-ntk depends on the `length` of the sequence (the target by default). For a target at or below the
    original length every method is the base model. Raises UserError for an unknown method.
    """
    stem, plus, rule = name.partition("+")
    if stem not in METHODS or (plus and rule not in RULES):
        known = ", ".join(["none", *METHODS])
        raise UserError(
            "method", got=repr(name), rule=f"known are {known}, all but none also with +su", do="choose one of them"
        )
    ratio = max(1.0, target / shape.original_length)
    if stem == "dynamic-ntk" and length is not None:
        vector = dynamic_ntk(shape, ratio, length / shape.original_length)
    else:
        vector = METHODS[stem].vector(shape, ratio)
    chosen = attention_factor(rule or METHODS[stem].own_attention, ratio, trained or shape.original_length)
    return RopeFactors(up_to=target, rescale=tuple(vector.tolist()), attention_factor=chosen)
