"""One small model through the real commands, each with its outcome, a line as it ends: a hang leaves those before."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import architectures_checks as checks
from architectures_small import ORIGINAL, build, save
from byte_tokenizer import byte_tokenizer
from commands import Ran, longrope, write_documents
from longrope.errors import UserError, first_line

WORKS, REFUSED, TROUBLE, NOT_BUILT = "works", "refused in one line", "trouble", "not built"
TARGET = 6 * ORIGINAL
_PASSKEY = 16 * ORIGINAL  # room for the prompt's words in bytes
_STDERR = "stderr.txt"
_ENGINES = ("transformers", "vllm", "sglang", "mlx", "gguf")


@dataclass(frozen=True)
class Tried:
    """One command or check on a model: its outcome, the line or trouble that it ended with, and its seconds."""

    step: str
    outcome: str
    said: str
    seconds: float


def judged(ran: Ran, good: tuple[int, ...]) -> tuple[str, str]:
    """(outcome, what it said) of a command that has ended."""
    lines = ran.err.splitlines()
    if ran.code in good and "Traceback" not in ran.err:
        return WORKS, ""
    line = ran.err.removesuffix("\n")
    if ran.code == 2 and not ran.out and len(lines) == 1 and line.isprintable() and line.startswith("longrope: "):
        return REFUSED, line.removeprefix("longrope: ")
    shown = " / ".join(lines[-3:])
    return TROUBLE, f"exit code {ran.code}, {len(lines)} lines: {shown[-400:]}"


def _command(*arguments: object, good: tuple[int, ...] = (0,)) -> Callable[[], tuple[str, str]]:
    def run() -> tuple[str, str]:
        ran = longrope(*arguments)
        return judged(replace(ran, err=_past_python() + ran.err), good)

    return run


def _past_python() -> str:
    """What was written to the process's own stderr since last asked: transformers keeps the one it began with."""
    if sys.__stderr__ is not None:
        sys.__stderr__.flush()
    written = Path(_STDERR).read_text()
    os.truncate(_STDERR, 0)
    return written


def _check(what: Callable[[Path], str]) -> Callable[[], tuple[str, str]]:
    def run() -> tuple[str, str]:
        try:
            wrong = what(Path("model"))
        except UserError as error:
            return REFUSED, str(error)
        return (TROUBLE, wrong) if wrong else (WORKS, "")

    return run


Step = tuple[str, Callable[[], tuple[str, str]]]


def _first_steps(seed: int) -> list[Step]:
    shared = ("--device", "cpu", "--seed", seed)
    search = ("search", "model", "--to", TARGET, "-d", "texts", "--evaluations", 4, "--windows", 2)
    return [
        ("doctor", _command("doctor", "model", good=(0, 1))),
        ("documents", _command("documents", "texts", "--model", "model", "--lengths", f"{ORIGINAL},{TARGET}")),
        ("plan", _command("plan", "model", "--to", TARGET, "--gpus", "1xH100-80GB")),
        ("search", _command(*search, "--gradient-windows", 2, "--out", "run", *shared)),
    ]


def _later_steps(seed: int, factors: tuple[str, ...]) -> Iterator[Step]:
    shared = ("--device", "cpu", "--seed", seed)
    texts = ("-d", "texts")
    lengths = ("--lengths", f"{ORIGINAL},{TARGET}", "--windows", 2)
    yield "perplexity", _command("evaluate", "perplexity", "model", *lengths, *texts, *factors, *shared)
    passkey = ("--lengths", _PASSKEY, "--tries", 1, "--factors", "none")
    yield "passkey", _command("evaluate", "passkey", "model", *passkey, *shared)
    yield "compare", _command("compare", "model", *lengths, *texts, "--methods", "none,yarn", *factors, *shared)
    prompt = ("--prompt", "The quick brown fox jumps over the lazy dog", "-n", 20, "--chunk", 16)
    yield "generate", _command("generate", "model", *prompt, *factors, *shared)


def _steps_with_factors(seed: int) -> Iterator[Step]:
    shared = ("--device", "cpu", "--seed", seed)
    factors = ("--factors", "run")
    for name, check in (("cached run", checks.cached_run), ("generated", checks.generated)):
        yield name, _check(check)
    for name, check in (("losses", checks.losses), ("gradients", checks.gradients)):
        yield name, _check(check)
    train = ("finetune", "model", *factors, "--length", TARGET, "-d", "texts", "--batch", 1, "--tracker", "none")
    measure = ("evaluate", "perplexity", "--lengths", TARGET, "--windows", 1, "-d", "texts")
    for name, steps, more in (("finetune", 2, ()), ("lora", 1, ("--lora", 4, "--merge"))):
        yield name, _command(*train, "--steps", steps, *more, "--out", name, *shared)
        if Path(name, "checkpoint").is_dir():
            yield f"{name}, measured", _command(*measure, f"{name}/checkpoint", *shared)
    for engine in _ENGINES:
        yield f"export {engine}", _command("export", "model", *factors, "--engine", engine, "--out", engine)
        if Path(engine).is_dir():
            yield f"verify {engine}", _command("verify", engine, "--against", "model")


def _timed(step: Step) -> Tried:
    name, run = step
    start = time.perf_counter()
    try:
        outcome, said = run()
    except Exception as error:  # what a command lets through is what is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {first_line(error)} ({Path(frame.filename).name}:{frame.lineno})"
        outcome = TROUBLE
    return Tried(name, outcome, said[:600], round(time.perf_counter() - start, 2))


def steps_of(seed: int) -> Iterator[Step]:
    """Every step; those that need factors only where the search found some."""
    yield from _first_steps(seed)
    found = Path("run/factors.json").is_file()
    yield from _later_steps(seed, ("--factors", "run") if found else ())
    if found:
        yield from _steps_with_factors(seed)


def try_model(model_type: str, seed: int, out: Path) -> None:
    """Build a model, run every step in a folder of its own, and append each as a line of JSON to `out`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_warning()  # type: ignore[no-untyped-call]  # as a command finds it
    with tempfile.TemporaryDirectory() as folder, chdir(folder), out.open("a") as lines:
        os.dup2(os.open(_STDERR, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # of a process that ends with this

        def write(each: Tried | dict[str, Any]) -> None:
            lines.write(json.dumps(each if isinstance(each, dict) else asdict(each)) + "\n")
            lines.flush()

        start = time.perf_counter()
        try:
            model = build(model_type, seed)
            with torch.no_grad():
                model(input_ids=torch.arange(1, 20)[None], use_cache=False)
            save(model, byte_tokenizer(ORIGINAL), Path("model"))
            _past_python()
        except Exception as error:
            seconds = round(time.perf_counter() - start, 2)
            write(Tried("build", NOT_BUILT, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", seconds))
            return
        write({"class": type(model).__name__})
        del model
        write_documents(Path("texts"), count=4)
        for step in steps_of(seed):
            write({"begun": step[0]})
            write(_timed(step))
