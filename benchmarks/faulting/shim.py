"""Faults at writes: a small library, preloaded, that counts what changes files, and kills or fails at one of them."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COUNT, KILL_BEFORE, KILL_WITHIN, FULL, READ_ONLY = range(5)
"""What happens at the chosen operation; a disk that is full or read-only stays so."""
_LOG = 1 << 20
_HEAD = struct.Struct("ll")


def compiler() -> str | None:
    """The C compiler of this machine, None where there is none."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compile the library into a folder. Raises CalledProcessError with what the compiler says."""
    made = folder / "faults.so"
    source = str(Path(__file__).with_name("shim.c"))
    command = [str(compiler()), "-shared", "-fPIC", "-O2", "-o", str(made), source, "-ldl"]
    subprocess.run(command, check=True)
    return made


def is_loaded() -> bool:
    """Whether this process was started with the library."""
    return hasattr(ctypes.CDLL(None), "faults_arm")


def environment(library: Path | None) -> dict[str, str]:
    """Of a process from which commands are forked: one thread, nothing that writes by itself, and the library."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    quiet = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    # Ray puts a token into the home folder otherwise.
    told = os.environ | threads | quiet | {"RAY_AUTH_MODE": "disabled", "PYTHONDONTWRITEBYTECODE": "1"}
    path = os.pathsep.join([entry for entry in sys.path if entry] + [os.environ.get("PYTHONPATH", "")])
    return told | {"PYTHONPATH": path} | ({"LD_PRELOAD": str(library)} if library else {})


@dataclass(frozen=True)
class Operation:
    """Something that changed a file: open, write, rename, ...; grows: it needs room on the disk."""

    name: str
    path: str
    grows: bool


class Fault:
    """A fault for a child: armed there, read here through memory that both share.

    how: of the constants above. at: the number of the operation below `folder`, from 1.
    """

    def __init__(self, folder: Path, how: int = COUNT, at: int = 0) -> None:
        self.folder, self.how, self.at = folder, how, at
        self._shared = mmap.mmap(-1, _LOG)

    def arm(self) -> None:
        """In the child, before its command begins."""
        library = ctypes.CDLL(None)
        where = ctypes.addressof(ctypes.c_char.from_buffer(self._shared))
        folder = os.fsencode(self.folder.resolve())
        library.faults_arm(folder, self.how, ctypes.c_long(self.at), ctypes.c_void_p(where), ctypes.c_size_t(_LOG))

    @property
    def count(self) -> int:
        """Operations so far."""
        return int(_HEAD.unpack(self._shared[: _HEAD.size])[0])

    def operations(self) -> list[Operation]:
        """What they were, of a fault that only counts."""
        used = _HEAD.unpack(self._shared[: _HEAD.size])[1]
        lines = self._shared[_HEAD.size : _HEAD.size + used].decode(errors="replace").splitlines()
        split = [line.partition(" ") for line in lines]
        return [Operation(name.rstrip("+"), path, name.endswith("+")) for name, _, path in split]
