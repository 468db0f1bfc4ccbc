"""Every causal language model class of transformers that can have RoPE, as a small random model, through every command.

    python benchmarks/architectures.py                      # all of them
    python benchmarks/architectures.py --only llama,glm4    # some
    python benchmarks/architectures.py --quick              # only that it runs: two of them

A step works, is refused in one line (exit code 2), or is trouble: a traceback, another message or exit code, a wrong
result, or no end. Results are checked, too: a cached run across boundaries against whole passes, losses and gradients
against the class's own, exports against stock transformers. Two models at a time, each in a process of its own. Ends
with status 1 when there is trouble.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from common import RESULTS, machine, today, versions, write_results

ROOT = Path(__file__).parents[1]
sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "tools")]  # commands and documents are those of the tests

from architectures_small import model_types  # noqa: E402
from architectures_try import NOT_BUILT, REFUSED, TROUBLE, WORKS, try_model  # noqa: E402

_QUICK = ("gpt_neox", "deepseek_v3")
_AT_ONCE = 2
_LOOK = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Found:
    """What became of one model type: its class, and every step as `Tried` is written."""

    model_type: str
    name: str
    steps: list[dict[str, Any]]

    @property
    def outcome(self) -> str:
        """Trouble where any step is; works where the search does, else refused or not built."""
        outcomes = {step["step"]: step["outcome"] for step in self.steps}
        if TROUBLE in outcomes.values():
            return TROUBLE
        return outcomes.get("build") or (WORKS if outcomes.get("search") == WORKS else REFUSED)

    def to_dict(self) -> dict[str, Any]:
        """What the JSON holds."""
        return {"model_type": self.model_type, "class": self.name, "outcome": self.outcome, "steps": self.steps}


def read_found(model_type: str, path: Path, ended: str) -> Found:
    """What a process wrote, and `ended`, why it wrote no more, as trouble of the step that it had begun."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if "step" in line]
    name = next((line["class"] for line in lines if "class" in line), "")
    if ended:
        begun = next((line["begun"] for line in reversed(lines) if "begun" in line), "build")
        steps.append({"step": begun, "outcome": TROUBLE, "said": ended, "seconds": None})
    return Found(model_type, name, steps)


@dataclass
class _Running:
    process: Any
    path: Path
    since: float

    def ended(self, limit: float) -> str | None:
        """None while it runs, else why it ended before its time; empty where it did not."""
        code = self.process.exitcode
        if code is None and time.monotonic() - self.since > limit:
            self.process.kill()
            self.process.join()
            return f"no end after {limit:g} seconds"
        return None if code is None else "" if code == 0 else f"its process ended with {code}"


def try_all(names: Sequence[str], seed: int, limit: float) -> list[Found]:
    """Every model type in a process of its own, so that none takes down others; prints one line each."""
    context, console = multiprocessing.get_context("fork"), Console(stderr=True, highlight=False)
    waiting, running, found = list(names), dict[str, _Running](), list[Found]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                name = waiting.pop(0)
                path = Path(folder, f"{name}.jsonl")
                process = context.Process(target=try_model, args=(name, seed, path))
                process.start()
                running[name] = _Running(process, path, time.monotonic())
            time.sleep(_LOOK)
            for name, each in list(running.items()):
                if (ended := each.ended(limit)) is None:
                    continue
                del running[name]
                found.append(read_found(name, each.path, ended))
                console.print(f"{name}: {found[-1].outcome}", markup=False, soft_wrap=True)
    return sorted(found, key=lambda each: each.model_type)


def _told(found: Found) -> str:
    """What the table says beside the outcome: trouble and refusals, each line once, with the steps that ended in it."""
    kinds = {TROUBLE: [TROUBLE], REFUSED: [REFUSED], NOT_BUILT: [NOT_BUILT], WORKS: [REFUSED]}[found.outcome]
    lines: dict[str, list[str]] = {}
    for step in found.steps:
        if step["outcome"] in kinds:
            lines.setdefault(step["said"], []).append(step["step"])
    return "\n".join(f"{', '.join(steps)}: {said}" for said, steps in lines.items())


def print_found(found: Sequence[Found]) -> None:
    """The table, on stderr."""
    table = Table(title="architectures", title_justify="left")
    for name in ("model type", "class", "outcome", "trouble, or what is refused"):
        table.add_column(name, overflow="fold")
    for each in found:
        table.add_row(each.model_type, each.name, each.outcome, _told(each).replace("[", r"\["))
    console = Console(stderr=True, highlight=False)
    console.print(table)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in _counted(found).items()))


def _counted(found: Sequence[Found]) -> dict[str, int]:
    counts = Counter(each.outcome for each in found)
    return {outcome: counts[outcome] for outcome in (WORKS, REFUSED, TROUBLE, NOT_BUILT)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two classes: a check of the script")
    parser.add_argument("--only", metavar="A,B,..", help="these model types alone")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="for all of one model")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    names = args.only.split(",") if args.only else list(_QUICK) if args.quick else model_types()
    name = "architectures-quick" if args.quick or args.only else "architectures"
    about = {"benchmark": name, "date": today(), "seed": args.seed, "threads": 1}
    about |= {"machine": machine(), "versions": versions()}
    found = try_all(names, args.seed, args.limit)
    print_found(found)
    document = {**about, "counts": _counted(found), "architectures": [each.to_dict() for each in found]}
    write_results(args.out / f"{name}.json", document)
    return 1 if any(each.outcome == TROUBLE for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
