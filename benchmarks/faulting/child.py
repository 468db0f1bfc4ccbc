"""The real command in a process forked from one that has imported everything: as a new process, without its start."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from faulting.shim import Fault

PATIENCE = 180.0
# What commands import when they are asked for something: once, here.
_NEEDED = (
    "longrope.cli longrope.console longrope.search.driver longrope.training.run longrope.training.lora "
    "longrope.extension.run longrope.export.run longrope.evaluate.run longrope.compare longrope.report longrope.doctor "
    "longrope.doctor.examine longrope.export.verify longrope.demo longrope.api gguf peft safetensors.torch "
    "transformers.models.llama.modeling_llama transformers.models.llama.configuration_llama "
    "transformers.integrations torch._dynamo rich.progress rich.traceback plotly.graph_objects jinja2 pydantic typer "
    "torch.profiler torch.utils.serialization peft.tuners.lora safetensors concurrent.futures.thread"
).split()


def import_everything() -> None:
    """Before the first fork. Starts no threads, which a fork would lose."""
    for name in _NEEDED:
        importlib.import_module(name)
    import torch

    from longrope.cli import run

    with redirect_stdout(io.StringIO()):
        run(["factors", "--help"])  # what the command line's parser needs is imported when it is first used
    torch.set_num_threads(1)
    gc.freeze()  # else every collection of a child walks through all that is here


@dataclass(frozen=True)
class Ran:
    """A command that has ended: its exit code (minus a signal's number), what it wrote, and its seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL


class Child:
    """A command that runs in `folder`. fault: armed before it begins. first: called there, too.

    streams: the folder of the files with what it says; by default that beside its own.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path,
        fault: Fault | None = None,
        first: Callable[[], object] | None = None,
        streams: Path | None = None,
    ) -> None:
        self._streams = [(streams or folder.parent) / f"{folder.name}.{name}" for name in ("out", "err")]
        self.begun = time.monotonic()
        self._code: int | None = None
        self._ended = self.begun
        self.pid = os.fork()
        if self.pid == 0:
            self._be([str(argument) for argument in arguments], folder, fault, first)

    def _be(self, arguments: list[str], folder: Path, fault: Fault | None, first: Callable[[], object] | None) -> None:
        """All of a child's life."""
        try:
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, path in enumerate(self._streams, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            sys.argv = ["longrope", *arguments]
            if first is not None:
                first()
            if fault is not None:
                fault.arm()
            from longrope.cli import main

            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    @property
    def streams(self) -> tuple[Path, Path]:
        """Files of its stdout and stderr, beside its folder."""
        return self._streams[0], self._streams[1]

    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code, self._ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return self._code is None

    def send(self, which: signal.Signals) -> None:
        """A signal, if it still runs."""
        if self.running():
            os.kill(self.pid, which)

    def ended(self, patience: float = PATIENCE) -> Ran:
        """Wait for its end. One that takes too long is killed, and says so in its stderr."""
        late = time.monotonic() + patience
        note = ""
        while self.running():
            if time.monotonic() > late:
                os.kill(self.pid, signal.SIGKILL)
                note = f"\nended by the campaign after {patience:.0f} seconds\n"
                late = float("inf")
            time.sleep(0.001)
        assert self._code is not None
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._streams)
        return Ran(self._code, out, err + note, self._ended - self.begun)


def run(arguments: Sequence[object], folder: Path, fault: Fault | None = None) -> Ran:
    """A command to its end."""
    return Child(arguments, folder, fault).ended()
