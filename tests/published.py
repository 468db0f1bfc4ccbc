"""Configurations of models that people use, as they are published: the keys that a RoPE is read from."""

from __future__ import annotations

from typing import Any

from longrope.baselines import su_attention_factor


def _model(family: str, width: int, heads: int, longest: int | None = None, **more: Any) -> dict[str, Any]:
    lengths = {} if longest is None else {"max_position_embeddings": longest}
    return {"model_type": family, "hidden_size": width, "num_attention_heads": heads, **lengths, **more}


def _longrope(pairs: int, short: float = 0.02, **more: Any) -> dict[str, Any]:
    lists = {
        "long_factor": [1.0 + pair for pair in range(pairs)],
        "short_factor": [1 + short * p for p in range(pairs)],
    }
    return {"rope_scaling": {"type": "longrope", **lists, **more}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_PHI3 = {"original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144}
_MSCALE = su_attention_factor(32, 4096)
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
_MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}

# Name -> configuration, and the errors and warnings that are true of it
PUBLISHED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "Llama-2-7B": (_model("llama", 4096, 32, 4096, rope_scaling=None), set()),
    "Llama-3.1-8B": (
        _model("llama", 4096, 32, 131072, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **_LLAMA3}), set()),
    "Llama-3.1-8B as transformers 5 saves it": (
        _model("llama", 4096, 32, 131072, head_dim=128,
               rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}), {"one-place", "theta-below"}),
    "Llama-4-Scout": (
        {"model_type": "llama4", "text_config": _model(
            "llama4_text", 5120, 40, 10485760, head_dim=128, rope_theta=5e5, no_rope_layers=[],
            rope_scaling={"rope_type": "llama3", **_LLAMA3, "high_freq_factor": 1.0})}, set()),
    "Mistral-7B-v0.1": (_model("mistral", 4096, 32, 32768, rope_theta=1e4, sliding_window=4096), set()),
    "Mistral-7B-v0.3": (_model("mistral", 4096, 32, 32768, rope_theta=1e6, sliding_window=None), set()),
    "Qwen2.5-7B with YaRN as its card says": (
        _model("qwen2", 3584, 28, 32768, rope_theta=1e6, sliding_window=131072, use_sliding_window=False,
               rope_scaling={"type": "yarn", **_YARN}), {"factor-mismatch"}),
    "Qwen2.5-7B with YaRN": (
        _model("qwen2", 3584, 28, 131072, rope_theta=1e6, rope_scaling={"type": "yarn", **_YARN}), set()),
    "Qwen3-8B": (_model("qwen3", 4096, 32, 40960, head_dim=128, rope_theta=1e6, rope_scaling=None), set()),
    "Phi-3-mini-128k": (_model("phi3", 3072, 32, 131072, **_PHI3, **_longrope(48)), set()),
    "Phi-3-mini-4k": (_model("phi3", 3072, 32, 4096, **{**_PHI3, "sliding_window": 2047}, rope_scaling=None), set()),
    "Phi-3.5-MoE": (
        _model("phimoe", 4096, 32, 131072, **{**_PHI3, "sliding_window": 131072},
               **_longrope(64, short_mscale=_MSCALE, long_mscale=_MSCALE)), set()),
    "Phi-4-mini": (
        _model("phi3", 3072, 24, 131072, partial_rotary_factor=0.75, **_PHI3, **_longrope(48, 0.0)),
        {"attention-at-short-length"}),
    "Gemma-2-9B": (_model("gemma2", 3584, 16, 8192, head_dim=256, rope_theta=1e4, sliding_window=4096), set()),
    "Gemma-3-1B": (
        _model("gemma3_text", 1152, 4, 32768, head_dim=256, rope_theta=1e6, rope_local_base_freq=1e4,
               sliding_window=512, rope_scaling=None), set()),
    "Gemma-3-4B": (
        {"model_type": "gemma3", "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}}, set()),
    "OLMo-2-7B": (_model("olmo2", 4096, 32, 4096, rope_theta=5e5, rope_scaling=None), set()),
    "Pythia-2.8B": (_model("gpt_neox", 2560, 32, 2048, rotary_emb_base=10000, rotary_pct=0.25), set()),
    "StableLM-3B": (_model("stablelm", 2560, 32, 4096, rope_theta=1e4, partial_rotary_factor=0.25), set()),
    "gpt-oss-20b": (
        _model("gpt_oss", 2880, 64, 131072, head_dim=64, rope_theta=150000, sliding_window=128,
               layer_types=["sliding_attention", "full_attention"],
               rope_scaling={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}), set()),
    "DeepSeek-V3": (
        _model("deepseek_v3", 7168, 128, 163840, rope_theta=1e4, **_MLA,
               rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}), set()),
    "MiniCPM3-4B": (
        _model("minicpm3", 2560, 40, 32768, rope_theta=1e4, **_MLA,
               **_longrope(32, 1.0, original_max_position_embeddings=32768)), set()),
    "Falcon-7B": ({"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "alibi": False}, set()),
    "Falcon-RW-1B": ({"model_type": "falcon", "hidden_size": 2048, "num_attention_heads": 32, "alibi": True}, set()),
    "EXAONE-4.0-1.2B": (
        _model("exaone4", 2048, 32, 65536, head_dim=64, rope_theta=1e6, sliding_window=None,
               layer_types=["full_attention"] * 4, rope_scaling={"rope_type": "llama3", **_LLAMA3}), set()),
    "EXAONE-4.0-32B": (
        _model("exaone4", 5120, 40, 131072, head_dim=128, rope_theta=1e6, sliding_window=4096,
               layer_types=["sliding_attention", "full_attention"], rope_scaling={"rope_type": "llama3", **_LLAMA3}),
        set()),
    "K-EXAONE-236B": (
        _model("exaone_moe", 6144, 64, 262144, head_dim=128, rope_theta=1e6, sliding_window=128,
               layer_types=["sliding_attention", "full_attention"]), set()),
    "Qwen2-VL-7B": (_model("qwen2_vl", 3584, 28, 32768, rope_theta=1e6, rope_scaling=_MROPE), set()),
    "Qwen2.5-VL-7B": (_model("qwen2_5_vl", 3584, 28, 128000, rope_theta=1e6, rope_scaling=_MROPE), set()),
    "Qwen3-VL-8B": (
        {"model_type": "qwen3_vl", "text_config": _model(
            "qwen3_vl_text", 4096, 32, 262144, head_dim=128, rope_theta=5e6,
            rope_scaling={"mrope_section": [24, 20, 20], "rope_type": "default"})}, set()),
    "Nemotron-H-8B": (_model("nemotron_h", 4096, 32, 8192, head_dim=128), set()),
    "Jamba-v0.1": (_model("jamba", 4096, 32, 262144, rope_theta=None), set()),
    "Granite-4.0-H-1B": (
        _model("granitemoehybrid", 1536, 12, 131072, rope_theta=1e4, position_embedding_type="nope"), set()),
    "Zamba2-2.7B": (_model("zamba2", 2560, 32, 4096, attention_head_dim=160, use_mem_rope=False), set()),
}  # fmt: skip
NOT_SUPPORTED = (
    "Llama-4-Scout", "DeepSeek-V3", "MiniCPM3-4B", "Falcon-RW-1B", "EXAONE-4.0-32B", "K-EXAONE-236B", "Qwen2-VL-7B",
    "Qwen2.5-VL-7B", "Qwen3-VL-8B", "Nemotron-H-8B", "Jamba-v0.1", "Granite-4.0-H-1B", "Zamba2-2.7B",
)  # fmt: skip
