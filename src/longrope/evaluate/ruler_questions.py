"""The user's own set of questions for RULER's qa_1 and qa_2.

A JSONL file, one object a line: {"question": "..", "answers": ["..", ".."], "context": ".."}. `answers` are the
spellings that count. `context` is the passage that answers it (qa_1), or a list of passages that must be put together
(qa_2). Passages of other questions are what the right ones hide among.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrope.errors import UserError
from longrope.files import LARGEST, check_regular


@dataclass(frozen=True)
class Question:
    """A question, the answers that count, and the passages that hold them; several: it is one of qa_2."""

    question: str
    answers: tuple[str, ...]
    context: tuple[str, ...]

    @property
    def task(self) -> str:
        """The task that asks it."""
        return "qa_1" if len(self.context) == 1 else "qa_2"


def passages(questions: Sequence[Question]) -> list[str]:
    """All passages, each once."""
    return list(dict.fromkeys(passage for question in questions for passage in question.context))


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """The questions of a JSONL file. Raises UserError, naming the line, for one that is not as described above."""
    check_regular(Path(path), "questions", LARGEST)
    try:
        # Not splitlines: U+2028, U+2029 and U+0085 may stand inside a JSON string.
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        got = f"{str(path)!r}, which cannot be read"
        rule = (error.strerror if isinstance(error, OSError) else None) or "it is text in UTF-8"
        raise UserError("questions", got=got, rule=rule, do="check the path and its content") from error
    found = [_question(line, f"{str(path)!r} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        rule = "a set of questions has at least one"
        raise UserError("questions", got=f"{str(path)!r}, which is empty", rule=rule, do="give a file with questions")
    return tuple(found)


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        rule = "every line is a JSON object"
        raise UserError(where, got="something else", rule=rule, do="correct the line") from error
    if not isinstance(row, dict):
        raise UserError(where, got="something else", rule="every line is a JSON object", do="correct the line")
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(where, got="no text in `question`", rule="it is a text", do="correct the line")
    return Question(row["question"].strip(), _texts(row, "answers", where), _texts(row, "context", where))


def _texts(row: dict[str, object], field: str, where: str) -> tuple[str, ...]:
    """A text, or a list of them, as a tuple of different ones. Raises UserError."""
    value = row.get(field)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(each, str) and each.strip() for each in values):
        rule = "it is a text, or a list of texts, and none is empty"
        raise UserError(where, got=f"no texts in `{field}`", rule=rule, do="correct the line")
    return tuple(dict.fromkeys(each.strip() for each in values))
