"""Candidates a second of two Ray workers over those of one, each with one thread.

    python benchmarks/workers.py           # two minutes on 2 quiet cores

The same candidates go through one worker and through two in turn, block by block, so that a machine whose speed
changes favours neither. Models are loaded, and each worker has done a candidate, before the first block.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from common import RESULTS, Figure, machine, print_table, spread, timed, today, versions, write_results
from longrope.checkpoint import TINY, LoadOptions
from longrope.documents import read_sources
from longrope.model import load_model
from longrope.search.objective import Evaluator
from longrope.search.space import LongRope
from longrope.search.tasks import Task
from longrope.windows import windows_of
from longrope.workers import open_workers

RATIO = 8
LEAST = 1.6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=16, help="of a block, for each side")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    args = parser.parse_args()
    loaded = load_model(TINY, LoadOptions(device="cpu", threads=1))
    windows = windows_of(loaded, read_sources(["stdlib"], share="search"), RATIO * 256, None, args.seed)
    space, rng = LongRope(loaded.rope.shape.pairs, RATIO), np.random.default_rng(args.seed)
    yarn = loaded.baseline("yarn+su", RATIO * 256)
    drawn = (
        Task(yarn.with_values(rescale=tuple(space.mutate(rng, yarn.vector, 0.3))), tuple(range(len(windows))))
        for _ in itertools.count()
    )
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for block in range(args.blocks + 1):  # the first loads the models, and is not counted
        tasks = list(itertools.islice(drawn, args.candidates))
        for count in (1, 2) if block % 2 else (2, 1):
            with open_workers(str(count), loaded, partial(Evaluator, windows=windows)) as workers:
                list(workers.run(tasks[:count]))
                took = timed(lambda tasks=tasks, workers=workers: list(workers.run(tasks)))  # type: ignore[misc]
            if block:
                seconds[count].append(took)
    ratios = np.array(seconds[1]) / np.array(seconds[2])
    figure = Figure(
        "seconds of two Ray workers / of one, the same candidates",
        on=f"tiny; {args.candidates} candidates of {len(windows)} windows of {RATIO * 256} tokens",
        value=float(np.median(1 / ratios)),
        limit=1 / LEAST,
        unit="times",
        details={
            "ratios": spread(1 / ratios),
            "candidates_a_second": {n: args.candidates / float(np.median(seconds[n])) for n in seconds},
        },
    )
    print_table("workers", [figure])
    Console(stderr=True).print(f"two workers do {1 / figure.value:.2f} times the candidates a second of one")
    about = {"benchmark": "workers", "date": today(), "seed": args.seed, "threads": 1, "machine": machine()}
    write_results(args.out / "workers.json", {**about, "versions": versions(), "figures": [figure.to_dict()]})
    return 0 if figure.ok else 1


if __name__ == "__main__":
    sys.exit(main())
