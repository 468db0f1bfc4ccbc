"""What `evaluate perplexity` costs beside a plain transformers loop, and how much longer a window it measures.

    python benchmarks/measures.py            # ten minutes on 2 quiet cores, 8 GiB of memory
    python benchmarks/measures.py --quick    # only that it runs: its figures mean nothing

Throughput is timed in turn, block by block. Reach is that of one window in a process of its own, which may have 8 GiB
of memory and no more (on CPU RLIMIT_DATA, on CUDA torch's share of the device): lengths double until the plain loop,
`model(ids, labels=ids)`, runs out of it; ours is then asked for four times that length.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from common import (
    Figure,
    arguments,
    llama_name,
    paired,
    random_llama,
    random_windows,
    run_benchmark,
    timed,
)
from longrope.checkpoint import TINY, LoadOptions
from longrope.documents import read_sources
from longrope.evaluate.execute import execute
from longrope.evaluate.methods import Result
from longrope.evaluate.perplexity_measure import PerplexityMeasure
from longrope.model import LoadedModel, load_model
from longrope.windows import Window, windows_of

VOCABULARY = 32_000
AGREE = 1e-5
TIMES = 4  # the length at which the plain loop runs out


@dataclass(frozen=True)
class Sizes:
    """How much is measured; memory in bytes."""

    length: int = 2048
    windows: int = 16
    random_windows: int = 4
    blocks: int = 11
    hidden: int = 512
    layers: int = 4
    memory: int = 8 * 2**30
    shortest: int = 4096
    reach_hidden: int = 256
    reach_layers: int = 2


QUICK = Sizes(
    length=256,
    windows=2,
    random_windows=2,
    blocks=1,
    hidden=64,
    layers=1,
    memory=5 * 2**29,
    shortest=2048,
    reach_hidden=64,
    reach_layers=1,
)


def ours(loaded: LoadedModel, windows: Sequence[Window]) -> Result:
    """Perplexity of the model as it is, as `longrope evaluate perplexity` measures it, without a run folder."""
    length = len(windows[0].ids)
    measure = PerplexityMeasure({length: windows})
    [result] = execute(loaded, measure, {("none", length): None}, {length: measure.items(loaded, length)})
    return result


@torch.inference_mode()
def plain(loaded: LoadedModel, windows: Sequence[Window]) -> float:
    """The same as most scripts have it: batches of as many windows, the loss of each by the model itself."""
    ids = torch.from_numpy(np.stack([window.ids for window in windows])).to(loaded.device)
    batches = torch.split(ids, max(1, loaded.batch_tokens // ids.shape[1]))
    with loaded.autocast():
        losses = [float(loaded.model(batch, labels=batch, use_cache=False).loss) * len(batch) for batch in batches]
    return math.exp(sum(losses) / len(ids))


def throughput(loaded: LoadedModel, windows: Sequence[Window], blocks: int) -> Figure:
    """Tokens a second of ours over those of the plain loop; both must find the same perplexity."""
    found, expected = ours(loaded, windows).value, plain(loaded, windows)
    assert abs(found / expected - 1) < 100 * AGREE, f"{found} and {expected}: not the same work"  # in bf16
    measured = paired(
        lambda: timed(lambda: ours(loaded, windows)), lambda: timed(lambda: plain(loaded, windows)), blocks
    )
    return Figure(
        "seconds of evaluate perplexity / plain loop",
        on=f"{loaded.name}; {len(windows)} windows of {len(windows[0].ids)} tokens",
        value=float(np.median(measured.ratios)),
        limit=1 / 0.95,
        unit="times",
        details=measured.details() | {"perplexity_ours": found, "perplexity_plain": expected},
    )


def agreement(windows: Sequence[Window]) -> Figure:
    """How far ours is from the plain loop in float32."""
    loaded = load_model(TINY, LoadOptions(device="cpu", dtype="float32"))
    found, expected = ours(loaded, windows).value, plain(loaded, windows)
    return Figure(
        "relative difference in perplexity from the plain loop",
        on=f"tiny in float32; {len(windows)} windows of {len(windows[0].ids)} tokens",
        value=abs(found / expected - 1),
        limit=AGREE,
        unit="",
        details={"perplexity_ours": found, "perplexity_plain": expected},
    )


def reach(sizes: Sizes, *, seed: int, threads: int, device: str) -> Figure:
    """Four times the length at which the plain loop runs out of memory, over the length that ours measures."""
    tried: dict[str, dict[str, int | None]] = {"plain": {}, "ours": {}}
    length = sizes.shortest
    while (peak := _peak("plain", length, sizes, seed, threads, device)) is not None:
        tried["plain"][str(length)] = peak
        length *= 2
    tried["plain"][str(length)] = None
    reached = TIMES * length
    while (peak := _peak("ours", reached, sizes, seed, threads, device)) is None:
        tried["ours"][str(reached)] = None
        reached //= 2
    tried["ours"][str(reached)] = peak
    model = llama_name(VOCABULARY, sizes.reach_hidden, sizes.reach_layers)
    return Figure(
        f"{TIMES} times the length where the plain loop runs out of memory / length that ours measures",
        on=f"{model}; {length} tokens / {reached} tokens, in {sizes.memory / 2**30:g} GiB",
        value=TIMES * length / reached,
        limit=1.0,
        unit="times",
        details={"plain_runs_out_at": length, "ours_measures": reached, "peak_bytes": tried},
    )


def _peak(side: str, length: int, sizes: Sizes, seed: int, threads: int, device: str) -> int | None:
    """The most bytes that a process used, None when it ran out of memory."""
    options = {"tokens": length, "hidden": sizes.reach_hidden, "layers": sizes.reach_layers, "memory": sizes.memory}
    options |= {"seed": seed, "threads": threads}
    command = [sys.executable, __file__, "--side", side, "--device", device]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak: int | None = json.loads(done.stdout)["peak"]
    return peak


def measure_one(side: str, args: argparse.Namespace) -> int | None:
    """In a process of its own: the peak of one window, None when memory runs out."""
    torch.set_num_threads(args.threads)
    loaded = random_llama(
        vocabulary=VOCABULARY, hidden=args.hidden, layers=args.layers, seed=args.seed, device=args.device
    )
    on_cuda = loaded.device.type == "cuda"
    if on_cuda:
        share = args.memory / torch.cuda.get_device_properties(loaded.device).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (args.memory, args.memory))
    windows = random_windows(VOCABULARY, length=args.tokens, count=1, seed=args.seed)
    try:
        if side == "plain":
            plain(loaded, windows)
        else:
            ours(loaded, windows)
    except (RuntimeError, MemoryError) as error:  # torch's allocator on a CPU raises a bare RuntimeError
        if "memory" not in str(error):
            raise
        return None
    if on_cuda:
        return torch.cuda.max_memory_allocated(loaded.device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_all(sizes: Sizes, *, seed: int, threads: int, device: str) -> list[Figure]:
    """Every figure; reach first, because a child process is born with the peak of its parent."""
    reached = reach(sizes, seed=seed, threads=threads, device=device)
    tiny = load_model(TINY, LoadOptions(device=device))
    text = windows_of(tiny, read_sources(["stdlib"], share="unseen"), sizes.length, sizes.windows, seed)
    large = random_llama(vocabulary=VOCABULARY, hidden=sizes.hidden, layers=sizes.layers, seed=seed, device=device)
    random = random_windows(VOCABULARY, length=sizes.length, count=sizes.random_windows, seed=seed)
    return [agreement(text), throughput(tiny, text, sizes.blocks), throughput(large, random, sizes.blocks), reached]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--side", choices=["plain", "ours"], help=argparse.SUPPRESS)  # a process of `reach`
    for name in ("tokens", "hidden", "layers", "memory"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"peak": measure_one(args.side, args)}))
        return 0
    sizes = QUICK if args.quick else Sizes()
    return run_benchmark(
        "measures",
        args,
        asdict(sizes),
        lambda: measure_all(sizes, seed=args.seed, threads=args.threads, device=args.device),
    )


if __name__ == "__main__":
    sys.exit(main())
