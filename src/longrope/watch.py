"""`longrope watch`: a live view of a run, read from its files alone, on any machine that sees them."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from longrope.errors import UserError, plural
from longrope.lengths import format_length
from longrope.report.facts import command_line
from longrope.report.read import RunData, Stage, read_run
from longrope.report.results import length_of
from longrope.report.searched import counts, evaluations_text, objective_text
from longrope.report.style import count_text, duration_text, slug, value_text
from longrope.report.tensorboard_files import EventLog
from longrope.runs import CONFIG, DONE, EVALUATIONS, LOCK, LOSSES, METRICS, RESULTS, is_run

_LINES = 6  # the last lines that are shown
_RECENT = 20  # evaluations that the rate is taken of


@dataclass(frozen=True)
class View:
    """What a run's files say now. state: running, finished, or interrupted (unfinished, and nobody holds its lock)."""

    state: str
    facts: Mapping[str, str]
    last: tuple[str, ...]


def watch(
    run: Path,
    *,
    once: bool = False,
    every: float = 1.0,
    tensorboard: Path | None = None,
    console: Console | None = None,
) -> None:
    """Show a run until it is finished, reading its files again `every` so many seconds; `once` shows it as it is.

    tensorboard: a folder where its figures are written as event files meanwhile. The end of a view is not the end of
    the run: Ctrl-C just returns. Raises UserError for a folder that is no run.
    """
    console = console or Console(stderr=True, highlight=False, markup=False)
    view = look_at(run)
    with EventLog(tensorboard / slug(run.resolve().name)) if tensorboard else nullcontext() as log:
        _log(run, log)
        if once:
            console.print(shown(view, run), soft_wrap=True)
        else:
            _show(run, view, every, log, console)


def _log(run: Path, log: EventLog | None) -> None:
    if log is None:
        return
    try:
        data = read_run(run)
    except UserError:  # a file that is half written: what it says is logged at the next look
        return
    log.update(data)


def _show(run: Path, view: View, every: float, log: EventLog | None, console: Console) -> None:
    """Show a run that goes on, until it is finished or Ctrl-C."""
    # The command line's own way with Ctrl-C is to end at once, as interrupted; nothing is interrupted here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with suppress(KeyboardInterrupt):
        if console.is_terminal:
            with Live(shown(view, run), console=console, auto_refresh=False) as live:
                _follow(run, view, every, log, lambda now: live.update(shown(now, run), refresh=True))
        else:
            console.print(shown(view, run), soft_wrap=True)
            _follow(run, view, every, log, lambda now: console.print(shown(now, run), soft_wrap=True))


def _follow(run: Path, view: View, every: float, log: EventLog | None, show: Callable[[View], None]) -> None:
    """Show what is new until the run is finished."""
    while view.state != "finished":
        time.sleep(every)
        now = look_at(run)
        if now != view:
            _log(run, log)
            show(now)
        view = now


def look_at(run: Path) -> View:
    """What the files of a run say. Raises UserError for a folder that is no run.

    A file that is written at this moment may be half there: what it says is told at the next look.
    """
    if _is_other(run) or not any((run / name).exists() for name in (CONFIG, EVALUATIONS, LOSSES, RESULTS, DONE)):
        read_run(run)  # refuses, with what is wrong
    facts: dict[str, str] = {}
    problem = ""
    data: RunData | None = None
    try:
        data = read_run(run)
    except UserError as error:
        problem = str(error)
    finished, held = (run / DONE).exists(), holder(run)
    state = "finished" if finished else "interrupted" if held is None else "running"
    at = run  # where something is written now
    if data is not None:
        if command := command_line(data):
            facts["command"] = command
        facts["model"] = str(data.model.get("name", "without a name"))
        stage = None if finished else next((each for each in data.stages if each.seconds is None), None)
        facts |= _stages(data, stage)
        if stage is not None:
            at = run / stage.name
        made = data if stage is None else stage.run
        if made is not None:
            facts |= _search(made) | _training(at, made, running=state == "running") | _results(at, made)
    if problem:
        facts["trouble"] = problem
    facts["state"] = _state(state, held, data)
    return View(state, facts, last_lines(at))


def _is_other(run: Path) -> bool:
    """Whether a folder is a checkpoint, or another with a config.json; a half-written one may be a run's."""
    try:
        return (run / CONFIG).exists() and not is_run(run)
    except UserError:
        return False


def holder(run: Path) -> str | None:
    """The process id in the lock of a run that a process of this machine holds, None when the lock is free."""
    try:
        lock = os.open(run / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(lock)
    return None


def last_lines(run: Path) -> tuple[str, ...]:
    """What was written last, of evaluations, losses and results, whichever file was."""
    files = [run / name for name in (EVALUATIONS, LOSSES, RESULTS) if (run / name).is_file()]
    if not files:
        return ()
    newest = max(files, key=lambda path: path.stat().st_mtime)
    with newest.open("rb") as file:  # its end: the file of a long search is large
        file.seek(max(0, newest.stat().st_size - 200_000))
        lines = file.read().splitlines()
    told = [_line(line) for line in lines[-_LINES - 1 :]]
    return tuple(text for text in told if text)[-_LINES:]


def _line(line: bytes) -> str:
    """A record in a few words; a half line, of a write that goes on, is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(record, dict):
        return ""
    if "method" in record and (length := length_of(record.get("length"))):
        words = [str(record["method"]), "at", format_length(length), str(record.get("item", ""))]
        words += [_outcome(record.get("record"))]
    elif (step := _real(record.get("step"))) is not None:
        loss = _real(record.get("loss"))
        words = [f"step {step:.0f}", "-" if loss is None else f"loss {value_text(loss)}"]
    else:
        value = _real(record.get("value"))
        number = "-" if value is None else value_text(value)
        place = f"{record['index']}." if "index" in record else ""
        words = [place, str(record.get("origin", record.get("key", ""))), number]
    return " ".join(_one_line(word) for word in words if word)


def _outcome(record: object) -> str:
    """What came of an item: its perplexity, its score, or whether the answer was found."""
    if not isinstance(record, dict):
        return "-"
    loss, count, score = (_real(record.get(name)) for name in ("loss", "count", "score"))
    if count:
        return "-" if loss is None else f"perplexity {value_text(math.exp(min(loss / count, 700.0)))}"
    if score is not None:
        return f"{record.get('task', '')} {value_text(score)}".strip()
    found = record.get("found")
    return "found" if found is True else "not found" if found is False else "-"


def _real(value: object) -> float | None:
    """A number that a float holds."""
    try:
        found = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _one_line(text: str) -> str:
    """Text without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.replace("\N{NO-BREAK SPACE}", " "))


