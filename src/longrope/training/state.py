"""Checkpoints of a training that goes on: which one is whole, and what its losses were."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope.errors import UserError
from longrope.files import append_line, as_line, disk_errors, read_lines, read_object, sync, sync_all, write_atomically

WHOLE = "longrope.json"
"""Written into a checkpoint when all else is there: the size of every file, a checksum, and which training's it is."""
_SUMMED = 8 * 2**30  # bytes; of larger files the sizes are compared
_TRAINERS = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_whole(checkpoint: Path, of: str) -> None:
    """Say that everything of a checkpoint is written. of: the identity of the run that wrote it."""
    with disk_errors(checkpoint):
        sync_all(checkpoint)
        sync(checkpoint.parent)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    sums = {name: _checksum(checkpoint / name) for name, size in sizes.items() if size <= _SUMMED}
    write_atomically(checkpoint / WHOLE, json.dumps({"of": of, "sizes": sizes, "crc32": sums}) + "\n")


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step, in order, whole or not."""
    folders = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    found = {int(match[1]): path for path in folders if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def last_whole(folder: Path, of: str) -> Path | None:
    """The last checkpoint that was written whole; later ones that were cut are removed.

    of: the identity of the run that goes on. Raises UserError for a checkpoint whose files have changed since, and for
    one that another training wrote.
    """
    for path in reversed(checkpoints(folder).values()):
        if not (path / WHOLE).exists():
            remove(path)  # it was being written, or removed, when the process ended
            continue
        listed = read_object(path / WHOLE, "list of a checkpoint's files")
        if listed.get("of", of) != of:  # earlier versions did not say
            got, rule = f"{path}, of another training", "a training goes on from its own checkpoints"
            do = "remove that folder: the same command goes on from the checkpoint before"
            raise UserError("checkpoint", got=got, rule=rule, do=do)
        sizes, sums = listed.get("sizes"), listed.get("crc32", {})  # earlier versions wrote no checksums
        there = {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}
        if not isinstance(sizes, Mapping) or dict(sizes) != there:
            listed = dict(sizes) if isinstance(sizes, Mapping) else {}
            differing = sorted({*listed, *there})
            name = next((each for each in differing if listed.get(each) != there.get(each)), WHOLE)
            raise damaged(path, name)
        if not isinstance(sums, Mapping):
            raise damaged(path, WHOLE)
        for name, expected in sums.items():
            if name in there and _checksum(path / name) != expected:
                raise damaged(path, name)
        return path
    return None


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is none from the first moment on."""
    (checkpoint / WHOLE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def damaged(checkpoint: Path, what: str) -> UserError:
    """The error of a checkpoint that cannot be read."""
    got, rule = f"{checkpoint}: {what}", "a training goes on from whole files"
    do = "restore the file, or remove that folder: the same command goes on from the checkpoint before"
    return UserError("checkpoint", got=got, rule=rule, do=do)


def windows_of_a_pass(checkpoint: Path) -> int | None:
    """How many windows a process ran together in the training that wrote a checkpoint, None where it does not say."""
    found = read_object(checkpoint / _TRAINERS, "state of a training").get("train_batch_size")
    return found if isinstance(found, int) else None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, "a checkpoint of Trainer's"
    return int(match[1])


def keep_losses(path: Path, checkpoint: Path | None) -> None:
    """Leave the losses of the steps up to a checkpoint; later ones will be made again.

    Those that the file has lost are taken from the checkpoint. Raises UserError when that has not all of them either.
    """
    step = 0 if checkpoint is None else step_of(checkpoint)
    lines = read_lines(path, repair=True, required={"step": int})
    kept = [line for line in lines if line["step"] <= step]
    if checkpoint is not None and [line["step"] for line in kept] != list(range(1, step + 1)):
        kept = _logged(checkpoint, step)
    if kept != lines:
        write_atomically(path, "".join(as_line(line) for line in kept))


def _logged(checkpoint: Path, step: int) -> list[dict[str, Any]]:
    """The losses that Trainer keeps in a checkpoint, as lines."""
    history = read_object(checkpoint / _TRAINERS, "state of a training").get("log_history")
    logs = [each for each in history if isinstance(each, Mapping)] if isinstance(history, list) else []
    found = [loss_line(each["step"], each) for each in logs if "loss" in each and isinstance(each.get("step"), int)]
    if [line["step"] for line in found] != list(range(1, step + 1)):
        raise damaged(checkpoint, f"{_TRAINERS} without the losses of its {step} steps")
    return found


def loss_line(step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    """A line of training.jsonl, of what Trainer logs."""
    norm = float(logs.get("grad_norm", 0.0))
    return {"step": step, "loss": float(logs["loss"]), "grad_norm": norm, "learning_rate": logs.get("learning_rate")}


def log_loss(path: Path, line: Mapping[str, Any]) -> None:
    """Append a step's loss."""
    append_line(path, line)


def _checksum(path: Path) -> str:
    found = 0
    with path.open("rb") as file:
        while piece := file.read(2**24):
            found = zlib.crc32(piece, found)
    return f"{found:08x}"


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != WHOLE]
