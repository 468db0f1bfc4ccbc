"""Real file systems that are full or read-only: each command in a mount of its own, of several sizes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from faulting.child import Child
from faulting.ground import Undisturbed
from faulting.tally import TRACEBACK, Case, Tally, one_line, told

_PAGE = 4096
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_READ_ONLY, _PRIVATE, _RECURSIVE = 1, 1 << 18, 1 << 14
_NOT_ALLOWED = 77
"""Exit code of a child that may have no mounts of its own."""


def cases(made: Mapping[str, Undisturbed], sizes: int = 6) -> list[Case]:
    """So many sizes up to what a command writes, and a read-only one, for commands that write a folder of their own."""
    return [
        Case(name, "writes", f"a disk of {size} bytes", partial(on_a_disk, each, size))
        for name, each in made.items()
        if {"--out", "--fix"} & set(each.command.arguments) and (each.made / each.command.makes[0]).is_dir()
        for size in _sizes(each.made / each.command.makes[0], sizes)
    ]


def _sizes(folder: Path, count: int) -> Iterator[int]:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield 0  # read-only
    yield from sorted({_PAGE * max(2, total * step // (count * _PAGE)) for step in range(1, count + 1)})


def on_a_disk(undisturbed: Undisturbed, size: int, tally: Tally) -> None:
    """The command with its folder on a small disk: it has room, or says in one line that there is none."""
    folder, place = undisturbed.fresh(), undisturbed.command.makes[0]
    (folder / "disk").mkdir()
    words = list(undisturbed.command.arguments)
    words[words.index("--fix" if "--fix" in words else "--out") + 1] = f"disk/{place}"
    ran = Child(words, folder, first=partial(_mount, folder / "disk", size)).ended()
    if ran.code == _NOT_ALLOWED:
        return
    tally.count("real disks")
    line, cause = one_line(ran), "No space left on device" if size else "Read-only file system"
    if ran.code != 0 and (line is None or cause not in line):
        tally.trouble(TRACEBACK, told(ran))


def _mount(folder: Path, size: int) -> None:
    """A disk of that size, of which only this process knows; read-only for 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    user = os.getuid()
    failed = libc.unshare(_NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER)
    if not failed and user != 0:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    options = f"size={size}".encode() if size else b""
    flags = ctypes.c_ulong(0 if size else _READ_ONLY)
    failed = failed or libc.mount(None, b"/", None, ctypes.c_ulong(_PRIVATE | _RECURSIVE), None)
    if failed or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options):
        os._exit(_NOT_ALLOWED)
