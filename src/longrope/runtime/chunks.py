"""A long text through a model by chunks: beyond the cache, memory is that of a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longrope.model import decoder_of
from longrope.runtime.attention import without_masks
from longrope.runtime.caches import CACHE
from longrope.runtime.history import Flags, Whole

# Tokens of a forward pass over a long text; the benchmark of prompts says what they take.
CHUNK = 2048


def whole_text(inputs: Tensor) -> tuple[Whole, Flags]:
    """Positions and what is attended (B, T) of texts without padding."""
    positions = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape[:2])
    return positions, np.ones(positions.shape, dtype=bool)


def by_chunks(
    model: Any, cache: Any, inputs: Tensor, positions: Whole, attended: Flags, chunk: int
) -> Iterator[tuple[int, Any]]:
    """Put ids (B, T) or embeddings (B, T, D) into a cache, by passes of so many tokens through the decoder.

    positions, attended: (B, T); what is not attended is padding, which a cache with tokens must not have. Yields (first
    column, the decoder's outputs) of each.
    """
    decoder, device, cached = decoder_of(model), inputs.device, int(cache.get_seq_length())
    whole = bool(attended.all())
    for start in range(0, inputs.shape[1], chunk):
        end = min(start + chunk, inputs.shape[1])
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        mask = None if whole else torch.tensor(attended[:, :end].astype(np.int64), device=device)
        at = torch.tensor(positions[:, start:end], device=device)
        given = {name: inputs[:, start:end], "position_ids": at, "attention_mask": mask}
        # A static cache is as wide as its room from the first chunk on: only a mask says what is in it
        with without_masks(model) if whole and cached + start and not cache.is_compileable else nullcontext():
            yield start, decoder(**given, **{CACHE: cache}, use_cache=True)
