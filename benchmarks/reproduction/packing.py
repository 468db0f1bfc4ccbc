"""What is needed to go on with a reproduction on another machine, as a few files of limited size.

That is the base model, the stages that are finished, parts and values. Not in it: states of optimizers, what is half
done, and documents of recall tasks, which are made again. What several folders have is in it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from longrope.errors import UserError
from longrope.files import disk_errors, read_object
from longrope.runs import DONE, is_run
from longrope.training.run import STATE as OPTIMIZERS

FILES, LARGEST = 8, 16_000_000
"""At most so many files, of so many bytes."""
INDEX, FORMAT = "index.json", "longrope-reproduction"
_AGAIN = "pack the state again"


def pack(state: Path, out: Path) -> int:
    """Write a pack of a state into a folder, in the place of an older one; its bytes.

    Raises UserError when it would be too large, and for a folder with other files.
    """
    _check_replaceable(out)
    listed: list[dict[str, Any]] = []
    contents: dict[str, bytes] = {}
    for path in sorted(_wanted(state)):
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        contents.setdefault(name, data)
        listed.append({"path": path.relative_to(state).as_posix(), "sha256": name, "size": len(data)})
    stream = b"".join(contents.values())
    pieces = [stream[start : start + LARGEST] for start in range(0, len(stream), LARGEST)]
    if len(pieces) > FILES - 1:
        rule = f"a pack is an index and at most {FILES - 1} files of {LARGEST / 1e6:.0f} MB"
        do = "leave out parts that train further models, or take the folder itself"
        raise UserError("--pack", got=f"{state} with {len(stream) / 1e6:.1f} MB", rule=rule, do=do)
    index = {"format": FORMAT, "name": state.name, "files": listed, "contents": list(contents)}
    index |= {"pieces": [hashlib.sha256(piece).hexdigest() for piece in pieces]}
    unfinished = out.with_name(f".{out.name}.unfinished")
    with disk_errors(out):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for number, piece in enumerate(pieces):
            (unfinished / _piece(number)).write_bytes(piece)
        (unfinished / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)
    return len(stream)


def unpack(packed: Path, state: Path) -> None:
    """Make a state of a pack, whole or not at all.

    Raises UserError for what is no pack, one of another plan or one that has changed, and for a state that is there.
    """
    if state.is_dir() and any(state.iterdir()):
        rule = "a pack is unpacked where there is no state yet"
        raise UserError("--unpack", got=f"{state}, which is there", rule=rule, do="leave out --unpack, or remove it")
    index = read_object(packed / INDEX, "--unpack")
    if index.get("format") != FORMAT or index.get("name") != state.name:
        got = f"{packed}, of {index.get('name')!r}"
        raise UserError("--unpack", got=got, rule=f"it is a pack of {state.name}", do="give another folder")
    try:
        files, contents = _files(index, packed), _contents(index, packed)
    except (KeyError, TypeError, AttributeError):
        rule = "it is as it was written"
        raise UserError("--unpack", got=f"{packed / INDEX}, which has changed", rule=rule, do=_AGAIN) from None
    unfinished = state.with_name(f".{state.name}.unfinished")
    with disk_errors(state):
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, content in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[content])
        shutil.rmtree(state, ignore_errors=True)
        unfinished.rename(state)


def _wanted(state: Path) -> Iterator[Path]:
    """The files of a state that go into a pack."""
    for name, folders, files in os.walk(state):
        here = Path(name)
        folders[:] = [each for each in folders if _goes(here / each, state)]
        for each in files:
            recall = here == state and each.startswith("recall-")
            if not (recall or each.startswith(".") or (here / each).is_symlink()):
                yield here / each


def _goes(folder: Path, state: Path) -> bool:
    """Whether a folder goes into a pack: none that is half done, and no training that only led to another."""
    if folder.is_symlink() or folder.name.startswith(".") or folder.name == OPTIMIZERS:
        return False
    if folder.parent == state and folder.name.startswith("base"):
        led = folder.name != "base" and (state / "base" / "model").is_dir()
        return (folder / "model").is_dir() and not led
    half = is_run(folder) and not (folder / DONE).exists()
    return not half or folder == state / "extend"


def _piece(number: int) -> str:
    return f"state.{number + 1}.bin"


def _check_replaceable(out: Path) -> None:
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if there - {INDEX, *map(_piece, range(FILES - 1))}:
        got, rule = f"{out}, which has other files", "a pack has a folder of its own"
        raise UserError("--pack", got=got, rule=rule, do="give another folder")


def _files(index: Mapping[str, Any], packed: Path) -> dict[str, str]:
    """Content by path. Raises UserError for a path that leads out of the state."""
    found = {}
    for each in index["files"]:
        path = PurePosixPath(each["path"])
        if path.is_absolute() or ".." in path.parts or each["sha256"] not in index["contents"]:
            got, rule = f"{packed / INDEX}, which names {path}", "its files lie in the state"
            raise UserError("--unpack", got=got, rule=rule, do=_AGAIN)
        found[str(path)] = each["sha256"]
    return found


def _contents(index: Mapping[str, Any], packed: Path) -> dict[str, bytes]:
    """What the files hold, by hash. Raises UserError for a piece that is not there or has changed."""
    pieces = []
    for number, expected in enumerate(index["pieces"]):
        path = packed / _piece(number)
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != expected:
            got = f"{path}, which {'has changed' if data else 'is not there'}"
            raise UserError("--unpack", got=got, rule="a pack is read as it was written", do=_AGAIN)
        pieces.append(data)
    stream, start, found = b"".join(pieces), 0, {}
    sizes = {each["sha256"]: each["size"] for each in index["files"]}
    for name in index["contents"]:
        found[name] = stream[start : start + sizes[name]]
        start += sizes[name]
    return found
