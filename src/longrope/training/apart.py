"""Whether the documents of a packed window are apart in a model, which mixed windows rely on."""

from __future__ import annotations

import torch

from longrope.errors import UserError
from longrope.model import LoadedModel

_LONGEST = 16  # tokens of a document of the check
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_ROUNDING = 0.02  # experts that other tokens go to multiply in other shapes, and round otherwise


def check_apart(loaded: LoadedModel, together: int = 1) -> None:
    """Raise UserError where what stands before a packed document changes what the model says of it.

    Positions that begin anew tell attention where documents begin. Convolutions and the states of recurrent layers do
    not ask for them, nor does every attention. together: windows of a pass.
    """
    model = loaded.model
    size = min(_LONGEST, loaded.rope.original_length)
    words = torch.arange(size, device=loaded.device)
    vocabulary = min(100, model.config.get_text_config().vocab_size)
    positions = torch.cat([words, words]).expand(together, -1)
    seen = []
    for before in (7 * words + 1, 3 * words + 2):
        ids = (torch.cat([before, words]) % vocabulary).expand(together, -1)
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        seen.append(logits[:, size:].double())
    difference = float((seen[0] - seen[1]).norm() / seen[0].norm())
    if not difference <= _ROUNDING.get(model.dtype, _HALF_ROUNDING):
        got = f"{type(model).__name__} with {model.config._attn_implementation} attention"
        rule = "a packed document is read by itself; here what stands before it changes what follows"
        raise UserError("--mixed", got=got, rule=rule, do="leave --mixed out, or try --attention sdpa")
