"""A GGUF file for llama.cpp: weights tensor by tensor, the factors, the tokenizer.

Architectures whose llama.cpp graphs pass rescale factors to the rotation: Llama and Mistral (as `llama`) and Phi3.
Names and keys are those of the `gguf` package; docs/engines.md says which form is for which build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from longrope.errors import UserError
from longrope.export.gguf_tokenizer import Vocabulary
from longrope.factors import FactorTable

_Array = NDArray[Any]

DTYPES = ("f32", "f16", "bf16", "q8_0")
"""Of matrices in a GGUF."""
_LONG, _SHORT, _ALWAYS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
# transformers' names of a layer's weights -> those of GGUF
_LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PHI3 = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "phi3": "phi3"}
"""model_type of transformers -> architecture of GGUF that is written here."""


@dataclass(frozen=True)
class _Weight:
    """A weight to be written: its GGUF name, shape and type, and what reads it."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], _Array]


def import_gguf() -> Any:
    """The `gguf` package. Raises UserError when it is not there."""
    try:
        import gguf
    except ImportError:
        do = 'install it with: pip install "longrope[gguf]"'
        raise UserError("--engine", got="gguf without its package", rule="it writes the file", do=do) from None
    return gguf


def check_architecture(config: Mapping[str, Any], source: Path) -> str:
    """The GGUF architecture of a model. Raises UserError for what cannot be written with factors."""
    family = str(config.get("model_type"))
    if family not in _ARCHITECTURES:
        rule = f"longrope writes {', '.join(_ARCHITECTURES)} as GGUF; most other graphs of llama.cpp pass no factors"
        raise UserError("--engine gguf", got=family, rule=rule, do="use another engine")
    if config.get("quantization_config"):
        rule = "a GGUF is made from weights that are not quantised"
        raise UserError(
            "--engine gguf", got="quantised weights", rule=rule, do="export the checkpoint they were made of"
        )
    if not list(source.glob("*.safetensors")):
        rule = "weights are read from safetensors"
        raise UserError("--engine gguf", got=f"{source} without them", rule=rule, do="save the model with transformers")
    return _ARCHITECTURES[family]


def check_graph(config: Mapping[str, Any], served: FactorTable) -> None:
    """Raise UserError for what these graphs of llama.cpp do otherwise than transformers.

    config: of the language model, as transformers has it; its window is widened where the model is extended.
    """
    do = "use another engine"
    activation, window = str(config.get("hidden_act")), config.get("sliding_window")
    if activation not in ("silu", "swish"):
        rule = "llama.cpp's graphs of these architectures have silu"
        raise UserError("--engine gguf", got=f"hidden_act {activation}", rule=rule, do=do)
    last = served.rows[-1].up_to
    if window is not None and window < last <= served.original_length:
        got, rule = f"a sliding window of {window} tokens", "llama.cpp's graphs of these architectures see all"
        raise UserError("--engine gguf", got=got, rule=rule, do="use --window long, which widens it, or another engine")


def write_gguf(
    source: Path, config: Mapping[str, Any], served: FactorTable, out: Path, *, window: str, dtype: str, name: str
) -> None:
    """Write a checkpoint's folder as one GGUF file, a weight at a time.

    config: as transformers has it, with what a config.json leaves to the class. served: the table of this window.
    dtype: of matrices; what has one dimension stays f32, rows that q8_0 cannot hold are f16. Raises UserError for
    weights or a tokenizer that GGUF has no names for.
    """
    gguf = import_gguf()
    if dtype not in DTYPES:
        raise UserError("--dtype", got=repr(dtype), rule=f"it is one of {', '.join(DTYPES)}", do="choose one of them")
    architecture = check_architecture(config, source)
    vocabulary = Vocabulary.of(source, config)
    weights = [*_weights(gguf, source, config, architecture, dtype), *_factors(gguf, served, architecture, window)]
    writer = gguf.GGUFWriter(str(out), architecture)
    try:
        _settings(gguf, writer, config, served, architecture, window, dtype, _name_of(name, vocabulary))
        vocabulary.write(writer)
        for weight in weights:
            shape = weight.shape
            plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
            kept: Any = plain.get(weight.kind, np.uint8)
            if kept is np.uint8:
                shape = gguf.quant_shape_to_byte_shape(shape, weight.kind)
            size = int(np.prod(shape)) * np.dtype(kept).itemsize
            writer.add_tensor_info(weight.name, shape, np.dtype(kept), size, raw_dtype=weight.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight in weights:
            writer.write_tensor_data(_as(gguf, weight.read(), weight.kind))
    finally:
        writer.close()


def _name_of(name: str, vocabulary: Vocabulary) -> str:
    """general.name. By a name with Phi-3 in it, llama.cpp looks for that model's special tokens, and fails without."""
    phi3 = any(part in name.lower() for part in ("phi-3", "phi3"))
    return "model" if phi3 and not {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= set(vocabulary.tokens) else name


def _as(gguf: Any, values: _Array, kind: Any) -> _Array:
    if kind == gguf.GGMLQuantizationType.F32:
        return values.astype(np.float32)
    if kind == gguf.GGMLQuantizationType.F16:
        return values.astype(np.float16)
    quantized: _Array = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), kind)
    return quantized


