"""Conversations as text: what a tokenizer's chat template writes of the messages of a row."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from longrope.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TODAY = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(['"])((?:(?!\1).)*)\1\s*\)""")
_THAT_DAY = datetime(2025, 1, 1, tzinfo=UTC)
"""What templates that write today's date write in documents: a run that goes on tomorrow reads the same texts."""


def conversation(messages: object, tools: object, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """`messages`, a list of {role, content, ..}, as the tokenizer's chat template writes them with the row's `tools`.

    Without its BOS, and without an EOS at its end: both are around whatever is trained on. `where` is the row, for
    messages. Raises UserError without a chat template, for another shape, and for what the template refuses.
    """
    return _written(messages, tools, where, _with_template(tokenizer, where, "messages"), "messages")


def exchange(
    prompt: object, completion: object, tools: object, where: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, str]:
    """Messages and the answer to them as one conversation, in two parts: what is read, and what is to be written.

    The first ends where the conversation differs from what the template writes to ask for an answer. Raises UserError
    as `conversation` does, and where the template writes the prompt's own messages otherwise when an answer follows.
    """
    written_by = _with_template(tokenizer, where, "prompt")
    before = _check_messages(prompt, where, "prompt")
    both = [*before, *_check_messages(completion, where, "completion")]
    asked = _written(before, tools, where, written_by, "prompt", asking=True)
    alone = _written(before, tools, where, written_by, "prompt")
    whole = _written(both, tools, where, written_by, "completion")
    read = _shared_start(asked, whole)
    if read < _shared_start(asked, alone):
        got, rule = "`prompt`", "the chat template writes it the same before an answer as alone"
        raise UserError(where, got=got, rule=rule, do="give the whole conversation as `messages`")
    return whole[:read], whole[read:]


def _with_template(tokenizer: PreTrainedTokenizerBase | None, where: str, field: str) -> PreTrainedTokenizerBase:
    if tokenizer is None or tokenizer.chat_template is None:
        got, rule = f"`{field}`, and no chat template", "messages become text through the model's chat template"
        do = "give documents with `text`, or a model whose tokenizer has a chat template"
        raise UserError(where, got=got, rule=rule, do=do)
    return tokenizer


def _check_messages(value: object, where: str, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(map(_is_message, value)):
        got, rule = f"`{field}` of another shape", "messages are a list of objects with role and content"
        raise UserError(where, got=got, rule=rule, do="convert the field")
    return value


def _written(
    messages: object,
    tools: object,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    field: str,
    *,
    asking: bool = False,
) -> str:
    present = [_present(each) for each in _check_messages(messages, where, field)]
    declared: Any = tools
    if isinstance(tools, str) and tools:
        try:
            declared = json.loads(tools)
        except (ValueError, RecursionError):
            rule, do = "they are a list of functions, or its JSON", "correct the row, or take it out"
            raise UserError(where, got="`tools` that are no JSON", rule=rule, do=do) from None
    try:
        template, tools = dated_template(tokenizer, declared or None), declared or None
        text = tokenizer.apply_chat_template(
            present, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=asking
        )
    except Exception as error:  # a template is a program, and it comes with the model
        do = "correct the row, or take it out"
        rule = f"the model's chat template refuses it ({first_line(error)})"
        raise UserError(where, got=f"`{field}`", rule=rule, do=do) from error
    return _without_ends(str(text), tokenizer.bos_token, tokenizer.eos_token)


def dated_template(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The tokenizer's chat template with a fixed date where it asks for today's in a format that it says there.

    Raises ValueError where the tokenizer has none, or several and none for this.
    """
    template = str(tokenizer.get_chat_template(tools=tools))
    return _TODAY.sub(lambda asked: json.dumps(_THAT_DAY.strftime(asked[2])), template)


def _shared_start(first: str, second: str) -> int:
    """How many characters two texts have in common at their start."""
    differ = (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differ, min(len(first), len(second)))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _present(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what is null: tables give every one every field, and its parts, too; templates look for it."""
    present = {key: value for key, value in message.items() if value is not None}
    if isinstance(parts := present.get("content"), list):
        present["content"] = [
            {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part
            for part in parts
        ]
    return present


def _without_ends(text: str, bos: str | None, eos: str | None) -> str:
    """A conversation without the BOS and the EOS that a template writes, and the space outside of them."""
    if bos and text.lstrip().startswith(bos):
        text = text.lstrip().removeprefix(bos)
    if eos and text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text
