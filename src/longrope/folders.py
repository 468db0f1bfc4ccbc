"""A new folder that is there whole or not at all, also after kills, at a path that is free or an empty folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longrope.files import disk_errors, write_atomically

_NAMES = ".names.json"
_LAST = "config.json"
"""What makes a checkpoint of a folder: it comes last."""


def is_free(out: Path) -> bool:
    """Whether nothing is at a path, or an empty folder but for what was left by a process that was killed."""
    if not out.exists():
        return True
    if not out.is_dir():
        return False
    unfinished = _unfinished(out)
    ours = {unfinished, *_moved(unfinished, out)}
    return all(path in ours for path in out.iterdir())


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; after any failure nothing is there.

    Raises UserError as the disk refuses.
    """
    unfinished = _unfinished(out)
    try:
        with disk_errors(out):
            for path in _moved(unfinished, out):
                path.unlink(missing_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            _put_in_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unfinished(out: Path) -> Path:
    # In a folder that is there, which may be a mount point: it can be neither removed nor renamed over.
    return (out if out.is_dir() else out.parent) / f".{out.name}.unfinished"


def _moved(unfinished: Path, out: Path) -> list[Path]:
    """Files of `out` that a process which was killed had put there."""
    try:
        names = json.loads((unfinished / _NAMES).read_text())
        return [out / name for name in names if (out / name).is_file()]
    except (OSError, ValueError, TypeError):
        return []


def _put_in_place(unfinished: Path, out: Path) -> None:
    if not out.exists():
        unfinished.rename(out)
        return
    paths = sorted(unfinished.iterdir(), key=lambda path: (path.name == _LAST, path.name))
    write_atomically(unfinished / _NAMES, json.dumps([path.name for path in paths]))
    moved: list[Path] = []
    try:
        for path in paths:
            moved.append(path.rename(out / path.name))
    except BaseException:
        for path in moved:
            with suppress(OSError):  # a disk that has become read-only: the next start removes it
                path.unlink(missing_ok=True)
        raise
