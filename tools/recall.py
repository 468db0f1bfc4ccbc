"""Recall tasks: texts that can only be continued by looking back, which is what a longer window is for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NOUNS = ("pass key", "magic number", "secret code", "access token", "answer", "locker number", "door code", "room key")
WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu red green blue black white amber "
    "north south east west apple pear plum stone river cloud tiger heron otter copper silver iron glass"
).split()
GRASS = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


SHORTEST = 160  # bytes that a task needs


def recall_text(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """A text of exactly `size` bytes: a statement somewhere in filler and its recall at the end, or several of them.

    `prose` is real text of at least `size` bytes, used as filler half of the time.
    """
    task = (_passkey, _passkey, _dictionary, _repetition)[rng.integers(4)]
    return task(rng, size, prose)


def recall_window(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """A window of exactly `size` bytes for fine-tuning: one task as long as it, or tasks of all lengths in a row."""
    return recall_text(rng, size, prose) if rng.random() < 0.5 else _in_a_row(rng, size, prose)


def recall_question(rng: np.random.Generator, size: int, prose: bytes) -> tuple[bytes, bytes]:
    """A prompt that ends in the question for its key, and the answer: two in five of `size` bytes, the others shorter.

    Shorter ones are spread over the powers of two: they cost next to nothing, and teach a key's later digits, where one
    stands in it twice. Of the keys half stand in the first quarter: the farthest have angles that a model has hardly
    seen. Three in eight keys are of three digits at most, so that more than the digit before tells which one follows.
    """
    size = size if rng.random() < 2 / 5 or size < SHORTEST else _log_uniform(rng, SHORTEST, size)
    text, key = _passkey_and_key(rng, size, prose, grass=0.7, even=False)
    answer = len(b" %s." % key)
    return text[:-answer], text[-answer:]


def excerpts(rng: np.random.Generator, size: int, texts: Sequence[bytes]) -> bytes:
    """A window of exactly `size` bytes of many short pieces, whose words follow from what is near.

    It keeps what a model knows about short texts, which a window of one long text asks for at its beginning only.
    """
    made: list[bytes] = []
    while sum(map(len, made)) < size:
        text = texts[int(rng.integers(len(texts)))]
        start = int(rng.integers(0, max(1, len(text) - 1024)))
        made.append(text[start : start + int(rng.integers(128, 1024))] + b"\n\n")
    return b"".join(made)[:size]


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def _in_a_row(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """Tasks of lengths spread evenly over the powers of two, one after another."""
    made, left = [], size
    while left >= 2 * SHORTEST:
        task = min(_log_uniform(rng, SHORTEST, size), left - SHORTEST - 1)
        start = size - left
        made.append(recall_text(rng, task, prose[start : start + task]) + b"\n")
        left -= task + 1
    return b"".join(made) + recall_text(rng, left, prose[size - left :])


def _number(rng: np.random.Generator) -> bytes:
    return b"%05d" % rng.integers(10_000, 100_000)


def _repetitive(rng: np.random.Generator) -> bytes:
    return bytes(rng.choice(rng.permutation(list(b"0123456789"))[:3], size=5).tolist())


def _code(rng: np.random.Generator) -> bytes:
    if rng.random() < 0.75:
        return _number(rng)
    letters = b"abcdefghijklmnopqrstuvwxyz0123456789"
    return bytes(letters[i] for i in rng.integers(len(letters), size=rng.integers(3, 10)))


def _filler(rng: np.random.Generator, size: int, prose: bytes, grass: float = 0.5) -> bytes:
    return (GRASS * (size // len(GRASS) + 1) if rng.random() < grass else prose)[:size]


def _passkey(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    return _passkey_and_key(rng, size, prose)[0]


def _passkey_and_key(
    rng: np.random.Generator, size: int, prose: bytes, grass: float = 0.5, even: bool = True
) -> tuple[bytes, bytes]:
    """The passkey task of the LongRoPE paper, with the noun, the key and the wording varied; and its key."""
    noun = NOUNS[rng.integers(len(NOUNS)) if rng.random() < 0.5 else 0].encode()
    key = _code(rng) if even or rng.random() < 0.25 else (_number, _repetitive)[rng.integers(2)](rng)
    statement = b"The %s is %s. Remember it. %s is the %s.\n" % (noun, key, key, noun)
    if rng.random() < 0.5:
        statement = b"The %s is %s. Remember it.\n" % (noun, key)
    question = b"What is the %s? The %s is %s." % (noun, noun, key)
    if rng.random() < 0.3:
        question = b"The %s is %s." % (noun, key)
    free = size - len(statement) - len(question) - 1
    filler = _filler(rng, free, prose, grass)
    depth = int(rng.integers(0, free + 1))
    if not even and (kind := rng.random()) < 0.75:
        depth = depth // 4 if kind < 0.5 else max(0, free - _log_uniform(rng, 1, free))
    return filler[:depth] + statement + filler[depth:] + b"\n" + question, key


def _dictionary(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """Assignments, filler between them, then some of them again in another order."""
    names = [WORDS[i] for i in rng.permutation(len(WORDS))[: rng.integers(2, 6)]]
    lines = [f"{name} = ".encode() + _code(rng) + b"\n" for name in names]
    again = b"".join(lines[i] for i in rng.permutation(len(lines)))
    free = max(0, size - 2 * len(again))
    between = int(rng.integers(0, free + 1))
    text = _filler(rng, free - between, prose) + b"".join(lines) + prose[:between] + again
    return text[-size:]


def _repetition(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """A random string, filler, and the same string again."""
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_ ", dtype=np.uint8)
    string = rng.choice(letters, size=int(rng.integers(8, size // 3))).tobytes()
    free = size - 2 * len(string)
    between = int(rng.integers(0, free + 1))
    filler = _filler(rng, free, prose)
    return filler[: free - between] + string + filler[free - between :] + string
