"""A command that starts processes of its own: what it is started with, and that nothing of it is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from longrope.launched import launched_ended, run_launched

# As torchrun does it: a worker in a session of its own, which a signal to the launcher's group does not reach. Both
# write their process ids, the worker when it is ready.
WORKER = "import os, signal, time; {worker}; open('worker', 'w').write(str(os.getpid())); time.sleep(300)"
LAUNCHER = """
import os, signal, subprocess, sys, time
{launcher}
open("launcher", "w").write(str(os.getpid()))
worker = subprocess.Popen([sys.executable, "-c", {code!r}], start_new_session=True)
def end(*_):
    worker.terminate()
    sys.exit(worker.wait())
if {passes_on}:
    signal.signal(signal.SIGTERM, end)
worker.wait()
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
OURS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
from longrope.launched import run_launched
run_launched([sys.executable, "launcher.py"])
"""
AS_COMMANDS = """
from longrope.launched import block_signals
block_signals()
from longrope.console import end_at_once_on_signals
end_at_once_on_signals()
"""


def write_launcher(folder: Path, *, deaf: bool = False) -> None:
    ignore = DEAF if deaf else "pass"
    text = LAUNCHER.format(launcher=ignore, code=WORKER.format(worker=ignore), passes_on=not deaf)
    (folder / "launcher.py").write_text(text)


def launched(folder: Path, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The launcher and its worker, as soon as they are there."""
    found = []
    for name in ("launcher", "worker"):
        until = time.monotonic() + 60
        while not ((folder / name).exists() and (folder / name).read_text()):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        found.append(psutil.Process(int((folder / name).read_text())))
    return found


def goes_on(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.mark.parametrize("deaf", [False, True], ids=["passes-signals-on", "deaf"])
@pytest.mark.parametrize(
    ("before", "which", "code"),
    [
        (AS_COMMANDS, signal.SIGTERM, 130),
        (AS_COMMANDS, signal.SIGINT, 130),
        ("", signal.SIGINT, -signal.SIGINT),  # a program of one's own
        ("", signal.SIGTERM, -signal.SIGTERM),
        ("", signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["command-term", "command-int", "program-int", "program-term", "killed"],
)
def test_what_was_launched_ends_with_the_process_that_did(
    tmp_path: Path, before: str, which: signal.Signals, code: int, deaf: bool
) -> None:
    write_launcher(tmp_path, deaf=deaf)
    with subprocess.Popen([sys.executable, "-c", before + OURS], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        try:
            of_it = launched(tmp_path, process)
            assert all(map(goes_on, of_it))
            sent = time.monotonic()
            process.send_signal(which)
            assert process.wait(timeout=60) == code
        finally:
            process.kill()
    if which == signal.SIGINT or before:  # else it could do nothing itself
        assert not any(map(goes_on, of_it))
    while any(map(goes_on, of_it)) and time.monotonic() < sent + 60:
        time.sleep(0.02)
    assert not any(map(goes_on, of_it))


def test_it_hears_signals_and_its_exit_code_is_told(tmp_path: Path) -> None:
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    told = tmp_path / "told"
    look = f"import signal; open({str(told)!r}, 'w').write(str(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        assert run_launched([sys.executable, "-c", look]) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert told.read_text() == f"[{signal.SIGUSR1!r}]", "what else is blocked is not ours to change"
    assert run_launched([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_launched([sys.executable, "-c", kill]) == -signal.SIGKILL


def test_a_command_that_is_none_is_told_and_the_next_one_starts() -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        run_launched(["no-such-command"])
    assert run_launched([sys.executable, "-c", ""]) == 0
    with launched_ended():
        pass  # nothing goes on
