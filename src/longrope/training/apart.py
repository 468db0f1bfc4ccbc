"""Whether documents that are packed into one row are apart in a model."""

from __future__ import annotations

import torch

from longrope.model import LoadedModel

_LONGEST = 16  # tokens of a document of the check
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_ROUNDING = 0.02  # experts that other tokens go to multiply in other shapes, and round otherwise


def documents_are_apart(loaded: LoadedModel) -> bool:
    """Whether what stands before a packed document leaves what the model says of it as it is.

    Positions that begin anew tell attention where documents begin. Convolutions and the states of recurrent layers do
    not ask for them, nor does every attention (GPT-OSS's, or flash attention of several rows).
    """
    model, size = loaded.model, min(_LONGEST, loaded.rope.original_length)
    words = torch.arange(size, device=loaded.device)
    vocabulary = min(100, model.config.get_text_config().vocab_size)
    positions = torch.cat([words, words]).expand(2, -1)
    seen = []
    for before in (7 * words + 1, 3 * words + 2):
        ids = (torch.cat([before, words]) % vocabulary).expand(2, -1)
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        seen.append(logits[:, size:].double())
    difference = float((seen[0] - seen[1]).norm() / seen[0].norm())
    return difference <= _ROUNDING.get(model.dtype, _HALF_ROUNDING)
