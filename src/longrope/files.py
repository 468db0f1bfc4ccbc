"""Files written whole or not at all, lines appended, JSON read: each failure of a disk or a file is one clear line."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, cast

import numpy as np

from longrope import seals
from longrope.errors import UserError, shown

TEMPORARY = ".longrope-*.tmp"
"""Names of files that are being written."""
LARGEST = 2**30
"""Bytes of a file that is read whole, other than documents and weights."""
_GIVEN_BY_A_SHELL = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Where a pipe is what was asked for."""
_ELSEWHERE = "choose a folder that can be written to"
_DISK_FULL = ("the disk must have room for it", "free some space, then run the same command again")
_PARENT = ("the folder above it must exist and take new files", _ELSEWHERE)
_NOT_ALLOWED = ("you must be allowed to write there", _ELSEWHERE)
_NO_LOCKS = ("the file system must support file locks", "choose a folder on another file system")
_UNKNOWN = 0  # the number of no error: a library says that a write failed, and the disk not why
_DISK_RULES = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EFBIG: ("the limit on file sizes must allow it", "raise the limit, then run the same command again"),
    errno.EROFS: ("the file system must be writable", _ELSEWHERE),
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.ENOENT: _PARENT,
    errno.ENOTDIR: _PARENT,
    errno.EEXIST: ("a folder is made there, and something else is in its place", "choose another path"),
    errno.EISDIR: ("a file is written there, and a folder is in its place", "choose another path"),
    errno.ENAMETOOLONG: ("the file system must take the name", "choose a shorter path"),
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    _UNKNOWN: (
        "the disk must take it",
        "see that there is room and no limit on file sizes, then run the same command again",
    ),
}

_REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# torch's writer of archives and numpy's of arrays say that a write failed, and not why.
_UNEXPLAINED = re.compile(r"unexpected pos \d+ vs \d+|PytorchStreamWriter|iostream error|\d+ requested and \d+ written")
_PROBE = 2**16  # bytes


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all: after any failure, kill or power cut the old one is still there.

    Text is written as UTF-8. A device or pipe (/dev/stdout) is written to directly. Raises UserError when the place
    cannot be written: disk full, read-only, not permitted, no such folder.
    """
    # Half a surrogate pair, which JSON can spell and UTF-8 cannot, stays as JSON spells it.
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with disk_errors(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_bytes(content)  # replacing /dev/null by a file would break the machine
        else:
            _replace(path.resolve(), content)


def _replace(path: Path, content: bytes) -> None:
    remove_leftovers(path.parent)
    temporary = path.parent / TEMPORARY.replace("*", uuid.uuid4().hex)
    try:
        with _begun(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _begun(temporary: Path) -> BinaryIO:
    """A new file with a lock on it, by which others see that its writer lives."""
    while True:
        file = temporary.open("xb")
        with suppress(OSError):  # where there are no locks, leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # taken for a leftover before it was locked


def remove_leftovers(folder: Path) -> None:
    """Remove what was left by processes that were killed while they wrote; those that live hold a lock on theirs."""
    for leftover in folder.glob(TEMPORARY):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def sync_all(folder: Path) -> None:
    """Make a folder and all in it durable, before something else says that it is whole."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """Make what a file holds, or renames in a folder, durable; file systems that cannot sync a folder say EINVAL."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the ways in which a disk refuses into a UserError; anything else is not the user's and passes.

    Those that libraries tell in words of their own are among them; where they do not say why, the disk is asked.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None:
            number = _told_in_words(str(error), path)
        if number not in _DISK_RULES:
            raise
        rule, do = _DISK_RULES[number]
        why = "a write failed" if number == _UNKNOWN else os.strerror(number)
        raise UserError("output", got=f"{path} ({why})", rule=rule, do=do) from None


