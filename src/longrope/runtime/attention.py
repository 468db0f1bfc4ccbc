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

NAME = "longrope_chunks"


def _parts(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention (B, H, t, D) of query to key and value, and the log-sum-exp (B, H, t) of its scores."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    elif query.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
    return out, lse[..., : query.shape[2]]  # kernels may pad it


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention (B, H, t, D) of the last t of T tokens: query (B, H, t, D), key and value (B, K, T, D), K | H.

    Heads that share keys are taken as further queries, so that keys are never repeated. No gradients.
    """
    batch, heads, tokens, width = query.shape
    shared, past = heads // key.shape[1], key.shape[2] - tokens
    scale = width**-0.5 if scale is None else scale
    here = [states[:, :, past:].repeat_interleave(shared, 1) for states in (key, value)]
    own, own_sum = _parts(query, here[0], here[1], True, scale)
    folded = query.reshape(batch, key.shape[1], shared * tokens, width)
    before, before_sum = _parts(folded, key[:, :, :past], value[:, :, :past], False, scale)
    before, before_sum = before.reshape(own.shape), before_sum.reshape(own_sum.shape)
    share = torch.sigmoid(before_sum - own_sum)[..., None]
    return torch.lerp(own, before, share.to(own.dtype))


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
    tokens = query.shape[2]
    if attention_mask is not None or tokens == 1 or key.shape[2] == tokens or key.shape[-1] != value.shape[-1]:
        if attention_mask is None and 1 < tokens < key.shape[2]:
            attention_mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(key.shape[2] - tokens)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


def _mask(*, local_size: int | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask where all before is seen; that of a local layer, which is as wide as its window."""
    if local_size is None and attention_mask is None and kwargs.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(local_size=local_size, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def without_masks(model: PreTrainedModel) -> Iterator[None]:
    """Let torch's attention of a model go without masks for chunks that nothing is padded in; other kinds stay.

    flash attention needs no mask by itself; eager attention is asked for where torch's cannot compute what it does.
    """
    config: Any = model.config.get_text_config()
    own = config._attn_implementation
    if own != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
