"""Answers that lm-eval keeps, as JSON: by itself it pickles them, and a folder that others made would run code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longrope.errors import UserError


def _written(answer: object, protocol: int = 0) -> bytes:
    """protocol: of the pickle that this stands in for."""
    return json.dumps(answer, default=float).encode()  # numpy's numbers


def _read(answer: bytes) -> Any:
    """A text, a number, or a tuple of them, as the model gave it. Raises UserError for what is none."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        found = tuple(found)
    if not isinstance(found, str | float | int | tuple):
        rule, do = "answers that were kept can be read", "remove the .db files, and they are asked for again"
        raise UserError("answers", got="one of another form", rule=rule, do=do)
    return found


@contextmanager
def answers_as_json() -> Iterator[None]:
    """Let what sqlitedict reads and writes meanwhile be JSON."""
    import sqlitedict

    own = sqlitedict.dumps, sqlitedict.loads
    sqlitedict.dumps, sqlitedict.loads = _written, _read
    try:
        yield
    finally:
        sqlitedict.dumps, sqlitedict.loads = own
