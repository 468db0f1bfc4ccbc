"""What says that a file is as it was written: a checksum at the end of a line or an object, and the seal of a run.

A finished run's DONE holds a hash of each of its files, with which whoever reads one of them compares it. Files of
earlier versions have neither, and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from longrope.errors import UserError

DONE = "DONE"
"""The last file of a run that is finished."""
_WHOLE = 64 * 2**20  # bytes; larger files are hashed by their size, beginning and end
_EDGE = 2**20
_CHECKSUM = re.compile(rb'(?s)(.*?),\s*"crc": "([0-9a-f]{8})"\s*\}\s*')


def with_checksum(text: str) -> str:
    """A JSON object, not empty, with a checksum of its text as its last key; line breaks stay as they are."""
    body = text.rstrip().removesuffix("}").rstrip()
    indented = "\n " in body
    key = f'"crc": "{zlib.crc32(body.encode()):08x}"'
    return f"{body},\n {key}\n}}\n" if indented else f"{body}, {key}}}\n"


def without_checksum(data: bytes) -> bytes | None:
    """The same text without the checksum, None where it is not that of the text; text without one is as it is."""
    found = _CHECKSUM.fullmatch(data)
    if found is None:
        return data
    return found[1] + b"}" if int(found[2], 16) == zlib.crc32(found[1]) else None


def seal(run: Path, files: Iterable[str], folders: Iterable[str]) -> str:
    """What DONE of a run holds: the hashes of these files and of all in these folders, as far as they are there."""
    paths = [run / name for name in files]
    for name in folders:
        paths += sorted(path for path in (run / name).rglob("*") if not path.name.startswith("."))
    hashes = {path.relative_to(run).as_posix(): _hash(path) for path in paths if path.is_file()}
    return json.dumps({"sha256": hashes}, indent=1) + "\n"


def check(path: Path) -> None:
    """Raise UserError for a file of a finished run that has changed since, and for a DONE that is broken itself."""
    for run in (path.parent, path.parent.parent):  # of a run, and of its checkpoint
        expected = _sealed(run).get(path.relative_to(run).as_posix())
        if expected is not None and path.is_file() and _hash(path) != expected:
            raise _changed(path, run)


def check_folder(folder: Path) -> None:
    """The same of everything in a folder that the seal of its run names: of a run itself, or of its checkpoint.

    Of a run what the command reads again is there, too; weights may have been removed to save room.
    """
    for run in (folder, folder.parent):
        for name in _sealed(run):
            path = run / name
            if path.is_relative_to(folder):
                check(path)
                if path.parent == folder == run and not path.exists():
                    raise _changed(path, run, "which is gone")


def _sealed(run: Path) -> Mapping[str, str]:
    done = run / DONE
    try:
        data = done.read_bytes()
    except OSError:
        return {}
    if not data:  # of an earlier version
        return {}
    try:
        hashes: Any = json.loads(data)["sha256"]
        return {str(name): str(value) for name, value in hashes.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if _is_run(run):
            raise _changed(done, run) from None
        return {}  # somebody else's file of that name


def _is_run(folder: Path) -> bool:
    try:
        return b'"command"' in (folder / "config.json").read_bytes()
    except OSError:
        return False


def _changed(path: Path, run: Path, how: str = "which is not as it was when the run ended") -> UserError:
    got, rule = f"{path}, {how}", "the files of a finished run stay as they are"
    do = f"restore it, or remove {run / DONE}: the same command ends the run again; to change a file, copy it elsewhere"
    return UserError("run", got=got, rule=rule, do=do)


def _hash(path: Path) -> str:
    found = hashlib.sha256(str(path.stat().st_size).encode())
    for piece in content_to_hash(path):
        found.update(piece)
    return found.hexdigest()


def content_to_hash(path: Path) -> Iterator[bytes]:
    """What a hash of a file is made of beside its size: all of it, of a large one its beginning and end."""
    with path.open("rb") as file:
        if path.stat().st_size <= _WHOLE:
            yield file.read()
        else:
            yield file.read(_EDGE)
            file.seek(-_EDGE, os.SEEK_END)
            yield file.read()
