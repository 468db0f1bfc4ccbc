"""What `finetune` costs beside a bare Trainer loop: seconds of a step, and memory of a long window.

    python benchmarks/training.py            # five minutes on 2 quiet cores, 8 GiB of memory
    python benchmarks/training.py --quick    # only that it runs: its figures mean nothing

Both sides are transformers.Trainer with the same arguments, model and windows; ours has the factors installed and the
loss by chunks. They are timed in turn, a few steps each, block by block.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from common import (
    RESULTS,
    Figure,
    llama_name,
    machine,
    memory_of,
    paired,
    print_table,
    random_llama,
    random_windows,
    timed,
    today,
    versions,
    write_results,
)
from longrope.baselines import baseline
from longrope.checkpoint import TINY, LoadOptions
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
    blocks: int = 5
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
            bf16=True,
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, once: a check of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    sizes, name = (QUICK, "training-quick") if args.quick else (Sizes(), "training")
    about: dict[str, Any] = {"benchmark": name, "date": today(), "seed": args.seed, "threads": args.threads}
    about |= {"device": LoadOptions(device=args.device).placement, "machine": machine(), "versions": versions()}
    # First, because a child process is born with the peak of its parent.
    memory = step_memory(sizes, seed=args.seed, threads=args.threads, device=args.device)
    tiny = load_model(TINY, LoadOptions(device=args.device))
    text = windows_of(tiny, read_sources(["stdlib"], share="search"), sizes.length, sizes.steps, args.seed)
    shape = {"vocabulary": VOCABULARY, "hidden": sizes.hidden, "layers": sizes.layers}
    large = random_llama(**shape, seed=args.seed, device=args.device)
    random = random_windows(VOCABULARY, length=sizes.length, count=sizes.steps, seed=args.seed)
    figures = [step_time(tiny, text, sizes), step_time(large, random, sizes), memory]
    print_table(name, figures)
    document = {**about, "sizes": asdict(sizes), "figures": [figure.to_dict() for figure in figures]}
    write_results(args.out / f"{name}.json", document)
    return 0 if args.quick or all(figure.ok for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
