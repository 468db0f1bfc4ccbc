"""Cases, each in a process of its own, a few at once. Their processes are forked: everything is imported already."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from faulting.tally import TRACEBACK, Case, Tally


def run_cases(cases: Sequence[Case], work: Path, at_once: int) -> Iterator[tuple[Case, Tally]]:
    """What came of each case, as they end."""
    waiting, going = list(enumerate(cases)), dict[int, tuple[int, Case]]()
    while waiting or going:
        while waiting and len(going) < at_once:
            index, case = waiting.pop(0)
            going[_start(index, case, work)] = (index, case)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.002)
            continue
        if pid not in going:
            continue
        index, case = going.pop(pid)
        answer = work / f"case-{index}.json"
        if status == 0 and answer.exists():
            tally = Tally.from_dict(json.loads(answer.read_text()))
            answer.unlink()
        else:
            tally = Tally()
            tally.trouble(TRACEBACK, f"the case itself ended with {status}")
        yield case, tally


def _start(index: int, case: Case, work: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    folder = work / f"case-{index}"
    code, tally = 0, Tally()
    try:
        folder.mkdir()
        os.chdir(folder)
        try:
            case.run(tally)
        except Exception:
            tally.trouble(TRACEBACK, "of the campaign: " + " / ".join(traceback.format_exc().splitlines()[-4:]))
        (work / f"case-{index}.json").write_text(json.dumps(tally.to_dict()))
        os.chdir(work)
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os._exit(code)
    raise AssertionError("it has ended")
