"""Further tables of the paper, each a part of its own."""

from __future__ import annotations

from collections.abc import Callable

from reproduction.setting import Setting
from reproduction.state import State

PARTS: dict[str, Callable[[Setting, State], None]] = {}
