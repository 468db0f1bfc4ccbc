"""The run folder: everything one command made, on disk at every moment, resumable, written by one process at a time.

RUN/config.json (everything needed to repeat it), evaluations.jsonl (one line a candidate evaluation), results.jsonl
(one line a measurement), training.jsonl (one line a step), factors.json, metrics.json, and DONE, written last, with a
hash of each.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, cast

from longrope import seals
from longrope.errors import UserError
from longrope.factors import FACTORS as FACTORS
from longrope.factors import FactorTable
from longrope.files import (
    TEMPORARY,
    append_line,
    disk_errors,
    finite,
    read_json,
    read_lines,
    read_object,
    remove_leftovers,
    sync,
    write_atomically,
)
from longrope.lengths import format_length
from longrope.seals import DONE as DONE

CONFIG, METRICS, REPORT = "config.json", "metrics.json", "report.html"
"""What was asked, what came of it in figures, and the page."""
EVALUATIONS, RESULTS, LOSSES = "evaluations.jsonl", "results.jsonl", "training.jsonl"
"""Files of one line a candidate evaluation, a measurement, a training step."""
STAGES = "stages.jsonl"
"""Of an extension: one line a stage that is done."""
CHECKPOINT, ADAPTER = "checkpoint", "adapter"
"""Folders that a training writes."""
_SEALED = (CONFIG, FACTORS, METRICS, EVALUATIONS, RESULTS, LOSSES, STAGES)
_NAME, _FINGERPRINT = "model.name", "model.fingerprint"  # the path or Hub id that was given, and what lies there
_NUMBER = int | float | None
_EVALUATION_KEYS: dict[str, type | UnionType] = {"key": str, "value": _NUMBER}
_RESULT_KEYS: dict[str, type | UnionType] = {"method": str, "length": int, "item": str, "record": dict}
LOCK = ".lock"
"""Holds the process id of who writes the run, and its lock."""


class RunFolder:
    """A run being written. A context manager: it holds the folder's lock until it is closed.

    path: the folder. config: what config.json holds. finished: DONE is there. resumed: the run was there before.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, finished: bool, resumed: bool, lock: int | None) -> None:
        self.path, self.config, self.finished, self.resumed = path, config, finished, resumed
        self._lock = lock

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], *, budget_keys: Sequence[str] = ()) -> RunFolder:
        """Create a run, or resume the one that is there when its config.json says the same.

        config: everything needed to repeat the run; what stands under "ignored" is not compared. budget_keys: names
        of settings that may grow (None is no limit); a finished run with a larger budget is no longer finished.
        Raises UserError when the folder holds other files or a run with other settings, when another process writes
        it, when it cannot be written, and for a finished one whose files have changed.
        """
        wanted = cast(dict[str, Any], finite(config))
        wanted.pop("crc", None)  # of one that was read from a config.json
        _refuse_other_files(path)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        if (path / DONE).exists() and not os.access(path, os.W_OK) and not _check_same(path, wanted, budget_keys):
            seals.check_folder(path)  # a finished run on a disk that is only read: nothing is going to be written
            return cls(path, wanted, finished=True, resumed=True, lock=None)
        lock = _take_lock(path)
        try:
            return cls._open_locked(path, wanted, budget_keys, lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def _open_locked(cls, path: Path, wanted: dict[str, Any], budget_keys: Sequence[str], lock: int) -> RunFolder:
        resumed = (path / CONFIG).exists()
        remove_leftovers(path)
        if not resumed:
            write_atomically(path / CONFIG, seals.with_checksum(_dump(wanted)))
        elif _check_same(path, wanted, budget_keys):
            with disk_errors(path):
                (path / DONE).unlink(missing_ok=True)
                (path / RESULTS).unlink(missing_ok=True)  # of what the smaller budget found
            write_atomically(path / CONFIG, seals.with_checksum(_dump(wanted)))
        finished = (path / DONE).exists()
        if finished:
            seals.check_folder(path)
        else:
            for name in (EVALUATIONS, RESULTS):
                read_lines(path / name, repair=True)
        return cls(path, wanted, finished=finished, resumed=resumed, lock=lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the lock go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save_factors(self, table: FactorTable) -> None:
        """Write factors.json."""
        table.save(self.path / FACTORS)

    def save_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json; NaN and infinities become null."""
        write_atomically(self.path / METRICS, _dump(metrics))

    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds. Raises UserError when it is missing or corrupt."""
        found = read_object(self.path / METRICS, "measurements of the run")
        results = found.get("results")
        if not isinstance(results, list) or not all(_is_result(each) for each in results):
            rule, do = "it holds results by method and length", f"remove {DONE} there: the same command measures again"
            raise UserError("measurements of the run", got=self.path / METRICS, rule=rule, do=do)
        return found

    def finished_with(self, folder: str) -> dict[str, Any]:
        """The metrics of a finished run that made a folder. Raises UserError, too, when that is not there any more."""
        if not (self.path / folder).is_dir():
            got, rule = f"{self.path}, finished, without its {folder}/", "that is what it made"
            raise UserError("run", got=got, rule=rule, do=f"put it back, or remove {DONE} there, and it is made again")
        return self.metrics()

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append a candidate evaluation to evaluations.jsonl."""
        append_line(self.path / EVALUATIONS, record)

    def evaluations(self) -> list[dict[str, Any]]:
        """All candidate evaluations so far, in order. Raises UserError when the file is corrupt."""
        return read_lines(self.path / EVALUATIONS, required=_EVALUATION_KEYS)

    def log_result(self, record: Mapping[str, Any]) -> None:
        """Append a measurement to results.jsonl."""
        append_line(self.path / RESULTS, record)

    def results(self) -> list[dict[str, Any]]:
        """All measurements so far, in order. Raises UserError when the file is corrupt."""
        return read_lines(self.path / RESULTS, required=_RESULT_KEYS)

    def finish(self) -> None:
        """Write DONE, with hashes of everything else, which is there, also after a power cut."""
        with disk_errors(self.path):
            for name in _SEALED:
                if (self.path / name).is_file():
                    sync(self.path / name)
        write_atomically(self.path / DONE, seals.seal(self.path, _SEALED, (CHECKPOINT, ADAPTER)))
        self.finished = True


def _is_result(data: object) -> bool:
    return isinstance(data, dict) and isinstance(data.get("method"), str) and type(data.get("length")) is int


def _dump(data: Mapping[str, Any]) -> str:
    return json.dumps(finite(data), indent=1, allow_nan=False) + "\n"


def _refuse_other_files(path: Path) -> None:
    """Raise UserError for a folder that is neither empty nor a run. Its files are not ours to touch."""
    if path.exists() and not path.is_dir():
        raise UserError("--out", got=f"{path}, a file", rule="a run is a folder", do="choose another --out")
    if not path.is_dir() or is_run(path):
        return
    ours = {item.name for item in path.glob(TEMPORARY)} | {LOCK}
    if others := sorted(item.name for item in path.iterdir() if item.name not in ours):
        got = f"{path}, which has {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
        rule = "the output folder holds other files and no run"
        raise UserError("--out", got=got, rule=rule, do="choose another --out or an empty folder")


def is_run(folder: Path) -> bool:
    """Whether a folder has the config.json of a run; that of a checkpoint has the same name.

    Raises UserError when the file is corrupt.
    """
    if not (folder / CONFIG).exists():
        return False
    data = read_json(folder / CONFIG, "config of the run")
    return isinstance(data, dict) and "command" in data and isinstance(data.get("settings"), dict)


def check_no_run(folder: Path) -> None:
    """Raise UserError for the folder of a run where a model is wanted, with what to give in its place."""
    try:
        if not (folder.is_dir() and is_run(folder)):
            return
    except UserError:  # a broken config.json is told by whoever reads it as a model's
        return
    if (folder / CHECKPOINT).is_dir():
        do = f"give {folder / CHECKPOINT}"
    elif (folder / ADAPTER).is_dir():
        do = "train with --merge, and give its checkpoint"
    else:
        # Not every command that takes a model has --factors: plan, doctor, extend and search have none.
        do = "give the model that it was of; evaluate, compare, generate and export take its factors with --factors"
    raise UserError("model", got=f"{folder}, a run", rule="a model is a folder of weights", do=do)


def _take_lock(path: Path) -> int:
    """A descriptor that holds the lock of a run until it is closed or the process ends."""
    file = path / LOCK
    with disk_errors(file):
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        except BlockingIOError:
            owner = os.read(lock, 20).decode("ascii", "replace") or "unknown"
            os.close(lock)
            rule = f"another process is writing this run (pid {owner})"
            raise UserError("--out", got=path, rule=rule, do="wait for it, end it, or choose another --out") from None
        except BaseException:
            os.close(lock)
            raise
    return lock


def _check_same(path: Path, wanted: Mapping[str, Any], budget_keys: Sequence[str]) -> bool:
    """Whether a budget has grown since config.json. Raises UserError when anything else differs, naming it."""
    old, new = _flat(cast(Mapping[str, Any], read_json(path / CONFIG, "config of the run"))), _flat(wanted)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if _FINGERPRINT in new and _FINGERPRINT not in changed and _NAME in changed:
        changed.remove(_NAME)  # the same model by another path: it was moved, or is the last stage of a run that was
    grown = [key for key in changed if _is_budget(key, budget_keys) and _grows(old.get(key), new.get(key))]
    # What was said comes before what follows of it: one more window changes the place of many.
    if differing := sorted((key for key in changed if key not in grown), key=lambda key: key.startswith("documents.")):
        shown = "; ".join(f"{key} was {_show(old.get(key))}, now {_show(new.get(key))}" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        rule = "a run is continued with its own settings" + (", only a budget may grow" if budget_keys else "")
        raise UserError("--out", got=f"{path}, a run where {shown}{more}", rule=rule, do="choose another --out")
    return bool(grown)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key, without those that are ignored: {"a": {"b": [{"c": 1}]}} -> {"a.b.0.c": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif value is not None:
            flat[name] = value
    return {name: value for name, value in flat.items() if not name.startswith("ignored.") and name != "longrope"}


def identity(config: Mapping[str, Any]) -> str:
    """A hash of all of a run's config.json that is compared when it goes on: what it wrote bears it.

    The model's fingerprint is in it, its path is not: a run goes on where that was moved.
    """
    flat = _flat(cast(dict[str, Any], finite(config)))
    flat.pop("model.name", None)
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def _is_budget(key: str, budget_keys: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"settings.{name}.") for name in budget_keys)


def _grows(old: object, new: object) -> bool:
    """None is no limit."""
    return new is None or (isinstance(old, int | float) and isinstance(new, int | float) and new > old)


def _show(value: object) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def lower_is_better(measure: str) -> bool:
    """Whether a measure of metrics.json falls when a method is better: perplexity; the others are shares found."""
    return measure in ("perplexity", "nonuniformity", "loss")


def command_line() -> list[str] | None:
    """The command line this process was started with, for a report; None when it is not `longrope`.

    With `python -m longrope`, as torchrun and accelerate start it, the program is its `__main__.py`.
    """
    program = Path(sys.argv[0])
    as_module = program.name == "__main__.py" and program.parent.name == "longrope"
    return ["longrope", *sys.argv[1:]] if program.stem == "longrope" or as_module else None


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher such as torchrun started, which talks for all."""
    return os.environ.get("RANK", "0") == "0"


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ


def short_name(model: str) -> str:
    """The last part of a model's path or Hub id.

    That of a snapshot in the Hub's cache is a hash: `.../models--me--q/snapshots/0a1b2c` is q, after its repository.
    """
    path = Path(model) if Path(model).name else Path(model).resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rsplit("--", 1)[-1]
    return path.name


def default_run_path(command: str, model: str, length: int) -> Path:
    """runs/COMMAND-MODEL-LENGTH; of the model the last part of its path or Hub id, made safe for a file name."""
    safe = re.sub(r"[^\w.+-]+", "_", short_name(model))[:60].strip("._-")
    return Path("runs") / f"{command}-{safe or 'model'}-{format_length(length)}"


def fresh_run_path(command: str) -> Path:
    """runs/COMMAND-YYYYmmdd-HHMMSS, with -2, -3, ... when that is taken."""
    stem, number = f"{command}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    path = Path("runs") / stem
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path
