"""A run folder as one self-contained HTML page. Reads files only, needs no network, never imports torch."""

from __future__ import annotations

from pathlib import Path

from longrope.files import write_atomically
from longrope.report.page import page
from longrope.report.read import read_run

__all__ = ["write_report"]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder to `out`, by default RUN/report.html, and return where it is.

    What a run does not have (yet) is said on the page. Raises UserError for a folder that is no run, for a corrupt
    file in it, naming the file, and when the page cannot be written.
    """
    target = run / "report.html" if out is None else out
    # A lone surrogate, which JSON can carry and UTF-8 cannot, becomes a question mark.
    write_atomically(target, page(read_run(run)).encode("utf-8", "replace"))
    return target
