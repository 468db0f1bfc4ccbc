"""Token ids of a prompt: text is told within some filler and asked for at the end, plain or as a turn of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from longrope.conversations import dated_template
from longrope.errors import UserError, first_line, shown
from longrope.windows import bos_of, shared_start, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that a piece of the prompt can follow without being joined to them.
_BEFORE = ("\n", "a")
_CONTENT = "longrope0content"  # stands for the user's turn while the chat template is taken apart


@dataclass(frozen=True)
class Wording:
    """The texts of one prompt. lead: what the answer follows directly; in a chat it begins the assistant's turn.

    number: the digits that are told and asked for.
    """

    intro: str
    told: str
    question: str
    lead: str
    answer: str
    number: str


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt without its filler. head: BOS, or the chat's beginning, and the introduction."""

    head: Sequence[int]
    told: Sequence[int]
    question: Sequence[int]
    answer: Sequence[int]

    @property
    def size(self) -> int:
        """Tokens without any filler."""
        return len(self.head) + len(self.told) + len(self.question) + len(self.answer)

    def around(self, filler: Sequence[int], depth: float) -> NDArray[np.int64]:
        """The whole prompt with its answer (size + len(filler),); told at `depth` (0 to 1) of the filler."""
        cut = int(depth * len(filler))
        ids = [*self.head, *filler[:cut], *self.told, *filler[cut:], *self.question, *self.answer]
        return np.array(ids, dtype=np.int64)


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, wording: Wording, *, chat: bool) -> Prompt:
    """The token ids of a prompt; its answer's are those that end the tokens of the whole text.

    chat: all but the lead and the answer is the user's turn of the tokenizer's chat template, and these begin the
    assistant's. Raises UserError for a tokenizer that cannot write the number, or has no chat template to use.
    """
    if chat:
        before, after = chat_frame(tokenizer)
        head = _ids(tokenizer, before + wording.intro)  # the template writes BOS where it is wanted
        begun = (wording.lead + wording.answer).lstrip()
        answer = wording.answer if wording.lead.strip() else wording.answer.lstrip()
        asked = wording.question + after + begun.removesuffix(answer)
    else:
        head = bos_of(tokenizer) + _ids(tokenizer, wording.intro)
        asked, answer = wording.question + wording.lead, wording.answer
    question, answered = _ending(tokenizer, asked, answer, told=wording.told)
    prompt = Prompt(head, inner_ids(tokenizer, wording.told), question, answered)
    check_prompt(tokenizer, prompt, wording)
    return prompt


def check_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, wording: Wording) -> None:
    """Raise UserError for a tokenizer that cannot write the number, where it is told or in the answer.

    What it does not know is dropped without a sign, or becomes its unknown token: in some, one for a whole word.
    """
    # The question's may stand for its last word and the answer together.
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in (prompt.answer or prompt.question)
    if not prompt.question or unknown:
        raise _not_apart(wording.question + wording.lead, wording.answer)
    for text, ids in ((wording.answer, prompt.answer), (wording.told, prompt.told)):
        written = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        if _digits(wording.number) not in _digits(written):
            got = f"one that loses {wording.number}: it writes {shown(text.strip())} as {shown(written.strip())}"
            rule = "each digit is in the prompt, where it is told and in the answer"
            do = "give a template with the number apart from other words, or a model whose tokenizer has all digits"
            raise UserError("tokenizer", got=got, rule=rule, do=do)


def inner_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text inside a longer one: without the space that some tokenizers put before a first word."""
    return _following(tokenizer, _anchor(tokenizer, text), text)


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before the user's turn, and from its end to where the assistant's begins.

    Raises UserError when there is no template, or it does not write one turn of the user as it is.
    """
    if tokenizer.chat_template is None:
        got, rule = "a tokenizer without a chat template", "--chat puts prompts through it"
        raise UserError("--chat", got=got, rule=rule, do="leave --chat out, or measure an instruct model")
    reason = "it writes something else"
    turn = [{"role": "user", "content": _CONTENT}]
    try:
        # Templates of models that think before they answer know the last keyword; others ignore it.
        template = dated_template(tokenizer)  # the same prompts tomorrow
        rendered = tokenizer.apply_chat_template(
            turn, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # a template is a program, and it comes with the model
        rendered, reason = "", first_line(error)
    before, _, after = str(rendered).partition(_CONTENT)
    if str(rendered).count(_CONTENT) != 1:
        got, rule = f"a chat template that cannot be used ({reason})", "it writes a user's turn once, as it is"
        raise UserError("--chat", got=got, rule=rule, do="leave --chat out")
    return before, after


def _ending(tokenizer: PreTrainedTokenizerBase, asked: str, answer: str, *, told: str) -> tuple[list[int], list[int]]:
    """Token ids of a question and of its answer, which begins with the first token that the question alone lacks.

    Where the tokenizer joins the question's end with the answer's beginning, that token is the answer's first.
    """
    anchor = _anchor(tokenizer, asked)
    whole = _following(tokenizer, anchor, asked + answer)
    known = shared_start(_following(tokenizer, anchor, asked), whole)
    question, answered = whole[:known], whole[known:]
    # One without tokens is for `check_prompt` to tell.
    if answered and _ids(tokenizer, told + asked + answer)[-len(answered) :] != answered:
        raise _not_apart(asked, answer)
    return question, answered


def _not_apart(asked: str, answer: str) -> UserError:
    got = f"one that writes {answer.strip()!r} as no tokens of its own after {asked.strip()[-40:]!r}"
    rule = "the answer's tokens are the same wherever the question stands"
    return UserError("tokenizer", got=got, rule=rule, do="give a template with another question or answer")


def _digits(text: str) -> str:
    """The digits of a text, in order.

    All else may be written otherwise: spaces and marks between pieces, case, full-width forms, half a character.
    """
    return "".join(letter for letter in normalize("NFKC", text) if letter.isdecimal())


def _anchor(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text before this one which the tokenizer does not join with it; empty when there is none."""
    for anchor in _BEFORE:
        first = _ids(tokenizer, anchor)
        if _ids(tokenizer, anchor + text)[: len(first)] == first:
            return anchor
    return ""


def _following(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str) -> list[int]:
    return _ids(tokenizer, anchor + text)[len(_ids(tokenizer, anchor)) :]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return token_ids(tokenizer, text) if text else []
