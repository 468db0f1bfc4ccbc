"""Run folders as one self-contained HTML page, and its plots and tables as files. Reads files only, needs no network.

Never imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longrope.files import write_atomically
from longrope.report.merge import with_names
from longrope.report.page import page
from longrope.report.read import RunData, read_run
from longrope.runs import REPORT

__all__ = ["write_csv", "write_png", "write_report", "write_tensorboard"]

Runs = Path | Sequence[Path]
"""One run folder, or several to be shown side by side."""


def write_report(runs: Runs, out: Path | None = None) -> Path:
    """Write the page of a run folder, or of several side by side, to `out` and return where it is.

    By default that is RUN/report.html for one run and report.html here for several. What a run does not have (yet) is
    said on the page. Raises UserError for a folder that is no run, for a corrupt file in it, naming the file, and when
    the page cannot be written.
    """
    data = _read(runs)
    target = out or (Path(data[0].path) / REPORT if len(data) == 1 else Path(REPORT))
    # A lone surrogate, which JSON can carry and UTF-8 cannot, becomes a question mark.
    write_atomically(target, page(data).encode("utf-8", "replace"))
    return target


def write_csv(runs: Runs, folder: Path) -> list[Path]:
    """Write every table and the points of every plot of the page as CSV files into a folder. Raises UserError."""
    from longrope.report.csv_files import write

    return write(_read(runs), folder)


def write_png(runs: Runs, folder: Path) -> list[Path]:
    """Write every plot of the page as a PNG file into a folder, with matplotlib.

    Raises UserError as `write_report`, and where matplotlib is not installed.
    """
    from longrope.report.png_files import write

    return write(_read(runs), folder)


def write_tensorboard(runs: Runs, folder: Path) -> list[Path]:
    """Write the best value by token-passes and the results by length as TensorBoard event files, a folder a run.

    Raises UserError as `write_report`, and where tensorboard is not installed.
    """
    from longrope.report.tensorboard_files import write

    return write(_read(runs), folder)


def _read(runs: Runs) -> list[RunData]:
    return with_names([read_run(run) for run in ([runs] if isinstance(runs, Path) else runs)])
