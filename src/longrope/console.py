"""What people see: rich tables and progress on stderr, one JSON document on stdout, and how a process ends."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from longrope.errors import printable
from longrope.files import disk_errors, finite
from longrope.launched import block_signals, launched_ended
from longrope.lengths import format_length
from longrope.report.style import stage_of
from longrope.runs import is_first_process, is_launched
from longrope.search.loop import format_seconds

if TYPE_CHECKING:
    from longrope.evaluate.execute import OnStep, Step
    from longrope.search.loop import OnProgress, Progress
    from longrope.training.callbacks import Progress as Trained

logger = logging.getLogger(__name__)

_INTERRUPTED = 130


class Plain(Console):
    """A console whose texts are texts: names in files are no markup, and what would move a cursor is written out."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does it."""
        return super().render_str(printable(text, "\n"), **options)


class _PlainLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), "\n\t")


err = Plain()
"""What people see goes there, so that stdout is for results."""

_resumed_with: list[tuple[str, ...]] = []  # one at most


def _say_nothing(*warning: Any, **more: Any) -> None:
    """In place of what shows warnings of libraries."""


def set_up_logging(verbosity: int) -> None:
    """Our notes on stderr: warnings at -1, notes at 0, everything at 1; other libraries speak at 1 only.

    Lines are folded for a terminal only: in a file a note stays one line, and a path in it whole.
    """
    level = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    handler: logging.Handler = logging.StreamHandler()
    if err.is_terminal:
        handler = RichHandler(console=err, show_time=False, show_level=False, show_path=verbosity > 0, markup=False)
    handler.setFormatter(_PlainLines())
    for name in ("longrope", *(["transformers", "datasets"] if verbosity > 0 else [])):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
        logger.propagate = False
    if verbosity < 1:
        warnings.showwarning = _say_nothing  # no filter: libraries that are imported later put theirs before it
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # which it reads when it is imported
        if "transformers" in sys.modules:
            logging.getLogger("transformers").setLevel(logging.ERROR)


