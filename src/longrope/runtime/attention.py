"""Attention of a chunk of tokens to all before it, without a mask as wide as the text.

transformers gives torch's attention a mask of (chunk, text) for it, which at a million tokens is larger than the
chunk's keys and values many times over. Here the past, which every token sees, and the chunk itself, which is causal,
are attended to apart and put together by their log-sum-exp, as blocks are in flash attention (arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longrope.model import decoder_of

_NAME = "longrope_chunks"
# Tokens of the past that are attended to at once: kernels for CPUs make a copy of their keys and values.
_BLOCK = 16384
_FLASH_WIDTH = 256  # of a head, at most; Gemma 4's global layers have 512


def _parts(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention (B, H, t, D) of query to key and value, and the log-sum-exp (B, H, t) of its scores."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    elif _has_flash(query):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
    return out, lse[..., : query.shape[2]]  # kernels may pad it


def _has_flash(query: Tensor) -> bool:
    """Whether torch's flash attention for CUDA takes these states."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    narrow = query.shape[-1] <= _FLASH_WIDTH
    return half and narrow and torch.cuda.get_device_capability(query.device)[0] >= 8


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention (B, H, t, D) of the last t of T tokens: query (B, H, t, D), key and value (B, K, T, D), K | H.

    Heads that share keys are taken as further queries, so that keys are never repeated. No gradients.
    """
    batch, heads, tokens, width = query.shape
    shared, past = heads // key.shape[1], key.shape[2] - tokens
    scale = width**-0.5 if scale is None else scale
    here = [states[:, :, past:].repeat_interleave(shared, 1) for states in (key, value)]
    out, total = _parts(query, here[0], here[1], True, scale)
    out = out.float()
    folded = query.reshape(batch, key.shape[1], shared * tokens, width)
    for start in range(0, past, _BLOCK):
        block = slice(start, min(start + _BLOCK, past))
        seen, its = _parts(folded, key[:, :, block], value[:, :, block], False, scale)
        its = its.reshape(total.shape)
        out = torch.lerp(out, seen.reshape(out.shape).float(), torch.sigmoid(its - total)[..., None])
        total = torch.logaddexp(total, its)
    return out.to(query.dtype)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    tokens, width = query.shape[2], query.shape[-1]
    plain = key.shape[-1] == value.shape[-1] and (query.device.type == "cpu" or width % 8 == 0)
    if attention_mask is not None or tokens == 1 or key.shape[2] == tokens or not plain:
        if attention_mask is None and 1 < tokens < key.shape[2]:
            attention_mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(key.shape[2] - tokens)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # Under autocast, rotated states are float32 here and others are not: torch's own attention casts all of them.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _mask(*, local_size: int | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask where all before is seen; that of a local layer, which is as wide as its window."""
    everything = local_size is None or local_size >= kwargs["q_offset"] + kwargs["q_length"]
    if everything and attention_mask is None and kwargs.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(local_size=local_size, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, _mask)


@contextmanager
def without_masks(model: PreTrainedModel) -> Iterator[None]:
    """Let torch's attention of a model go without masks for chunks that nothing is padded in; other kinds stay.

    flash attention needs no mask by itself; eager attention is asked for where torch's cannot compute what it does.
    A class that calls torch's attention by itself (Falcon) would not attend by chunks, but without any mask.
    """
    config: Any = model.config.get_text_config()
    own = config._attn_implementation
    by_interface = getattr(type(decoder_of(model)), "_can_set_attn_implementation", lambda: True)()
    if own != "sdpa" or model.device.type not in ("cpu", "cuda") or not by_interface:
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own
