"""Hostile input, many times over: files that are damaged and changed in every place, through the real commands.

    python benchmarks/hostile.py --examples 500    # inputs of each kind
    python benchmarks/hostile.py --quick           # only that it runs: a few of each

Every command must end with 0 or, in one printable line, 2 (doctor also with 1), soon, and a refusal must leave all
files as they were: anything else is a wrong end. A factors file must be taken exactly where a second reading of the
rules takes it. Equal seeds try equal inputs. Ends with status 1 when a figure misses its limit.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from common import Figure, arguments, run_benchmark

ROOT = Path(__file__).parents[1]
sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "tools")]  # the inputs are those of the tests

from commands import Ran, table, write_checkpoint, write_documents  # noqa: E402
from hostility import (  # noqa: E402
    CONFIG_KEYS,
    FACTORS_KEYS,
    PLAN,
    PLAN_KEYS,
    Hostile,
    csv_file,
    damaged,
    document,
    extended,
    is_table,
    toml,
    tried,
)
from longrope.convert import to_csv  # noqa: E402
from report_runs import make_run  # noqa: E402

Tried = tuple[Ran | None, str]
Here = Path()


@dataclass
class Sizes:
    """Inputs of each kind; what is slow gets a tenth."""

    examples: int


@dataclass
class Kind:
    """Inputs of one kind: what they are made by, and the commands that they are given to, with their results."""

    name: str
    inputs: SearchStrategy[Any]
    give: Callable[[Any], Iterator[Tried]]
    slow: bool = False
    rule: Callable[[Any], bool] | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("inputs", "commands", "taken", "refused"), 0))
    wrong: list[str] = field(default_factory=list)
    taken_wrongly: list[str] = field(default_factory=list)

    def try_one(self, case: Any) -> None:
        self.counts["inputs"] += 1
        first: Ran | None = None
        for number, (ran, problem) in enumerate(self.give(case)):
            self.counts["commands"] += 1
            first = ran if number == 0 else first
            if problem:
                self.wrong.append(problem[:300])
            elif ran is not None:
                self.counts["refused" if ran.code == 2 else "taken"] += 1
        if self.rule is not None and first is not None and (first.code == 0) != self.rule(case):
            self.taken_wrongly.append(case.done)

    def figures(self) -> list[Figure]:
        told: dict[str, Any] = {**self.counts, "examples": sorted(set(self.wrong))[:5]}
        found = [Figure("wrong ends", self.name, len(self.wrong), 0, "", told)]
        if self.rule is not None:
            told = {"inputs": self.counts["inputs"], "examples": sorted(set(self.taken_wrongly))[:5]}
            found.append(Figure("taken or refused wrongly", self.name, len(self.taken_wrongly), 0, "", told))
        return found


def _factors(case: Hostile) -> Iterator[Tried]:
    Path("f.json").write_bytes(case.data)
    for more in ((), ("--json",), ("--to", "csv"), ("--to", "transformers"), ("--to", "json", "--out", "out.json")):
        yield tried("factors", "f.json", *more, folder=Here)


def _csv(case: Hostile) -> Iterator[Tried]:
    Path("f.csv").write_bytes(case.data)
    for row in ((), ("--row", "192_small"), ("--row", "small@192")):
        yield tried("factors", "f.csv", "--rope-theta", 500, "--original-length", 48, *row, folder=Here)


def _config(case: Hostile) -> Iterator[Tried]:
    Path("c").mkdir(exist_ok=True)
    Path("c/config.json").write_bytes(case.data)
    yield tried("factors", "c/config.json", folder=Here)
    yield tried("doctor", "c/config.json", "--json", folder=Here, ends=(0, 1, 2))
    shutil.rmtree("fixed", ignore_errors=True)
    yield tried("doctor", "c", "--fix", "fixed", folder=Here, ends=(0, 1, 2))


def _checkpoint(case: Hostile) -> Iterator[Tried]:
    Path("model/config.json").write_bytes(case.data)
    for folder in ("exported", "run"):
        shutil.rmtree(folder, ignore_errors=True)
    yield tried("export", "model", "--factors", "good.json", "--out", "exported", folder=Here)
    search = (
        "search",
        "model",
        "--to",
        192,
        "-d",
        "texts",
        "--windows",
        1,
        "--evaluations",
        1,
        "--device",
        "cpu",
        "-q",
    )
    yield tried(*search, "--out", "run", folder=Here)


def _plan(case: Hostile) -> Iterator[Tried]:
    Path("plan.toml").write_bytes(case.data)
    yield tried("extend", "tiny", "--to", 2048, "-d", "texts", "--stages", "plan.toml", "--dry-run", folder=Here)


def _document(case: tuple[str, Hostile]) -> Iterator[Tried]:
    path = Path(f"d{case[0]}")
    path.write_bytes(case[1].data)
    yield tried("documents", path, folder=Here)


def _run(name: str) -> Callable[[Hostile], Iterator[Tried]]:
    def give(case: Hostile) -> Iterator[Tried]:
        shutil.rmtree("shown", ignore_errors=True)
        shutil.copytree("made", "shown")
        Path("shown", name).write_bytes(case.data.replace(b"\n", b" ") + b"\n")
        for command in (("report", "shown"), ("watch", "shown", "--once")):
            yield tried(*command, folder=Here)

    return give


def kinds() -> list[Kind]:
    """All kinds of input. What they are given to is in the current folder."""
    write_checkpoint(Path("model"))
    write_documents(Path("texts"), count=2)
    table().save("good.json")
    made = make_run(Path("made"))
    config, metrics = (json.loads((made / name).read_text()) for name in ("config.json", "metrics.json"))
    line = json.loads((made / "evaluations.jsonl").read_text().splitlines()[0])
    return [
        Kind(
            "factors files", damaged(table().to_dict(), FACTORS_KEYS), _factors, rule=lambda case: is_table(case.data)
        ),
        Kind("CSVs of factors", csv_file(to_csv(table())), _csv),
        Kind("configurations", damaged(extended(), CONFIG_KEYS), _config),
        Kind("plans", toml(PLAN, PLAN_KEYS), _plan, slow=True),
        Kind("documents", document(), _document),
        Kind("config.json of a run", damaged(config, ("stages",)), _run("config.json"), slow=True),
        Kind("metrics.json of a run", damaged(metrics, ("details", "measure")), _run("metrics.json"), slow=True),
        Kind("lines of a run", damaged(line, ("losses", "rescale")), _run("evaluations.jsonl"), slow=True),
        Kind("checkpoints", damaged(extended(), CONFIG_KEYS), _checkpoint, slow=True),
    ]


def campaign(kind: Kind, count: int, seed: int) -> None:
    """Try so many inputs of a kind, and count."""
    checks = list(HealthCheck)
    limits = settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=checks
    )
    hypothesis.seed(seed)(limits(given(kind.inputs)(kind.try_one)))()


def measure(sizes: Sizes, seed: int) -> list[Figure]:
    """The figures of every kind."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # names that files give are never asked for
    figures = []
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for kind in kinds():
            campaign(kind, max(1, sizes.examples // 10) if kind.slow else sizes.examples, seed)
            figures += kind.figures()
    return figures


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--examples", type=int, default=300, metavar="N", help="inputs of each kind")
    args = parser.parse_args()
    sizes = Sizes(5 if args.quick else args.examples)
    return run_benchmark("hostile", args, asdict(sizes), lambda: measure(sizes, args.seed))


if __name__ == "__main__":
    sys.exit(main())
