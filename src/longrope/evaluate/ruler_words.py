"""RULER's tasks of counting: common words (cwe) and frequent coded words (fwe)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from string import ascii_lowercase

from longrope.evaluate.ruler_samples import Builder, Sample, Text, after

_SYLLABLES = [first + second for first in "bdfgjklmnprstvz" for second in "aeiou"]
_COMMON = 10


def common_words(
    sample: Sample, times: tuple[int, int], shown_times: tuple[int, int] | None = None, *, published: bool = False
) -> Builder:
    """Common words: ten words `times[0]` times each among others `times[1]` times each, in a numbered list.

    shown_times: those of the solved list before it, where there is one; it has 20 words, or 40 where they come more
    than once.
    """
    words = sample.texts["cwe"]

    def task(part: str, others: int, times: tuple[int, int]) -> Text:
        rng = sample.random(part)
        chosen: dict[str, None] = {}
        while len(chosen) < _COMMON + others:  # six letters each, so that none is part of another
            chosen["".join(rng.choices(_SYLLABLES, k=3))] = None
        common, uncommon = list(chosen)[:_COMMON], list(chosen)[_COMMON:]
        listed = common * times[0] + uncommon * times[1]
        sample.random(f"{part} order").shuffle(listed)
        prompt = words["prompt"].format(context=_numbered(listed))
        return Text(prompt, words["answer_prefix"].format(), tuple(common), _numbered(common))

    shown = [task("example", 30 if shown_times[1] > 1 else 10, shown_times)] if shown_times else []
    return Builder(lambda count: after(shown, task("words", count, times)), least=1, published=published)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def zeta_counts(words: int, vocabulary: int) -> list[int]:
    """How often the word of each rank comes up in about so many words: zeta with alpha = 2, rounded down."""
    return [int(words / (rank * rank * math.pi**2 / 6)) for rank in range(1, vocabulary + 1)]


def frequent_words(sample: Sample) -> Builder:
    """Frequent words: coded words with frequencies of a zeta distribution, whose most frequent one is dots."""
    rng, words = sample.random("words"), sample.texts["fwe"]
    vocabulary = max(5, sample.length // 50)
    coded: dict[str, None] = {"...": None}
    while len(coded) < vocabulary:
        coded["".join(rng.choices(ascii_lowercase, k=6))] = None
    asked = tuple(coded)[1:4]

    def clear(words: int) -> bool:
        *_, third, fourth = zeta_counts(words, 5)
        return third > fourth

    least = next(number for number in range(1, 100) if clear(number))

    def build(count: int) -> Text:
        while not clear(count):  # the third and the fourth word would come up equally often
            count -= 1
        listed = list(Counter(dict(zip(coded, zeta_counts(count, vocabulary), strict=True))).elements())
        sample.random("order").shuffle(listed)
        prompt = words["prompt"].format(context=" ".join(listed))
        return Text(prompt, words["answer_prefix"].format(), asked, ", ".join(asked))

    return Builder(build, least=least)
