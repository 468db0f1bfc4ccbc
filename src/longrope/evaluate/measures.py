"""What every measurement is: items of one length, each done under the factors that the model carries, and their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from types import UnionType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longrope.model import LoadedModel

# What came of an item, as a line of results.jsonl holds it: numbers, strings and lists of them.
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One piece of a measurement, that is done whole by one worker and written down when it is done.

    key: names it among the items of its length, the same in every run of the same settings. ids: its prompt or window
    (T,). data: what else doing it and scoring it needs; picklable.
    """

    key: str
    ids: NDArray[np.int64]
    data: Mapping[str, Any] = field(default_factory=dict)


def fingerprint_of(items: Sequence[Item]) -> str:
    """`sha256:...` over the keys and ids of items: equal prompts and windows, whatever made them."""
    digest = sha256()
    for item in items:
        digest.update(f"{item.key}:{len(item.ids)}:".encode())
        digest.update(item.ids.astype("<i8").tobytes())
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class Summary:
    """The value of a method at a length, of `tokens` tokens, with its 95% interval where there is one.

    details: what plots and tables show beside the value; JSON as it is.
    """

    value: float
    tokens: int
    ci: tuple[float, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Measure(Protocol):
    """A kind of measurement with its settings; picklable, because workers are sent it."""

    @property
    def name(self) -> str:
        """As in `longrope evaluate NAME`."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its results depend on beside model, factors, documents and length: JSON, for config.json."""
        ...

    @property
    def record_keys(self) -> Mapping[str, type | UnionType]:
        """What every record holds, by name and type."""
        ...

    @property
    def batched(self) -> bool:
        """Whether `run` does several items at once; where it does not, each is written down as it is done."""
        ...

    def items(self, loaded: LoadedModel, length: int) -> Sequence[Item]:
        """The items of a length, the same for every method. Raises UserError when a prompt does not fit into it."""
        ...

    def run(self, loaded: LoadedModel, items: Sequence[Item]) -> Sequence[Record]:
        """Do items of one length together, under the factors that the model carries now; their records, in order.

        How many come together is the caller's choice, and does not change a record.
        """
        ...

    def summarize(self, length: int, records: Sequence[Record]) -> Summary:
        """Of the records of all items of a length, in the order of the items."""
        ...
