"""Tokens that a tokenizer has and the model has no weights for.

Such a tokenizer is common (a padding token that somebody added), and harmless until a text holds the token: then torch
reads beyond the weights, which on a CPU is an IndexError and on CUDA ends the process with an assertion of the device.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.errors import UserError, plural, shown


def guard_vocabulary(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Let the model refuse ids that it has no weights for, where the tokenizer has some; what is to be said of them.

    Costs nothing where every token has weights; else one comparison a forward pass. Raises UserError when the token
    that windows begin with has none.
    """
    embeddings = cast(nn.Module | None, model.get_input_embeddings())
    size = getattr(embeddings, "num_embeddings", None)
    if embeddings is None or not isinstance(size, int):
        return None
    beyond = {index: token for token, index in _vocabulary(tokenizer).items() if index >= size}
    if not beyond:
        return None
    rule = f"the model has weights for {size:,} tokens"
    bos: Any = tokenizer.bos_token_id
    if bos in beyond:
        got = f"{name}, whose tokenizer begins texts with {shown(beyond[bos])}, token {bos}"
        raise UserError("model", got=got, rule=rule, do="restore its tokenizer's files")

    def refuse(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].numel():
            largest = int(inputs[0].max())
            if largest >= size:
                got = f"{shown(beyond.get(largest, '?'))}, token {largest} of {name}'s tokenizer"
                raise UserError("text", got=got, rule=rule, do="take it out of the text, or restore the tokenizer")

    embeddings.register_forward_pre_hook(refuse)
    first = min(beyond)
    told = f"the tokenizer has {plural(len(beyond), 'token')} that the model has no weights for"
    return f"{told}, the first {shown(beyond[first])}: texts that hold one are refused"


def check_end(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError when the model has no weights for the token that ends every window of a training."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    eos: Any = tokenizer.eos_token_id
    if isinstance(size, int) and isinstance(eos, int) and eos >= size:
        got = f"{name}, whose tokenizer ends texts with {shown(str(tokenizer.eos_token))}, token {eos}"
        rule = f"the model has weights for {size:,} tokens"
        raise UserError("model", got=got, rule=rule, do="restore its tokenizer's files")


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    try:
        return tokenizer.get_vocab()
    except NotImplementedError:  # of a class that came with the checkpoint
        return {}
