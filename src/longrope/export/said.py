"""What is said of an export that is read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """One thing that was looked at: ok, or not, or None for what is good to know."""

    name: str
    ok: bool | None
    what: str

    def told(self) -> dict[str, Any]:
        """As a document."""
        return dict(vars(self))