def end_at_once_on_signals() -> None:
    """SIGINT and SIGTERM end the process with exit code 130 and, where there is one, the command that resumes.

    State is always on disk, so nothing is left to do but to end what was launched. A thread waits for the signals,
    because Python's own handlers would wait for a forward pass to end first, which can be many minutes. Where threads
    are there already, `block_signals` has been called before them.
    """
    block_signals()
    signals = {signal.SIGINT, signal.SIGTERM}

    def wait() -> None:
        signal.sigwait(signals)
        below_the_bar = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # with the cursor that the bar hides
        with launched_ended():  # or it would hold the run's lock, which the next command takes
            line = f"{below_the_bar}longrope: interrupted{_resume()}\n"
            with suppress(OSError):
                if is_first_process():
                    os.write(2, os.fsencode(line))  # paths are any bytes
            os._exit(_INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


def _resume() -> str:
    """What goes on with an interrupted command, for the end of a line; nothing of one that writes no run."""
    if _resumed_with and is_launched():
        return "; the same command goes on with it"  # its first words are the launcher's, which are not known here
    return "".join(
        f"; this goes on with it: {shlex.join(['longrope', *sys.argv[1:], *more])}" for more in _resumed_with
    )


def resume_with(*arguments: str) -> None:
    """Say that the command writes a run, which goes on after an interruption with the same command line.

    arguments: what has to follow it, such as the run's new folder.
    """
    _resumed_with[:] = [arguments]


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of --json, on stdout; NaN and infinities become null.

    Raises UserError when stdout is a full disk.
    """
    print_out(json.dumps(finite(document), indent=1, allow_nan=False) + "\n")


def print_out(text: str) -> None:
    """Write to stdout, all of it now; on a terminal without what would act on it. UserError when stdout is full."""
    if sys.stdout.isatty():
        text = printable(text, "\n\t")
    with disk_errors(Path("/dev/stdout")):
        known = sys.stdout.encoding or "utf-8"  # ASCII in some containers
        sys.stdout.write(text.encode(known, "backslashreplace").decode(known))
        sys.stdout.flush()


_Show = Callable[[float, int, str], None]


def _count(done: float) -> str:
    """How much is done, with a tenth where it is a part of one: 12, 19.9."""
    return f"{done:.1f}".removesuffix(".0")


@contextmanager
def _bar(*, transient: bool = False) -> Iterator[_Show]:
    """A progress bar with a text, to be given how much is done of how much, and the text.

    It appears when first given something: what fails before, fails in one line.
    """
    told = TextColumn("{task.description}", markup=False)
    count = TextColumn("{task.fields[count]}", style="progress.download", markup=False)
    bar = Bar(told, BarColumn(), count, console=err, transient=transient)
    task = bar.add_task("", total=None, count="")

    def show(done: float, total: int, text: str) -> None:
        of = f"{_count(done)}/{total}"
        bar.update(task, completed=done, total=total, description=printable(text), count=of)
        bar.start()

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def search_progress(quiet: bool) -> Iterator[OnProgress | None]:
    """Progress of a search: a bar on a terminal, elsewhere a line at the end of a round, some fifty in a search."""
    if quiet:
        yield None
    elif err.is_terminal:
        with _bar() as show:
            yield lambda progress: show(progress.done, progress.total, describe_progress(progress))
    else:
        told = 0.0
        last: list[Progress] = []  # one at most

        def log() -> None:
            nonlocal told
            for progress in last:
                if progress.rate:  # nothing to say of what an earlier process evaluated
                    logger.info("%s, %s/%d", describe_progress(progress), _count(progress.done), progress.total)
                    told = progress.done

        def on_progress(progress: Progress) -> None:
            if last and _round(progress) != _round(last[0]) and last[0].done - told >= last[0].total / 50:
                log()
            last[:] = [progress]

        yield on_progress
        log()


def _round(progress: Progress) -> tuple[str, int]:
    """What a search is at: of children, mutations and crossovers are one round."""
    stage = stage_of(progress.origin)
    return "evolution" if stage in ("mutations", "crossovers") else stage, progress.iteration


@contextmanager
def measuring_progress(quiet: bool) -> Iterator[OnStep | None]:
    """Progress of measurements: a bar on a terminal, elsewhere a line a method and length and some fifty more."""
    told: list[Step] = []  # one at most

    def text(step: Step) -> str:
        left = "" if step.seconds_left is None else f", {format_seconds(step.seconds_left)} left"
        return f"{step.method} at {format_length(step.length)}{left}"

    if quiet:
        yield None
    elif err.is_terminal:
        with _bar(transient=True) as show:
            yield lambda step: show(step.done, step.total, text(step))
    else:

        def log(step: Step) -> None:
            same = told and (told[0].method, told[0].length) == (step.method, step.length)
            if not same or step.done - told[0].done >= step.total / 50:
                told[:] = [step]
                logger.info("measuring %s, %d/%d", text(step), step.done, step.total)

        yield log


@contextmanager
def training_progress(quiet: bool) -> Iterator[Callable[[Trained], None] | None]:
    """Progress of a training: a bar on a terminal, elsewhere some fifty lines."""

    def text(step: Trained) -> str:
        return f"training: loss {step.loss:.4f}, {format_seconds(step.seconds_left)} left"

    told = 0

    def log(step: Trained) -> None:
        nonlocal told
        if step.done - told >= step.total / 50 or step.done == step.total:
            told = step.done
            logger.info("%s, %d/%d", text(step), step.done, step.total)

    if quiet:
        yield None
    elif err.is_terminal:
        with _bar() as show:
            yield lambda step: show(step.done, step.total, text(step))
    else:
        yield log


def describe_progress(progress: Progress) -> str:
    """Where a search is, in words: stage, round, best value, evaluations a second, time left."""
    best = f"{progress.best:.4f}" if math.isfinite(progress.best) else "-"
    left = format_seconds((progress.total - progress.done) / progress.rate) if progress.rate else "-"
    stage, number = _round(progress)
    return f"{stage}, round {number}: best {best}, {progress.rate:.2f} evaluations/s, {left} left"
