"""The model card of an exported checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope.doctor.view import SWITCHING
from longrope.errors import UserError, one_line, plural
from longrope.factors import FactorTable
from longrope.files import read_text
from longrope.lengths import format_length
from longrope.runs import CHECKPOINT, short_name

_USE = {
    "long": "The long factors are used at every length, which is safe in every engine. Short prompts pay for it: "
    "the model is not the original one below its original length.",
    "short": "Only the short factors are used: the window is the original one.",
}
# How an engine chooses between short and long factors
_CHOOSES = {
    "transformers": "transformers uses the short factors up to the original length and the long ones beyond, by the "
    "longest sequence of a batch.",
    "vllm": "vLLM chooses once, for all requests: long where --max-model-len is beyond the original length.",
    "gguf": "llama.cpp chooses once: long where the context that it allocates (-c) is beyond the original length. It "
    "rounds that up to a multiple of 256 tokens.",
}
_STALE = (
    "Stock `generate` keeps keys that were cached under the short factors when a text grows past the original length, "
    "and is wrong from there on; a prompt that is longer from the start is right."
)
_MADE_AGAIN = (
    "Stock `generate` of this class makes its cache again when a text grows past the original length; a loop of your "
    "own does not."
)


_OF_CHECKPOINT = (
    "factors.json is the whole table, which longrope reads by itself. Where config.json can express it, it has it, "
    "too; otherwise it has the window of the base, and `longrope export` writes a folder for an engine."
)
_OF_ADAPTERS = (
    "These are adapters alone, of the base that adapter_config.json names, trained under factors.json: without these "
    'factors they are of no use. `longrope.load(base, "path/of/this/folder")` puts the factors on the base, and then '
    '`PeftModel.from_pretrained(base, "path/of/this/folder")` the adapters.'
)
_FRONT = re.compile(r"---\r?\n.*?^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)


def model_card(
    name: str,
    table: FactorTable,
    window: str,
    *,
    engine: str = "transformers",
    family: str = "",
    dtype: str | None = None,
    widened: str | None = None,
    left_out: Sequence[str] = (),
    costs: Sequence[Mapping[str, Any]] = (),
    measured: Mapping[str, Any] | None = None,
    about: str = "",
) -> str:
    """Markdown that says what the checkpoint is, how it was made, how it is loaded and what it costs.

    table: the one that is served. family: the model_type. dtype: of matrices, where weights were converted. widened:
    what became of a sliding window. left_out: what the engine cannot express, a sentence each; costs: what that costs,
    as `export.costs` measures it. measured: the metrics.json of the run that made the table. about: the original
    card's front matter, which the Hub reads.
    """
    made = table.provenance
    lines = [
        *_opening(name, table, about),
        "The weights are those of the checkpoint that was exported, "
        + ("unchanged." if dtype is None else f"converted to GGUF with matrices in {dtype}."),
        *([f"In config.json: {widened}."] if widened else []),
        "",
        f"Engine: `{engine}`. Window: `{window}`. {_use(engine, window, family)}",
        "The rows below and in factors.json are those in use here; rows that this window leaves out are in neither.",
        "",
        *_how_to_load(engine, window, table.rows[-1].up_to),
        "",
        *_rows(table),
        *_left_out(left_out, costs),
        *_measured(measured or {}, table.rows[-1].up_to),
    ]
    if made:
        lines += ["", "Made by: " + ", ".join(f"{_plain(key)} {_plain(value)}" for key, value in made.items()) + "."]
    return "\n".join([*lines, ""])


def _use(engine: str, window: str, family: str) -> str:
    """Which factors a text gets."""
    if window != "dynamic":
        return _USE[window]
    if engine != "transformers":  # SGLang and mlx-lm have one list, where this is forced on them
        return _CHOOSES.get(engine, _USE["long"])
    return f"{_CHOOSES[engine]} {_MADE_AGAIN if family in SWITCHING else _STALE}"


def extension_card(name: str, table: FactorTable, stages: Sequence[Mapping[str, Any]], about: str = "") -> str:
    """Markdown of the checkpoint of an extension: what was done, and which factors it has by length.

    about: the base's front matter.
    """
    trained = any(stage["do"] == "finetune" for stage in stages)
    weights = (
        "The weights were fine-tuned." if trained else "The weights are those of the original checkpoint, unchanged."
    )
    return _checkpoint_card(name, table, weights, about, "; ".join(str(stage["stage"]) for stage in stages))


def training_card(
    name: str, table: FactorTable, trained: Mapping[str, Any], about: str = "", *, apart: bool = False
) -> str:
    """Markdown of the checkpoint of a fine-tuning: what was trained, and which factors it has by length.

    trained: `settings` of the run's config.json. about: the front matter of what was trained. apart: of a folder with
    the adapters alone.
    """
    lora, mixed = trained.get("lora"), trained.get("mixed")
    what = "all weights"
    if lora:
        what = f"adapters (LoRA, rank {lora['rank']})" + ("" if apart else ", merged")
        if beside := [key for key in ("embeddings", "norms") if lora.get(key)]:
            what += f", and all {' and '.join(beside)}"
    steps, windows = plural(trained["steps"], "step"), plural(trained["batch"], "window")
    weights = (
        f"Fine-tuned: {what}, {steps} of {windows} of {trained['length']} tokens, "
        f"learning rate {trained['learning_rate']:g} ({trained['schedule']}), seed {trained['seed']}."
    )
    if mixed is not None:
        weights += f" Of the windows a share of {mixed:g} was packed of short documents under their own row."
    return _checkpoint_card(name, table, weights, about, use=_OF_ADAPTERS if apart else _OF_CHECKPOINT)


def _checkpoint_card(
    name: str, table: FactorTable, weights: str, about: str, stages: str = "", use: str = _OF_CHECKPOINT
) -> str:
    """The card of a folder with the whole table; weights: what became of them, in a sentence."""
    lines = [
        *_opening(name, table, about),
        weights,
        "",
        use,
        "",
        *([f"Stages: {stages}.", ""] if stages else []),
        *_rows(table),
    ]
    return "\n".join([*lines, ""])


def _opening(name: str, table: FactorTable, about: str) -> list[str]:
    """The lines that every card begins with: front matter, title, lengths."""
    last = table.rows[-1]
    extended = last.up_to > table.original_length
    what = "extended to" if extended else "with rescaled RoPE for"
    return [
        *([about] if about else []),
        f"# {_title(name, table)}, {what} {format_length(last.up_to)} tokens",
        "",
        f"Original length {format_length(table.original_length)}, "
        + (f"target {format_length(last.up_to)} ({last.up_to / table.original_length:g}x)" if extended else "kept")
        + ", LongRoPE factors (arXiv 2402.13753), made with longrope.",
    ]


def front_matter(folder: Path) -> str:
    """The block of YAML that begins the README.md of a checkpoint: licence, languages and the like; "" without one."""
    try:
        found = _FRONT.match(read_text(folder / "README.md", "model card"))
    except UserError:  # there is none, or it is no text
        return ""
    return found[0] if found else ""


def _title(name: str, table: FactorTable) -> str:
    """The last part of a model's name; that of a run's checkpoint is the same for all, and its table knows better."""
    folder = short_name(name)
    own = short_name(table.model or name)
    return _plain(own if folder == CHECKPOINT else folder)


def _plain(text: object) -> str:
    """A name or value of a file as text of a card: in one line, and no markup, link or element."""
    told = "".join(f"\\{each}" if each in "\\`*[]|" else each for each in one_line(str(text)))
    return told.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":\\//")


def _how_to_load(engine: str, window: str, longest: int) -> list[str]:
    """A block that loads the folder in its engine."""
    folder = "path/of/this/folder"
    if engine == "transformers":
        lines = [
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{folder}")',
        ]
        return ["```python", *lines, "```"]
    commands = {
        "vllm": f"vllm serve {folder} --max-model-len {longest}",
        "sglang": f"python -m sglang.launch_server --model-path {folder} --context-length {longest}",
        "mlx": f"mlx_lm.generate --model {folder} --prompt ...",
        "gguf": f"llama-server -m {folder}/*.gguf -c {longest}",
    }
    return ["```sh", commands[engine], "```"]


def _left_out(left_out: Sequence[str], costs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the engine cannot express, and the perplexity that it costs."""
    if not left_out:
        return []
    lines = ["", "Left out, because the engine cannot express it:", "", *(f"* {each}" for each in left_out), ""]
    lines += ["| tokens | perplexity by the whole table | as served |", "| ---: | ---: | ---: |"]
    for cost in costs:
        length = format_length(int(cost["length"]))
        shown = [_number(cost.get(name)) if "why" not in cost else "not measured" for name in ("table", "engine")]
        lines.append(f"| {length} | {shown[0]} | {shown[1]} |")
    return lines


