"""What `finetune` costs beside a bare Trainer loop: seconds of a step, and memory of a long window.

    python benchmarks/training.py            # ten minutes on 2 quiet cores, 8 GiB of memory
    python benchmarks/training.py --quick    # only that it runs: its figures mean nothing

Both sides are transformers.Trainer with the same arguments, model and windows; ours has the factors installed and the
loss by chunks. They are timed in turn, a few steps each, block by block.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from common import (
    Figure,
    arguments,
    llama_name,
    memory_of,
    paired,
    random_llama,
    random_windows,
    run_benchmark,
    timed,
)
from longrope.baselines import baseline
from longrope.checkpoint import AUTOCAST, TINY, LoadOptions
from longrope.documents import read_sources
from longrope.model import LoadedModel, load_model
from longrope.training.loss import chunked_loss
from longrope.windows import Window, windows_of

VOCABULARY = 32_000


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    length: int = 2048
    steps: int = 4
    blocks: int = 15
    hidden: int = 512
    layers: int = 4
    memory_tokens: int = 8192
    memory_hidden: int = 256
    memory_layers: int = 2


QUICK = Sizes(length=256, steps=1, blocks=1, hidden=64, layers=1, memory_tokens=1024, memory_hidden=64)


@contextmanager
def as_finetuned(loaded: LoadedModel, length: int) -> Iterator[None]:
    """The model as `finetune` trains it."""
    with loaded.patch() as patch, chunked_loss(loaded.model):
        patch.install(baseline("yarn", loaded.rope.shape, length))
        yield


def train(loaded: LoadedModel, windows: Sequence[Window], steps: int) -> None:
    """A few steps of Trainer, one window each; nothing is saved."""
    items: list[dict[str, Tensor]] = [
        {"input_ids": torch.from_numpy(window.ids), "labels": torch.from_numpy(window.ids)} for window in windows
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=1e-6,
            bf16=loaded.options.dtype in (AUTOCAST, "bfloat16"),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=loaded.device.type == "cpu",
            dataloader_pin_memory=loaded.device.type == "cuda",
        )
        trainer = Trainer(model=loaded.model, args=arguments, train_dataset=items)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def step_time(loaded: LoadedModel, windows: Sequence[Window], sizes: Sizes) -> Figure:
    """Seconds of a step of ours over those of a bare loop."""
    model: Any = loaded.model
    model.requires_grad_(True)

    def ours() -> float:
        with as_finetuned(loaded, sizes.length):
            return timed(lambda: train(loaded, windows, sizes.steps))

    measured = paired(ours, lambda: timed(lambda: train(loaded, windows, sizes.steps)), sizes.blocks)
    return Figure(
        "seconds of a training step / bare Trainer loop",
        on=f"{loaded.name}; a window of {sizes.length} tokens a step",
        value=float(np.median(measured.ratios)),
        limit=1 / 0.95,
        unit="times",
        details=measured.details() | {"steps": sizes.steps},
    )


def step_memory(sizes: Sizes, *, seed: int, threads: int, device: str) -> Figure:
    """Peak memory of a step of ours over that of a bare loop, weights and optimizer left out."""
    options: dict[str, Any] = {"tokens": sizes.memory_tokens, "vocabulary": VOCABULARY, "seed": seed}
    options |= {"hidden": sizes.memory_hidden, "layers": sizes.memory_layers, "threads": threads, "device": device}
    model = llama_name(VOCABULARY, sizes.memory_hidden, sizes.memory_layers)
    used = {side: memory_of(side, **options) for side in ("step", "bare-step")}
    return Figure(
        "peak memory of a training step / bare loop",
        on=f"{model}; a window of {sizes.memory_tokens} tokens",
        value=used["step"]["call_bytes"] / used["bare-step"]["call_bytes"],
        limit=0.5,
        unit="times",
        details=used,
    )


def measure_all(sizes: Sizes, *, seed: int, threads: int, device: str) -> list[Figure]:
    """Every figure; memory first, because a child process is born with the peak of its parent."""
    memory = step_memory(sizes, seed=seed, threads=threads, device=device)
    tiny = load_model(TINY, LoadOptions(device=device))
    text = windows_of(tiny, read_sources(["stdlib"], share="search"), sizes.length, sizes.steps, seed)
    large = random_llama(vocabulary=VOCABULARY, hidden=sizes.hidden, layers=sizes.layers, seed=seed, device=device)
    random = random_windows(VOCABULARY, length=sizes.length, count=sizes.steps, seed=seed)
    return [step_time(tiny, text, sizes), step_time(large, random, sizes), memory]


def main() -> int:
    args = arguments(__doc__).parse_args()
    sizes = QUICK if args.quick else Sizes()
    return run_benchmark(
        "training",
        args,
        asdict(sizes),
        lambda: measure_all(sizes, seed=args.seed, threads=args.threads, device=args.device),
    )


if __name__ == "__main__":
    sys.exit(main())
