"""Tables of results: as the page shows them and as --csv writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longrope.report.facts import Row, seen_rows, table_rows
from longrope.report.read import RunData
from longrope.report.style import length_text, slug


@dataclass(frozen=True)
class Table:
    """Rows of figures under columns; a row has the name and the look of a method.

    name: of its file under --csv. note: what to know of it. folded: shown when asked for.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    folded: bool = False
    corner: str = "method"


def length_tables(run: RunData, note: str) -> list[Table]:
    """Methods by length, and the same on the windows of the search where there are both."""
    made = []
    if run.results:
        columns = tuple(length_text(length) for length in run.lengths)
        made.append(Table(slug(run.measure), f"{run.measure} by length", columns, tuple(table_rows(run)), note))
    if run.seen:
        columns = tuple(length_text(length) for length in sorted({result.length for result in run.seen}))
        title = "The same on the windows that the search itself used"
        made.append(Table(f"{slug(run.measure)}-search-windows", title, columns, tuple(seen_rows(run)), folded=True))
    return made


def rows_of_csv(table: Table) -> list[Sequence[str]]:
    """A header and a line a row; an interval stands in brackets behind its value."""
    lines: list[Sequence[str]] = [(table.corner, *table.columns)]
    for row in table.rows:
        cells = [f"{cell.text} ({cell.interval})" if cell.interval else cell.text for cell in row.cells]
        lines.append((row.look.label, *cells))
    return lines
