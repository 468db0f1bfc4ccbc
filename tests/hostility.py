"""Hostile input: what is made of good files, and what every command must do with it."""

from __future__ import annotations

import copy
import gzip
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from commands import Ran, contents, longrope
from models import config

SECONDS = 30.0
"""No command may take longer to refuse a small file, on a busy machine."""
MARKUP = "</script><script>hostile()</script><img src=x onerror=hostile()>[bold]{{7*7}}"
CONTROL = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202e\ud800"
_DEEP: list[Any] = []
for _ in range(60):
    _DEEP = [_DEEP]

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 7.5, 16, 48, 192),
    *(2**31, 2**40, 2**53 + 1, 2**63, 10**30, 10**400, -(10**400)),
    *(1e308, 5e-324, math.nan, math.inf, -math.inf),
    *("", "x", "1", "16", "nan", "true", "default", "su", "longrope", "yarn", "llama", "١٢", "../../x", "/etc/passwd"),
    *(MARKUP, CONTROL, "a\nb", "\0", "x" * 100_000),
    *([], {}, [[]], [None], [1.0], [1.0] * 8, [math.nan] * 8, ["1"] * 8, [1.0] * 100_000),
    *({"": 0}, {"full_attention": 1}, {"full_attention": {}}, {"a": {"b": []}}, _DEEP),
]


FACTORS_KEYS = ("version", "up_to", "provenance", "start_tokens")
CONFIG_KEYS = tuple(
    "text_config rope_parameters rope_scaling layer_types head_dim sliding_window partial_rotary_factor type factor "
    "quantization_config attn_implementation dtype auto_map kv_lora_rank mrope_section beta_fast mscale rotary_dim "
    "long_mscale longrope_factors architectures".split()
)
PLAN: dict[str, Any] = {
    "stages": [
        {"do": "search", "to": "192", "on": "base", "evaluations": 9, "windows": 2},
        {"do": "finetune", "to": "192", "recipe": "longrope-llama2", "steps": 3, "mixed": 0.5},
        {"do": "second", "to": "8x", "start_tokens": 0},
        {"do": "recovery", "to": ["1x", 96], "attention_factor": "search"},
    ],
    "measure": {"lengths": ["1x", "192"], "windows": 2, "passkey": 3},
}
PLAN_KEYS = ("method", "lora", "schedule", "search_length", "documents", "batch", "hours", "seed", "race")


