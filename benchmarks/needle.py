"""Passkey accuracy at 8x of the factors that each objective finds: needle against perplexity.

    python benchmarks/needle.py            # three searches of `tiny`, about ten minutes on one core

The needle's number has five digits here, as the codes that `tiny` was trained to recall; the passkey prompts that judge
are others than the needle's, in wording, filler and keys.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import RESULTS, machine, today, versions, write_results
from longrope.checkpoint import TINY, LoadOptions
from longrope.documents import read_sources
from longrope.evaluate.passkey import passkey
from longrope.evaluate.perplexity import measure
from longrope.factors import RopeFactors, last_row
from longrope.model import load_model
from longrope.search.driver import choose_search_windows, search_windows
from longrope.search.settings import SearchSettings
from longrope.windows import choose_windows

RATIO, UNSEEN = 8, 32
OBJECTIVES: dict[str, dict[str, Any]] = {
    "perplexity": {"objective": "perplexity"},
    "needle, spread": {"objective": "needle", "needle_depth": "spread", "needle_digits": 5},
    "needle, start": {"objective": "needle", "needle_depth": "start", "needle_digits": 5},
}
BASELINES = ("yarn", "yarn+su", "llama3", "llama3+su")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=400, help="passkey prompts of each factors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="where searches can go on from")
    args = parser.parse_args()
    loaded = load_model(TINY, LoadOptions(device="cpu", threads=1))
    torch.set_num_threads(1)
    target = RATIO * loaded.rope.original_length
    documents = read_sources(["stdlib"], share="search")
    unseen = choose_windows(
        read_sources(["stdlib"], share="unseen"), loaded.tokenizer, length=target, count=UNSEEN, seed=0
    )
    rows: dict[str, RopeFactors] = {name: loaded.baseline(name, target) for name in BASELINES}
    for name, chosen in OBJECTIVES.items():
        settings = SearchSettings(to=target, seed=args.seed, **chosen)
        windows = choose_search_windows(loaded, settings, documents)
        out = args.runs / f"objective-{name.replace(', ', '-')}-seed{args.seed}"
        rows[name] = last_row(search_windows(loaded, settings, windows, out=out), target)
    results = []
    with loaded.patch() as patch:
        for name, row in rows.items():
            patch.install(row)
            found = passkey(loaded, target, tries=args.tries, seed=args.seed)
            results.append(
                {
                    "factors": name,
                    "passkey": found.value,
                    "ci": found.ci,
                    "tries": found.tries,
                    "perplexity_unseen": measure(loaded, unseen).value,
                    "rescale": list(row.rescale),
                    "attention_factor": row.attention_factor,
                }
            )
    show(results, target)
    about = {"benchmark": "needle", "date": today(), "seed": args.seed, "threads": 1, "length": target}
    write_results(args.out / "needle.json", {**about, "machine": machine(), "versions": versions(), "results": results})
    return 0


def show(results: list[dict[str, Any]], target: int) -> None:
    table = Table(title=f"passkey accuracy at {target} tokens, tiny", title_justify="left")
    for name in ("factors", "passkey", "95% interval", "perplexity, unseen"):
        table.add_column(name)
    for result in results:
        low, high = result["ci"]
        told = f"{result['passkey']:.3f}", f"{low:.3f} to {high:.3f}", f"{result['perplexity_unseen']:.4f}"
        table.add_row(result["factors"], *told)
    Console(stderr=True, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
