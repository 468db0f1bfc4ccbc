"""`report --tensorboard`: a run's figures as TensorBoard event files, for those who look at all their runs there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longrope.errors import UserError
from longrope.files import disk_errors
from longrope.report.read import RunData
from longrope.report.style import slug


def write(runs: Sequence[RunData], folder: Path) -> list[Path]:
    """An event file a run, in FOLDER/RUN; what an earlier report wrote there is replaced. Raises UserError.

    The step of the search's best value is its token-passes, that of results their length in tokens.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        do = "pip install 'longrope[tensorboard]'"
        raise UserError("--tensorboard", got="no tensorboard", rule="it writes the files", do=do) from None
    written = []
    for run in runs:
        place = folder / slug(run.name)
        with disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            for old in place.glob("events.out.tfevents.*.longrope"):
                old.unlink()
            writer: Any = EventFileWriter(str(place), filename_suffix=".longrope")
            try:
                for tag, step, value in scalars(run):
                    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                    writer.add_event(Event(step=step, summary=summary))
            finally:
                writer.close()
        written += sorted(place.glob("events.out.tfevents.*.longrope"))
    return written


def scalars(run: RunData) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of everything to be written."""
    best, spent = math.inf, 0.0
    for each in run.evaluations:
        spent += each.tokens
        if each.kind == "complete" and each.value is not None and each.value < best:
            best = each.value
            yield "search/best", round(spent), best
    for measure, results in run.measures.items():
        for result in sorted(results, key=lambda result: result.length):
            if result.value is not None:
                windows = "/search windows" if result.seen else ""
                yield f"{measure}/{result.method}{windows}", result.length, result.value
