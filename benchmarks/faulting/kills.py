"""kill -9 at random moments, several times a run; the command that was killed is started again until it ends."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from faulting.child import Child, run
from faulting.commands import RUNS
from faulting.ground import Undisturbed
from faulting.tally import LOST, TRACEBACK, WRONG, Case, Tally, is_clean, told

AT_MOST = 4
"""Kills of one run."""
_FINAL = re.compile(r"(^|/)(DONE|longrope\.json)$")


def cases(made: Mapping[str, Undisturbed], kills: Mapping[str, int], seed: int) -> list[Case]:
    """Runs of each command, as many as are needed for about so many kills (two of three moments hit)."""
    return [
        Case(name, "kills", f"run {index}", partial(killed, made[name], np.random.default_rng((seed, place, index))))
        for place, name in enumerate(kills)
        for index in range(max(1, round(kills[name] / AT_MOST)))
    ]


def killed(undisturbed: Undisturbed, rng: np.random.Generator, tally: Tally) -> None:
    """A run that is killed several times, at moments drawn over what it takes undisturbed, and then ends."""
    folder, kills = undisturbed.fresh(), 0
    kept = Kept(undisturbed, folder)
    for _ in range(3 * AT_MOST):
        child = Child(undisturbed.command.arguments, folder)
        end = child.begun + float(rng.uniform(0, undisturbed.seconds))
        while child.running() and time.monotonic() < end:
            time.sleep(0.0005)
        child.send(signal.SIGKILL)
        ran = child.ended()
        if not ran.was_killed:
            break
        kills += 1
        kept.look()
        if kills == AT_MOST:
            ran = run(undisturbed.command.arguments, folder)
            break
    tally.count("kills", kills)
    check_end(undisturbed, folder, ran.code, told(ran), tally)
    if not is_clean(ran):
        tally.trouble(TRACEBACK, told(ran))
    kept.check(tally)


def check_end(undisturbed: Undisturbed, folder: Path, code: int, said: str, tally: Tally) -> None:
    """What was resumed must have ended with what the undisturbed command left.

    A new folder that was whole when its command was killed is not made a second time: the command then says so.
    """
    is_done = code == 2 and undisturbed.command not in RUNS and not undisturbed.differs(folder)
    if code != 0 and not is_done:
        tally.trouble(LOST, f"it does not go on: {said}")
    elif paths := undisturbed.differs(folder):
        tally.trouble(WRONG, f"other than undisturbed: {', '.join(paths[:5])}")


class Kept:
    """What was done before a kill and must not be done again: whole lines, finished stages, checkpoints."""

    def __init__(self, undisturbed: Undisturbed, folder: Path) -> None:
        self.undisturbed, self.folder = undisturbed, folder
        self.lines: dict[str, list[bytes]] = {}
        self.files: dict[Path, int] = {}

    def look(self) -> None:
        """After a kill."""
        for name in self.undisturbed.command.lines:
            self.lines[name] = self._whole_lines(name)
        for name in self.undisturbed.command.makes:
            for path in (self.folder / name).rglob("*"):
                if _FINAL.search(str(path)) and path.is_file() and not path.is_relative_to(self.folder / "ground"):
                    self.files.setdefault(path, path.stat().st_mtime_ns)

    def check(self, tally: Tally) -> None:
        """At the end. A checkpoint that later ones have replaced is not missed."""
        for name, lines in self.lines.items():
            if self._whole_lines(name)[: len(lines)] != lines:
                tally.trouble(LOST, f"lines of {name} were made again")
        for path, written in self.files.items():
            if path.exists() and path.stat().st_mtime_ns != written:
                tally.trouble(LOST, f"{path.relative_to(self.folder)} was made again")

    def _whole_lines(self, name: str) -> list[bytes]:
        path = self.folder / name
        data = path.read_bytes() if path.exists() else b""
        return data[: data.rfind(b"\n") + 1].splitlines()