def _search(data: RunData) -> dict[str, str]:
    if not data.evaluations:
        return {}
    facts = {}
    wanted = _real(data.settings.get("evaluations") or data.settings.get("token_passes"))
    budget = "" if wanted is None else f" of {count_text(wanted)}"
    facts["search"] = f"{evaluations_text(data)}{budget}"
    best = min((e.value for e in data.evaluations if e.kind == "complete" and e.value is not None), default=None)
    if best is not None:
        facts["best"] = f"{objective_text(data.settings)} {value_text(best)}"
    recent = data.evaluations[-_RECENT:]
    seconds = sum(each.seconds for each in recent)
    spent = counts(data.evaluations).tokens
    rate = f", {count_text(sum(each.tokens for each in recent) / seconds)} tokens/s" if seconds > 0 else ""
    took = duration_text(sum(each.seconds for each in data.evaluations))
    facts["token-passes"] = f"{count_text(spent)} in {took} of work{rate}"
    return facts


def _stages(data: RunData, current: Stage | None) -> dict[str, str]:
    """Which stage of an extension is being made, or that all are."""
    if not data.stages:
        return {}
    if current is None:
        return {"stages": f"all {len(data.stages)} done"}
    place = data.stages.index(current) + 1
    return {"stage": f"{current.name}, {place} of {len(data.stages)}{'' if current.run else ', about to begin'}"}


def _training(run: Path, data: RunData, *, running: bool) -> dict[str, str]:
    """The step of a training, its loss and, while it runs, its pace and the time that is left."""
    if not data.losses:
        return {}
    step, loss = data.losses[-1]
    total = _real(data.settings.get("steps"))
    facts = {"training": f"step {step:.0f}" + ("" if total is None else f" of {total:.0f}")}
    facts["loss"] = "-" if loss is None else value_text(loss)
    pace = _seconds_a_step(run, step) if running else None
    if pace is not None:
        left = "" if total is None else f", {duration_text(pace * max(0.0, total - step))} left"
        facts["pace"] = f"{pace:.3g} s a step{left}"
    return facts


def _seconds_a_step(run: Path, step: float) -> float | None:
    """What a step takes, by when files were written: losses bear no times. None where that says nothing.

    A process begins with step 0, or with the checkpoint that it goes on from, and writes the lock then. Where that
    checkpoint is gone, as older ones are, the first of its own tells as much.
    """
    saved = []
    with suppress(OSError):  # files come and go while they are looked at
        began, now = (run / LOCK).stat().st_mtime, (run / LOSSES).stat().st_mtime
        for folder in run.glob("checkpoints/checkpoint-*"):
            number = folder.name.rpartition("-")[2]
            if number.isdecimal() and int(number) <= step:
                saved.append((int(number), folder.stat().st_mtime))
        before, since = [number for number, at in saved if at <= began], [each for each in saved if each[1] > began]
        first, at = (max(before, default=0), began) if before or not since else min(since)
        if step > first and now > at:
            return (now - at) / (step - first)
    return None


def _results(run: Path, data: RunData) -> dict[str, str]:
    """What is measured: whole results of metrics files, else the lines that a measurement has written so far."""
    facts = {}
    for measure, results in data.measures.items():
        lengths = sorted({result.length for result in results})
        names = ", ".join(format_length(length) for length in lengths)
        facts[measure] = f"{plural(len({result.method for result in results}), 'method')} at {names}"
    if not (run / METRICS).is_file() and (run / RESULTS).is_file():
        ignored = data.config.get("ignored")
        total = _real(ignored.get("items")) if isinstance(ignored, Mapping) else None
        of = "" if total is None else f" of {total:,.0f}"
        facts["measured so far"] = f"{(run / RESULTS).read_bytes().count(10):,}{of} items in {RESULTS}"
    return facts


def _state(state: str, held: str | None, data: RunData | None) -> str:
    if state == "interrupted":
        again = command_line(data) if data else ""
        where = "on this machine, nobody writes it"
        return f"interrupted ({where}); the same command goes on with it{': ' + again if again else ''}"
    return f"running, process {held}" if state == "running" else state


def shown(view: View, run: Path) -> Group:
    """A view as rich shows it; names from files are text, never markup."""
    colour = {"running": "green", "finished": "bold green", "interrupted": "yellow"}[view.state]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in view.facts.items():
        table.add_row(Text(_one_line(name)), Text(_one_line(text), style=colour if name == "state" else ""))
    lines = [Text(f"  {line}", style="dim", overflow="ellipsis", no_wrap=True) for line in view.last]
    return Group(Text(_one_line(shlex.quote(str(run))), style="bold"), table, *lines)
