"""What each engine can express of a factor table, and the configuration that it wants; docs/engines.md has sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from longrope.baselines import su_attention_factor
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors

ENGINES = ("transformers", "vllm", "sglang", "mlx", "gguf")
WINDOWS = ("dynamic", "long", "short")
# Families whose class has an attention factor for each of its lists
_OWN_MSCALES = ("phimoe",)
# Families whose transformers class wants the original length at the top level
_ORIGINAL_ABOVE = ("phi3", "phimoe", "phi4_multimodal")


def check_names(engine: str, window: str) -> None:
    """Raise UserError for an engine or a window that is none."""
    for flag, value, known in (("--engine", engine, ENGINES), ("--window", window, WINDOWS)):
        if value not in known:
            raise UserError(flag, got=repr(value), rule=f"it is one of {', '.join(known)}", do="choose one of them")


def table_for_window(table: FactorTable, window: str) -> FactorTable:
    """The table that a window leaves: all rows of `dynamic`, the last at every length of `long`, the first of `short`.

    Raises UserError for an unknown window.
    """
    check_names(ENGINES[0], window)
    if window == "dynamic":
        return table
    short = table.rows[0].with_values(up_to=table.original_length)
    if window == "short":
        return replace(table, rows=(short,))
    # transformers uses its long list beyond the original length only, so a configuration holds the long row twice.
    long = table.rows[-1]
    if long.up_to <= table.original_length:
        return replace(table, rows=(long.with_values(up_to=table.original_length),))
    return replace(table, rows=(long.with_values(up_to=table.original_length), long))


def standard_attention_factor(table: FactorTable) -> float:
    """What engines compute from the lengths by themselves: sqrt(1 + ln s / ln L), 1 where nothing is extended."""
    return su_attention_factor(max(1.0, table.rows[-1].up_to / table.original_length), table.original_length)


def losses(served: FactorTable, engine: str, window: str, family: str) -> list[str]:
    """What an engine cannot express of a served table, a sentence each."""
    found, rows = [], served.rows
    if any(row.start_tokens for row in rows):
        starts = ", ".join(str(row.start_tokens) for row in rows)
        found.append(f"start tokens ({starts}): no engine keeps them unscaled")
    if window == "dynamic" and engine == "sglang":
        found.append("two regimes: SGLang chooses for all requests of a pass together and keeps their caches")
    elif window == "dynamic" and engine == "mlx":
        found.append("two regimes: mlx-lm uses the long factors at every length")
    elif len(rows) > 2:
        found.append(f"{len(rows)} rows: engines have two, short and long")
    factors = {row.attention_factor for row in rows}
    if len(factors) > 1 and engine in ("transformers", "gguf") and family not in _OWN_MSCALES:
        told = " and ".join(f"{factor:.4g}" for factor in sorted(factors))
        found.append(f"attention factors of {told}: {engine} has one for all lengths")
    standard, last = standard_attention_factor(served), rows[-1].attention_factor
    if engine == "mlx" and family not in _OWN_MSCALES and not math.isclose(last, standard, rel_tol=1e-4):
        found.append(f"attention factor {last:.4g}: mlx-lm computes {standard:.4g} from the lengths")
    return found


def expressible(served: FactorTable, engine: str, window: str, family: str) -> FactorTable:
    """The nearest table that an engine can express: what `losses` names is left out of it."""
    rows = tuple(row.with_values(start_tokens=0) for row in served.rows)
    if window == "dynamic" and engine in ("sglang", "mlx"):
        rows = table_for_window(replace(served, rows=rows), "long").rows
    elif len(rows) > 2:
        rows = (rows[0], rows[-1])
    one = family not in _OWN_MSCALES and engine in ("transformers", "gguf")
    if one:
        rows = tuple(row.with_values(attention_factor=rows[-1].attention_factor) for row in rows)
    if engine == "mlx" and family not in _OWN_MSCALES:
        standard = standard_attention_factor(replace(served, rows=rows))
        rows = tuple(row.with_values(attention_factor=standard) for row in rows)
    return replace(served, rows=rows)


def engine_config(config: Mapping[str, Any], served: FactorTable, engine: str) -> dict[str, Any]:
    """A config.json as transformers wants it, with what another engine reads beside it, or reads otherwise."""
    if engine == "transformers":
        return dict(config)
    written = dict(config)
    nested = isinstance(written.get("text_config"), dict)
    text = dict(written["text_config"]) if nested else written
    scales = {"short_mscale": served.rows[0].attention_factor, "long_mscale": served.rows[-1].attention_factor}
    for key in ("rope_parameters", "rope_scaling"):
        value = text.get(key)
        if isinstance(value, dict):
            inner = value.get("full_attention")
            both = {**(inner if isinstance(inner, dict) else value), **scales}
            both["type"] = both["rope_type"]
            text[key] = {**value, "full_attention": both} if isinstance(inner, dict) else both
    if engine == "vllm" and text.get("model_type") not in _ORIGINAL_ABOVE:
        # With it, a server starts with the original length; inside the scaling it is all that is needed.
        text.pop("original_max_position_embeddings", None)
    if text.get("head_dim") is None and text.get("hidden_size") and text.get("num_attention_heads"):
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    return {**written, "text_config": text} if nested else text


def row_of_engine(served: FactorTable, engine: str, window: str, length: int, context: int) -> RopeFactors:
    """The row that an engine uses for a text of `length` tokens, where it serves a `context` of so many.

    transformers chooses by the text, vLLM and llama.cpp by what they serve, SGLang and mlx-lm have one row.
    """
    last = served.rows[-1]
    if len(served.rows) == 1 or window != "dynamic":
        return last
    if engine == "transformers":
        return served.row_for(length)
    if engine in ("vllm", "gguf"):
        return last if context > served.original_length else served.rows[0]
    return last