def _kind(gguf: Any, shape: tuple[int, ...], dtype: str) -> Any:
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1 or dtype == "f32":
        return kinds.F32
    if dtype == "q8_0":
        return kinds.Q8_0 if shape[-1] % 32 == 0 else kinds.F16
    return kinds.BF16 if dtype == "bf16" else kinds.F16


def _factors(gguf: Any, served: FactorTable, architecture: str, window: str) -> Iterator[_Weight]:
    """The factor tensors: both, chosen by the context that is allocated, or one that holds at every length."""

    def weight(name: str, values: tuple[float, ...]) -> _Weight:
        read = np.array(values, dtype=np.float32)
        return _Weight(name, read.shape, gguf.GGMLQuantizationType.F32, lambda: read)

    first, last = served.rows[0], served.rows[-1]
    if window == "dynamic" or architecture == "phi3":  # whose loader knows no other tensors
        yield weight(_LONG, last.rescale)
        yield weight(_SHORT, first.rescale)
    elif any(value != 1.0 for value in last.rescale):
        yield weight(_ALWAYS, last.rescale)


def _weights(gguf: Any, source: Path, config: Mapping[str, Any], architecture: str, dtype: str) -> Iterator[_Weight]:
    """All weights of a checkpoint by their GGUF names. Raises UserError for one that has none."""
    names = _PHI3 if architecture == "phi3" else _LLAMA
    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads)
    tied = bool(config.get("tie_word_embeddings"))
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                found = _name(key, names)
                if found is None:
                    rule = f"llama.cpp's {architecture} has no weight of that name"
                    raise UserError("--engine gguf", got=f"weight {key}", rule=rule, do="use another engine")
                if found == "output.weight" and tied and _is_embedding(source, opened.get_tensor(key)):
                    continue
                shape = tuple(opened.get_slice(key).get_shape())
                turned = {"attn_q": heads, "attn_k": shared}.get(found.split(".")[-2]) if names is _LLAMA else None

                def read(file: Path = file, key: str = key, turned: int | None = turned) -> _Array:
                    with safe_open(str(file), framework="pt") as again:
                        values = again.get_tensor(key).to(torch.float32).numpy()
                    return values if turned is None else interleaved(values, turned)

                yield _Weight(found, shape, _kind(gguf, shape, dtype), read)


def _is_embedding(source: Path, head: Any) -> bool:
    """Whether an output projection is the input embedding: a configuration may say so of weights that differ."""
    for file in source.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as opened:
            if "model.embed_tokens.weight" in opened.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                return torch.equal(opened.get_tensor("model.embed_tokens.weight"), head)
    return True


def _name(key: str, names: Mapping[str, str]) -> str | None:
    stem, _, kind = key.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _AROUND:
        return f"{_AROUND[stem]}.{kind}"
    prefix, layers, rest = stem.partition("model.layers.")
    number, _, inner = rest.partition(".")
    if prefix or not layers or not number.isdigit() or inner not in names:
        return None
    return f"blk.{number}.{names[inner]}.{kind}"


def interleaved(values: _Array, heads: int) -> _Array:
    """Rows (heads * d, ...) of queries or keys from halves, as transformers rotates them, to neighbouring pairs."""
    shape = values.shape
    halves = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)


def _settings(
    gguf: Any,
    writer: Any,
    config: Mapping[str, Any],
    served: FactorTable,
    architecture: str,
    window: str,
    dtype: str,
    name: str,
) -> None:
    heads, last = int(config["num_attention_heads"]), served.rows[-1]
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, kinds[dtype]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(last.up_to)
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(served.rotary_dim)
    writer.add_rope_freq_base(served.rope_theta)
    if last.attention_factor != 1.0:
        writer.add_rope_scaling_attn_factors(float(last.attention_factor))
    if window == "dynamic" or architecture == "phi3":
        # Never a scaling factor: llama.cpp would scale by it on top.
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(served.original_length)
