"""What RULER's tasks have in common: a sample, its texts, and how it is built at any size."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longrope.evaluate.ruler_questions import Question
from longrope.evaluate.ruler_texts import Texts


@dataclass(frozen=True)
class Text:
    """A prompt with its references; answer: one as a model would write it, for the room that it takes."""

    prompt: str
    answer_prefix: str
    references: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Sample:
    """What a sample is made from: where it stands, and the texts it may use; `seed` is that of the whole measurement.

    haystack: units of running text. questions: those that the task may ask.
    """

    task: str
    length: int
    index: int
    seed: int
    texts: Texts
    haystack: Sequence[str] = ()
    questions: Sequence[Question] = ()

    def random(self, part: str) -> random.Random:
        """Random numbers of one part of this sample alone: no other sample, and no other part, moves them."""
        return random.Random(f"{self.seed}/{self.task}/{self.length}/{self.index}/{part}")


@dataclass(frozen=True)
class Builder:
    """Prompts of a sample by number of units, which is `least` or more. published: in the published form."""

    build: Callable[[int], Text]
    least: int
    published: bool = True


def after(shown: Sequence[Text], text: Text) -> Text:
    """A text after solved ones."""
    solved = "".join(f"{each.prompt}\n{each.answer_prefix} {each.answer}\n\n" for each in shown)
    return Text(solved + text.prompt, text.answer_prefix, text.references, text.answer)
