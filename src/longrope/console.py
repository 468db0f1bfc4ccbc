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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from longrope.errors import printable
from longrope.files import disk_errors, finite
from longrope.lengths import format_length
from longrope.report.style import stage_of
from longrope.runs import lower_is_better

if TYPE_CHECKING:
    from longrope.doctor.examine import Finding
    from longrope.evaluate.execute import OnStep, Step
    from longrope.export.said import Said
    from longrope.factors import FactorTable
    from longrope.search.loop import OnProgress, Progress
    from longrope.training.callbacks import Progress as Trained

logger = logging.getLogger(__name__)

INTERRUPTED = 130


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

_resumed_with: list[tuple[str, ...]] = []  # one at most


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


def end_at_once_on_signals() -> None:
    """SIGINT and SIGTERM end the process with exit code 130 and, where there is one, the command that resumes.

    State is always on disk, so nothing is left to do. A thread waits for the signals, because Python's own handlers
    would wait for a forward pass to end first, which can be many minutes.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads started later inherit it

    def wait() -> None:
        signal.sigwait(signals)
        command = "".join(shlex.join(["longrope", *sys.argv[1:], *more]) for more in _resumed_with)
        resume = f"; this goes on with it: {command}" if command else ""
        below_the_bar = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # with the cursor that the bar hides
        with suppress(OSError):
            if os.environ.get("RANK", "0") == "0":  # of several processes that train together the first one talks
                os.write(2, os.fsencode(f"{below_the_bar}longrope: interrupted{resume}\n"))  # paths are any bytes
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


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
        sys.stdout.write(text.encode("utf-8", "backslashreplace").decode())
        sys.stdout.flush()


Show = Callable[[int, int, str], None]


@contextmanager
def _bar(*, transient: bool = False) -> Iterator[Show]:
    """A progress bar with a text, to be given how much is done of how much, and the text.

    It appears when first given something: what fails before, fails in one line.
    """
    told = TextColumn("{task.description}", markup=False)
    bar = Bar(told, BarColumn(), MofNCompleteColumn(), console=err, transient=transient)
    task = bar.add_task("", total=None)

    def show(done: int, total: int, text: str) -> None:
        bar.update(task, completed=done, total=total, description=printable(text))
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
        told = 0
        last: list[Progress] = []  # one at most

        def log() -> None:
            nonlocal told
            for progress in last:
                if progress.rate:  # nothing to say of what an earlier process evaluated
                    logger.info("%s, %d/%d", describe_progress(progress), progress.done, progress.total)
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


def format_seconds(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def results_table(results: Sequence[Mapping[str, Any]], *, title: str, measure: str = "perplexity") -> Table:
    """Methods by length; of each length the best in bold, and marked with ~ what is not told apart from it."""
    lengths = sorted({result["length"] for result in results})
    methods = list(dict.fromkeys(result["method"] for result in results))
    values = {(result["method"], result["length"]): result["value"] for result in results}
    choose = min if lower_is_better(measure) else max
    close = {(result["method"], result["length"]) for result in results if _not_told_apart(result)}
    best = {
        length: choose(
            (values[method, length] for method in methods if values.get((method, length)) is not None), default=None
        )
        for length in lengths
    }
    told = "~ not told apart from the best" if close else None
    table = Table(title=title, title_justify="left", min_width=len(title), caption=told, caption_justify="left")
    table.add_column("method")
    for length in lengths:
        table.add_column(format_length(length), justify="right")
    for method in methods:
        marks = ["~" if (method, length) in close else "" for length in lengths]
        cells = [_cell(values.get((method, length)), best[length]) for length in lengths]
        table.add_row(method, *(Text.assemble(mark, cell) for mark, cell in zip(marks, cells, strict=True)))
    return table


def _not_told_apart(result: Mapping[str, Any]) -> bool:
    """Whether there is a difference from the best, and its paired interval reaches zero, or there is none."""
    against = result.get("against_best") or {}
    interval = against.get("ci")
    return bool(against.get("value")) and (interval is None or interval[0] <= 0 <= interval[1])


def _cell(value: float | None, best: float | None) -> Text:
    if value is None:
        return Text("-")
    text = f"{value:.4g}" if value >= 1000 else f"{value:.3f}"
    return Text(text, style="bold" if value == best else "")


def tasks_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """lm-eval's metrics by task."""
    table = Table(title="lm-evaluation-harness", title_justify="left")
    for name in ("task", "metric", "value", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, found in tasks.items():
        for metric, value in found.items():
            if not metric.endswith("_stderr") and isinstance(value, int | float):
                error = found.get(f"{metric}_stderr")
                told = f"{error:.4f}" if isinstance(error, int | float) else ""
                table.add_row(task, metric, f"{value:.4f}", told)
    return table


def tasks_by_method_table(results: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """The first of lm-eval's metrics of every task, by method."""
    firsts: list[dict[str, float | None]] = []
    for result in results:
        tasks = result["details"]["tasks"]
        first = {task: next(iter(found.items()), None) for task, found in tasks.items()}
        firsts.append({f"{task} {metric[0]}": metric[1] for task, metric in first.items() if metric})
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("method")
    columns = list(dict.fromkeys(name for found in firsts for name in found))
    for name in columns:
        table.add_column(name, justify="right")
    for result, found in zip(results, firsts, strict=True):
        cells = [found.get(name) for name in columns]
        table.add_row(result["method"], *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    return table


def factors_table(table: FactorTable) -> Table:
    """Rows of a factor table, one line each."""
    title = (
        f"{table.model or 'factors'}: base {table.rope_theta:g}, {table.rotary_dim} rotary dimensions, original length "
    )
    shown = Table(title=title + format_length(table.original_length), title_justify="left")
    for name in ("up to", "start tokens", "attention factor", "first", "middle", "last"):
        shown.add_column(name, justify="right")
    for row in table.rows:
        middle = row.rescale[len(row.rescale) // 2]
        cells = [
            f"{row.attention_factor:.4f}",
            *(f"{value:.4g}" for value in (row.rescale[0], middle, row.rescale[-1])),
        ]
        shown.add_row(format_length(row.up_to), str(row.start_tokens), *cells)
    return shown


def findings_table(findings: Sequence[Finding]) -> Table:
    """What a doctor found, a line each."""
    shown = Table(title_justify="left")
    for name in ("", "finding", "what", "mend"):
        shown.add_column(name, overflow="fold")
    for finding in findings:
        mend = finding.do + (" (--fix does)" if finding.fixed else "")
        shown.add_row(finding.severity, finding.name, finding.what, mend)
    return shown


def said_table(said: Sequence[Said]) -> Table:
    """What an export says when it is read back."""
    shown = Table(title_justify="left")
    for name in ("", "", "what"):
        shown.add_column(name, overflow="fold")
    verdicts = {True: Text("ok"), False: Text("wrong", style="bold"), None: Text()}
    for each in said:
        shown.add_row(verdicts[each.ok], each.name, each.what)
    return shown


def costs_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    """The stages of an extension with what each costs at most."""
    total = sum(cost["tokens"] for cost in costs)
    shown = Table(title=f"{len(costs)} steps, {total:,} token-passes at most", title_justify="left")
    shown.add_column("step")
    shown.add_column("token-passes", justify="right")
    shown.add_column("made of")
    for cost in costs:
        shown.add_row(cost["method"], f"{cost['tokens']:,}", cost["made_of"])
    return shown


def plan_table(document: Mapping[str, Any]) -> Table:
    """The stages of a plan: what each takes of a device, how long, and whether it fits."""
    settings = document["settings"]
    title = f"{document['model']}, {document['parameters']:,} parameters, to {format_length(settings['to'])}"
    shown = Table(title=title, title_justify="left", caption=_assumed(settings), caption_justify="left")
    for name in ("stage", "tokens", "PFLOP", "GB", "hours"):
        shown.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    shown.add_column("fits, and how", overflow="fold")
    for each in document["results"]:
        hours = (
            "-" if each["hours"] is None else f"{each['hours']:.2g}" if each["hours"] < 10 else f"{each['hours']:,.0f}"
        )
        parts = sorted(each["memory"].items(), key=lambda part: -part[1])
        made_of = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts if value >= 5e7)
        how = f"{'yes' if each['fits'] else 'NO'}: {each['layout']}" + (f" ({made_of})" if made_of else "")
        how += f"; it would with {each['advice']}" if each["advice"] else ""
        amount = f"{each['value'] / 1e9:.1f}" if each["memory"] else "-"
        shown.add_row(
            each["method"], f"{each['tokens'] / 1e6:,.1f}M", f"{each['flops'] / 1e15:,.3g}", amount, hours, how
        )
    return shown


def _assumed(settings: Mapping[str, Any]) -> str:
    """What hours were computed from."""
    room = f"{settings['gpus']}, of each {settings['bytes_each'] / 1e9:.1f} GB for tensors (GB: of one device)"
    if rates := settings.get("measured_rates"):
        told = ", ".join(f"{name} {rates[name] / 1e9:.3g}" for name in ("matrices", "attention", "written"))
        return f"{room}; rates measured here, in G a second: {told}"
    if settings.get("mfu") is None:
        return f"{room}; no hours: --flops says how fast a device is"
    told = ", ".join(f"{kind} {share:.0%}" for kind, share in settings["mfu"].items())
    peak = f"{settings['peak_flops'] / 1e12:.0f} TFLOP/s"
    return f"{room}; computed, not measured: assumed of a peak of {peak} (--mfu) {told}"


def documents_table(described: Mapping[str, Any]) -> Table:
    """What `longrope documents` found: windows by length, and a histogram of lengths."""
    title = f"{described['documents']} documents, {described['tokens']:,} tokens, the longest {described['longest']:,}"
    shown = Table(title=title, title_justify="left")
    for name in ("at least", "documents", "windows"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    most = max((row["documents"] for row in described["lengths"]), default=0) or 1
    for row in described["lengths"]:
        bar = "\u2588" * round(30 * row["documents"] / most)
        shown.add_row(format_length(row["length"]), f"{row['documents']:,}", f"{row['windows']:,}", bar)
    return shown
