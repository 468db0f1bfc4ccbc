"""Measurements done: item by item, each on disk when it is done, in this process or by workers, in any order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from longrope.evaluate.measures import Item, Measure, Record, fingerprint_of
from longrope.evaluate.methods import Result
from longrope.evaluate.paired import Difference, against_best
from longrope.factors import RopeFactors
from longrope.files import finite
from longrope.model import LoadedModel
from longrope.runs import lower_is_better
from longrope.workers import Workers, open_workers

Rows = Mapping[tuple[str, int], RopeFactors | None]
"""Factors by method and length; None is the checkpoint as it is."""


@dataclass(frozen=True)
class Step:
    """Where a measurement is: `done` items of `total`, the method and length that are done, seconds left (about)."""

    done: int
    total: int
    method: str
    length: int
    seconds_left: float | None = None


OnStep = Callable[[Step], None]
"""Called before each piece of a measurement."""
_OnRecord = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Part:
    """Some items of one method and length: what one worker does at once."""

    row: RopeFactors | None
    length: int
    items: tuple[int, ...]


_Waiting = tuple[tuple[str, int], Part]
"""A part that is not done, with the method and length that it is of."""


class Measuring:
    """Does parts of a measurement on a model, under their factors; items are given by length."""

    def __init__(self, loaded: LoadedModel, measure: Measure, items: Mapping[int, Sequence[Item]]) -> None:
        self._loaded, self._measure, self._items = loaded, measure, items
        self._patch = loaded.patch()

    def __call__(self, task: Part) -> list[Record]:
        """The records of a part's items, in order."""
        self._patch.install(task.row)
        items = self._items[task.length]
        return list(self._measure.run(self._loaded, [items[index] for index in task.items]))

    def close(self) -> None:
        """Restore the model."""
        self._patch.undo()


def execute(
    loaded: LoadedModel,
    measure: Measure,
    rows: Rows,
    items: Mapping[int, Sequence[Item]],
    *,
    windows: str | None = None,
    known: Sequence[Mapping[str, Any]] = (),
    workers: str | None = None,
    on_record: _OnRecord | None = None,
    on_step: OnStep | None = None,
) -> list[Result]:
    """Results of all rows, in their order.

    known: lines that an earlier process gave to `on_record`; their items are not done again. windows: which documents
    the items are of (`search`, `unseen`), where several are measured in one run. Raises UserError as the measure does.
    """
    lines = {(line["method"], line["length"], line.get("windows"), line["item"]): line for line in known}
    records: dict[tuple[str, int], dict[int, Record]] = {key: {} for key in rows}
    waiting: list[_Waiting] = []
    for (method, length), row in rows.items():
        of_length = items[length]
        found = {n: lines.get((method, length, windows, item.key)) for n, item in enumerate(of_length)}
        records[method, length] = {n: line["record"] for n, line in found.items() if line is not None}
        size = max(1, loaded.batch_tokens // length) if measure.batched else 1
        for start in range(0, len(of_length), size):
            # A group that was cut is done again whole: how many come together may change the last bits.
            group = range(start, min(start + size, len(of_length)))
            if any(found[n] is None for n in group):
                waiting.append(((method, length), Part(row, length, tuple(group))))
    if waiting:
        make = partial(Measuring, measure=measure, items=items)
        with open_workers(workers, loaded, make) as opened:
            for (method, length), part, made in _done(opened, waiting, _finished(rows, items, waiting), on_step):
                for n, record in zip(part.items, made, strict=True):
                    if n in records[method, length]:
                        continue
                    whole: dict[str, Any] = cast(dict[str, Any], finite(dict(record)))
                    records[method, length][n] = whole
                    if on_record:
                        line = {"method": method, "length": length, "item": items[length][n].key, "record": whole}
                        on_record(line | ({"windows": windows} if windows else {}))
    ordered = {key: [of_row[n] for n in range(len(of_row))] for key, of_row in records.items()}
    hashes = {length: fingerprint_of(of_length) for length, of_length in items.items()}
    return _summed(measure, ordered, windows, hashes)


def _summed(
    measure: Measure,
    records: Mapping[tuple[str, int], Sequence[Record]],
    windows: str | None,
    hashes: Mapping[int, str],
) -> list[Result]:
    """Results of all rows, each with its difference from the best of its length and the hash of its items."""
    summaries = {key: measure.summarize(key[1], of_row) for key, of_row in records.items()}
    behind: dict[tuple[str, int], tuple[str, Difference]] = {}
    for length in dict.fromkeys(length for _, length in records):
        values = {key[0]: summary.value for key, summary in summaries.items() if key[1] == length}
        of_length = {key[0]: of_row for key, of_row in records.items() if key[1] == length}
        found = against_best(values, of_length, lower=lower_is_better(measure.name))
        behind |= {(method, length): each for method, each in found.items()}
    return [
        Result.summing(*key, summary, windows, behind.get(key), hashes[key[1]]) for key, summary in summaries.items()
    ]


def _finished(rows: Rows, items: Mapping[int, Sequence[Item]], waiting: Sequence[_Waiting]) -> int:
    """How many items are in no group that waits."""
    return sum(len(items[length]) for _, length in rows) - sum(len(part.items) for _, part in waiting)


def _done(
    workers: Workers[Part, list[Record]], waiting: Sequence[_Waiting], done: int, on_step: OnStep | None
) -> Iterator[tuple[tuple[str, int], Part, list[Record]]]:
    """Parts with their records as they end, in any order; progress by the tokens that are left, after `done` items."""
    total = done + sum(len(part.items) for _, part in waiting)
    tokens = sum(len(part.items) * part.length for _, part in waiting)
    begun, tokens_done = time.perf_counter(), 0
    if on_step:
        (method, length), _ = waiting[0]
        on_step(Step(done, total, method, length))
    for index, made in workers.run([part for _, part in waiting]):
        key, part = waiting[index]
        yield key, part, made
        done, tokens_done = done + len(part.items), tokens_done + len(part.items) * part.length
        if on_step and done < total:
            left = (time.perf_counter() - begun) * (tokens - tokens_done) / tokens_done
            (method, length), _ = waiting[min(index + 1, len(waiting) - 1)]
            on_step(Step(done, total, method, length, left))
