"""Small transformers models for tests: two layers, seeded weights, every architecture that longrope says it covers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from byte_tokenizer import BOS, EOS, PAD, byte_tokenizer

ORIGINAL = 48
"""Trained length in tokens of every model here: no power of two, so that a wrong one shows."""
VOCABULARY = 259
"""That of the byte tokenizer."""

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": ORIGINAL,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.12,  # attention that tells positions apart: a wrong angle moves the logits
}
_GROUPED = {"num_key_value_heads": 1}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
}


def _rope(theta: float = 500.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def _extended(**parameters: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 4 * ORIGINAL, "rope_parameters": {"rope_theta": 500.0, **parameters}}


_LOCAL_AND_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_ROPE_BY_LAYER_TYPE = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GROUPED, **_rope()}),
    "mistral": ("MistralConfig", {**_GROUPED, **_rope(), "sliding_window": 24}),
    "qwen2": ("Qwen2Config", {**_GROUPED, **_rope()}),
    "qwen3": ("Qwen3Config", {**_GROUPED, **_rope(), "head_dim": 24}),
    "phi3": (
        "Phi3Config",
        {**_GROUPED, **_rope(partial_rotary_factor=0.75), "original_max_position_embeddings": ORIGINAL},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_rope(partial_rotary_factor=0.25), "hidden_size": 64}),
    "gemma2": ("Gemma2Config", {**_GROUPED, **_rope(), **_GEMMA, **_LOCAL_AND_GLOBAL}),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, **_GEMMA, **_LOCAL_AND_GLOBAL, **_ROPE_BY_LAYER_TYPE}),
    "olmo2": ("Olmo2Config", {**_GROUPED, **_rope()}),
    "mixtral": ("MixtralConfig", {**_GROUPED, **_rope(), "num_local_experts": 3, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", {**_GROUPED, **_rope()}),  # interleaved cos and sin, scaled logits
    "gpt_oss": (  # cos and sin for half a head
        "GptOssConfig",
        {
            **_GROUPED,
            **_rope(),
            **_LOCAL_AND_GLOBAL,
            "head_dim": 16,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
    "llama4": (  # cos and sin as one complex number
        "Llama4TextConfig",
        {
            **_GROUPED,
            **_rope(),
            "head_dim": 16,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 1],
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 16,
        },
    ),
    "phi": ("PhiConfig", {**_rope(partial_rotary_factor=0.5)}),
    "stablelm": ("StableLmConfig", {"num_key_value_heads": 2, **_rope(partial_rotary_factor=0.25)}),
    "granite": ("GraniteConfig", {**_GROUPED, **_rope(), "logits_scaling": 4.0}),
    "smollm3": ("SmolLM3Config", {**_GROUPED, **_rope(), "no_rope_layers": [1, 0]}),
    "olmo3": ("Olmo3Config", {**_GROUPED, **_LOCAL_AND_GLOBAL, **_ROPE_BY_LAYER_TYPE}),
}
ARCHITECTURES = tuple(_CONFIGS)
"""Names of the models that can be extended and are not scaled yet."""

_SCALED: dict[str, dict[str, Any]] = {
    "linear": _extended(rope_type="linear", factor=4.0),
    "dynamic": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 4.0}},
    "yarn": _extended(rope_type="yarn", factor=4.0, original_max_position_embeddings=ORIGINAL),
    "llama3": _extended(
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=ORIGINAL,
    ),
    "longrope": _extended(**_LONGROPE),
}
SCALED = tuple(_SCALED)
"""Kinds of scaling; the model of each is `llama-KIND`."""
_CONFIGS |= {f"llama-{kind}": ("LlamaConfig", {**_GROUPED, **changes}) for kind, changes in _SCALED.items()}

# Can be extended, apart from the list above: PhiMoE's class knows no other scaling than longrope.
_CONFIGS |= {
    "falcon": ("FalconConfig", {**_rope(), "alibi": False, "num_kv_heads": 1}),
    "phimoe": ("PhimoeConfig", {**_GROUPED, **_rope(), "num_local_experts": 3, "num_experts_per_tok": 2}),
}

_MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gptj": ("GPTJConfig", {"rotary_dim": 8}),
    "falcon_alibi": ("FalconConfig", {**_rope(), "alibi": True}),  # has a rotary embedding and does not use it
    # Their global layers do not rotate; the last is Llama 4 as it is published.
    "cohere2": ("Cohere2Config", {**_GROUPED, **_rope(), **_LOCAL_AND_GLOBAL}),
    "exaone4": ("Exaone4Config", {**_GROUPED, **_rope(), **_LOCAL_AND_GLOBAL}),
    "llama4_nope": ("Llama4TextConfig", {**_CONFIGS["llama4"][1], "no_rope_layers": [1, 0]}),
    "bert": ("BertConfig", {}),
    "t5": ("T5Config", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}),
    "deepseek_v2": ("DeepseekV2Config", {**_rope(), **_MLA}),
    "deepseek_v3": ("DeepseekV3Config", {**_rope(), **_MLA}),
    "multimodal_rope": (
        "Qwen3_5TextConfig",
        {
            **_GROUPED,
            **_rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
            "head_dim": 16,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
}
_CLASSES = {"bert": "BertModel", "t5": "T5ForConditionalGeneration"}


def config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a model by name, with some of its keys replaced."""
    kind, settings = {**_CONFIGS, **_REFUSED}[name]
    shared = {key: value for key, value in _SHARED.items() if name != "t5" or "hidden" not in key}
    return cast(PreTrainedConfig, getattr(transformers, kind)(**_copied({**shared, **settings, **changes})))


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A float32 model in eval mode; equal names and changes give equal weights. `changes` are keys of its config."""
    torch.manual_seed(0)
    made = config(name, **changes)
    cls = getattr(transformers, _CLASSES[name]) if name in _CLASSES else AutoModelForCausalLM
    model = cls(made) if name in _CLASSES else cls.from_config(made, dtype=torch.float32)
    return cast(PreTrainedModel, cast(Any, model).eval())


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Save a model with the byte tokenizer, as a checkpoint that load_model reads. `options` go to save_pretrained."""
    model.save_pretrained(folder, **options)
    byte_tokenizer(ORIGINAL).save_pretrained(folder)
    return folder


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random bytes (batch, length), no special tokens."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Deep enough a copy: transformers completes the dicts that it is given."""
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in settings.items()}