@dataclass(frozen=True)
class Hostile:
    """A file as bytes, and in words what was done to the good one."""

    data: bytes
    done: str


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index in a document, as paths; of a list its first two and its last."""
    found: list[tuple[Any, ...]] = []
    if isinstance(data, dict):
        for key, value in data.items():
            found += [(*at, key), *places(value, (*at, key))]
    elif isinstance(data, list):
        for index in sorted({0, 1, len(data) - 1} & set(range(len(data)))):
            found += [(*at, index), *places(data[index], (*at, index))]
    return found


def _change(draw: st.DrawFn, data: Any, more: list[str]) -> str:
    """Change a document at one place; what was done."""
    paths = places(data)
    path: tuple[Any, ...] = draw(st.sampled_from(paths)) if paths else ()
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap", "add"])) if path else "add"
    if how == "replace":
        inner[path[-1]] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    elif how == "remove":
        del inner[path[-1]]
    elif how == "wrap":
        inner[path[-1]] = draw(st.sampled_from([[inner[path[-1]]], {"x": inner[path[-1]]}, str(inner[path[-1]])]))
    elif how == "rename" and isinstance(inner, dict):
        inner[draw(st.sampled_from(["", "x", MARKUP, CONTROL, *more]))] = inner.pop(path[-1])
    elif isinstance(inner, dict):
        inner[draw(st.sampled_from(["x", MARKUP, CONTROL, *more]))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    elif isinstance(inner, list):
        inner.append(copy.deepcopy(draw(st.sampled_from(VALUES))))
    return f"{how} {'.'.join(map(str, path))}"


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "spaces": lambda data: b" \n\t ",
    "cut": lambda data: data[: len(data) // 2],
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data: data.decode("utf-8", "replace").encode("utf-16"),
    "not UTF-8": lambda data: data.replace(b":", b":\xff\xfe", 1),
    "zero bytes": lambda data: data.replace(b",", b"\0,", 1),
    "twice": lambda data: data + data,
    "a comment": lambda data: b"// x\n" + data,
    "too deep": lambda data: b"[" * 200_000,
    "deep objects": lambda data: b'{"a":' * 100_000,
    "a number of many digits": lambda data: b"1" * 10_000,
    "a key twice": lambda data: data.replace(b"{", b'{"version": 1, "version": 2, "rope_theta": 3, ', 1),
    "1e999": lambda data: data.replace(b": 1", b": 1e999", 1),
    "NaN": lambda data: b"NaN",
    "a string": lambda data: b'"x"',
    "a list": lambda data: b"[1, 2]",
    "null": lambda data: b"null",
    "a pickle": lambda data: b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "a million numbers": lambda data: b"[" + b"1," * 10**6 + b"1]",
}


@st.composite
def damaged(draw: st.DrawFn, good: Mapping[str, Any], more: tuple[str, ...] = ()) -> Hostile:
    """A JSON document with one to three changes, or its bytes damaged. more: keys that it may get."""
    data = copy.deepcopy(dict(good))
    if draw(st.integers(0, 4)) == 0:
        how = draw(st.sampled_from(sorted(BYTES)))
        return Hostile(BYTES[how](json.dumps(data).encode()), how)
    done = [_change(draw, data, list(more)) for _ in range(draw(st.integers(0, 3)))]
    return Hostile(json.dumps(data).encode(), "; ".join(done))


@st.composite
def toml(draw: st.DrawFn, good: Mapping[str, Any], more: tuple[str, ...] = ()) -> Hostile:
    """A document with changes, as far as TOML can say them."""
    case = draw(damaged(good, more))
    try:
        data = json.loads(case.data)
    except (ValueError, RecursionError):
        return case
    if not isinstance(data, dict):
        return case
    text = "\n".join(f"{json.dumps(key)} = {_in_toml(value)}" for key, value in data.items())
    return Hostile(text.encode("utf-8", "replace"), case.done)


def _in_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_in_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return '"null"' if value is None else json.dumps(value, ensure_ascii=False)


@st.composite
def csv_file(draw: st.DrawFn, good: str) -> Hostile:
    """A CSV of factors with up to three cells changed, or its bytes damaged."""
    if draw(st.integers(0, 4)) == 0:
        how = draw(st.sampled_from(sorted(BYTES)))
        return Hostile(BYTES[how](good.encode()), how)
    rows, done = [line.split(",") for line in good.splitlines()], []
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.sampled_from(rows))
        place = draw(st.integers(0, len(row) - 1))
        row[place] = str(draw(st.sampled_from([*VALUES, '"', "a,b", "1e999", "0x10", "\u0661\u0662", "1_0", " 2 "])))[
            :10_000
        ]
        done.append(f"cell {place}")
    return Hostile("\n".join(",".join(row) for row in rows).encode("utf-8", "replace"), "; ".join(done))


@st.composite
def document(draw: st.DrawFn) -> tuple[str, Hostile]:
    """A document of any kind, as the ending of its name and its bytes."""
    ending = draw(st.sampled_from([".txt", ".jsonl", ".jsonl.gz", ".parquet"]))
    if draw(st.booleans()):
        return ending, Hostile(draw(st.binary(max_size=200)), "any bytes")
    row = {"text": "a", "messages": [{"role": "user", "content": "b"}]}
    cases = draw(st.lists(damaged(row, ("text", "tools")), min_size=1, max_size=3))
    data = b"\n".join(case.data for case in cases)
    return ending, Hostile(gzip.compress(data) if ending.endswith(".gz") else data, cases[0].done)


def extended() -> dict[str, Any]:
    """The config.json of `commands.write_checkpoint`, extended, with every place that a scaling is read from."""
    rope: dict[str, Any] = {"rope_type": "longrope", "type": "longrope", "short_factor": [1.0] * 8, "rope_theta": 500.0}
    rope |= {"long_factor": [2.0] * 8, "original_max_position_embeddings": 48, "factor": 4.0, "attention_factor": 1.1}
    described = config("llama", architectures=["LlamaForCausalLM"]).to_dict()
    described |= {"rope_scaling": rope, "rope_parameters": dict(rope), "rope_theta": 500.0, "model_type": "llama"}
    described |= {"max_position_embeddings": 192, "original_max_position_embeddings": 48}
    plain: dict[str, Any] = json.loads(json.dumps(described, default=str))
    return plain


def sparse(path: Path) -> None:
    """A file of a terabyte that takes no place."""
    with path.open("wb") as file:
        file.truncate(2**40)


def one_line(text: str) -> bool:
    """Whether a text is one line, which a terminal shows as it is."""
    return text.endswith("\n") and all(letter.isprintable() for letter in text[:-1])


def is_table(data: bytes) -> bool:
    """Whether bytes are a factors.json, said anew and apart from the code that is tested."""
    twice = False

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        twice |= len(dict(pairs)) < len(pairs)
        return dict(pairs)

    try:
        found = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return False
    keys = {"format", "version", "rope_theta", "rotary_dim", "original_length", "table"}
    if twice or not isinstance(found, dict) or not keys <= set(found) <= keys | {"model", "provenance"}:
        return False
    rows, pairs = found["table"], found["rotary_dim"]
    if not isinstance(rows, list) or not rows or not _count(pairs, 2) or pairs % 2:
        return False
    good = found["format"] == "longrope-factors" and found["version"] == 1 and found["version"] is not True
    good = good and _positive(found["rope_theta"]) and _count(found["original_length"], 1)
    good = good and isinstance(found.get("model"), str | None) and isinstance(found.get("provenance", {}), dict)
    return bool(good) and all(_is_row(row, pairs // 2) for row in rows) and _ascending([row["up_to"] for row in rows])


def _is_row(row: Any, pairs: int) -> bool:
    if not isinstance(row, dict) or set(row) != {"up_to", "rescale", "start_tokens", "attention_factor"}:
        return False
    values = row["rescale"]
    return (
        isinstance(values, list)
        and len(values) == pairs
        and all(map(_positive, [*values, row["attention_factor"]]))
        and _count(row["up_to"], 1)
        and _count(row["start_tokens"], 0)
    )


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1.8e308 and value == value


def _count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= 2**40


def _ascending(values: list[int]) -> bool:
    return all(low < high for low, high in pairwise(values))


def tried(*arguments: object, folder: Path, ends: tuple[int, ...] = (0, 2)) -> tuple[Ran | None, str]:
    """A command run on hostile input, and what is wrong with how it ended, empty where nothing is.

    folder: what must be as before where the command refuses. ends: the exit codes that there may be.
    """
    before, start = contents(folder), time.monotonic()
    try:
        ran = longrope(*arguments)
    except BaseException as error:  # also what is no Exception, such as a panic of a library in Rust
        return None, f"{type(error).__name__}: {str(error)[:300]}"
    if time.monotonic() - start > SECONDS:
        return ran, f"took {time.monotonic() - start:.0f} s"
    if ran.code not in ends or "Traceback" in ran.err or "again with -v" in ran.err:
        return ran, f"exit code {ran.code}: {ran.err[-300:]!r}"
    if ran.code == 2:
        if ran.out or not ran.err.startswith("longrope: ") or not one_line(ran.err):
            return ran, f"not one line: {ran.out[:100]!r} {ran.err[:300]!r}"
        if contents(folder) != before:
            return ran, f"refused, and wrote {sorted(contents(folder).keys() - before.keys())}"
    elif not all(letter.isprintable() or letter == "\n" for letter in ran.out + ran.err):
        return ran, f"control characters: {(ran.out + ran.err)[:300]!r}"
    return ran, ""
