"""Recall tasks: texts that can only be continued by looking back, which is what a longer window is for."""

from __future__ import annotations

import re

import numpy as np

NOUNS = ("pass key", "magic number", "secret code", "access token", "answer", "locker number", "door code", "room key")
WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu red green blue black white amber "
    "north south east west apple pear plum stone river cloud tiger heron otter copper silver iron glass"
).split()
GRASS = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


# A task needs so many bytes, and of a window of pairs more than half is the pairs: what is learned is one byte of each.
SHORTEST, BYTES_A_PAIR = 160, 150


def recall_text(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """A text of exactly `size` bytes: a statement somewhere in filler and its recall at the end, or several of them.

    `prose` is real text of at least `size` bytes, used as filler half of the time.
    """
    task = (_passkey, _passkey, _dictionary, _repetition)[rng.integers(4)]
    return task(rng, size, prose)


def recall_window(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """A window of exactly `size` bytes for fine-tuning: recall at every distance that fits into it.

    One task as long as the window, tasks of all lengths one after another, or (mostly) many pairs of a statement and
    its question, some near each other and some far apart, in the same text.
    """
    kind = rng.integers(6)
    if kind == 0 or size < 2 * SHORTEST:
        return recall_text(rng, size, prose)
    return _in_a_row(rng, size, prose) if kind == 1 else _pairs(rng, size, prose)


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


def _pairs(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """Keys of different names, each stated once and asked for once, mostly in filler that is nothing to learn.

    Half of the distances are spread over the powers of two, half are more than half of the window: else few would be
    as far as windows are new. Of prose the filler is rarely, because what a window of prose says of the next byte
    drowns the few bytes in which one looks back.
    """
    said = []
    for name in _names(rng, prose, max(1, size // BYTES_A_PAIR)):
        key = _code(rng)
        statement = short = b"\nThe %s is %s.\n" % (name, key)
        if rng.random() < 0.5:
            statement = b"\nThe %s is %s. Remember it. %s is the %s.\n" % (name, key, key, name)
        question = short if rng.random() < 0.5 else b"\nWhat is the %s? The %s is %s.\n" % (name, name, key)
        distance = _log_uniform(rng, 1, size) / size if rng.random() < 0.5 else rng.uniform(0.5, 1)
        place = rng.uniform(0, 1 - distance)
        said += [(place, statement), (place + distance, question)]
    free = size - sum(len(each) for _, each in said)
    filler, made, at = _filler(rng, free, prose, grass=0.75), [], 0
    for place, text in sorted(said):
        upto = int(place * free)
        made += [filler[at:upto], text]
        at = upto
    return b"".join(made) + filler[at:]


def _names(rng: np.random.Generator, prose: bytes, count: int) -> list[bytes]:
    """At most `count` names, the paper's first: the others are words of the prose. Each ends as no other one does.

    What stands right before "is" tells one statement from another, as in the paper's filler, whose sky and sun also are
    something.
    """
    words = sorted(set(re.findall(rb"\b[a-z]{3,9}\b", prose)))
    names = {b"key": NOUNS[0].encode()}
    for number in rng.permutation(len(words)):
        names.setdefault(words[number][-3:], words[number])
    return list(names.values())[:count]


def _code(rng: np.random.Generator) -> bytes:
    if rng.random() < 0.75:
        return b"%05d" % rng.integers(10_000, 100_000)
    letters = b"abcdefghijklmnopqrstuvwxyz0123456789"
    return bytes(letters[i] for i in rng.integers(len(letters), size=rng.integers(3, 10)))


def _filler(rng: np.random.Generator, size: int, prose: bytes, grass: float = 0.5) -> bytes:
    return (GRASS * (size // len(GRASS) + 1) if rng.random() < grass else prose)[:size]


def _passkey(rng: np.random.Generator, size: int, prose: bytes) -> bytes:
    """The passkey task of the LongRoPE paper, with the noun, the key and the wording varied."""
    noun = NOUNS[rng.integers(len(NOUNS)) if rng.random() < 0.5 else 0].encode()
    key = _code(rng)
    statement = b"The %s is %s. Remember it. %s is the %s.\n" % (noun, key, key, noun)
    if rng.random() < 0.5:
        statement = b"The %s is %s. Remember it.\n" % (noun, key)
    question = b"What is the %s? The %s is %s." % (noun, noun, key)
    if rng.random() < 0.3:
        question = b"The %s is %s." % (noun, key)
    free = size - len(statement) - len(question) - 1
    filler = _filler(rng, free, prose)
    depth = int(rng.integers(0, free + 1))
    return filler[:depth] + statement + filler[depth:] + b"\n" + question


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
