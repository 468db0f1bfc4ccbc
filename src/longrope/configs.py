"""The RoPE of a transformers config, under every name its keys have had, and its scaling as a factor table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from longrope import baselines
from longrope.baselines import RopeShape, Vector
from longrope.errors import UserError, shown
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.lengths import LONGEST

SCALING_KEYS = frozenset(
    "rope_type type rope_theta factor attention_factor original_max_position_embeddings max_position_embeddings "
    "beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor high_freq_factor alpha "
    "short_factor long_factor short_mscale long_mscale".split()
)
"""Of rope_parameters: what a scaling, or the base, is made of. A class may keep others there that are of its own."""
_DEFAULT_THETA = 10000.0
_LARGEST_HEAD = 2**16
# What a class of transformers takes where a config.json says nothing, of classes that do not take 10000 and 1
_THETAS = {
    family: theta
    for theta, families in {
        1e5: "helium",
        1.5e5: "gpt_oss",
        1.6e5: "modernbert-decoder",
        5e5: "bitnet blt cohere ernie4_5 ernie4_5_moe exaone flex_olmo llama4_text mllama_text_model olmo3",
        1e6: "cwm emu3_text_model gemma3_text gemma3n_text lfm2 lfm2_moe minimax mixtral phimoe solar_open",
        2e6: "smollm3",
        5e6: "minimax_m2 minimax_m3_vl_text",
        8e6: "sarvam_moe",
        11158840.0: "hy_v3",
        1.2e7: "apertus apertus1p5_text",
    }.items()
    for family in families.split()
}
_SHARES = {
    **dict.fromkeys("gpt_neox stablelm qwen3_5_text qwen3_5_moe_text qwen3_next".split(), 0.25),
    **dict.fromkeys("bamba glm glm4 glm4_moe nemotron persimmon phi recurrent_gemma".split(), 0.5),
}


@dataclass(frozen=True)
class RopeConfig:
    """What a transformers config says about RoPE, of the layers that can be extended.

    rotary_dim: rotated dimensions of a head. original_length, max_length (`max_position_embeddings`): tokens.
    scaling: `default`, or the scaling that the checkpoint has already (`linear`, `yarn`, ...).
    """

    rope_theta: float
    rotary_dim: int
    original_length: int
    max_length: int
    scaling: str

    @property
    def shape(self) -> RopeShape:
        """The part that the baselines need."""
        return RopeShape(self.rope_theta, self.rotary_dim, self.original_length)


def rope_config(config: Mapping[str, Any], *, original_length: int | None = None) -> RopeConfig:
    """The RoPE of a parsed config.json, or of `PretrainedConfig.to_dict()`, under old and new key names.

    The original length is the argument, else `original_max_position_embeddings`, else `max_position_embeddings`.
    A missing rope_theta or partial_rotary_factor is what the class of its `model_type` takes, 10000 and 1 for most; a
    missing scaling is none, although a few classes (GPT-OSS, Ministral 3) have a whole RoPE of their own.
    Where a config.json leaves out more than these, `to_dict()` is the certain form.
    Raises UserError when there is no such RoPE, or one that cannot be extended.
    """
    return _parse(config, original_length).rope


def table_from_config(config: Mapping[str, Any], *, original_length: int | None = None) -> FactorTable:
    """The scaling of a parsed config.json as a factor table, equal to what transformers computes.

    longrope has a row for each of its lists, the others one row for every length; dynamic NTK, whose factors follow the
    length, has a row of ones and the factors at its longest length. Original length and errors as `rope_config`.
    """
    source = _parse(config, original_length)
    rope = source.rope
    rows = SCALINGS[rope.scaling](source)
    provenance = {"method": rope.scaling}
    return FactorTable(rope.rope_theta, rope.rotary_dim, rope.original_length, rows, provenance=provenance)


@dataclass(frozen=True)
class _Source:
    """A parsed config: its RoPE, its scaling parameters, and the length that transformers' formulas call original.

    family: its model_type, for classes with a rule of their own.
    """

    rope: RopeConfig
    parameters: Mapping[str, Any]
    trained_length: int
    family: str

    @property
    def shape(self) -> RopeShape:
        return RopeShape(self.rope.rope_theta, self.rope.rotary_dim, self.trained_length)

    def number(self, key: str, default: float | None = None) -> float:
        value = _number(self.parameters, key, default)
        if not 1 / LONGEST <= value <= LONGEST:  # beyond, formulas give infinities
            _bad(key, f"{value:g}", f"it is from {1 / LONGEST:g} to {LONGEST}")
        return value

    def every_length(self, vector: Vector, ratio: float, attention_factor: float = 1.0) -> tuple[RopeFactors, ...]:
        reach = max(self.rope.max_length, round(ratio * self.rope.original_length))
        return (RopeFactors(reach, tuple(vector.tolist()), attention_factor=attention_factor),)


def _parse(config: Mapping[str, Any], original_length: int | None) -> _Source:
    text = language_part(config)
    parameters = _rope_parameters(text)
    _refuse_other_kinds(text, parameters)
    scaling = _scaling_name(parameters)
    max_length = _whole(text, "max_position_embeddings")
    if max_length > LONGEST:
        _bad("max_position_embeddings", f"{max_length:.15g}", f"it is at most {LONGEST}")
    trained = _whole(parameters, "original_max_position_embeddings", default=max_length)
    if parameters.get("llama_4_scaling_beta") and original_length not in (None, trained):
        rule = f"its class scales queries by the original length that its configuration says, {trained}"
        raise UserError("--original-length", got=original_length, rule=rule, do="leave it out")
    rope = RopeConfig(
        rope_theta=_number(parameters, "rope_theta", _THETAS.get(str(text.get("model_type")), _DEFAULT_THETA)),
        rotary_dim=_rotary_dim(text, parameters),
        original_length=trained if original_length is None else original_length,
        max_length=max_length,
        scaling=scaling,
    )
    _ = rope.shape  # checks the base
    return _Source(rope, parameters, trained, str(text.get("model_type")))


def language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model: `text_config` where a multimodal config nests it."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _rope_parameters(text: Mapping[str, Any]) -> dict[str, Any]:
    """One flat dict under the new names, found as transformers finds it: the legacy `rope_scaling` wins."""
    old, new = (_of_extended_layers(text.get(key), key) for key in ("rope_scaling", "rope_parameters"))
    nested = _is_nested(text.get("rope_parameters")) or _is_nested(text.get("rope_scaling"))
    # Where each layer type has its own RoPE, a flat legacy dict updates that of the global layers.
    parameters = {**new, **old} if nested else dict(old or new)
    beside = {
        "rope_theta": _first(text, "rotary_emb_base", "global_rope_theta", "rope_theta"),
        "partial_rotary_factor": _first(text, "partial_rotary_factor", "rotary_pct"),
    }
    for key, value in beside.items():
        if parameters.get(key) is None:
            parameters[key] = value
    if nested:
        parameters.pop("truncate", None)  # transformers looks for it beside the layer types, where it is not
    original = text.get("original_max_position_embeddings")
    if original is not None and not nested:
        parameters["original_max_position_embeddings"] = original
    return parameters


def _of_extended_layers(value: object, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        _bad(key, shown(value), "it is an object")
    if not _is_nested(value):
        return value
    if value.get("full_attention", 0) is None:
        rule = "the layers that see the whole text rotate, as it is they that longer windows are new to"
        raise UserError("config", got=f"{key} without any for full_attention", rule=rule, do="choose another model")
    if not isinstance(value.get("full_attention"), Mapping):
        got, rule = f"layer types {', '.join(map(str, value))}", "the layers to extend are called full_attention"
        raise UserError(f"config: {key}", got=got, rule=rule, do="choose another model, or correct config.json")
    chosen: Mapping[str, Any] = value["full_attention"]
    return chosen


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values())


def _refuse_other_kinds(text: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    do = "choose a model with one rotation for the whole head"
    for key in ("kv_lora_rank", "qk_rope_head_dim"):
        if text.get(key):
            rule = "multi-head latent attention is not supported"
            raise UserError("config", got=f"{key} {shown(text[key])}", rule=rule, do=do)
    if parameters.get("mrope_section"):
        got, rule = f"mrope_section {shown(parameters['mrope_section'])}", "multimodal RoPE is not supported"
        raise UserError("config", got=got, rule=rule, do=do)


def _scaling_name(parameters: Mapping[str, Any]) -> str:
    name = _first(parameters, "rope_type", "type") or "default"
    if name == "su":  # its first name, in the first Phi-3 checkpoints
        return "longrope"
    if not isinstance(name, str) or name not in SCALINGS:
        rule, do = f"known are {', '.join(SCALINGS)}", "choose another model, or correct config.json"
        raise UserError("config: rope_type", got=shown(name), rule=rule, do=do)
    return name


def _rotary_dim(text: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    head = _head_dim(text)
    # Released MiniMax-M2 checkpoints say rotary_dim.
    default = _SHARES.get(str(text.get("model_type")), _number(text, "rotary_dim", head) / head)
    share = _number(parameters, "partial_rotary_factor", default)
    rotary = int(head * share)
    if head > _LARGEST_HEAD:
        _bad("head_dim", f"{head:.15g}", f"it is at most {_LARGEST_HEAD}")
    if share > 1 or rotary < 2 or rotary % 2:
        rule = "an even number of dimensions of a head is rotated"
        _bad("partial_rotary_factor", f"{share:g} of head_dim {head}", rule)
    return rotary


def _head_dim(text: Mapping[str, Any]) -> int:
    for key in ("head_dim", "attention_head_dim", "kv_channels"):  # the others are Zamba2's name and JetMoE's
        if text.get(key) is not None:
            return _whole(text, key)
    if text.get("hidden_size") is None or text.get("num_attention_heads") is None:
        rule = "the head dimension is head_dim, or hidden_size / num_attention_heads"
        raise UserError("config", got="no head_dim", rule=rule, do="add head_dim to config.json")
    hidden, heads = _whole(text, "hidden_size"), _whole(text, "num_attention_heads")
    if hidden < heads:
        _bad("hidden_size", hidden, f"it is at least num_attention_heads, {heads}")
    return hidden // heads


def _default(source: _Source) -> tuple[RopeFactors, ...]:
    return source.every_length(baselines.position_interpolation(source.shape, 1.0), 1.0)


def _linear(source: _Source) -> tuple[RopeFactors, ...]:
    ratio = source.number("factor")
    return source.every_length(baselines.position_interpolation(source.shape, ratio), ratio)


def _dynamic(source: _Source) -> tuple[RopeFactors, ...]:
    if source.family.startswith("hunyuan") and source.parameters.get("alpha"):  # which is one base at every length
        return source.every_length(baselines.ntk(source.shape, source.number("alpha")), 1.0)
    # transformers measures the length in max_position_embeddings here, whatever the original length is.
    short, factor = source.rope.max_length, source.number("factor")
    ones, reach = unscaled(source.shape.pairs, short), round(factor * short)
    if reach <= short:
        return (ones,)
    vector = baselines.ntk(source.shape, factor * reach / short - (factor - 1))
    return ones, RopeFactors(reach, tuple(vector.tolist()))


def _yarn(source: _Source) -> tuple[RopeFactors, ...]:
    # A factor of null means the ratio of the lengths; without the key transformers fails.
    null = "factor" in source.parameters
    factor = source.number("factor", source.rope.max_length / source.trained_length if null else None)
    vector = baselines.yarn(
        source.shape,
        factor,
        source.number("beta_fast", 32.0),
        source.number("beta_slow", 1.0),
        truncate=bool(source.parameters.get("truncate", True)),
    )
    return source.every_length(vector, factor, source.number("attention_factor", _yarn_attention(source, factor)))


def _yarn_attention(source: _Source, factor: float) -> float:
    if not (source.parameters.get("mscale") and source.parameters.get("mscale_all_dim")):
        return baselines.yarn_attention_factor(factor)
    growth = baselines.yarn_attention_factor(factor) - 1
    return (1 + source.number("mscale") * growth) / (1 + source.number("mscale_all_dim") * growth)


def _llama3(source: _Source) -> tuple[RopeFactors, ...]:
    factor, low, high = source.number("factor"), source.number("low_freq_factor"), source.number("high_freq_factor")
    if low > high:
        _bad("low_freq_factor", f"{low:g}", f"it is at most high_freq_factor, {high:g}")
    return source.every_length(baselines.llama3(source.shape, factor, low, high), factor)


def _longrope(source: _Source) -> tuple[RopeFactors, ...]:
    short, long = (_factor_list(source, key) for key in ("short_factor", "long_factor"))
    factor = source.number("factor", source.rope.max_length / source.trained_length)
    standard = baselines.su_attention_factor(factor, source.trained_length)
    attention = [source.number("attention_factor", standard)] * 2
    # Its class has one for each list, and asks for no other. (That of transformers 5.24 rotates by the short list at
    # every length; the long one is what the checkpoints were trained with, and what is used here.)
    if source.family == "phimoe":
        attention = [source.number("short_mscale"), source.number("long_mscale")]
    first = RopeFactors(source.trained_length, short, attention_factor=attention[0])
    if source.rope.max_length <= source.trained_length:
        return (first,)  # the long list is never used
    return first, RopeFactors(source.rope.max_length, long, attention_factor=attention[1])


def _factor_list(source: _Source, key: str) -> tuple[float, ...]:
    value, pairs = source.parameters.get(key), source.shape.pairs
    if value is None:
        _missing(key)
    if isinstance(value, str) or not isinstance(value, Sequence):
        _bad(key, shown(value), "it is a list of numbers")
    if len(value) != pairs:
        _bad(key, f"{len(value)} numbers", f"rotary dimension {2 * pairs} has {pairs} pairs")
    return tuple(_positive(f"{key}[{pair}]", item) for pair, item in enumerate(value))


SCALINGS: dict[str, Callable[[_Source], tuple[RopeFactors, ...]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _first(source: Mapping[str, Any], *keys: str) -> object:
    return next((source[key] for key in keys if source.get(key) is not None), None)


def _number(source: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The positive number under a key; a key that is missing or null without a default is an error."""
    value = source.get(key)
    if value is None and default is None:
        _missing(key)
    return _positive(key, default if value is None else value)


def _whole(source: Mapping[str, Any], key: str, default: int | None = None) -> int:
    number = _number(source, key, default)
    if number != int(number):
        _bad(key, number, "it is a whole number")
    return int(number)


def _positive(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        _bad(key, shown(value), "it is a finite, positive number")
    return float(value)


def _missing(key: str) -> NoReturn:
    do = "complete config.json, or save it again with the model's own transformers class"
    raise UserError("config", got=f"no {key}", rule="this RoPE needs it", do=do)


def _bad(key: str, got: object, rule: str) -> NoReturn:
    raise UserError(f"config: {key}", got=got, rule=rule, do="correct config.json")
