"""What engines do with a configuration that is right in itself, and the table beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from longrope.configs import language_part, rope_config
from longrope.doctor.view import SWITCHING, View, check, positive, without_scaling
from longrope.errors import UserError
from longrope.rotating import never_turned, said_to_turn_globally

# Architectures of transformers whose llama.cpp graphs pass rescale factors to the rotation
_IN_LLAMA_CPP = (
    "llama mistral mixtral phi3 phimoe minicpm minicpm3 granite granitemoe apertus".split()
)  # fmt: skip
_ANY_LENGTH = 2048


@check("stale-cache", "warning", "serve with longrope, or export --window long")
def _stale(view: View) -> Iterator[str]:
    if view.two_regimes and view.family not in SWITCHING:
        told = "stock transformers keeps keys of the short factors when a text passes the original length"
        yield f"{told}: `generate` is wrong from there on for {view.family or 'this class'}"


@check("sglang-regimes", "note", "export --engine sglang, which writes one list")
def _sglang(view: View) -> Iterator[str]:
    if view.two_regimes:
        yield "SGLang chooses short or long for all requests of a pass together, and keeps their caches"


@check("llama-cpp", "note", "serve it with another engine")
def _llama_cpp(view: View) -> Iterator[str]:
    if view.kind == "longrope" and view.family and view.family not in _IN_LLAMA_CPP:
        yield f"llama.cpp's graph of {view.family} passes no factors: a GGUF of it has plain RoPE"


@check("table-of-another-model", "error", "put the model's own factors.json there")
def _other_table(view: View) -> Iterator[str]:
    table, pairs = view.folder.table, view.pairs
    if table is None or pairs is None:
        return
    theta = view.used.get("rope_theta", view.text.get("rope_theta"))
    if table.rotary_dim != 2 * pairs:
        yield f"factors.json has rotary_dim {table.rotary_dim}, the model {2 * pairs}"
    if isinstance(theta, int | float) and not math.isclose(theta, table.rope_theta):
        yield f"factors.json has rope_theta {table.rope_theta:g}, the model {theta:g}"


@check("table-differs", "warning", "export again")
def _table_differs(view: View) -> Iterator[str]:
    table, long = view.folder.table, view.used.get("long_factor")
    if table is None or view.kind != "longrope" or not isinstance(long, list):
        return
    last = table.rows[-1].rescale
    if (
        len(long) == len(last)
        and all(map(positive, long))
        and any(not math.isclose(a, b, rel_tol=1e-6) for a, b in zip(long, last, strict=True))
    ):
        yield "factors.json and long_factor differ: longrope uses the first, every other engine the second"


@check("table-not-served", "note", "longrope export writes a checkpoint for an engine")
def _not_served(view: View) -> Iterator[str]:
    table = view.folder.table
    if table is not None and view.kind == "default" and any(set(row.rescale) != {1.0} for row in table.rows):
        yield "factors.json extends the model and config.json does not: other engines run the model as it was"


@check("not-supported", "note", "choose a model with ordinary RoPE, or complete config.json")
def _not_supported(view: View) -> Iterator[str]:
    why = never_turned(view.text)
    if not why and not said_to_turn_globally(view.text):
        why = f"the layers of {view.family} that see the whole text do not rotate"
    if why:
        yield f"longrope cannot extend it: {why}"
        return
    text = without_scaling(language_part(view.config))
    if view.family:  # its class has a length, where it has heads to rotate
        text.setdefault("max_position_embeddings", _ANY_LENGTH)
    try:
        rope_config(text)
    except UserError as error:
        if view.text is view.config or not str(error.got).startswith(
            "no "
        ):  # a nested one leaves out what its class has
            yield f"longrope cannot extend it: {error.what}: {error.got}; {error.rule}"
