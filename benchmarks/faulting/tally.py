"""What was tried and what went wrong, of one case and of many."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from faulting.child import Ran

LOST, TRACEBACK, WRONG = "lost", "traceback", "wrong"
"""Work that was done and had to be done again; a traceback or no clear line; another result than the undisturbed."""
_NOT_ONE_LINE = re.compile(r'^(Traceback|  File "|[A-Za-z_.]+(Error|Exception|Warning)\b)', re.MULTILINE)


@dataclass
class Tally:
    """Counts by name, and troubles: a kind of the above, and what happened."""

    counts: Counter[str] = field(default_factory=Counter)
    troubles: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take another one in."""
        self.counts += other.counts
        self.troubles += other.troubles

    def count(self, name: str, number: int = 1) -> None:
        """Something more was tried."""
        self.counts[name] += number

    def trouble(self, kind: str, what: str) -> None:
        """Something went wrong."""
        self.troubles.append((kind, what))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"counts": dict(self.counts), "troubles": [list(each) for each in self.troubles]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tally:
        """From JSON."""
        return cls(Counter(data["counts"]), [(kind, what) for kind, what in data["troubles"]])


@dataclass(frozen=True)
class Case:
    """Something to try on a command, in a process of its own, and what is to be said of it."""

    command: str
    part: str
    what: str
    run: Callable[[Tally], None]


def told(ran: Ran) -> str:
    """The end of what a command said, for a trouble."""
    return f"exit {ran.code}: {' / '.join(ran.err.strip().splitlines()[-12:])[-900:]}"


def one_line(ran: Ran) -> str | None:
    """The one line of a command that ended for its user's or its disk's sake, None where it is not one clear line."""
    lines = [line for line in ran.err.splitlines() if line.startswith("longrope: ")]
    if ran.code != 2 or len(lines) != 1 or _NOT_ONE_LINE.search(ran.err):
        return None
    return lines[0]


def is_clean(ran: Ran) -> bool:
    """Whether nothing that looks like a traceback was said."""
    return not _NOT_ONE_LINE.search(ran.err)


def summed(tallies: Iterable[Tally]) -> Tally:
    """All of them as one."""
    whole = Tally()
    for each in tallies:
        whole.add(each)
    return whole
