"""A run's figures as TensorBoard event files, for those who look at all their runs there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from longrope.errors import UserError
from longrope.files import disk_errors
from longrope.report.read import RunData
from longrope.report.style import slug

_FILES = "events.out.tfevents.*.longrope"


def write(runs: Sequence[RunData], folder: Path) -> list[Path]:
    """An event file a run, in FOLDER/RUN; what an earlier report wrote there is replaced. Raises UserError."""
    written = []
    for run in runs:
        with EventLog(folder / slug(run.name)) as log:
            log.update(run)
        written += sorted(log.place.glob(_FILES))
    return written


class EventLog:
    """The event file of a run in a folder, to which a run that goes on is added. A context manager.

    The step of the search's best value is its token-passes, that of results their length in tokens. An event file of an
    earlier report or view in the folder is replaced. Raises UserError where tensorboard is not installed or the folder
    cannot be written.
    """

    def __init__(self, place: Path) -> None:
        try:
            self._event = import_module("tensorboard.compat.proto.event_pb2").Event
            self._summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
            writers = import_module("tensorboard.summary.writer.event_file_writer")
        except ImportError:
            do = "pip install 'longrope[tensorboard]'"
            raise UserError("--tensorboard", got="no tensorboard", rule="it writes the files", do=do) from None
        self.place = place
        self._written: set[tuple[str, int]] = set()
        with disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            for old in place.glob(_FILES):
                old.unlink()
            self._writer: Any = writers.EventFileWriter(str(place), filename_suffix=".longrope")

    def update(self, run: RunData) -> None:
        """Write what is not written yet."""
        with disk_errors(self.place):
            for tag, step, value in scalars(run):
                if (tag, step) not in self._written:
                    self._written.add((tag, step))
                    summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value)])
                    self._writer.add_event(self._event(step=step, summary=summary))
            self._writer.flush()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()


def scalars(run: RunData) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of everything to be written."""
    best, spent = math.inf, 0.0
    for each in run.evaluations:
        spent += each.tokens
        if each.kind == "complete" and each.value is not None and each.value < best:
            best = each.value
            yield "search/best", round(spent), best
    for step, loss in run.losses:
        if loss is not None:
            yield "training/loss", round(step), loss
    for measure, results in run.measures.items():
        for result in sorted(results, key=lambda result: result.length):
            if result.value is not None:
                windows = "/search windows" if result.seen else ""
                yield f"{measure}/{result.method}{windows}", result.length, result.value
