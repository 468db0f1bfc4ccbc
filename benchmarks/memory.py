"""Peak memory of one long window: run by evaluation.py and training.py, each side in a process of its own.

    python benchmarks/memory.py {ours,labels,gradient,kept,step,bare-step} --tokens 32768 ...

Prints one JSON object: bytes in use before the call, the peak during it, and their difference. On CPU the first is the
process's resident set and the second its highest, as getrusage has it; on CUDA both are those of torch's allocator. A
call on a few tokens comes first, so that libraries, threads and kernels that are loaded once are in neither.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from common import random_llama, random_windows
from longrope.baselines import baseline
from longrope.model import LoadedModel
from longrope.search.objective import Evaluator
from longrope.search.tasks import Task
from longrope.training.loss import chunked_loss
from longrope.windows import Window

WARM_UP = 64


def ours(loaded: LoadedModel, window: Window) -> float:
    """The loss of the window in one candidate evaluation, in nats a scored token."""
    factors = baseline("yarn", loaded.rope.shape, len(window.ids))
    with Evaluator(loaded, [window]) as evaluate:
        return evaluate(Task(factors, windows=(0,))).losses[0] / window.scored


def gradient(loaded: LoadedModel, window: Window, checkpoints: bool = True) -> float:
    """The loss of the window in one gradient step, with activation checkpointing or without, in nats a scored token."""
    loaded.checkpoint_from = 1 if checkpoints else 1 + len(window.ids)
    factors = baseline("yarn", loaded.rope.shape, len(window.ids))
    with Evaluator(loaded, [window]) as evaluate:
        outcome = evaluate(Task(factors, windows=(0,), gradient=True))
    assert outcome.recomputed == (len(window.ids) if checkpoints else 0)
    return outcome.losses[0] / window.scored


def kept(loaded: LoadedModel, window: Window) -> float:
    """The same without checkpointing: all activations are kept."""
    return gradient(loaded, window, checkpoints=False)


@torch.no_grad()
def labels(loaded: LoadedModel, window: Window) -> float:
    """The loss that a transformers model gives for labels, in nats a token."""
    ids = torch.from_numpy(window.ids)[None].to(loaded.device)
    with loaded.autocast():
        loss: Tensor = loaded.model(ids, labels=ids).loss
    return float(loss)


def step(loaded: LoadedModel, window: Window) -> float:
    """The loss of a training step on all weights as `finetune` makes it: forward and backward, no optimizer."""
    model: Any = loaded.model.requires_grad_(True).train()
    with chunked_loss(model):
        return _step(loaded, window)


def bare_step(loaded: LoadedModel, window: Window) -> float:
    """The same with the model's own loss."""
    loaded.model.requires_grad_(True).train()
    return _step(loaded, window)


def _step(loaded: LoadedModel, window: Window) -> float:
    model: Any = loaded.model
    ids = torch.from_numpy(window.ids)[None].to(loaded.device)
    with loaded.autocast():
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return float(loss.detach())


SIDES = {
    "ours": ours,
    "labels": labels,
    "gradient": gradient,
    "kept": kept,
    "step": step,
    "bare-step": bare_step,
}


def resident(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def highest(device: torch.device) -> int:
    """The most bytes that were in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's begins with that of the process that started this one
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=list(SIDES))
    for name in ("tokens", "vocabulary", "hidden", "layers", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = {"vocabulary": args.vocabulary, "hidden": args.hidden, "layers": args.layers}
    loaded = random_llama(**size, seed=args.seed, device=args.device)
    [window] = random_windows(args.vocabulary, length=args.tokens, count=1, seed=args.seed)
    [short] = random_windows(args.vocabulary, length=WARM_UP, count=1, seed=args.seed)
    side = SIDES[args.side]
    side(loaded, short)
    before, highest_before = resident(loaded.device), highest(loaded.device)
    side(loaded, window)
    peak = highest(loaded.device)
    assert peak > highest_before, "the peak was before the call: measure a longer window"
    print(json.dumps({"before_bytes": before, "peak_bytes": peak, "call_bytes": peak - before}))


if __name__ == "__main__":
    main()
