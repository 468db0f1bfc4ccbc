"""The commands of the campaign, what they are run on, and what they leave behind: all of it that is not time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from longrope.baselines import RopeShape, baseline
from longrope.factors import FactorTable, unscaled

sys.path.append(str(Path(__file__).parents[2] / "tools"))

ORIGINAL = 48
"""Trained length of the campaign's model."""
TARGET = 4 * ORIGINAL
_SHAPE = RopeShape(rope_theta=500.0, rotary_dim=16, original_length=ORIGINAL)
_TIMES = ("seconds", "elapsed", "peak_bytes", "seconds_left", "resumed", "crc")
_UNTOLD = (".lock", ".names.json")  # the second is in the way of nobody
_PLAN = """
[[stages]]
do = "search"
to = "4x"
windows = 2
evaluations = 3

[[stages]]
do = "finetune"
to = "4x"
steps = 2
batch = 1
learning_rate = 1e-3
save_every = 1

[[stages]]
do = "second"
to = "8x"
windows = 2
evaluations = 3

[measure]
windows = 1
passkey = 0
"""


def write_ground(folder: Path) -> None:
    """A model, documents, factors and a plan: what all commands read."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from byte_tokenizer import BOS, EOS, PAD, VOCABULARY, byte_tokenizer

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "default", "rope_theta": _SHAPE.rope_theta},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.12,  # so that a wrong angle moves the logits
    )
    torch.manual_seed(0)
    cast(Any, LlamaForCausalLM(config)).save_pretrained(folder / "model")
    byte_tokenizer(ORIGINAL).save_pretrained(folder / "model")
    rng, words = np.random.default_rng(0), "the rope of a model turns every pair of numbers by an angle".split()
    (folder / "texts").mkdir()
    for index in range(6):
        (folder / "texts" / f"{index}.txt").write_text(" ".join(rng.choice(words, 600))[:3000])
    rows = (unscaled(_SHAPE.pairs, ORIGINAL), baseline("yarn", _SHAPE, TARGET))
    FactorTable(_SHAPE.rope_theta, _SHAPE.rotary_dim, ORIGINAL, rows, "small").save(folder / "good.json")
    (folder / "plan.toml").write_text(_PLAN)


@dataclass(frozen=True)
class Command:
    """A command line and the paths that it makes. before: what it reads that other commands make.

    goes_on: the same command, started again, ends what was begun. lines: files whose whole lines no fault may lose.
    """

    name: str
    arguments: tuple[object, ...]
    makes: tuple[str, ...]
    before: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    prepare: Callable[[Path], None] | None = field(default=None, compare=False)


_COMPUTED = ("--dtype", "float32", "--threads", 1, "-q")
_ON_TEXTS = ("-d", "texts", *_COMPUTED)
_TRAINED = ("--length", TARGET, "-f", "good.json", "--steps", 4, "--batch", 1, "--learning-rate", 1e-3)


def _search(method: str, evaluations: int) -> Command:
    made = f"{method}"
    more = ("--method", method, "--windows", 3, "--evaluations", evaluations, "--out", made)
    arguments = ("search", "model", "--to", TARGET, *_ON_TEXTS, *more)
    return Command(f"search {method}", arguments, (made,), lines=(f"{made}/evaluations.jsonl", f"{made}/results.jsonl"))


def _finetune(name: str, *more: object) -> Command:
    given = ("finetune", "model", *_TRAINED, *_ON_TEXTS, "--tracker", "none", *more, "--out", name)
    return Command(f"finetune {name}", given, (name,))


def _measured(name: str, *words: object) -> Command:
    made = name.replace(" ", "-")
    return Command(name, (*words, *_COMPUTED, "--out", made), (made,), lines=(f"{made}/results.jsonl",))


def _empty(folder: Path) -> None:
    (folder / "into").mkdir()


_PERPLEXITY = ("--lengths", "48,96,192", "-d", "texts", "-f", "good.json", "--windows", 4)
_COMPARED = ("--lengths", "96,192", "-d", "texts", "--windows", 2, "--methods", "none,pi,yarn+su")
_EXPORTED = ("export", "model", "-f", "good.json", "-q", "--out")
_EXTENDED = ("--to", 8 * ORIGINAL, *_ON_TEXTS, "--tracker", "none", "--stages", "plan.toml", "--out", "long")

ALL = (
    _search("evolution", 12),
    _search("hybrid", 24),
    _finetune("full", "--save-every", 2),
    _finetune("lora", "--lora", 2, "--merge", "--save-every", 3),
    Command("extend", ("extend", "model", *_EXTENDED), ("long",), lines=("long/stages.jsonl", "long/results.jsonl")),
    _measured("evaluate perplexity", "evaluate", "perplexity", "model", *_PERPLEXITY),
    _measured("evaluate passkey", "evaluate", "passkey", "model", "--lengths", "384,512", "--tries", 4),
    _measured("compare", "compare", "model", *_COMPARED),
    Command("export transformers", (*_EXPORTED, "stock"), ("stock",)),
    Command("export into a folder", (*_EXPORTED, "into"), ("into",), prepare=_empty),
    Command("export gguf", (*_EXPORTED, "cpp", "--engine", "gguf"), ("cpp",)),
    Command("factors --out", ("factors", "good.json", "--to", "csv", "--out", "made.csv", "-q"), ("made.csv",)),
    Command("doctor --fix", ("doctor", "stock", "--fix", "mended", "-q"), ("mended",), ("export transformers",)),
    Command("report", ("report", "hybrid", "--csv", "csv", "-q"), ("hybrid/report.html", "csv"), ("search hybrid",)),
)
BY_NAME = {command.name: command for command in ALL}
RUNS = tuple(command for command in ALL if command.lines or command.name.startswith("finetune"))
"""Those that write a run folder."""


def copy(ground: Path, folder: Path) -> Path:
    """A case's own folder with everything the ground has."""
    shutil.copytree(ground, folder)
    return folder


def left_behind(folder: Path, command: Command) -> dict[str, object]:
    """All that a command has made, by path: bytes, or what they mean where times are among them."""
    found: dict[str, object] = {}
    for name in command.makes:
        path = folder / name
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.name not in _UNTOLD:
                found[str(file.relative_to(folder))] = meaning(file)
    return found


def meaning(path: Path) -> object:
    """The bytes of a file, without times and what else may differ between two equal runs."""
    if not path.exists():
        return None
    data = path.read_bytes()
    in_state = any(part.startswith("checkpoint-") for part in path.parts)
    if in_state and path.suffix not in (".safetensors",):
        return "there"  # optimizers and random states show in what is trained with them
    try:
        if path.suffix == ".jsonl":
            return [_timeless(json.loads(line)) for line in data.splitlines()]
        if path.suffix == ".json" and path.parent.name not in ("model", "stock", "into", "mended"):
            return _timeless(json.loads(data))
        if path.name == "DONE":
            return "there"
    except ValueError:
        return data
    if (path.name == "report.html" and path.parent.name == "long") or path.name == "README.md":
        return len(data) > 0 and data.rstrip().endswith((b"</html>", b"|", b"```", b"."))  # with seconds of stages
    return data


def _timeless(value: object) -> object:
    if isinstance(value, Mapping):
        kept = {key: each for key, each in value.items() if key not in _TIMES}
        if "command" in kept and "settings" in kept:
            kept.pop("ignored", None)
        return {key: _timeless(each) for key, each in kept.items()}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def differing(expected: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """Paths that are not the same in both."""
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
