"""RULER's samples as token ids: the largest prompt that leaves room for its answer, for any tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from longrope.errors import UserError
from longrope.evaluate.measures import Item
from longrope.evaluate.prompts import chat_frame
from longrope.evaluate.ruler_samples import Builder, Sample, Text
from longrope.evaluate.ruler_tasks import TOKENS, builders
from longrope.windows import bos_of, token_ids

_MANY = 16  # units a token of the window, a unit being a word or more
Encode = Callable[[Text], list[int]]
"""Token ids of a prompt with the beginning of its answer."""


def encoder(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> Encode:
    """What makes token ids of prompts: BOS and the prompt, or the user's turn of the chat template.

    The beginning of the answer is part of the prompt; in a chat it is the assistant's. Raises UserError without a chat
    template.
    """
    before, after = chat_frame(tokenizer) if chat else ("", "\n")
    bos = [] if chat else bos_of(tokenizer)

    def encode(text: Text) -> list[int]:
        return bos + token_ids(tokenizer, f"{before}{text.prompt}{after}{text.answer_prefix}")

    return encode


def room(sample: Sample, text: Text, encode: Encode) -> int:
    """Tokens that are left for the answer: as published, or an eighth of a window that is shorter than eight of those.

    More where the answer is longer: its tokens and a quarter, because a model may write more between its parts.
    """
    bare = len(encode(Text("", "", (), "")))
    answer = len(encode(Text("", f" {text.answer}", (), ""))) - bare
    return max(math.ceil(1.25 * answer), min(TOKENS[sample.task], sample.length // 8))


def needs(sample: Sample, encode: Encode) -> int:
    """Tokens that the smallest form of a sample takes with its answer."""
    sizes = []
    for builder in builders(sample):
        text = builder.build(builder.least)
        sizes.append(len(encode(text)) + room(sample, text, encode))
    return min(sizes)


def item(sample: Sample, encode: Encode) -> Item:
    """The largest prompt of the first form that fits, which there must be."""
    for builder in builders(sample):
        tokens = room(sample, builder.build(builder.least), encode)
        found = longest(builder, encode, sample.length - tokens)
        if found is not None:
            text, ids = found
            data = {"task": sample.task, "references": list(text.references), "tokens": tokens}
            data |= {} if builder.published else {"reduced": True}
            return Item(f"{sample.task}/{sample.index:04d}", np.array(ids, dtype=np.int64), data)
    raise AssertionError("that a form fits has been checked")


def longest(builder: Builder, encode: Encode, budget: int) -> tuple[Text, list[int]] | None:
    """The prompt of most units that has `budget` tokens or fewer, and its ids; None when even the smallest has more.

    Tokens grow almost evenly with units, so that few prompts are tokenized on the way. Raises UserError for a tokenizer
    that makes next to no tokens of them, which would fill no window.
    """
    text = builder.build(builder.least)
    ids = encode(text)
    if len(ids) > budget:
        return None
    first = low = (builder.least, len(ids))
    high: tuple[int, int] | None = None
    best, rounds = (text, ids), 0
    while high is None or high[0] - low[0] > 1:
        start, end = (first, low) if high is None else (low, high)
        slope = (end[1] - start[1]) / max(1, end[0] - start[0])
        step = (budget - low[1]) / slope if slope > 0 else max(16, 2 * low[0], (budget - low[1]) // 64)
        if high is not None and rounds % 3 == 2:  # where they do not grow evenly
            step = (high[0] - low[0]) / 2
        guess = low[0] + max(1, int(step))
        guess = guess if high is None else min(guess, high[0] - 1)
        text, rounds = builder.build(guess), rounds + 1
        ids = encode(text)
        if len(ids) <= budget:
            low, best = (guess, len(ids)), (text, ids)
            if guess - builder.least > _MANY * budget:
                got = f"one that makes {len(ids)} tokens of a prompt of {len(text.prompt)} characters"
                rule = "a window is filled up with text that the tokenizer writes"
                do = "give documents and templates in a language of the model"
                raise UserError("tokenizer", got=got, rule=rule, do=do)
        else:
            high = (guess, len(ids))
    return best
