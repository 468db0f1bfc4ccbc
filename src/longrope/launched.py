"""A command that starts processes of its own, such as torchrun: it ends with this process, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil  # type: ignore[import-untyped]

_PATIENCE = 3.0  # seconds that a command has to end what it started; workers of ours end at once
_KILLED = 1.0  # seconds that the system has to take down what was killed
_LOOK = 0.05  # seconds between two looks at what is left
_GUARD = "import sys; from longrope.launched import guard; guard(int(sys.argv[1]))"

_lock = threading.Lock()  # held while a command starts, and while it is ended
_going: list[psutil.Process] = []  # one at most


def block_signals() -> None:
    """Keep SIGINT and SIGTERM for the thread that is going to wait for them.

    Threads that are there already would be ended by one, and the process with them: numpy starts some when it is
    imported, where there are several cores. So this comes before such imports.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def run_launched(words: Sequence[str]) -> int:
    """Run a command to its end, without its stdout; its exit code, or minus the signal that ended it.

    It has a session of its own: what a terminal sends to this process is not for it. When this process ends first, so
    does the command with all that it started. Raises OSError for a command that cannot be started.
    """
    with _lock:
        launched = psutil.Process(_started(words))
        _going.append(launched)
    try:
        with _guarded(launched.pid):
            return os.waitstatus_to_exitcode(os.waitpid(launched.pid, 0)[1])
    except BaseException:  # Ctrl-C in a program that calls us, or there is nobody to guard it
        with launched_ended():
            raise
    finally:
        with _lock:  # taken for good where this process is about to end: then nothing more is said of the command
            _going.clear()


@contextmanager
def _guarded(pid: int) -> Iterator[None]:
    """Have another process look after a command, in case that this one is killed meanwhile."""
    nowhere = subprocess.DEVNULL  # whoever reads our output waits until all that have it are gone
    words = [sys.executable, "-P", "-c", _GUARD, str(pid)]
    guarding = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        yield
    finally:
        guarding.communicate()  # closes its stdin: it ends


def _started(words: Sequence[str]) -> int:
    """The process id of a command that hears SIGINT and SIGTERM, which are blocked in the threads of `longrope`.

    posix_spawn alone sets a mask for the new process without code of ours between fork and exec.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {signal.SIGINT, signal.SIGTERM}
    return os.posix_spawnp(
        words[0],
        list(words),
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        setsid=True,
        setsigmask=blocked,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores, and other programs do not expect to be
    )


@contextmanager
def launched_ended() -> Iterator[None]:
    """End the command that is going on, if any, with all that it started; meanwhile none is started."""
    with _lock:
        for command in _going:
            _end(command)
        yield


def guard(pid: int) -> None:
    """Wait until stdin is closed, which the end of the process at its other end does, and end a command.

    That process may be killed, and then does nothing itself.
    """
    try:
        command = psutil.Process(pid)
    except psutil.Error:  # it has ended already
        return
    sys.stdin.read()
    _end(command)


def _end(command: psutil.Process) -> None:
    """End a command and all that it started: it is asked to, and what is left after a while is killed.

    Launchers pass the signal on to workers, which have sessions of their own.
    """
    left = _left({command})
    if command in left:
        with suppress(OSError):
            os.killpg(command.pid, signal.SIGTERM)
    left = _waited_for(left, _PATIENCE)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    _waited_for(left, _KILLED)


def _waited_for(processes: set[psutil.Process], seconds: float) -> set[psutil.Process]:
    """What is left of processes, and of what they start meanwhile, after so many seconds at most."""
    until = time.monotonic() + seconds
    while (processes := _left(processes)) and time.monotonic() < until:
        time.sleep(_LOOK)
    return processes


def _left(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Those of these processes, and of all that they have started, which go on."""
    found = set(processes)
    for process in processes:
        with suppress(psutil.Error):
            found.update(process.children(recursive=True))
    return {process for process in found if _goes_on(process)}


def _goes_on(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended stays as a zombie until its parent looks, which is not for us."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
