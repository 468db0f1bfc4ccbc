"""Windows of the needle objective: a number told in a real document, of which only the recall at the end is scored.

The needle-driven perplexity of LongRoPE2 (arXiv 2502.20082): most tokens of a text can be foretold from those just
before them, and say little about far positions; the number cannot. The wording is ours, or that of a template.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from longrope.documents import Document
from longrope.errors import UserError
from longrope.evaluate.prompts import Prompt, check_prompt
from longrope.evaluate.templates import FIRST, INTRO_FROM, NEEDLE, SECOND, SHORT_NEEDLE, NeedleTemplate
from longrope.windows import Window, bos_of, choose_windows, shared_start, spare_windows, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Depth = Literal["start", "spread"]
"""Where needles are; `needle_windows` says what each is."""
DEPTHS: tuple[Depth, ...] = get_args(Depth)
"""All of them."""

DIGITS = 7
"""Of the number, as in LongRoPE2."""


def needle_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    depth: Depth,
    digits: int = DIGITS,
    template: NeedleTemplate | None = None,
    taken: Sequence[Window] | None = None,
) -> list[Window]:
    """`count` windows of exactly `length` tokens: BOS, introduction, document with a needle, question, answer.

    Only the tokens of the answer are scored: a number of `digits` digits, with what a template writes around it. The
    seed fixes keys and numbers, and the documents' spans by the rules of `choose_windows`. depth: "start" puts the
    needle before the document, as LongRoPE2 does; "spread" puts that of window k at (k + 1/2) / count of the document.
    `Window.start` is where the span of the document begins. template: the prompts' wording; by default ours, without
    its introduction below 1024 tokens. With `taken`, the spans are none of those of these windows, and as many of
    `count` as the documents have. Raises UserError when the prompt does not fit, the documents do not suffice, or the
    tokenizer cannot write the number.
    """
    if depth not in DEPTHS:
        rule = f"it is one of {', '.join(DEPTHS)}"
        raise UserError("--needle-depth", got=repr(depth), rule=rule, do="choose one of them")
    prompts = needle_prompts(tokenizer, length=length, count=count, seed=seed, digits=digits, template=template)
    bos = tokenizer.bos_token_id is not None
    # Every span as long as the longest needed: prompts differ by a few tokens.
    longest = length - min((each.size for each in prompts), default=0)
    try:
        drawn = {"length": longest + bos, "count": count, "seed": seed}
        if taken is None:
            spans = choose_windows(documents, tokenizer, **drawn)
        else:
            spans = spare_windows(documents, tokenizer, **drawn, taken=taken)
    except UserError as error:
        raise error.changed(rule=f"{error.rule} (a needle's prompt takes the rest of {length})") from None
    windows = []
    for index, (span, prompt) in enumerate(zip(spans, prompts, strict=False)):
        text = span.ids[bos:][: length - prompt.size].tolist()
        ids = prompt.around(text, 0.0 if depth == "start" else (index + 0.5) / len(spans))
        windows.append(Window(span.document, span.sha256, span.start, ids, length - len(prompt.answer)))
    return windows


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    digits: int = DIGITS,
    template: NeedleTemplate | None = None,
) -> list[Prompt]:
    """Each window's prompt, without its document.

    Raises UserError when one does not fit into a window, or the tokenizer cannot write its number.
    """
    rng = np.random.default_rng(seed)
    wording = SHORT_NEEDLE if length < INTRO_FROM else NEEDLE
    prompt = partial(_own_prompt, tokenizer, wording) if template is None else partial(template.prompt, tokenizer)
    prompts = []
    for _ in range(count):
        if template is None:
            key = f"{FIRST[rng.integers(len(FIRST))]}-{SECOND[rng.integers(len(SECOND))]}"
        else:
            key = template.names[int(rng.integers(len(template.names)))]
        prompts.append(prompt(key, str(rng.integers(10 ** (digits - 1), 10**digits))))
    fixed = max((each.size for each in prompts), default=0)
    if length < fixed + 2:
        raise UserError(
            "--objective",
            got=f"a window of {length} tokens",
            rule=f"the needle's prompt without a document takes {fixed}",
            do=f"search at {fixed + 2} tokens or more, or with the perplexity objective",
        )
    return prompts


def _own_prompt(tokenizer: PreTrainedTokenizerBase, template: NeedleTemplate, key: str, number: str) -> Prompt:
    """A prompt of our own wording, of which the answer is the number alone."""
    ids = partial(token_ids, tokenizer)
    wording = template.wording(key, number)
    head = bos_of(tokenizer) + (ids(wording.intro) if wording.intro else [])
    asked = wording.question + wording.lead
    whole = ids(asked + wording.answer)
    # The space is scored only where it is one token with the number, or the tokenizer joins even more than that.
    known = max(shared_start(ids(text), whole) for text in (asked, f"{asked} "))
    prompt = Prompt(head, ids(wording.told), whole[:known], whole[known:])
    check_prompt(tokenizer, prompt, wording)
    return prompt
