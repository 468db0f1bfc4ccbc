"""What a candidate evaluation costs beside the bare model: time, memory, and the small waits around it.

    python benchmarks/evaluation.py            # all figures, a few minutes on 2 quiet cores, 12 GiB of memory
    python benchmarks/evaluation.py --quick    # only that it runs: its figures mean nothing

docs/benchmarks.md says what is measured and how. Ends with status 1 when a figure misses its limit.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import (
    Figure,
    arguments,
    llama_name,
    memory_of,
    paired,
    random_llama,
    random_windows,
    run_benchmark,
    spread,
    timed,
)
from longrope.baselines import baseline
from longrope.checkpoint import TINY, LoadOptions
from longrope.documents import read_sources
from longrope.factors import RopeFactors, unscaled
from longrope.model import LoadedModel, load_model
from longrope.search.objective import Evaluator
from longrope.search.space import LongRope
from longrope.search.tasks import Task
from longrope.windows import Window, windows_of

VOCABULARY = 32_000
RATIO = 8  # of the candidates, an extension as in the demonstration


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    length: int = 2048
    windows: int = 8
    random_windows: int = 4
    blocks: int = 11
    hidden: int = 512
    layers: int = 4
    memory_tokens: int = 32 * 1024
    memory_hidden: int = 256
    memory_layers: int = 2
    installs: int = 2000
    helps: int = 15


QUICK = Sizes(
    length=256,
    windows=2,
    random_windows=2,
    blocks=1,
    hidden=64,
    layers=1,
    memory_tokens=512,
    memory_hidden=64,
    installs=20,
    helps=1,
)


def candidates(loaded: LoadedModel, seed: int) -> Iterator[RopeFactors]:
    """Ever new mutants of YaRN, as a search draws them; all have start tokens, which cost a little more."""
    rng = np.random.default_rng(seed)
    shape = loaded.rope.shape
    space = LongRope(pairs=shape.pairs, ratio=RATIO)
    start = baseline("yarn", shape, RATIO * shape.original_length)
    while True:
        yield start.with_values(rescale=tuple(space.mutate(rng, start.vector, 0.3)), start_tokens=16)


def whole(factors: RopeFactors, windows: Sequence[Window]) -> Task:
    """A candidate evaluation: factors on all windows."""
    return Task(factors, windows=tuple(range(len(windows))))


def bare_evaluation(loaded: LoadedModel, windows: Sequence[Window]) -> float:
    """Summed loss in nats by the model as transformers has it and one cross-entropy over all logits of a batch."""
    ids = torch.from_numpy(np.stack([window.ids for window in windows])).to(loaded.device)
    total: Tensor = torch.zeros((), dtype=torch.float64, device=loaded.device)
    with torch.inference_mode(), loaded.autocast():
        for batch in torch.split(ids, max(1, loaded.batch_tokens // ids.shape[1])):
            logits = loaded.model(input_ids=batch, use_cache=False).logits
            targets = torch.nn.functional.pad(batch[:, 1:], (0, 1), value=-100)  # the last token has no target
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return float(total)


def check_same_work(loaded: LoadedModel, windows: Sequence[Window]) -> None:
    """The two sides must give the same loss, else their times compare nothing."""
    with Evaluator(loaded, windows) as evaluate:
        ours = sum(evaluate(whole(unscaled(loaded.rope.shape.pairs, len(windows[0].ids)), windows)).losses)
    bare = bare_evaluation(loaded, windows)
    assert abs(ours - bare) < 1e-3 * bare, f"ours {ours}, bare {bare} nats: not the same work"


def evaluation_cost(loaded: LoadedModel, windows: Sequence[Window], blocks: int, seed: int) -> Figure:
    """Time of a candidate evaluation over that of the bare forward pass and cross-entropy."""
    check_same_work(loaded, windows)
    drawn = candidates(loaded, seed)

    def ours() -> float:
        task = whole(next(drawn), windows)
        with Evaluator(loaded, windows) as evaluate:  # the bare side has the model without a patch
            return timed(lambda: evaluate(task))

    measured = paired(ours, lambda: timed(lambda: bare_evaluation(loaded, windows)), blocks)
    return Figure(
        "time of a candidate evaluation / bare forward and cross-entropy",
        on=f"{loaded.name}; {len(windows)} windows of {len(windows[0].ids)} tokens",
        value=float(np.median(measured.ratios)),
        limit=1.05,
        unit="times",
        details=measured.details(),
    )


def window_memory(sizes: Sizes, *, seed: int, threads: int, device: str) -> Figure:
    """Peak memory of evaluating one long window over that of model(ids, labels=ids)."""
    used = {side: _memory_of(side, sizes, seed, threads, device) for side in ("ours", "labels")}
    model = llama_name(VOCABULARY, sizes.memory_hidden, sizes.memory_layers)
    return Figure(
        "peak memory of a candidate evaluation / model(ids, labels=ids)",
        on=f"{model}; a window of {sizes.memory_tokens} tokens",
        value=used["ours"]["call_bytes"] / used["labels"]["call_bytes"],
        limit=0.25,
        unit="times",
        details=used,
    )


def gradient_memory(sizes: Sizes, *, seed: int, threads: int, device: str) -> Figure:
    """Peak memory of a gradient step on one long window over that of evaluating it."""
    used = {side: _memory_of(side, sizes, seed, threads, device) for side in ("gradient", "ours", "kept")}
    model = llama_name(VOCABULARY, sizes.memory_hidden, sizes.memory_layers)
    return Figure(
        "peak memory of a gradient step / candidate evaluation",
        on=f"{model}; a window of {sizes.memory_tokens} tokens",
        value=used["gradient"]["call_bytes"] / used["ours"]["call_bytes"],
        limit=2.5,
        unit="times",
        details=used,
    )


def _memory_of(side: str, sizes: Sizes, seed: int, threads: int, device: str) -> dict[str, int]:
    size = {"vocabulary": VOCABULARY, "hidden": sizes.memory_hidden, "layers": sizes.memory_layers}
    return memory_of(side, tokens=sizes.memory_tokens, **size, seed=seed, threads=threads, device=device)


def install_time(loaded: LoadedModel, installs: int, seed: int) -> Figure:
    """Time of changing from one candidate to the next."""
    drawn = candidates(loaded, seed)
    with loaded.patch() as patch:
        patch.install(next(drawn))
        seconds = []
        for _ in range(installs):
            factors = next(drawn)
            seconds.append(timed(lambda factors=factors: patch.install(factors)))  # type: ignore[misc]
    milliseconds = spread(1000 * np.array(seconds))
    return Figure(
        "time of changing candidates (Patch.install)",
        on=loaded.name,
        value=milliseconds["median"],
        limit=1.0,
        unit="ms",
        details={"installs": installs, "milliseconds": milliseconds},
    )


def longrope_script() -> str:
    """Where pip put the command `longrope`."""
    return str(Path(sysconfig.get_path("scripts")) / "longrope")


def help_time(starts: int) -> Figure:
    """Time of the whole process `longrope --help`."""
    command = [longrope_script(), "--help"]
    seconds = [timed(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(starts + 1)][1:]
    return Figure(
        "time of longrope --help",
        on="the whole process, from its start to its end",
        value=float(np.median(seconds)),
        limit=0.5,
        unit="s",
        details={"starts": starts, "seconds": spread(seconds)},
    )


def help_imports() -> Figure:
    """How many modules of torch `longrope --help` imports."""
    command = [sys.executable, "-X", "importtime", longrope_script(), "--help"]
    trace = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    imported = [line.rpartition("|")[2].strip() for line in trace.splitlines()]
    assert "longrope.cli" in imported, "the trace does not show the imports of longrope"
    of_torch = sum(name.partition(".")[0] == "torch" for name in imported)
    return Figure("modules of torch that longrope --help imports", on="the same", value=of_torch, limit=0, unit="")


def measure_all(sizes: Sizes, *, seed: int, threads: int, device: str) -> list[Figure]:
    """Every figure; memory first, because a child process is born with the peak of its parent."""
    memory = window_memory(sizes, seed=seed, threads=threads, device=device)
    of_gradient = gradient_memory(sizes, seed=seed, threads=threads, device=device)
    tiny = load_model(TINY, LoadOptions(device=device))
    large = random_llama(vocabulary=VOCABULARY, hidden=sizes.hidden, layers=sizes.layers, seed=seed, device=device)
    text = windows_of(tiny, read_sources(["stdlib"], share="search"), sizes.length, sizes.windows, seed)
    random = random_windows(VOCABULARY, length=sizes.length, count=sizes.random_windows, seed=seed)
    return [
        evaluation_cost(tiny, text, sizes.blocks, seed),
        evaluation_cost(large, random, sizes.blocks, seed),
        memory,
        of_gradient,
        install_time(tiny, sizes.installs, seed),
        help_time(sizes.helps),
        help_imports(),
    ]


def main() -> int:
    args = arguments(__doc__).parse_args()
    sizes = QUICK if args.quick else Sizes()
    return run_benchmark(
        "evaluation",
        args,
        asdict(sizes),
        lambda: measure_all(sizes, seed=args.seed, threads=args.threads, device=args.device),
    )


if __name__ == "__main__":
    sys.exit(main())
