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
"""What `--engine` may be."""
_WINDOWS = ("dynamic", "long", "short")
# Families whose class has an attention factor for each of its lists
_OWN_MSCALES = ("phimoe",)
# Families whose transformers class wants the original length at the top level
_ORIGINAL_ABOVE = ("phi3", "phimoe", "phi4_multimodal")
# Families that rotate neighbouring pairs: LongRoPE in vLLM and SGLang is for halves
_NEIGHBOURS = ("cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium", "llama4_text")
# Families whose file in mlx-lm 0.32 hands `rope_scaling` to the rotation; the others drop it without a word
_IN_MLX = (
    "apertus gemma3_text granite granitemoe llama mistral olmo2 olmo3 olmoe phi3 phimoe qwen2 qwen3 seed_oss smollm3"
).split()


def check_names(engine: str, window: str) -> None:
    """Raise UserError for an engine or a window that is none."""
    for flag, value, known in (("--engine", engine, ENGINES), ("--window", window, _WINDOWS)):
        if value not in known:
            raise UserError(flag, got=repr(value), rule=f"it is one of {', '.join(known)}", do="choose one of them")


def check_family(engine: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a model whose code in an engine does not rotate by factors.

    config: of the language model, as transformers has it. What can be a GGUF file, `gguf_file.check_architecture` says.
    """
    family, rule, do = str(config.get("model_type")), "", "choose another engine"
    if engine in ("vllm", "sglang") and family in _NEIGHBOURS:
        rule = f"its LongRoPE rotates halves of a head, {family} neighbouring pairs"
    elif engine == "mlx" and family not in _IN_MLX:
        rule = f"mlx-lm's {family} rotates without factors; those that use them are {', '.join(_IN_MLX)}"
    elif engine == "mlx" and (local := _local_theta(config)) and family == "olmo3":
        parameters = config["rope_parameters"]
        if not math.isclose(local, parameters["full_attention"]["rope_theta"]):
            rule = "mlx-lm's olmo3 has one rope_theta for local and global layers"
    if rule:
        raise UserError(f"--engine {engine}", got=family, rule=rule, do=do)


def _local_theta(config: Mapping[str, Any]) -> float | None:
    """rope_theta of local layers that have a RoPE of their own."""
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    return float(local["rope_theta"]) if isinstance(local, Mapping) and local.get("rope_theta") else None


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
        original = served.original_length
        rows = (replace(served, rows=rows).row_for(original).with_values(up_to=original), rows[-1])
    one = family not in _OWN_MSCALES and engine in ("transformers", "gguf")
    if one:
        rows = tuple(row.with_values(attention_factor=rows[-1].attention_factor) for row in rows)
    if engine == "mlx" and family not in _OWN_MSCALES:
        standard = standard_attention_factor(replace(served, rows=rows))
        rows = tuple(row.with_values(attention_factor=standard) for row in rows)
    return replace(served, rows=rows)


def engine_config(
    config: Mapping[str, Any], served: FactorTable, engine: str, *, computes_head_dim: bool = False
) -> dict[str, Any]:
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
            if isinstance(inner, dict):  # the form before transformers 5: flat, of the global layers alone
                text["rope_scaling"] = dict(both)
                text["rope_local_base_freq"] = _local_theta(text)
                text |= _pattern(text)
                break
    if engine == "vllm" and text.get("model_type") not in _ORIGINAL_ABOVE:
        # With it, a server starts with the original length; inside the scaling it is all that is needed.
        text.pop("original_max_position_embeddings", None)
    rope = text.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("partial_rotary_factor") is not None:
        text["partial_rotary_factor"] = rope["partial_rotary_factor"]  # mlx-lm's phi3 looks for it there alone
    sized = text.get("head_dim") is None and text.get("kv_channels") is None and not computes_head_dim
    if sized and text.get("hidden_size") and text.get("num_attention_heads"):
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    return {**written, "text_config": text} if nested else text


def _pattern(text: Mapping[str, Any]) -> dict[str, int]:
    """How often a layer is global, which mlx-lm's Gemma 3 asks for and transformers 5 no longer saves."""
    kinds = text.get("layer_types") or ()
    if text.get("sliding_window_pattern") or "full_attention" not in kinds:
        return {}
    every = list(kinds).index("full_attention") + 1
    regular = all((kind == "full_attention") == ((at + 1) % every == 0) for at, kind in enumerate(kinds))
    return {"sliding_window_pattern": every} if regular else {}


def engine_attention_factors(
    text: Mapping[str, Any], written: FactorTable, engine: str
) -> tuple[float | None, float | None]:
    """The attention factors that an engine has for its short and its long list.

    text: the language model's part of a config.json, and written: the table that transformers reads there.
    """
    place = text.get("rope_parameters" if engine == "vllm" else "rope_scaling")
    rope = place.get("full_attention", place) if isinstance(place, Mapping) else {}
    standard = standard_attention_factor(written)
    if engine in ("vllm", "sglang") or text.get("model_type") in _OWN_MSCALES:
        return rope.get("short_mscale", standard), rope.get("long_mscale", standard)
    first, last = written.rows[0].attention_factor, written.rows[-1].attention_factor
    return (standard, standard) if engine == "mlx" else (first, last)


def missing_keys(text: Mapping[str, Any], served: FactorTable, engine: str) -> list[str]:
    """What an engine looks for in the language model's part of config.json and does not find there, a phrase each.

    transformers, which reads either form of the scaling, is not asked.
    """
    family, found = str(text.get("model_type")), []
    place = {"vllm": "rope_parameters", "sglang": "rope_scaling", "mlx": "rope_scaling"}.get(engine)
    if place is None:
        return []
    rope = text.get(place)
    rope = rope.get("full_attention", rope) if isinstance(rope, Mapping) else {}
    found += [f"{place}.{key}" for key in ("rope_type", "short_factor", "long_factor") if not rope.get(key)]
    above = family in _ORIGINAL_ABOVE and engine == "mlx"
    original = (text if above else rope).get("original_max_position_embeddings")
    if original != served.original_length:
        found.append("original_max_position_embeddings" if above else f"{place}.original_max_position_embeddings")
    theta = text.get("rope_theta") if engine != "vllm" else rope.get("rope_theta", text.get("rope_theta"))
    if not isinstance(theta, int | float) or not math.isclose(theta, served.rope_theta):
        found.append("rope_theta")
    if engine == "mlx" and family == "phi3":
        head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        if int(head * text.get("partial_rotary_factor", 1.0)) != served.rotary_dim:
            found.append("partial_rotary_factor")
        found += [] if rope.get("type") == "longrope" else [f"{place}.type"]
    return found


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
