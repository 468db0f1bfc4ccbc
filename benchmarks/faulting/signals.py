"""SIGINT and SIGTERM at random moments and inside a long forward pass or step; a second process; a clock that jumps."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from faulting.child import Child, Ran, run
from faulting.commands import ORIGINAL, RUNS
from faulting.ground import Undisturbed
from faulting.kills import Kept, check_end
from faulting.tally import LOST, TRACEBACK, WRONG, Case, Tally, is_clean, told
from longrope.baselines import RopeShape, baseline
from longrope.factors import FactorTable, unscaled

WITHIN = 5.0
"""Seconds in which a signal must end a command."""
LONG = 24 * 1024
"""Tokens of one forward pass that takes several seconds."""
_BOTH = (signal.SIGINT, signal.SIGTERM)
_DAY = 86400.0


def cases(made: Mapping[str, Undisturbed], seed: int, times: int = 2) -> list[Case]:
    """Each signal so many times a command, at moments drawn over what it takes undisturbed."""
    return [
        Case(name, "signals", f"{which.name} {index}", partial(interrupted, each, which, (seed, place, index)))
        for place, (name, each) in enumerate(made.items())
        for which in _BOTH
        for index in range(times)
    ]


def interrupted(undisturbed: Undisturbed, which: signal.Signals, seed: tuple[int, ...], tally: Tally) -> None:
    """A signal at some moment, then the same command again."""
    folder = undisturbed.fresh()
    child = Child(undisturbed.command.arguments, folder)
    _wait_until_it_listens(child)
    moment = float(np.random.default_rng((*seed, which)).uniform(0, undisturbed.seconds))
    while child.running() and time.monotonic() < child.begun + moment:
        time.sleep(0.001)
    ran = _end(child, which, tally)
    kept = Kept(undisturbed, folder)
    if ran.code != 0:
        kept.look()
        ran = run(undisturbed.command.arguments, folder)
    check_end(undisturbed, folder, ran.code, told(ran), tally)
    kept.check(tally)


def _wait_until_it_listens(child: Child) -> None:
    """Until signals are blocked for the thread that waits for them, as the first thing a command does."""
    status = Path(f"/proc/{child.pid}/status")
    while child.running():
        try:
            blocked = next(line for line in status.read_text().splitlines() if line.startswith("SigBlk"))
        except (OSError, StopIteration):
            return
        if int(blocked.split()[1], 16) & 1 << (signal.SIGTERM - 1):
            return
        time.sleep(0.001)


def _end(child: Child, which: signal.Signals, tally: Tally) -> Ran:
    """Send a signal and see that it ends the command in time, with one line; one that was done already stays done."""
    sent = time.monotonic()
    child.send(which)
    ran = child.ended()
    if ran.code == 0:
        return ran
    tally.count("signals")
    lines = [line for line in ran.err.splitlines() if line.startswith("longrope: ")]
    if ran.code != 130 or not is_clean(ran) or len(lines) != 1 or not lines[0].startswith("longrope: interrupted"):
        tally.trouble(TRACEBACK, f"{which.name}: {told(ran)}")
    if time.monotonic() - sent > WITHIN:
        tally.trouble(LOST, f"{which.name} took {time.monotonic() - sent:.1f} s to end it")
    return ran


# Inside a long forward pass, and inside a training step


def long_cases(made: Mapping[str, Undisturbed]) -> list[Case]:
    """Both signals in the middle of one pass of a model, in every command that has one."""
    return [
        Case(name, "signals", f"{which.name} in a long pass", partial(in_a_pass, made[name], words, which))
        for name, words in _long().items()
        if name in made
        for which in _BOTH
    ]


def _long() -> dict[str, tuple[object, ...]]:
    computed = ("-d", "long", "--dtype", "float32", "--threads", 1, "-q", "--out", "run")
    search = ("search", "model", "--to", LONG, "--windows", 1, "--evaluations", 3, *computed)
    trained = ("finetune", "model", "--length", LONG, "-f", "long.json", "--steps", 2, "--batch", 1, *computed)
    measured = ("--lengths", LONG, "--windows", 1, *computed)
    return {
        "search evolution": (*search, "--method", "evolution"),
        "search hybrid": search,
        "finetune full": (*trained, "--tracker", "none"),
        "finetune lora": (*trained, "--tracker", "none", "--lora", 2),
        "extend": ("extend", "model", "--to", LONG, "--tracker", "none", "--stages", "long.toml", *computed),
        "evaluate perplexity": ("evaluate", "perplexity", "model", "-f", "long.json", *measured),
        "compare": ("compare", "model", "--methods", "none,pi", *measured),
    }


def in_a_pass(undisturbed: Undisturbed, words: tuple[object, ...], which: signal.Signals, tally: Tally) -> None:
    """A signal when the run is there and its process has computed for a while without a line of results."""
    folder = undisturbed.fresh()
    (folder / "long").mkdir()
    for index in range(4):
        (folder / "long" / f"{index}.txt").write_text("all of it is one long text " * (LONG // 13) + str(index))
    table = FactorTable.load(folder / "good.json")
    shape = RopeShape(table.rope_theta, table.rotary_dim, ORIGINAL)
    rows = (unscaled(shape.pairs, ORIGINAL), baseline("yarn", shape, LONG))
    replace(table, rows=rows).save(folder / "long.json")
    (folder / "long.toml").write_text(
        f'[[stages]]\ndo = "search"\nto = "{LONG}"\nwindows = 1\nevaluations = 3\n[measure]\nwindows = 1\npasskey = 0\n'
    )
    child = Child(words, folder)
    while child.running() and not (folder / "run" / "config.json").exists():
        time.sleep(0.005)
    begun = _cpu_seconds(child.pid)
    while child.running() and _cpu_seconds(child.pid) < begun + 0.7:
        time.sleep(0.005)
    ran = _end(child, which, tally)
    if ran.code != 130:
        tally.trouble(LOST, f"the pass was over before the signal: {told(ran)}")
    elif not (folder / "run" / "config.json").exists():
        tally.trouble(LOST, "no run is left to go on with")


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Two processes


def second_cases(made: Mapping[str, Undisturbed]) -> list[Case]:
    """The same command twice at a time, of those that make a run or a new folder."""
    wanted = [name for name, each in made.items() if each.command in RUNS or _makes_a_folder(name)]
    return [Case(name, "signals", "a second process", partial(second, made[name])) for name in wanted]


def _makes_a_folder(name: str) -> bool:
    return name.startswith(("export", "doctor"))


def second(undisturbed: Undisturbed, tally: Tally) -> None:
    """While the first is stopped in the middle of its writing, the second is told; then the first ends as ever."""
    folder = undisturbed.fresh()
    place = undisturbed.command.makes[0]
    signs = [folder / place / "config.json"]
    if _makes_a_folder(undisturbed.command.name):
        inside = folder / place / f".{place}.unfinished"
        signs = [inside / "tokenizer.json", folder / f".{place}.unfinished" / "tokenizer.json"]
        signs += [folder / f".{place}.unfinished" / "model-f16.gguf"]
    first = Child(undisturbed.command.arguments, folder)
    while first.running() and not any(sign.exists() for sign in signs):
        time.sleep(0.0002)
    first.send(signal.SIGSTOP)
    streams = folder.parent / "second"
    streams.mkdir()
    ran = Child(undisturbed.command.arguments, folder, streams=streams).ended()
    lines = [line for line in ran.err.splitlines() if line.startswith("longrope: ")]
    tally.count("second processes")
    if ran.code != 2 or len(lines) != 1 or "another process is writing" not in lines[0]:
        tally.trouble(TRACEBACK, f"the second: {told(ran)}")
    first.send(signal.SIGCONT)
    ran = first.ended()
    check_end(undisturbed, folder, ran.code, told(ran), tally)


# Clocks


def clock_cases(made: Mapping[str, Undisturbed], seed: int) -> list[Case]:
    """Every command under a clock that jumps by days, to and fro, at every look at it."""
    return [Case(name, "signals", "a clock that jumps", partial(clocked, made[name], seed)) for name in made]


def clocked(undisturbed: Undisturbed, seed: int, tally: Tally) -> None:
    """It must end as ever; a search with so many hours must not be ended by a day that has not passed."""
    rng = random.Random(seed)
    real = time.time

    def jump() -> None:
        time.time = lambda: real() + rng.uniform(-_DAY, _DAY)  # in the child only

    folder = undisturbed.fresh()
    ran = Child(undisturbed.command.arguments, folder, first=jump).ended()
    tally.count("clocks")
    check_end(undisturbed, folder, ran.code, told(ran), tally)
    if not undisturbed.command.name.startswith("search"):
        return
    timed = (*undisturbed.command.arguments, "--hours", 1)
    folder = undisturbed.fresh("timed")
    ran = Child(timed, folder, first=jump).ended()
    place = undisturbed.command.makes[0]
    same = (folder / place / "factors.json").read_bytes() == (undisturbed.made / place / "factors.json").read_bytes()
    if ran.code != 0 or not same:
        tally.trouble(WRONG, f"with --hours 1 under a clock that jumps: {told(ran)}")
