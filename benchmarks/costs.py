"""The cost model of `longrope plan` against measured runs: peak memory and time of single windows.

    python benchmarks/costs.py            # some eight minutes on 2 quiet cores, 4 GiB of memory
    python benchmarks/costs.py --quick    # only that it runs: its figures mean nothing

Every point is a process of its own (costs_point.py). docs/cost-model.md says what is compared with what. Ends with
status 1 when a prediction is off by more than its limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import Figure, arguments, run_benchmark
from costs_point import Point

MEMORY, TIME = 0.25, 0.35  # limits of |predicted - measured| / measured
# Blocks from 1 MiB on go back to the system when they are freed, so that a resident set is what tensors take. By itself
# glibc keeps blocks of up to 32 MiB, which the tensors of these small models are.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}

NARROW: Mapping[str, Any] = {"hidden": 256, "layers": 6, "heads": 4, "kv_heads": 4, "vocabulary": 256}
GROUPED: Mapping[str, Any] = {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 2, "vocabulary": 32_000}
WIDE: Mapping[str, Any] = {"hidden": 1024, "layers": 4, "heads": 16, "kv_heads": 4, "vocabulary": 32_000}
POINTS = [
    Point("forward", 32_768, **NARROW),
    Point("forward", 8_192, **GROUPED),
    Point("forward", 16_384, **WIDE),
    Point("gradient", 4_096, **NARROW),
    Point("gradient", 8_192, **NARROW, again=True),
    Point("gradient", 4_096, **GROUPED, again=True),
    Point("gradient", 4_096, **WIDE),
    Point("train", 4_096, **NARROW),
    Point("train", 2_048, **GROUPED),
    Point("train", 4_096, **WIDE, again=True),
    Point("lora", 4_096, **NARROW, again=True),
    Point("lora", 2_048, **GROUPED),
    Point("lora", 4_096, **WIDE, again=True),
    Point("prefill", 32_768, **NARROW),
    Point("prefill", 16_384, **GROUPED),
    Point("prefill", 8_192, **WIDE),
]
QUICK = [Point(kind, 256, 64, 1, 1, 1, 256) for kind in ("forward", "gradient", "train", "lora", "prefill")]


def measured(point: Point) -> dict[str, Any]:
    """What costs_point.py prints of a point."""
    script = str(Path(__file__).with_name("costs_point.py"))
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(point.threads)}
    command = [sys.executable, script, json.dumps(asdict(point))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def figures(point: Point) -> list[Figure]:
    """How far the predictions of a point are off."""
    told = measured(point)
    size = f"hidden {point.hidden}, layers {point.layers}, heads {point.heads}/{point.kv_heads}"
    twice = ", layers computed twice" if point.again else ""
    on = f"{point.kind}{twice}; {point.tokens:,} tokens; {size}, vocabulary {point.vocabulary:,}"
    found = []
    for name, limit, key in (("memory", MEMORY, "bytes"), ("time", TIME, "seconds")):
        was = told["peak_bytes" if key == "bytes" else key]
        predicted = told[f"predicted_{key}"]
        details = {"predicted": predicted, "measured": was, "ratio": predicted / was}
        details |= {"parts": told["parts"]} if key == "bytes" else {"rates": told["rates"]}
        found.append(Figure(f"{name}, predicted beside measured", on, abs(predicted / was - 1), limit, "", details))
    return found


def measure_all(points: Sequence[Point], *, seed: int, threads: int) -> list[Figure]:
    """Both figures of every point."""
    return [each for point in points for each in figures(replace(point, seed=seed, threads=threads))]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="KIND", help="points of one kind, such as prefill")
    args = parser.parse_args()
    points = [each for each in (QUICK if args.quick else POINTS) if args.only in (None, each.kind)]
    sizes = {"points": len(points)}
    return run_benchmark("costs", args, sizes, lambda: measure_all(points, seed=args.seed, threads=args.threads))


if __name__ == "__main__":
    sys.exit(main())
