"""The numbers that a scaling is computed from, and the base that it scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longrope.configs import SCALINGS, table_from_config
from longrope.doctor.view import View, check, positive
from longrope.errors import UserError
from longrope.rotating import never_turned

# What a scaling is computed with where the configuration does not say it, or says what another check tells of
_LENGTH, _THETA, _PAIRS = 4096, 10000.0, 8
# Scalings whose original length transformers takes from the top level
_OF_ORIGINAL = ("yarn", "llama3", "longrope")


def _alone(view: View) -> dict[str, Any]:
    """A configuration of the scaling alone: all that other checks look at is as it should be."""
    keys = ("model_type", "rope_parameters", "rope_scaling", "original_max_position_embeddings")
    alone = View({key: view.text[key] for key in keys if key in view.text})
    pairs = view.pairs or _PAIRS
    theta = view.used.get("rope_theta", view.text.get("rope_theta"))
    for _, rope in alone.ropes:
        rope.pop("mrope_section", None)
        rope["partial_rotary_factor"] = 1.0  # the class of model_type may take another where none is said
        rope["rope_theta"] = theta if positive(theta) and theta > 1 else _THETA
        if alone.kind == "longrope":
            rope |= {"short_factor": [1.0] * pairs, "long_factor": [1.0] * pairs}
            if "long_mscale" not in rope:
                rope |= {"short_mscale": 1.0, "long_mscale": 1.0}
    return {**alone.config, "head_dim": 2 * pairs, "max_position_embeddings": view.longest or view.original or _LENGTH}


@check("scaling-values", "error", "write the numbers that the model was extended with")
def _values(view: View) -> Iterator[str]:
    if view.kind in SCALINGS and view.kind != "default":
        try:
            table_from_config(_alone(view))
        except UserError as error:
            told = f"{error.what}: {error.got}".removeprefix("config: ")
            yield f"{view.kind} cannot be computed: {told}; {error.rule}"


def _drop_null(view: View) -> None:
    view.text.pop("original_max_position_embeddings")


@check("original-null", "error", "leave it out at the top level", _drop_null)
def _original_null(view: View) -> Iterator[str]:
    top = view.text.get("original_max_position_embeddings", 0)
    if top is None and view.kind in _OF_ORIGINAL and not view.by_type:
        yield "original_max_position_embeddings is null at the top level: transformers takes it from there, and fails"


@check("theta-values", "error", "write the rope_theta that the model was trained with")
def _theta(view: View) -> Iterator[str]:
    places = [(f"{key}.rope_theta", rope.get("rope_theta")) for key, rope in view.ropes]
    places += [(key, view.text.get(key)) for key in ("rope_theta", "rotary_emb_base")]
    for name, value in places:
        if value is not None and not positive(value):
            yield f"{name} is {value:g}: the base of a RoPE is a finite, positive number"
    if view.null_theta and not never_turned(view.text):
        yield "rope_theta is null: transformers takes it for the base, and fails"
