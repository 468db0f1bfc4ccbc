"""What benchmarks share: figures with limits, paired timing, the machine, the table and the JSON they write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from longrope import __version__
from longrope.checkpoint import TINY, LoadOptions, load_tokenizer
from longrope.configs import rope_config, table_from_config
from longrope.files import write_atomically
from longrope.model import LoadedModel
from longrope.windows import Window

Vector = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured number and the limit it must not exceed; `on` says of what, `details` how it came about."""

    figure: str
    on: str
    value: float
    limit: float
    unit: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the value keeps the limit."""
        return self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {
            "figure": self.figure,
            "on": self.on,
            "limit": self.limit,
            "value": self.value,
            "ok": self.ok,
            "unit": self.unit,
            "details": dict(self.details),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Figure:
        """From the JSON."""
        return cls(**{name: value for name, value in data.items() if name != "ok"})


@dataclass(frozen=True)
class Paired:
    """Seconds of two ways of doing the same work, measured in turn: one row a block, (blocks, 2 runs of each)."""

    ours: Vector
    bare: Vector

    @property
    def ratios(self) -> Vector:
        """Ours over bare, one ratio a block (blocks,)."""
        return np.asarray(self.ours.sum(1) / self.bare.sum(1))

    def details(self) -> dict[str, Any]:
        """Spread of the ratios, and the median seconds of one run."""
        return {
            "blocks": len(self.ratios),
            "ratios": spread(self.ratios),
            "seconds_ours": float(np.median(self.ours)),
            "seconds_bare": float(np.median(self.bare)),
        }


def paired(ours: Callable[[], float], bare: Callable[[], float], blocks: int) -> Paired:
    """Time two ways (each call gives its seconds) in blocks of bare, ours, ours, bare, and the other way round in turn.

    Both halves of a block have the same mean time, so that a machine that slows down steadily favours neither. One run
    of each before, not counted, loads what is loaded once.
    """
    bare(), ours()
    seconds: dict[Callable[[], float], list[float]] = {ours: [], bare: []}
    for block in range(blocks):
        outer, inner = (bare, ours) if block % 2 == 0 else (ours, bare)
        for run in (outer, inner, inner, outer):
            seconds[run].append(run())
    return Paired(ours=np.array(seconds[ours]).reshape(-1, 2), bare=np.array(seconds[bare]).reshape(-1, 2))


def timed(run: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, whose result must have left the device when it returns."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: Sequence[float] | Vector) -> dict[str, float]:
    """Lowest, quartiles, median and highest of some numbers."""
    names = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")
    return dict(zip(names, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True))


def memory_of(side: str, **options: int | str) -> dict[str, int]:
    """What memory.py measures of a side, in a process of its own."""
    script = str(Path(__file__).with_name("memory.py"))
    command = [sys.executable, script, side, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    used: dict[str, int] = json.loads(done.stdout)
    return used


def random_llama(
    *, vocabulary: int, hidden: int, layers: int, seed: int, device: str, dtype: str = "auto"
) -> LoadedModel:
    """A Llama with random weights and heads of 64 dimensions, as `load_model` would load it; never saved."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    options = LoadOptions(device=device, dtype=dtype).resolved()
    torch.manual_seed(seed)  # transformers draws weights from torch's own generator
    model = cast(Any, LlamaForCausalLM(config)).eval().requires_grad_(False)
    on_cuda = options.placement.startswith("cuda")
    described = config.to_dict()
    return LoadedModel(
        name=llama_name(vocabulary, hidden, layers),
        model=model.to(device=options.placement, dtype=torch.bfloat16 if on_cuda else torch.float32),
        tokenizer=load_tokenizer(TINY),  # never asked
        rope=rope_config(described),
        own=table_from_config(described),
        table=None,
        fingerprint="random",
        options=options,
    )


def llama_name(vocabulary: int, hidden: int, layers: int) -> str:
    """What figures call a random Llama."""
    return f"random Llama, vocabulary {vocabulary:,}, hidden {hidden}, layers {layers}"


def random_windows(vocabulary: int, *, length: int, count: int, seed: int) -> list[Window]:
    """Windows of uniformly random tokens, each as of its own document: what they cost does not depend on the text."""
    ids = np.random.default_rng(seed).integers(vocabulary, size=(count, length))
    return [Window(f"random {index}", f"{index}", 0, row) for index, row in enumerate(ids)]


def machine() -> dict[str, Any]:
    """What figures depend on and what anyone may know: no host name, no paths."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(psutil.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Versions of what is measured and of what it runs on."""
    return {
        "python": platform.python_version(),
        "longrope": __version__,  # also of a checkout that is not installed
        **{name: version(name) for name in ("torch", "transformers")},
    }


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """Write a benchmark's JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def today() -> str:
    """The date, UTC."""
    return datetime.now(UTC).date().isoformat()


def print_table(title: str, figures: Sequence[Figure]) -> None:
    """The figures and whether they keep their limits, on stderr."""
    table = Table(title=title, title_justify="left")
    for name in ("figure", "on"):
        table.add_column(name, overflow="fold")
    for name in ("limit", "value", "quartiles", ""):
        table.add_column(name, justify="right")
    for figure in figures:
        verdict = "ok" if figure.ok else "[bold]missed[/bold]"
        value, limit = (f"{number:.3g} {figure.unit}".strip() for number in (figure.value, figure.limit))
        table.add_row(figure.figure, figure.on, limit, value, _quartiles(figure), verdict)
    Console(stderr=True, highlight=False).print(table)


def _quartiles(figure: Figure) -> str:
    for numbers in figure.details.values():
        if isinstance(numbers, Mapping) and "lower_quartile" in numbers:
            return f"{numbers['lower_quartile']:.3g} .. {numbers['upper_quartile']:.3g}"
    return ""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that benchmarks with limits share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, once: a check of the script")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu or cuda")
    return parser


def run_benchmark(
    name: str, args: argparse.Namespace, sizes: Mapping[str, Any], measure: Callable[[], Sequence[Figure]]
) -> int:
    """Measure, print the table and write the JSON; the exit code, 1 when a figure misses its limit."""
    torch.set_num_threads(args.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    name = f"{name}-quick" if args.quick else name
    about: dict[str, Any] = {"benchmark": name, "date": today(), "seed": args.seed, "threads": args.threads}
    about |= {"device": LoadOptions(device=args.device).placement, "machine": machine(), "versions": versions()}
    figures = measure()
    print_table(name, figures)
    document = {**about, "sizes": dict(sizes), "figures": [figure.to_dict() for figure in figures]}
    write_results(args.out / f"{name}.json", document)
    return 0 if args.quick or all(figure.ok for figure in figures) else 1
