"""A new folder that is there whole or not at all, also after kills, at a path that is free or an empty folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longrope.errors import UserError
from longrope.files import disk_errors, sync, sync_all, write_atomically

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

    Raises UserError as the disk refuses, and while another process writes there.
    """
    unfinished = _unfinished(out)
    if unfinished.is_dir():  # of a process that lives, or was killed
        os.close(_locked(unfinished, out))
    lock: int | None = None
    try:
        with disk_errors(out):
            for path in _moved(unfinished, out):
                path.unlink(missing_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            lock = _locked(unfinished, out)
            yield unfinished
            sync_all(unfinished)
            _put_in_place(unfinished, out)
            sync(out)
            sync(out.parent)
    finally:
        if lock is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.close(lock)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` and all in it at the end; a failure leaves the old one.

    For folders inside a run, whose lock this process holds. Raises UserError as the disk refuses.
    """
    folder = folder.resolve()  # a link to where there is room stays one
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with disk_errors(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        _open_to_others(unfinished)
        sync_all(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        sync(folder.parent)


def _open_to_others(folder: Path) -> None:
    """Give files the permissions that the umask has for new ones; safetensors writes weights for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file():
            with suppress(OSError):  # a file system without permissions
                path.chmod(mode)


def _locked(unfinished: Path, out: Path) -> int:
    """A descriptor that holds the lock of a folder. Raises UserError when another process does."""
    lock = os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        rule, do = "another process is writing there", "wait for it, or choose another folder"
        raise UserError("output", got=out, rule=rule, do=do) from None
    except OSError:  # a file system without locks
        pass
    return lock


def _unfinished(out: Path) -> Path:
    # In a folder that is there, which may be a mount point: it can be neither removed nor renamed over.
    return (out if out.is_dir() else out.parent) / f".{out.name}.unfinished"


def _moved(unfinished: Path, out: Path) -> list[Path]:
    """Files of `out` that a process which was killed had put there; none where it had put all of them."""
    try:
        names = json.loads((unfinished / _NAMES).read_text())
        moved = [out / name for name in names if (out / name).is_file()]
    except (OSError, ValueError, TypeError):
        return []
    return moved if len(moved) < len(names) else []


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
