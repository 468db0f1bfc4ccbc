"""What a search asks for and what comes back: factors on some of the windows, their losses, perhaps their gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from longrope.factors import RopeFactors

Result = TypeVar("Result")


@dataclass(frozen=True)
class Task:
    """Factors to be tried on some windows: one piece of work, done whole by one worker.

    windows: indices into the windows of the search, ascending. gradient: whether the loss is differentiated.
    """

    factors: RopeFactors
    windows: tuple[int, ...]
    gradient: bool = False

    @property
    def key(self) -> str:
        """Short name: equal tasks of one search have equal outcomes."""
        told = f"{self.factors.key} {self.windows} {self.gradient}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Gradient:
    """Derivatives of a task's loss by each rescale factor (P,) and by the attention factor: nats, windows weighted."""

    rescale: tuple[float, ...]
    attention_factor: float


@dataclass(frozen=True)
class Outcome:
    """What came of a task: the summed loss in nats of each of its windows, and what it cost.

    tokens: token-passes, a backward pass counting two. recomputed: tokens of forward passes made again to save
    memory, which are not among them.
    """

    losses: tuple[float, ...]
    tokens: int
    seconds: float
    gradient: Gradient | None = None
    recomputed: int = 0
    peak_bytes: int | None = None
    """The most memory that the worker had in use so far, on its device; not part of the result."""

    def to_dict(self) -> dict[str, Any]:
        """As it stands in evaluations.jsonl, without the seconds' last digits."""
        written: dict[str, Any] = {
            "losses": list(self.losses),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
        }
        if self.gradient is not None:
            written["gradient"] = [*self.gradient.rescale, self.gradient.attention_factor]
        if self.recomputed:
            written["recomputed"] = self.recomputed
        return written

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """From a line of evaluations.jsonl, in which numbers that are not finite are null."""

        def number(value: float | None) -> float:
            return float("nan") if value is None else float(value)

        gradient = None
        if (numbers := data.get("gradient")) is not None:
            gradient = Gradient(tuple(number(value) for value in numbers[:-1]), number(numbers[-1]))
        return cls(
            losses=tuple(number(value) for value in data["losses"]),
            tokens=int(data["tokens"]),
            seconds=float(data["seconds"]),
            gradient=gradient,
            recomputed=int(data.get("recomputed", 0)),
        )


@dataclass(frozen=True)
class Proposal:
    """A task of a search, where its factors come from (`yarn`, `mutation`, `descent`, ...), and in which round.

    may_win: whether the factors may be what the search returns; those that were not rounded may not.
    """

    task: Task
    origin: str
    iteration: int
    may_win: bool = True


# A search as a generator: it yields the tasks of a round, which may be done in any order and at the same time, and is
# sent their outcomes in the order of the tasks. Sent the same outcomes it asks for the same tasks, so that a search is
# resumed by being told again what it was told.
Steps = Generator[Sequence[Proposal], Sequence[Outcome], Result]
