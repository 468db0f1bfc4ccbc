"""Lengths in tokens as people write them: 4096, 4k, 128k, 2048k or 2m (k = 1024)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from longrope.errors import UserError

_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}
LONGEST = 2**40
"""Tokens: what is longer than a million times the longest window there is, is a mistake."""


def parse_length(text: str) -> int:
    """Tokens of a length such as `4096`, `4k` or `2m`. Raises UserError when it is not one."""
    match = re.fullmatch(r"([0-9]{1,15})([km]?)", text.strip().lower())
    length = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < length <= LONGEST:
        rule = "a length is a positive whole number of tokens, with k for 1024 or m for 1024k"
        rule += ", and not beyond 1048576m" if length else ""
        raise UserError("length", got=repr(text), rule=rule, do="write it like 4096, 4k, 128k or 2m")
    return length


def as_length(length: int | str) -> int:
    """Tokens of a length given as a number or as text. Raises UserError when it is not one."""
    return parse_length(str(length))


def parse_lengths(text: str) -> list[int]:
    """Ascending, distinct tokens of a list such as `256,1k,2k`. Raises UserError when one is not a length."""
    return sorted({parse_length(part) for part in text.split(",")})


def as_lengths(lengths: int | str | Iterable[int | str]) -> list[int]:
    """Ascending, distinct tokens of several lengths, of one, or of a text such as `256,1k`. Raises UserError."""
    if isinstance(lengths, int | str):
        return parse_lengths(str(lengths))
    return sorted({as_length(length) for length in lengths})


def format_length(length: int) -> str:
    """The short way to write a length: 131072 -> 128k, 300 -> 300."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
