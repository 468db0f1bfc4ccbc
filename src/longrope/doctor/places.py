"""Where a configuration says things, and under which names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longrope.doctor.view import BY_TYPE, View, check

# Rope types that transformers knows
_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
# Classes that know another name of the default one
_MROPE = ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")


def _rename_su(view: View) -> None:
    for _, rope in view.ropes:
        rope |= {key: "longrope" for key in ("rope_type", "type") if rope.get(key) == "su"}


def _su_is_known(view: View) -> bool:
    """Whether transformers renames it: for Phi3, after it has looked for the original length of a longrope."""
    return view.family == "phi3" and view.used.get("original_max_position_embeddings") is not None


@check("su-name", lambda view: "warning" if _su_is_known(view) else "error", "call it longrope", _rename_su)
def _su(view: View) -> Iterator[str]:
    if any("su" in (rope.get("rope_type"), rope.get("type")) for _, rope in view.ropes):
        if view.family == "phi3" and not _su_is_known(view):
            yield "the type is called su: transformers then reads no original length at the top level, and fails"
        else:
            yield "the type is called su: transformers renames it for Phi3 alone, and fails on it elsewhere"


def _same_names(view: View) -> None:
    for _, rope in view.ropes:
        rope["rope_type"] = rope["type"] = rope.get("rope_type") or rope.get("type")


@check("type-names-differ", "error", "give both the same value", _same_names)
def _types_differ(view: View) -> Iterator[str]:
    for key, rope in view.ropes:
        if len({rope.get("rope_type"), rope.get("type")} - {None}) > 1:
            names = f"rope_type {rope['rope_type']} and type {rope['type']}"
            yield f"{key} has {names}: vLLM refuses it, transformers takes the first"


@check("type-name-old", "note", "write rope_type beside it", _same_names)
def _type_old(view: View) -> Iterator[str]:
    for key, rope in view.ropes:
        if rope.get("type") and not rope.get("rope_type"):
            yield f"{key} names its type by the old key `type` alone"


@check("unknown-type", "error", f"use one of {', '.join(_KINDS)}")
def _unknown(view: View) -> Iterator[str]:
    known = view.kind in _KINDS or (view.kind == "mrope" and view.family in _MROPE)
    if view.ropes and not known:
        yield f"rope_type {view.kind!r} is none that transformers knows"


def _write_both(view: View) -> None:
    used: dict[str, Any] = dict(view.used)
    theta = used.get("rope_theta", view.text.get("rope_theta"))
    if theta is not None:
        used["rope_theta"] = view.text["rope_theta"] = theta
    if not view.by_type:
        view.text |= {"rope_parameters": used, "rope_scaling": dict(used)}


@check("one-place", "warning", "write it to rope_scaling and rope_parameters", _write_both)
def _one_place(view: View) -> Iterator[str]:
    # The other way round is no trap: every engine still reads rope_scaling
    if view.kind != "default" and [key for key, _ in view.ropes] == ["rope_parameters"] and not view.by_type:
        yield "the scaling is in rope_parameters alone: mlx-lm, SGLang and transformers 4 read rope_scaling"


def _alike(one: object, other: object) -> bool:
    return one == other or repr(one) == repr(other)  # as NaN is


@check("places-differ", "error", "make them equal", _write_both)
def _places_differ(view: View) -> Iterator[str]:
    if len(view.ropes) == 2 and not view.by_type:
        old, new = ({key: value for key, value in rope.items() if value is not None} for _, rope in view.ropes)
        if different := sorted(key for key in old.keys() & new.keys() if not _alike(old[key], new[key])):
            told = ", ".join(different)
            yield f"rope_scaling and rope_parameters differ in {told}: transformers takes the first, vLLM the second"


@check("theta-lost", "error", "write the rope_theta that the model was trained with")
def _theta_lost(view: View) -> Iterator[str]:
    places = [rope.get("rope_theta") for _, rope in view.ropes]
    places += [view.text.get(key) for key in ("rope_theta", "rotary_emb_base")]
    own = view.family in BY_TYPE and view.text is not view.config  # Gemma 3 as it is published: its class has them
    lost = all(value is None for value in places) and not view.null_theta
    if view.ropes and not own and lost:
        yield "no rope_theta anywhere: each engine takes a default of its own, silently"


@check("theta-below", "warning", "write it at the top level, too", _write_both)
def _theta_below(view: View) -> Iterator[str]:
    inner = any(rope.get("rope_theta") is not None for _, rope in view.ropes)
    if view.kind != "default" and inner and view.text.get("rope_theta") is None and not view.by_type:
        yield "rope_theta is not at the top level: mlx-lm then uses 10000, older SGLang finds none"


def _one_theta(view: View) -> None:
    theta = view.used.get("rope_theta")
    if theta is not None:
        view.text["rope_theta"] = theta
        for _, rope in view.ropes:
            rope["rope_theta"] = theta


@check("theta-differs", "error", "keep the one that was trained with; the mend keeps that of the scaling", _one_theta)
def _theta_differs(view: View) -> Iterator[str]:
    places = [rope.get("rope_theta") for _, rope in view.ropes]
    places += [] if view.by_type else [view.text.get("rope_theta")]
    values = {float(value) for value in places if isinstance(value, int | float)}
    if len(values) > 1:
        yield f"rope_theta is {' and '.join(f'{value:g}' for value in sorted(values))} in different places"


def _explicit_head(view: View) -> None:
    heads, hidden = view.text.get("num_attention_heads"), view.text.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        view.text["head_dim"] = hidden // heads


@check(
    "head-dim-none",
    lambda view: "note" if view.kind == "default" else "error",
    "write hidden_size / num_attention_heads",
    _explicit_head,
)
def _head_dim(view: View) -> Iterator[str]:
    if "head_dim" in view.text and view.text["head_dim"] is None:
        yield "head_dim is null: transformers fails on it when it checks a scaling"


@check("local-layers", lambda view: "note" if view.family == "gemma2" else "error", "extend the global layers alone")
def _local(view: View) -> Iterator[str]:
    if view.kind != "default" and view.family in BY_TYPE and not view.by_type:
        yield f"{view.family} has a RoPE for each type of layer, and the scaling is flat, for none of them by name"
    elif view.kind != "default" and view.family == "gemma2":
        yield "gemma2 has one RoPE for all layers: local ones are rescaled with the global ones"
