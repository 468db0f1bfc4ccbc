"""Run the command line in tests, and the small checkpoint and documents that it is run on."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope.baselines import RopeShape, baseline
from longrope.cli import run
from longrope.factors import FactorTable, unscaled
from models import ORIGINAL, build, save

SHAPE = RopeShape(rope_theta=500.0, rotary_dim=16, original_length=ORIGINAL)
"""RoPE of the checkpoint below."""
TARGET = 4 * ORIGINAL
COMMAND = [sys.executable, "-c", "from longrope.__main__ import main; main()"]


@dataclass(frozen=True)
class Ran:
    """A command that has ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


def longrope(*arguments: object) -> Ran:
    """Run a command in this process: all of the command line but its handling of signals."""
    out, err = io.StringIO(), io.StringIO()
    with _same_logging(), redirect_stdout(out), redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


@contextmanager
def _same_logging() -> Iterator[None]:
    """Leave logging as it was: a command sets it up for its whole process."""
    from transformers.utils import logging as of_transformers

    loggers = [logging.getLogger(name) for name in ("longrope", "transformers", "datasets")]
    before = [(each.level, each.handlers, each.propagate) for each in loggers]
    bars = of_transformers.is_progress_bar_enabled()
    try:
        yield
    finally:
        for each, (level, handlers, propagate) in zip(loggers, before, strict=True):
            each.setLevel(level)
            each.handlers, each.propagate = handlers, propagate
        if bars:
            of_transformers.enable_progress_bar()  # type: ignore[no-untyped-call]


def start(*arguments: object, cwd: Path, code: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start the real command in a process of its own, with one thread and its output in pipes."""
    command = COMMAND if code is None else [sys.executable, "-c", code]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "200"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*command, *map(str, arguments)], cwd=cwd, env=environment, **pipes)


def longrope_process(*arguments: object, cwd: Path, **options: Any) -> Ran:
    """Run the real command in a process of its own to its end."""
    with start(*arguments, cwd=cwd, **options) as process:
        out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out or "", err or "")


def refused(*arguments: object) -> str:
    """The one line of a command that must end with exit code 2 and write nothing anywhere below this folder."""
    before = contents(Path())
    ran = longrope(*arguments)
    assert (ran.code, ran.out) == (2, ""), ran
    assert ran.err.startswith("longrope: ")
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1, ran.err
    assert contents(Path()) == before
    return ran.err.removeprefix("longrope: ").removesuffix("\n")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder; not the lock files of runs."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def evaluation_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl without what differs from run to run."""
    found = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "elapsed", "crc")} for line in found]


def unfinish_training(run: Path) -> None:
    """Make of a finished training one that was killed before its end."""
    for name in ("DONE", "metrics.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint")


def write_checkpoint(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A Llama of two layers with the byte tokenizer, trained length ORIGINAL."""
    return save(build(name, **changes), folder)


def write_documents(folder: Path, count: int = 6, characters: int = 1500) -> Path:
    """A folder of text files, `count` of them, the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    words = (
        "the rope of a model turns every pair of numbers by an angle that grows with the position of its token".split()
    )
    rng = np.random.default_rng(0)
    for index in range(count):
        text = " ".join(rng.choice(words, characters // 4))
        (folder / f"{index}.txt").write_text(text[:characters])
    return folder


def table(up_to: int = TARGET, shape: RopeShape = SHAPE) -> FactorTable:
    """A factor table as a search writes it: ones up to the original length, and YaRN's factors."""
    rows = (unscaled(shape.pairs, shape.original_length), baseline("yarn", shape, up_to))
    return FactorTable(shape.rope_theta, shape.rotary_dim, shape.original_length, rows, "small")
