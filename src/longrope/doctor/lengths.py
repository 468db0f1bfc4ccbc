"""Lengths that contradict each other, or what is around them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from longrope.doctor.view import SWITCHING, View, check, positive

# Classes that have local layers by design, whatever their configuration says of them
_LOCAL = ("gemma2", "gemma3", "gemma3_text", "cohere2", "gpt_oss", "olmo3", "exaone4")


def _original_from_table(view: View) -> None:
    if view.folder.table is not None:
        for _, rope in view.ropes:
            rope["original_max_position_embeddings"] = view.folder.table.original_length


@check("original-missing", "error", "write the length that the model was trained on", _original_from_table)
def _original_missing(view: View) -> Iterator[str]:
    places = (view.text, view.used)
    if view.kind == "longrope" and all(place.get("original_max_position_embeddings") is None for place in places):
        yield "no original_max_position_embeddings: it becomes max_position_embeddings, and long factors are never used"


def _one_original(view: View) -> None:
    for _, rope in view.ropes:
        rope["original_max_position_embeddings"] = view.original


@check("original-differs", "error", "make them equal; the mend keeps that of the top level", _one_original)
def _original_differs(view: View) -> Iterator[str]:
    top, inner = (place.get("original_max_position_embeddings") for place in (view.text, view.used))
    if top and inner and top != inner:
        who = "transformers takes the first, mlx-lm the second"
        yield f"original_max_position_embeddings is {top} at the top level and {inner} in the scaling: {who}"


@check("not-longer", "error", "write the extended length to max_position_embeddings")
def _not_longer(view: View) -> Iterator[str]:
    # With equal lists nothing is lost: a window that is served as it was
    if view.two_regimes and view.original and view.longest and view.longest <= view.original:
        told = f"max_position_embeddings {view.longest} is not beyond the original {view.original}"
        yield f"{told}: the long factors are never used"


def _lengths_agree(view: View) -> None:
    if view.kind == "longrope":  # whose factors are in its lists: `factor` only describes the lengths
        for _, rope in view.ropes:
            rope["factor"] = view.ratio
    elif view.original:  # what yarn rotates by
        view.text["max_position_embeddings"] = round(float(view.used["factor"]) * view.original)


@check("factor-mismatch", "warning", "let factor be max_position_embeddings / original", _lengths_agree)
def _factor_mismatch(view: View) -> Iterator[str]:
    factor = view.used.get("factor")
    if view.kind not in ("longrope", "yarn") or not view.ratio or not positive(factor):
        return
    if not math.isclose(factor, view.ratio, rel_tol=1e-6):
        told = f"factor is {factor:g} and max / original {view.ratio:g}"
        if view.kind == "longrope":
            yield f"{told}: transformers computes its attention factor from the first, mlx-lm from the second"
        else:
            yield f"{told}: the model rotates for the first, servers may take the second for its window"


def _widen(view: View) -> None:
    view.text["sliding_window"] = view.longest


@check("sliding-window", "error", "widen sliding_window to the extended length", _widen)
def _sliding(view: View) -> Iterator[str]:
    window, longest = view.text.get("sliding_window"), view.longest
    everywhere = "full_attention" not in (view.text.get("layer_types") or ()) and view.family not in _LOCAL
    on = view.text.get("use_sliding_window", True) and view.kind != "default" and everywhere
    extended = not (view.kind == "longrope" and view.ratio and view.ratio <= 1)
    if on and extended and isinstance(window, int) and longest and window < longest:
        yield f"every layer sees {window} tokens of the {longest} that the model is extended to"


@check("tokenizer-length", "warning", "write the extended length to tokenizer_config.json")
def _tokenizer(view: View) -> Iterator[str]:
    longest = (view.folder.tokenizer or {}).get("model_max_length")
    if view.kind != "default" and isinstance(longest, int | float) and view.longest and longest < view.longest:
        yield f"the tokenizer's model_max_length is {longest:g}: pipelines and servers cut longer texts off"


@check("starts-short", "note", "start vLLM with --max-model-len, or export --engine vllm")
def _starts_short(view: View) -> Iterator[str]:
    if view.kind == "longrope" and view.text.get("original_max_position_embeddings") and view.family not in SWITCHING:
        yield "with original_max_position_embeddings at the top level, vLLM starts with the original length"
