"""Whether documents packed into one row are apart in a model, and whether a window can be shared by processes."""

from __future__ import annotations

import torch

from longrope.errors import UserError
from longrope.model import LoadedModel
from longrope.patch import EXTENDED_LAYERS

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
    half = torch.is_autocast_enabled(loaded.device.type)
    return difference <= (_HALF_ROUNDING if half else _ROUNDING.get(model.dtype, _HALF_ROUNDING))


def check_shareable(loaded: LoadedModel) -> None:
    """Raise UserError for a model that context parallelism would compute wrongly, or refuse: it shares attention alone.

    Local layers lose their masks there, and what else passes something on from token to token (states, convolutions)
    would pass it on within the pieces that a process has.
    """
    config, name = loaded.model.config.get_text_config(), type(loaded.model).__name__
    kinds = set(getattr(config, "layer_types", None) or ()) - {EXTENDED_LAYERS}
    with loaded.looking():
        whole = not kinds and documents_are_apart(loaded)
    if not whole:
        got = f"{name}, with layers of {', '.join(sorted(kinds))}" if kinds else f"{name}, of more than attention"
        rule = "processes share a window where every layer attends to all of it"
        raise UserError("processes", got=got, rule=rule, do="use FSDP without context parallelism")
    # Where accelerate looks for attention; anywhere else it is given a mask, which torch's does not take.
    attending = sum(each.endswith("self_attn") for each, _ in loaded.model.named_modules())
    if attending < config.num_hidden_layers:
        got, rule = f"{name}, whose attention has another name", "accelerate shares layers named self_attn"
        raise UserError("processes", got=got, rule=rule, do="use FSDP without context parallelism")
