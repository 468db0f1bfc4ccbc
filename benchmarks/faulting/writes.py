"""A crash at every write, and a disk that is full or read-only from every write on; then the same command again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial

from faulting.child import run
from faulting.ground import Undisturbed
from faulting.kills import check_end
from faulting.shim import FULL, KILL_BEFORE, KILL_WITHIN, READ_ONLY, Fault, Operation
from faulting.tally import LOST, TRACEBACK, Case, Tally, one_line, told

_NAMES = {KILL_BEFORE: "crash before", KILL_WITHIN: "crash within", FULL: "disk full at", READ_ONLY: "read-only at"}
_COUNTED = {KILL_BEFORE: "crashes", KILL_WITHIN: "crashes", FULL: "disk faults", READ_ONLY: "disk faults"}
_CAUSES = {FULL: "No space left on device", READ_ONLY: "Read-only file system"}
# A stage of an extension is a run like those of `search` and `finetune`: of it what begins and ends it is tried here.
_INSIDE = re.compile(r"^/long/0\d-[^/]+/(?!DONE$|\.lock$)")


def cases(made: Mapping[str, Undisturbed], every: int = 1) -> list[Case]:
    """Cases of all commands; every: only each so-many-th operation, for a short version."""
    return [
        Case(name, "writes", what, partial(faulted, made[name], how, at))
        for name in made
        for how, at, what in list(_faults(made[name]))[::every]
    ]


def _faults(undisturbed: Undisturbed) -> Iterator[tuple[int, int, str]]:
    """What is tried at each operation. After an operation is before the next one."""
    before: Operation | None = None
    for at, operation in enumerate(undisturbed.operations, start=1):
        first_of_burst = before != operation
        before = operation
        if undisturbed.command.name == "extend" and _INSIDE.match(operation.path):
            continue
        for how in (KILL_BEFORE, KILL_WITHIN, FULL, READ_ONLY):
            if how == KILL_BEFORE and operation.name == "sync":
                continue  # a crash of the process, not of the machine: what was written stays
            if how == KILL_WITHIN and operation.name != "write":
                continue
            if how == FULL and not operation.grows:
                continue
            if how == READ_ONLY and (operation.name == "sync" or not first_of_burst):
                continue
            yield how, at, f"{_NAMES[how]} {operation.name} {at} of {operation.path}"


def faulted(undisturbed: Undisturbed, how: int, at: int, tally: Tally) -> None:
    """One fault, and the same command without it."""
    folder = undisturbed.fresh()
    ran = run(undisturbed.command.arguments, folder, Fault(folder, how, at))
    tally.count(_COUNTED[how])
    if how in _CAUSES:
        line = one_line(ran)
        if ran.code == 0:  # what could not be written was not needed
            check_end(undisturbed, folder, ran.code, told(ran), tally)
            return
        if line is None or _CAUSES[how] not in line:
            tally.trouble(TRACEBACK, told(ran))
    elif not ran.was_killed:
        tally.trouble(LOST, f"the crash was not reached: {told(ran)}")
    ran = run(undisturbed.command.arguments, folder)
    check_end(undisturbed, folder, ran.code, told(ran), tally)
