"""Tiny random models of every causal language model class of transformers: what `architectures.py` tries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from byte_tokenizer import BOS, EOS, PAD, VOCABULARY
from longrope.configs import SCALINGS

ORIGINAL = 48
"""Trained length in tokens of every model here."""
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_emb_base", "qk_rope_head_dim")
_HEAD = 16

# By the name of a key, whatever the class; of those that a configuration has and that are not null.
_WIDTHS = dict.fromkeys(
    ("hidden_size", "n_embd", "d_model", "embedding_size", "lru_width", "attention_hidden_size"), 32
)
_INNER = (
    "intermediate_size ffn_hidden_size intermediate_size_mlp moe_intermediate_size shared_expert_intermediate_size "
    "dense_intermediate_size moe_shared_expert_intermediate_size ffn_dim shared_intermediate_size n_inner "
    "block_ff_dim expert_ffn_hidden_size moe_latent_size"
).split()
_EXPERTS = (
    "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts num_experts_total"
).split()
_CHOSEN = "num_experts_per_tok moe_topk top_k_experts num_experts_per_token moe_k moe_top_k".split()
_ONE = (
    "n_group topk_group num_expert_group topk_groups n_shared_experts num_shared_experts moe_num_shared_experts".split()
)
_EIGHT = (
    "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim o_lora_rank index_topk "
    "sliding_window attention_chunk_size mamba_d_state mamba_d_head mamba_head_dim ssm_state_size mamba_chunk_size "
    "hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim chunk_size"
).split()
_TWO = (
    "num_attention_heads n_head num_heads n_heads index_n_heads linear_num_key_heads linear_num_value_heads "
    "mamba_n_heads mamba_num_heads num_memory_blocks depth"
).split()
SIZES: dict[str, Any] = {
    **_WIDTHS,
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_CHOSEN, 2),
    **dict.fromkeys(_ONE, 1),
    **dict.fromkeys(_EIGHT, 8),
    **dict.fromkeys(_TWO, 2),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_key_value_heads": 1,
    "num_kv_heads": 1,
    "head_dim": _HEAD,
    "kv_channels": _HEAD,
    "rotary_dim": _HEAD,
    "max_position_embeddings": ORIGINAL,
    "original_max_position_embeddings": ORIGINAL,
    "initial_context_length": ORIGINAL,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.12,  # attention that tells positions apart: a wrong angle moves the logits
    "mamba_n_groups": 1,
    "first_k_dense_replace": 1,
    "query_pre_attn_scalar": _HEAD,
    "image_size": 32,
    "patch_size": 16,
}
# What no rule of the above gives, by model type.
_MAMBA = {"mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64}
_ROPE_ALONE = {"rope_type": "default", "rope_theta": 10000.0}
_ORIGINAL = {"original_max_position_embeddings": ORIGINAL}
_ROTATES = {"position_embedding_type": "rope"}
_DORY = {
    "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 3,
    **{"num_hidden_layers": 12, "n_input_layers": 4, "n_recurrent_layers": 4, "n_output_layers": 4},
}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64}
_QWEN4 = {**_INDEXER, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 300, "ple_embed_dim": 32, "hc_lowrank": 8}
_GEMMA3N = {
    **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48, "laurel_rank": 8},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
}
_DOTS3 = {"head_dim": 16, "per_layer_config": {}, "shared_experts_intermediate_size": 48}
_DBRX = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": ORIGINAL}
_BLT_PART = {"hidden_size_global": 32, "cross_attn_k": 2}
_BY_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"], **_ROTATES},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16},  # of which a third rotates
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {"rope_parameters": {**_ROPE_ALONE, "llama_4_scaling_beta": 0.1, **_ORIGINAL}},
    "blt": {
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 500,
        **{key: {**_BLT_PART} for key in ("encoder_config", "decoder_config")},
    },
    "dbrx": {
        **_DBRX,
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 1, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32},
    },
    "diffllama": {"num_key_value_heads": 2},
    "dory": _DORY,
    "dots1": {"num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3},
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "zamba2": {
        **{"use_mem_rope": True, "num_key_value_heads": 2, "kv_channels": 16, "attention_hidden_size": 64},
        **{"attention_head_dim": 32, "n_mamba_heads": 2, "mamba_headdim": 32, "num_query_groups": 2},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
_WHERE_NONE = ("head_dim", "num_key_value_heads")  # classes that compute nothing of a null here


def model_types() -> list[str]:
    """Model types of causal language models whose configuration can have a rotary embedding, by name."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _may_rotate(name))


def _may_rotate(model_type: str) -> bool:
    try:
        config: Any = CONFIG_MAPPING[model_type]()
        described = config.get_text_config().to_dict()
    except Exception:  # a class may ask for anything; that it does not build shows in the table
        return True
    return any(described.get(key) for key in _ROPE)


def small_config(model_type: str) -> PreTrainedConfig:
    """The class's own default configuration with small sizes and a layer of each kind."""
    kind: Any = CONFIG_MAPPING[model_type]
    made = kind(**_shrunk(kind(), _BY_TYPE.get(model_type, {})))
    return cast(PreTrainedConfig, made)


def _shrunk(config: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a default configuration, and of those inside it."""
    own = config.to_dict()
    changes = {key: value for key, value in SIZES.items() if own.get(key) is not None and type(own[key]) is not list}
    changes |= {key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in own}
    changes |= {key: SIZES[key] for key in _WHERE_NONE if key in own}
    if own.get("kv_lora_rank"):  # multi-head latent attention: every head has keys, and the rotated part is apart
        changes |= {"num_key_value_heads": 2, "head_dim": SIZES["qk_rope_head_dim"]}
    changes |= _layers(own)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(own.get(key), Mapping):
            changes[key] = _unscaled(own[key])
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            changes[key] = _shrunk(inner, named.get(key, {}))
    changes |= {key: value for key, value in named.items() if key not in getattr(config, "sub_configs", {})}
    return changes


def _layers(own: Mapping[str, Any]) -> dict[str, Any]:
    """Few layers, and what lists say of each: of every combination that occurs the first."""
    name = next((key for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if own.get(key)), None)
    if name is None:
        return {}
    count = own[name]
    lists = {key: value for key, value in own.items() if isinstance(value, list) and len(value) == count}
    kinds = [str([value[layer] for value in lists.values()]) for layer in range(count)]
    kept = sorted({kinds.index(kind) for kind in kinds})
    if len(kept) < 2:
        kept = list(range(min(2, count)))
    return {name: len(kept)} | {key: [value[layer] for layer in kept] for key, value in lists.items()}


def _unscaled(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a RoPE, or of one for each kind of layer, without the scaling that a default may have."""
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return {key: _unscaled(value) if isinstance(value, Mapping) else value for key, value in parameters.items()}
    if parameters.get("rope_type", "default") not in SCALINGS:
        return dict(parameters)
    kept = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", "llama_4_scaling_beta")
    return {"rope_type": "default"} | {key: parameters[key] for key in kept if parameters.get(key) is not None}


def build(model_type: str, seed: int) -> PreTrainedModel:
    """A float32 model in eval mode; equal seeds give equal weights."""
    torch.manual_seed(seed)
    make: Any = AutoModelForCausalLM
    model = make.from_config(small_config(model_type), dtype=torch.float32).eval()
    numbers = sum(weight.numel() for weight in model.parameters())
    if numbers > 20_000_000:
        raise ValueError(f"{numbers:,} weights: its default sizes have names of their own")
    return cast(PreTrainedModel, model)


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> Path:
    """A checkpoint that load_model reads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
