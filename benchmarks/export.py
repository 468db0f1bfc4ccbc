"""What an export takes: memory and time of a checkpoint of a gigabyte, beside copying it.

    python benchmarks/export.py            # all figures, about five minutes and 6 GiB of disk
    python benchmarks/export.py --quick    # only that it runs: its figures mean nothing

docs/benchmarks.md says what is measured and how. Ends with status 1 when a figure misses its limit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import Figure, arguments, run_benchmark, spread, timed
from longrope.baselines import RopeShape, baseline, su_attention_factor
from longrope.checkpoint import TINY, model_source
from longrope.factors import FactorTable, unscaled

RUN = """
import json, os, sys, time
import psutil, torch
import longrope, longrope.export.run
from longrope.factors import FactorTable
sys.path.append(sys.argv[5])
from memory import highest
before = psutil.Process().memory_info().rss
start = time.perf_counter()
longrope.export(sys.argv[1], FactorTable.load(sys.argv[2]), sys.argv[3], engine=sys.argv[4], window="long")
os.sync()
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "before_bytes": before, "peak_bytes": highest(torch.device("cpu"))}))
"""


@dataclass(frozen=True)
class Sizes:
    """The checkpoint: bf16 weights in shards. runs: of each engine."""

    hidden: int = 2048
    layers: int = 8
    vocabulary: int = 32_000
    shard: str = "512MB"
    runs: int = 5


QUICK = Sizes(hidden=128, layers=2, vocabulary=259, shard="1MB", runs=1)


def checkpoint(folder: Path, sizes: Sizes, seed: int) -> FactorTable:
    """A random Llama with tiny's tokenizer, saved in shards, and a table for it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.hidden * 11 // 4,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.hidden // 64, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, dtype="bfloat16",
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(folder, max_shard_size=sizes.shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(model_source(TINY)) / name, folder / name)
    shape = RopeShape(10000.0, 64, 4096)
    factor = su_attention_factor(8, 4096)
    rows = [row.with_values(attention_factor=factor) for row in (unscaled(32, 4096), baseline("yarn", shape, 32768))]
    return FactorTable(10000.0, 64, 4096, tuple(rows))


def exported(folder: Path, table: Path, out: Path, engine: str) -> dict[str, Any]:
    """Seconds and memory of an export, in a process of its own."""
    command = [sys.executable, "-c", RUN, str(folder), str(table), str(out), engine, str(Path(__file__).parent)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def copied(folder: Path, out: Path) -> float:
    """Seconds of copying a folder, on the disk when it ends."""

    def copy() -> None:
        shutil.copytree(folder, out)
        os.sync()

    seconds = timed(copy)
    shutil.rmtree(out)
    return seconds


def measure_all(sizes: Sizes, seed: int) -> list[Figure]:
    """All figures."""
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        ground = Path(temporary)
        table = checkpoint(ground / "model", sizes, seed)
        table.save(ground / "factors.json")
        shards = [path.stat().st_size for path in (ground / "model").glob("*.safetensors")]
        on = f"{sum(shards) / 1e9:.2f} GB in {len(shards)} shards"
        copied(ground / "model", ground / "copy")  # into the file system's cache
        for engine in ("vllm", "gguf"):
            told, bare = [], []
            for _ in range(sizes.runs):
                bare.append(copied(ground / "model", ground / "copy"))
                told.append(exported(ground / "model", ground / "factors.json", ground / "out", engine))
            seconds = [one["seconds"] for one in told]
            memory = max(one["peak_bytes"] - one["before_bytes"] for one in told)
            ratios = np.array(seconds) / np.array(bare)
            details = {"ratios": spread(ratios), "seconds": seconds, "copying": bare, "bytes": memory, "shards": shards}
            # What is converted is reported; its limits only say that something is broken.
            memory_limit, time_limit = (1.1, 1.2) if engine == "vllm" else (2.0, 60.0)
            figures.append(
                Figure(
                    "memory of an export / largest shard",
                    f"{engine}, {on}",
                    memory / max(shards),
                    memory_limit,
                    "",
                    details,
                )
            )
            ratio = float(np.median(ratios))
            figures.append(Figure("time of an export / copying it", f"{engine}, {on}", ratio, time_limit, "", details))
    return figures


def main() -> int:
    args = arguments(__doc__).parse_args()
    sizes = QUICK if args.quick else Sizes()
    return run_benchmark("export", args, asdict(sizes), lambda: measure_all(sizes, args.seed))


if __name__ == "__main__":
    sys.exit(main())
