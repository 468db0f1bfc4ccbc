"""Ray on this machine or on a cluster: how it is reached, kept quiet, and ended with the process that started it."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]

from longrope.errors import UserError

_CONNECT_SECONDS = 12.0
_OBJECT_STORE = 2**27  # bytes beside the windows; Ray's own choice is a third of the machine's memory

# Ray connects for minutes to a port that does not answer, and cannot be told to stop: it is tried in another process.
_PROBE = (
    "import sys, ray; ray.init(sys.argv[1], configure_logging=False, logging_level='error', log_to_driver=False);"
    "ray.shutdown()"
)
# A driver that is killed takes Ray's processes with it, but for two which linger for a minute: they are ended here.
_GUARD = """
import sys, psutil
sys.stdin.read()
for pid, started in (each.split(":") for each in sys.argv[1:]):
    try:
        process = psutil.Process(int(pid))
        if str(process.create_time()) == started:
            process.kill()
    except psutil.Error:
        pass
"""


@dataclass(frozen=True)
class Place:
    """What --workers asks for: `count` local workers, or all that the cluster at `address` holds (`auto`: finds it)."""

    count: int | None = None
    address: str | None = None


def parse_workers(text: str) -> Place:
    """`N`, `ray` or `ray:HOST:PORT`. Raises UserError for anything else."""
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return Place(count=int(text))
    if text == "ray":
        return Place(address="auto")
    host, _, port = text.removeprefix("ray:").rpartition(":")
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if text.startswith("ray:") and host and "/" not in host and is_port:
        return Place(address=f"{host}:{port}")
    raise UserError(
        "--workers",
        got=repr(text),
        rule="it is a number of at least 1, ray, or ray:HOST:PORT of a cluster started with `ray start`",
        do="give one of them, or leave it out to search in one process",
    )


class Cluster:
    """A connection to Ray: a cluster that runs, or one on this machine which ends with this process."""

    def __init__(self, ray: Any, place: Place, cpus: int, gpus: int, stored: int) -> None:
        self._ray = ray
        self._ours = not ray.is_initialized()  # else it is the caller's, and stays
        self._guard: subprocess.Popen[bytes] | None = None
        if not self._ours:
            return
        if place.address is not None:
            _check_answers(place.address)
        logging.getLogger("ray").setLevel(logging.ERROR)  # it greets and advises on stderr
        # It tells of a worker's death on stdout, which is for our JSON, and has no option that keeps it from that.
        importlib.import_module("ray._private.worker").__dict__["_worker_logs_enabled"] = False
        about: dict[str, Any] = {"configure_logging": False, "logging_level": "error", "log_to_driver": False}
        if place.address is None:
            about |= {"num_cpus": cpus, "num_gpus": gpus, "include_dashboard": False}
            about["object_store_memory"] = _OBJECT_STORE + 2 * stored
        with _kept():
            before = set(psutil.Process().children(recursive=True))
            try:
                ray.init(place.address or "local", **about)
            except Exception as error:  # of a machine that is too busy, of ports, of memory
                ray.shutdown()
                for child in set(psutil.Process().children(recursive=True)) - before:  # which that leaves
                    with suppress(psutil.Error):
                        child.kill()
                why = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
                do = "run the same command again when the machine has less to do, or leave --workers out"
                raise UserError("--workers", got=f"no start of Ray ({why})", rule="it starts", do=do) from None
        if place.address is None:
            self._guard = _start_guard()

    def close(self) -> None:
        """Leave the cluster, or end it when it was started here."""
        if self._ours:
            self._ray.shutdown()
        if self._guard is not None:
            self._guard.communicate()  # closes its stdin: it ends what is left, and itself


def _start_guard() -> subprocess.Popen[bytes]:
    """A process that waits for the end of this one, and then ends what the raylet started."""
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    started = [f"{child.pid}:{child.create_time()}" for raylet in raylets for child in raylet.children()]
    command = [sys.executable, "-c", _GUARD, *started]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


@contextmanager
def _kept() -> Iterator[None]:
    """Keep this process's handler of SIGTERM and its environment, which Ray replaces and adds to."""
    mode = os.environ.get("RAY_AUTH_MODE")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray sets it there only
            signal.signal(signal.SIGTERM, handler)
        if mode is None:
            os.environ.pop("RAY_AUTH_MODE", None)


def import_ray() -> Any:
    """The module `ray`. Raises UserError when it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        do = 'install it with: pip install "longrope[ray]"'
        raise UserError("--workers", got=f"no Ray here ({error})", rule="workers are Ray's", do=do) from None


def check_listens(address: str) -> None:
    """Raise UserError unless something listens at an address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise _no_answer(address, str(error)) from None


def _check_answers(address: str) -> None:
    """Raise UserError unless a Ray cluster answers at an address, or anywhere on this machine (`auto`)."""
    command = [sys.executable, "-c", _PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONNECT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        tokens = "" if "RAY_AUTH_MODE" in os.environ else "; one that wants tokens needs RAY_AUTH_MODE=token"
        raise _no_answer(address, f"nothing heard in {_CONNECT_SECONDS:.0f} seconds{tokens}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise _no_answer(address, textwrap.shorten(said[-1], 300, placeholder=" ..."))


def _no_answer(address: str, why: str) -> UserError:
    where = "on this machine" if address == "auto" else f"at {address}"
    rule = "a cluster that was started with `ray start` answers"
    do = "start one with `ray start --head` and give the HOST:PORT that it prints, or use --workers N"
    return UserError("--workers", got=f"no Ray cluster {where} ({why})", rule=rule, do=do)
