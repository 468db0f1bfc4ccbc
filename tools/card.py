"""Measure the embedded model and write its card and figures beside it.

    python tools/card.py runs/tiny src/longrope/assets/tiny

Run by whoever has trained it with tools/pretrain.py: the training's settings and log are read from the first folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longrope.baselines import critical_dimension
from longrope.documents import read_sources
from longrope.evaluate.passkey import passkey
from longrope.evaluate.perplexity import summarize, token_losses
from longrope.model import LoadedModel, load_model
from longrope.windows import choose_windows

CONTEXTS = (16, 32, 64, 128, 192, 256)
WINDOWS, TRIES = 512, 500


def perplexity_by_context(loaded: LoadedModel) -> list[dict[str, Any]]:
    """Perplexity of tokens by how many came before, on windows of modules that were not trained on."""
    length = loaded.rope.original_length
    documents = read_sources(["stdlib"], share="unseen")
    windows = choose_windows(documents, loaded.tokenizer, length=length, count=WINDOWS, seed=0)
    ids = torch.from_numpy(np.stack([window.ids for window in windows]))
    losses = torch.cat([token_losses(loaded, batch) for batch in torch.split(ids, 32)]).double().numpy()
    rows, names = [], [window.sha256 for window in windows]
    for low, high in zip((1, *CONTEXTS), (*CONTEXTS, length), strict=False):
        if low >= high:
            continue
        part = losses[:, low - 1 : high - 1]  # column k holds the loss of token k + 1, which has k + 1 before it
        figure = summarize(part.sum(1), np.full(len(part), part.shape[1]), names)
        rows.append({"context": [low, high - 1], "perplexity": figure.value, "ci": figure.ci, "tokens": figure.tokens})
    return rows


def summed_seconds(log: list[dict[str, Any]]) -> float:
    """Seconds of all sessions of a training; the clock of each starts at 0."""
    ends = [line for line, after in pairwise(log) if after["seconds"] < line["seconds"]]
    return float(sum(line["seconds"] for line in [*ends, log[-1]]))


def card(settings: dict[str, Any], training: dict[str, Any], figures: dict[str, Any]) -> str:
    """The model card in Markdown."""
    chosen = settings["settings"]
    rows = "\n".join(
        f"| {low} to {high} | {row['perplexity']:.3f} | {row['ci'][0]:.3f} to {row['ci'][1]:.3f} |"
        for row in figures["perplexity"]
        for low, high in [row["context"]]
    )
    keys = figures["passkey"]
    return f"""---
license: apache-2.0
library_name: transformers
tags: [byte-level, demonstration]
---

# tiny, the embedded model of longrope

A byte-level Llama of {figures["parameters"] / 1e6:.2f}M parameters, trained from scratch on windows of {chosen["length"]} tokens. It is made for
demonstrations and tests of context extension, and for nothing else: it completes Python and finds a key in its window.

| | |
| --- | --- |
| layers, hidden size, intermediate size | {chosen["layers"]}, {chosen["hidden"]}, {chosen["intermediate"]} |
| heads, key-value heads, head dimension | {chosen["heads"]}, {chosen["kv_heads"]}, {chosen["head_dim"]} |
| original length, rope_theta | {chosen["length"]}, {chosen["theta"]:g} |
| critical dimension | pair {figures["critical_dimension"]:.2f} of {figures["pairs"]}, {figures["critical_dimension"] / figures["pairs"]:.2f} of the pairs, as LLaMA2's |
| vocabulary | the 256 bytes, `<bos>`, `<eos>`, `<pad>`; embeddings tied |
| weights | bfloat16 safetensors |

## Training

`python tools/pretrain.py --out runs/tiny --tokens {chosen["tokens"] / 1e6:g}e6`: {training["tokens"] / 1e6:.1f}M tokens in steps of {chosen["batch"]} windows, AdamW with a peak learning rate of
{chosen["learning_rate"]:g} and a cosine schedule, bfloat16 autocast, seed {chosen["seed"]}; {training["seconds"] / 3600:.1f} hours on 2 CPU cores that were shared with other work.
Python {settings["versions"]["python"]}, torch {settings["versions"]["torch"]}, transformers {settings["versions"]["transformers"]}. Training loss at the end: {training["loss"]:.3f} nats a token.

The text is the standard library of that Python, its tests included, but for a fifth of its modules: of the SHA-256 of a module's path, modulo
10, 0 is left for judging and 1 for searching. {100 * chosen["recall"]:g}% of the windows are recall tasks that the script generates: keys in filler,
assignments repeated in another order, random strings repeated. No third-party text is shipped; the weights are ours.

## Figures

Measured by `tools/card.py` on modules that were not trained on ({figures["windows"]} windows; 95% bootstrap intervals over modules):

| tokens of context | perplexity | interval |
| ---: | ---: | ---: |
{rows}

Passkey retrieval at {keys["length"]} tokens: {100 * keys["value"]:.1f}% of {keys["tries"]} keys ({100 * keys["ci"][0]:.1f}% to {100 * keys["ci"][1]:.1f}%).
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", type=Path, help="the --out of tools/pretrain.py")
    parser.add_argument("model", type=Path, help="the finished model, where the card is written")
    given = parser.parse_args(argv)
    settings = json.loads((given.training / "settings.json").read_text())
    log = [json.loads(line) for line in (given.training / "training.jsonl").read_text().splitlines()]
    loaded = load_model(str(given.model))
    found = passkey(loaded, loaded.rope.original_length, tries=TRIES, seed=0)
    figures = {
        "parameters": loaded.model.num_parameters(),
        "pairs": loaded.rope.shape.pairs,
        "critical_dimension": critical_dimension(loaded.rope.shape),
        "windows": WINDOWS,
        "perplexity": perplexity_by_context(loaded),
        "passkey": {
            "length": loaded.rope.original_length,
            "value": found.value,
            "tries": found.tries,
            "ci": list(found.ci),
        },
    }
    end = log[-1] | {"seconds": summed_seconds(log)}
    record = {"training": settings | {"end": end}, "figures": figures}
    (given.model / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.model / "README.md").write_text(card(settings, end, figures))
    print(card(settings, end, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
