"""`report --csv`: every table of the page, and the points of every plot, as files for a spreadsheet or a paper."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longrope.files import disk_errors, write_atomically
from longrope.report.plots import measure_sections, plots_of
from longrope.report.read import RunData
from longrope.report.tables import rows_of_csv

_HEADER = ("trace", "x", "y", "value", "low", "high", "note")


def write(runs: Sequence[RunData], folder: Path) -> list[Path]:
    """NAME.csv of each table and plot-NAME.csv of each plot. Raises UserError when the folder cannot be written."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sections = measure_sections(runs)
    written = []
    for section in sections:
        for table in section.tables:
            written.append(_write(folder / f"{table.name}.csv", rows_of_csv(table)))
    for plot in plots_of(runs):
        points = [point for trace in plot.figure["data"] for point in _points(trace)]
        written.append(_write(folder / f"plot-{plot.name}.csv", [_HEADER, *points]))
    return written


def _write(path: Path, rows: Iterable[Sequence[object]]) -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[_safe(cell) for cell in row] for row in rows])
    write_atomically(path, text.getvalue().encode("utf-8", "replace"))
    return path


def _safe(cell: object) -> object:
    """Text that a spreadsheet would run as a formula stands behind an apostrophe; numbers stay as they are."""
    dangerous = isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{cell}" if dangerous else cell


def _points(trace: dict[str, Any]) -> list[tuple[object, ...]]:
    """The points of a trace, with its interval's ends where it has them; of a heat map its cells."""
    if trace["type"] == "heatmap":
        return [
            ("", _plain(x), _plain(y), value, "", "", _plain(note))
            for y, values, notes in zip(trace["y"], trace["z"], trace["customdata"], strict=True)
            for x, value, note in zip(trace["x"], values, notes, strict=True)
            if value is not None
        ]
    name, error = _plain(trace.get("name", "")), trace.get("error_y", {})
    notes = trace.get("text", [""] * len(trace["x"]))
    above = error.get("array", [None] * len(trace["x"]))
    below = error.get("arrayminus", above)
    made = []
    for x, y, up, down, note in zip(trace["x"], trace["y"], above, below, notes, strict=True):
        ends = ("", "") if y is None or (not up and not down) else (y - down, y + up)
        made.append((name, _plain(x), "" if y is None else y, "", *ends, _plain(note)))
    return made


def _plain(text: object) -> object:
    """A name as it was before plotly's escapes."""
    return html.unescape(text) if isinstance(text, str) else text
