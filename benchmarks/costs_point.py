"""One measured point of costs.py, in a process of its own.

    python benchmarks/costs_point.py '{"kind": "forward", "tokens": 8192, "hidden": 512, ...}'

Prints one JSON object: the most bytes that were in use beyond those before the model was made (resident sets, as the
kernel counts them), the seconds of a second run, the rates of the machine's parts measured before and after it, and
what the cost model predicts of both. kind: forward (a candidate evaluation), gradient (a gradient step of the search),
train (a step of `finetune`, by Trainer), lora (the same with adapters), prefill (a prompt by chunks into a cache).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from common import random_llama, random_windows
from longrope.baselines import baseline
from longrope.checkpoint import AUTOCAST, LoadOptions
from longrope.configs import rope_config, table_from_config
from longrope.model import LoadedModel
from longrope.planning import memory
from longrope.planning.precision import precision_of
from longrope.planning.rates import measured_rates
from longrope.planning.shape import ModelShape
from longrope.planning.speed import Rates, seconds
from longrope.planning.subject import shape_of
from longrope.runtime.caches import RoomyCache
from longrope.runtime.chunks import by_chunks, whole_text
from longrope.search.objective import Evaluator
from longrope.search.tasks import Task
from longrope.training.lora import LoraSettings, with_lora
from longrope.training.loss import chunked_loss
from longrope.windows import Window

PRECISION = precision_of(LoadOptions(device="cpu").resolved().dtype, cuda=False)
RANK = 16
WARM_UP = 64  # tokens
STEPS = 3  # of a training; the first has no moments yet


@dataclass(frozen=True)
class Point:
    """What is measured. again: layers are computed twice (activation checkpointing)."""

    kind: str
    tokens: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    again: bool = False
    seed: int = 0
    threads: int = 2


def build(point: Point) -> LoadedModel:
    """A random Llama of the point's shape, as `load_model` would load it on a CPU."""
    config = LlamaConfig(
        vocab_size=point.vocabulary,
        hidden_size=point.hidden,
        intermediate_size=point.hidden * 11 // 4,
        num_hidden_layers=point.layers,
        num_attention_heads=point.heads,
        num_key_value_heads=point.kv_heads,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    loaded = random_llama(vocabulary=256, hidden=64, layers=1, seed=point.seed, device="cpu")
    torch.manual_seed(point.seed)  # transformers draws weights from torch's own generator
    model: Any = LlamaForCausalLM(config)
    described = config.to_dict()
    loaded.model = model.eval().requires_grad_(False)
    loaded.rope, loaded.own = rope_config(described), table_from_config(described)
    return loaded


def evaluate(loaded: LoadedModel, window: Window, *, gradient: bool, again: bool) -> None:
    """A candidate evaluation, or a gradient step."""
    loaded.checkpoint_from = 1 if again else 1 + len(window.ids)
    with Evaluator(loaded, [window]) as run:
        run(Task(baseline("yarn", loaded.rope.shape, len(window.ids)), windows=(0,), gradient=gradient))


@torch.inference_mode()
def prefill(loaded: LoadedModel, window: Window) -> None:
    """A prompt by chunks into a cache."""
    ids = torch.from_numpy(window.ids)[None]
    with loaded.patch() as patch, loaded.autocast():
        patch.install(baseline("yarn", loaded.rope.shape, len(window.ids)))
        cache = RoomyCache(loaded.model.config, len(window.ids))
        for _ in by_chunks(loaded.model, cache, ids, *whole_text(ids), memory.CHUNK):
            pass


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.begun, self.took = 0.0, list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.took.append(time.perf_counter() - self.begun)


def train(loaded: LoadedModel, window: Window, point: Point, steps: int) -> float:
    """Steps as `finetune` makes them, by Trainer; the median seconds of one that is not the first."""
    model: Any = loaded.model
    item = {name: torch.from_numpy(window.ids) for name in ("input_ids", "labels")}
    clock = Clock()
    with loaded.patch() as patch, tempfile.TemporaryDirectory() as folder:
        patch.install(baseline("yarn", loaded.rope.shape, len(window.ids)))
        trained = with_lora(model, LoraSettings(RANK), point.seed) if point.kind == "lora" else model
        model.requires_grad_(True) if point.kind == "train" else None
        with chunked_loss(model):
            arguments = TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-6,
                bf16=loaded.options.dtype == AUTOCAST,
                optim="adamw_torch", max_grad_norm=1.0, save_strategy="no", logging_strategy="no", report_to=[],
                disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False,
                activation_checkpointing=point.again, activation_checkpointing_kwargs={"use_reentrant": False},
            )  # fmt: skip
            trainer = Trainer(model=trained, args=arguments, train_dataset=[item] * steps, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    return float(np.median(clock.took[1:] or clock.took))


def run(loaded: LoadedModel, window: Window, point: Point) -> float:
    """The point on a window; its seconds."""
    if point.kind in ("train", "lora"):
        return train(loaded, window, point, STEPS)
    begun = time.perf_counter()
    if point.kind == "prefill":
        prefill(loaded, window)
    else:
        evaluate(loaded, window, gradient=point.kind == "gradient", again=point.again)
    return time.perf_counter() - begun


def predicted_memory(point: Point, shape: ModelShape) -> dict[str, float]:
    """Bytes by their parts, as `plan` has them."""
    if point.kind == "forward":
        return memory.forward(shape, PRECISION, point.tokens, "cpu")
    if point.kind == "prefill":
        return memory.by_chunks(shape, PRECISION, point.tokens, "cpu", scored=False)
    if point.kind == "gradient":
        return memory.gradient(shape, PRECISION, point.tokens, "cpu", again=point.again)
    rank = RANK if point.kind == "lora" else 0
    return memory.train(shape, PRECISION, point.tokens, "cpu", again=point.again, rank=rank)


def predicted_seconds(point: Point, shape: ModelShape, rates: Rates) -> float:
    """Seconds, as `plan --gpus cpu` has them."""
    kind, rank = ("forward", 0) if point.kind == "prefill" else (point.kind, RANK * (point.kind == "lora"))
    scored = point.kind != "prefill"
    return seconds(shape, PRECISION, point.tokens, rates, kind, rank=rank, again=point.again, scored=scored)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def main() -> None:
    point = Point(**json.loads(sys.argv[1]))
    torch.set_num_threads(point.threads)
    small = Point(**(asdict(point) | {"hidden": 64, "layers": 1, "heads": 1, "kv_heads": 1, "vocabulary": 256}))
    [short] = random_windows(small.vocabulary, length=WARM_UP, count=1, seed=point.seed)
    run(build(small), short, small)  # libraries, threads and kernels that are loaded once
    before = psutil.Process().memory_info().rss
    loaded = build(point)
    [window] = random_windows(point.vocabulary, length=point.tokens, count=1, seed=point.seed)
    first = run(loaded, window, point)
    peak = status("VmHWM") - before
    shape = shape_of(loaded.model)
    rates = [measured_rates(shape, PRECISION, point.tokens, seed=point.seed)]
    took = run(build(point), window, point)
    rates.append(measured_rates(shape, PRECISION, point.tokens, seed=point.seed))
    mean = Rates(*(float(np.mean([getattr(each, part.name) for each in rates])) for part in fields(Rates)))
    parts = predicted_memory(point, shape)
    told: dict[str, Any] = {"point": asdict(point), "peak_bytes": peak, "seconds": took, "seconds_first": first}
    told |= {"predicted_bytes": sum(parts.values()), "parts": parts, "rates": asdict(mean)}
    print(json.dumps(told | {"predicted_seconds": predicted_seconds(point, shape, mean)}))


if __name__ == "__main__":
    main()
