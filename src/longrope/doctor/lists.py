"""The factors themselves, and the attention factor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from longrope.doctor.view import View, check, positive
from longrope.errors import shown


@check("list-missing", "error", "write it: 1 for each pair, or the factors that were searched")
def _missing(view: View) -> Iterator[str]:
    if view.kind == "longrope":
        yield from (f"no {key}" for key in ("short_factor", "long_factor") if key not in view.used)


def _wrong_lengths(view: View) -> Iterator[tuple[str, int, int, bool]]:
    """(name, numbers, pairs, whether they are for the whole head) of each list that is of a wrong length."""
    pairs = view.pairs
    share: Any = view.used.get("partial_rotary_factor", view.text.get("partial_rotary_factor"))
    for key, value in view.lists() if view.kind == "longrope" and pairs else ():
        if isinstance(value, list) and pairs and len(value) != pairs and not any(isinstance(x, list) for x in value):
            whole = isinstance(share, int | float) and 0 < share < 1 and len(value) == round(pairs / share)
            yield key, len(value), pairs, whole


@check("list-length", "error", "use factors that were searched for this model")
def _length(view: View) -> Iterator[str]:
    for key, count, pairs, whole in _wrong_lengths(view):
        if not whole:
            rule = f"the model rotates {pairs} pairs"
            yield f"{key} has {count} numbers and {rule}: transformers warns, and then fails to build it"


@check("partial-rotary", "error", "search factors for the rotated pairs")
def _partial(view: View) -> Iterator[str]:
    for key, count, pairs, whole in _wrong_lengths(view):
        if whole:
            yield f"{key} has a number for each pair of the head, {count}; the model rotates {pairs} (partial rotary)"


@check("per-layer-lists", "error", "keep the vector that is meant: one serves all layers")
def _per_layer(view: View) -> Iterator[str]:
    for key, value in view.lists():
        if isinstance(value, list) and any(isinstance(item, list) for item in value):
            yield f"{key} is a list of lists: the model builds, and its first forward pass fails"


@check("factor-values", "error", "factors are finite, positive numbers")
def _values(view: View) -> Iterator[str]:
    for key, value in view.lists():
        items = value if isinstance(value, list) else [value]
        if bad := [each for each in items if not isinstance(each, list) and not positive(each)]:
            yield f"{key} has {shown(bad[0])} among its factors"


def _write_mscales(view: View) -> None:
    for _, rope in view.ropes:
        rope.setdefault("short_mscale", view.attention)
        rope.setdefault("long_mscale", view.attention)


def _is_standard(view: View, factor: float) -> bool:
    return view.standard is not None and math.isclose(factor, view.standard, rel_tol=1e-4)


@check("mscale-missing", "warning", "write short_mscale and long_mscale", _write_mscales)
def _mscale_missing(view: View) -> Iterator[str]:
    given = view.used.get("attention_factor")
    if view.kind != "longrope" or "long_mscale" in view.used or view.family == "phimoe":
        return
    if isinstance(given, int | float) and not _is_standard(view, given):
        who = "vLLM and SGLang take short_mscale and long_mscale, else the standard one"
        yield f"attention_factor {given:g} is read by transformers alone: {who}"


def _write_attention(view: View) -> None:
    for _, rope in view.ropes:
        if "long_mscale" in rope:
            rope["attention_factor"] = rope["long_mscale"]


@check("mscale-alone", "warning", "write attention_factor, too", _write_attention)
def _mscale_alone(view: View) -> Iterator[str]:
    long = view.used.get("long_mscale")
    alone = view.used.get("attention_factor") is None and view.family != "phimoe"
    if view.kind == "longrope" and alone and isinstance(long, int | float) and not _is_standard(view, long):
        yield f"long_mscale {long:g} is read by vLLM and SGLang alone: transformers uses the standard attention factor"


@check("mscale-phimoe", "error", "write them", _write_mscales)
def _phimoe(view: View) -> Iterator[str]:
    if view.family == "phimoe" and view.kind == "longrope" and "long_mscale" not in view.used:
        yield "PhiMoE's class needs short_mscale and long_mscale"


@check(
    "attention-at-short-length",
    "warning",
    "search with --attention-factor none, or serve with longrope, which has one for each row",
)
def _attention_short(view: View) -> Iterator[str]:
    short, factor = view.used.get("short_factor"), view.attention
    ones = isinstance(short, list) and all(positive(each) and math.isclose(each, 1.0) for each in short)
    if view.kind == "longrope" and ones and factor is not None and abs(factor - 1) > 1e-6 and view.family != "phimoe":
        yield f"the short factors are 1, but not the attention factor, {factor:.4g}: short texts have another model"


@check("attention-not-standard", "note", "use another engine than mlx-lm and ollama's converter")
def _not_standard(view: View) -> Iterator[str]:
    if view.kind == "longrope" and view.attention and view.standard and not _is_standard(view, view.attention):
        told = f"the attention factor is {view.attention:.4g} where the lengths give {view.standard:.4g}"
        yield f"{told}: mlx-lm and ollama's converter compute the second"