def _measured(metrics: Mapping[str, Any], longest: int) -> list[str]:
    """What the run that made the table measured of it, and beside it, up to the longest length that is served."""
    results = metrics.get("results") or ()
    rows = [each for each in results if {"method", "length", "value"} <= each.keys() and each["length"] <= longest]
    if not rows:
        return []
    windows = any("windows" in each for each in rows)
    lines = ["", f"Measured by the run that made the factors, {metrics.get('measure', 'value')}:", ""]
    lines += ["| factors | tokens | value |" + (" on |" if windows else "")]
    lines += ["| --- | ---: | ---: |" + (" --- |" if windows else "")]
    for each in rows:
        value = each["value"]
        cells = [str(each["method"]), format_length(int(each["length"])), _number(value)]
        lines.append(f"| {' | '.join([*cells, *([str(each.get('windows', ''))] if windows else [])])} |")
    return lines


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _rows(table: FactorTable) -> list[str]:
    lines = [
        "| up to | start tokens | attention factor | rescale factors, first to last |",
        "| ---: | ---: | ---: | --- |",
    ]
    for row in table.rows:
        span = f"{row.rescale[0]:.4g} to {row.rescale[-1]:.4g}"
        lines.append(f"| {format_length(row.up_to)} | {row.start_tokens} | {row.attention_factor:.4f} | {span} |")
    return lines