def _told_in_words(said: str, path: Path) -> int | None:
    """The number of a disk's error that safetensors, tokenizers, torch or numpy tell, None for anything else."""
    for number in _REFUSED_WRITES:
        if f"os error {number})" in said or os.strerror(number) in said:
            return number
    if _UNEXPLAINED.search(said) is None:
        return None
    folder = next(each for each in (path, *path.parents) if each.is_dir())
    try:
        write_probe = folder / TEMPORARY.replace("*", uuid.uuid4().hex)
        try:
            write_probe.write_bytes(bytes(_PROBE))
        finally:
            write_probe.unlink(missing_ok=True)
    except OSError as error:
        return error.errno
    return _UNKNOWN


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line with its checksum and hand it to the operating system; NaN and infinities become null.

    A line that does not fit on the disk is taken back. Raises UserError when the file cannot be written.
    """
    line = as_line(record)
    with disk_errors(path):
        size = path.stat().st_size if path.is_file() else None
        try:
            with path.open("ab") as file:
                file.write(line.encode())
        except OSError:
            if size is not None:
                with suppress(OSError):
                    os.truncate(path, size)
            raise


def as_line(record: Mapping[str, Any]) -> str:
    """A record, not empty, as a line of a JSON-lines file."""
    return seals.with_checksum(json.dumps(finite(record), allow_nan=False))


def read_lines(
    path: Path, *, repair: bool = False, required: Mapping[str, type | UnionType] | None = None
) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, none when there is no file; a half-written last line is dropped.

    `repair` also cuts the file back to its whole lines, so that it can be appended to. Raises UserError with the
    number of the line when another line is broken, or when one lacks a key of `required` or has another type there,
    and for a file that has changed since its run ended.
    """
    if not path.exists():
        return []
    check_regular(path, "lines")
    try:
        data = path.read_bytes()
        seals.check(path)
    except OSError as error:
        rule = "it is a readable file"
        raise UserError("lines", got=f"{path} ({error.strerror})", rule=rule, do="check the path") from None
    lines = data.splitlines(keepends=True)
    records = [_record(line) for line in lines]
    if records and records[-1] is None:
        records.pop()
    if None in records:
        broken = records.index(None) + 1
        rule = "every line but the last is a JSON object, as it was written"
        raise UserError("lines", got=f"{path}, line {broken} broken", rule=rule, do="restore the file or start anew")
    whole = b"".join(lines[: len(records)])
    if whole and not whole.endswith(b"\n"):
        whole += b"\n"
    if repair and whole != data:
        write_atomically(path, whole)
    found = [record for record in records if record is not None]
    for number, record in enumerate(found, start=1):
        for name, kind in (required or {}).items():
            if name not in record or not isinstance(record[name], kind):
                got, rule = f"{path}, line {number} with no proper {name!r}", "every line is a record of this run"
                raise UserError("lines", got=got, rule=rule, do="restore the file or start anew")
    return found


def _record(line: bytes) -> dict[str, Any] | None:
    text = seals.without_checksum(line)
    try:
        record = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def finite(value: object) -> object:
    """The same with plain numbers and containers, where NaN and infinities are None."""
    value = _plain(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite_or_none(value: float) -> float | None:
    """A number, or None where it is not finite, which JSON has no number for."""
    return value if math.isfinite(value) else None


def _plain(value: object) -> object:
    """numpy's numbers and arrays as Python's, paths as text."""
    if isinstance(value, np.generic | np.ndarray):
        return cast(object, value.tolist())
    return str(value) if isinstance(value, Path) else value


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError when it is missing or not one."""
    data = read_json(path, what)
    if not isinstance(data, dict):
        got = f"{path} ({type(data).__name__})"
        raise UserError(what, got=got, rule="it is a JSON object", do="restore it or start anew")
    return data


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file.

    Raises UserError when it is missing or unreadable, of an absurd size, or changed since its run ended.
    """
    check_regular(path, what, LARGEST)
    try:
        seals.check(path)
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(what, got=f"{path}, which does not exist", rule="it is a file", do="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        rule = "it is a readable text file"
        raise UserError(what, got=f"{path} ({error})", rule=rule, do="check the path") from None


def check_regular(path: Path, what: str, largest: float = math.inf) -> None:
    """Raise UserError for a pipe or a device, which may never end, and for too large a file; a missing one passes."""
    try:
        found = path.stat()
    except OSError:
        return  # reading it says why
    given = str(path).startswith(_GIVEN_BY_A_SHELL)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or given):
        got = f"{path}, which is a pipe or a device"
        raise UserError(what, got=got, rule="it is a regular file", do="save it as a file first")
    if found.st_size > largest:
        got = f"{path} of {found.st_size:,} bytes"
        raise UserError(what, got=got, rule=f"it has at most {largest:,.0f}", do="check the path")


def read_json(path: Path, what: str, *, unique: bool = False) -> object:
    """Parsed JSON of a file. Raises UserError when it is missing, unreadable, not JSON, or not as it was written.

    unique: a key that an object has twice is an error, too; by itself the last one would win.
    """
    return parse_json(read_text(path, what), path, what, unique=unique)


def parse_json(text: str, path: Path, what: str, *, unique: bool = False) -> object:
    """`read_json` of a text that was read already: a pipe can be read once."""
    checked = seals.without_checksum(text.encode())
    if checked is None:
        rule = "it is as it was written"
        raise UserError(what, got=f"{path}, which has changed", rule=rule, do="restore the file or make it again")
    text = checked.decode()
    try:
        return cast(object, json.loads(text, object_pairs_hook=_once if unique else None))
    except (ValueError, RecursionError) as error:
        got = f"{path} ({error})" if text.strip() else f"{path}, which is empty"
        raise UserError(what, got=got, rule="it is JSON", do="restore the file or make it again") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key in made if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return made
