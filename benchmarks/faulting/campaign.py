"""The parts of the campaign in order, its table, and its JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import Figure, machine, today, versions, write_results
from faulting import damage, disks, kills, signals, workers, writes
from faulting.child import import_everything
from faulting.ground import Undisturbed, undisturbed
from faulting.pool import run_cases
from faulting.shim import is_loaded
from faulting.tally import LOST, TRACEBACK, WRONG, Case, Tally, summed

Made = Mapping[str, Undisturbed]
_KILLS = {"search evolution": 24, "search hybrid": 36, "finetune full": 36, "finetune lora": 16, "extend": 48}
_KILLS |= {"evaluate perplexity": 20, "evaluate passkey": 16, "compare": 16, "export transformers": 20}
_KILLS |= {"export into a folder": 16, "export gguf": 12, "factors --out": 8, "doctor --fix": 12, "report": 8}


def _kills(made: Made, args: argparse.Namespace) -> list[Case]:
    wanted = {name: 4 if args.quick else number for name, number in _KILLS.items() if name in made}
    return kills.cases(made, wanted, args.seed)


def _writes(made: Made, args: argparse.Namespace) -> list[Case]:
    every = args.every or (12 if args.quick else 1)
    return [*writes.cases(made, every), *disks.cases(made)[::every]]


def _damage(made: Made, args: argparse.Namespace) -> list[Case]:
    every = args.every or (10 if args.quick else 1)
    return damage.cases(made, args.seed, flips=1 if args.quick else 2, every=every)


def _signals(made: Made, args: argparse.Namespace) -> list[Case]:
    found = signals.cases(made, args.seed, times=1 if args.quick else 3)
    found += [] if args.quick else signals.long_cases(made)
    return [*found, *signals.second_cases(made), *signals.clock_cases(made, args.seed)]


def _workers(made: Made, args: argparse.Namespace) -> list[Case]:
    return workers.cases(made, args.seed, *((1, 1) if args.quick else (4, 2)))


PARTS: dict[str, Callable[[Made, argparse.Namespace], list[Case]]] = {
    "kills": _kills,
    "writes": _writes,
    "damage": _damage,
    "signals": _signals,
    "workers": _workers,
}
_ONE_AT_A_TIME = ("workers",)
_COLUMNS = (
    "kills",
    "crashes",
    "disk faults",
    "real disks",
    "damaged files",
    "refused",
    "repaired or not needed",
    "taken as it is",
    "signals",
    "second processes",
    "clocks",
    "workers lost",
    "nodes lost",
)


def campaign(args: argparse.Namespace, work: Path) -> int:
    """Run what was asked for; the exit code, 1 when anything was lost, was told by a traceback, or ended wrong.

    Each part is written when it ends, beside the other parts of the same campaign that earlier calls have made.
    """
    console = Console(stderr=True, highlight=False)
    if not is_loaded():
        console.print("no C compiler here: nothing is tried at single writes, and no run is left on its way")
    import_everything()
    made = undisturbed(args.commands.split(","), work)
    made = {name: each for name, each in made.items() if name in args.commands.split(",")}
    name = "faults-quick" if args.quick else "faults"
    path = args.out / f"{name}.json"
    about: dict[str, Any] = {"benchmark": name, "seed": args.seed, "commands": list(made)}
    parts = _made_before(path, about)
    for part in args.parts.split(","):
        start = time.monotonic()
        tallies = _part(part, made, args, work, console)
        seconds = round(time.monotonic() - start, 1)
        console.print(f"{part}: {seconds:.0f} s")
        parts[part] = {"date": today(), "every": args.every, "seconds": seconds}
        parts[part] |= {"machine": machine(), "versions": versions()}
        parts[part] |= {"tallies": {command: tally.to_dict() for command, tally in tallies.items()}}
        ordered = {each: parts[each] for each in PARTS if each in parts}
        figures = [_figure(kind, _whole(ordered), f"{len(made)} commands") for kind in (LOST, TRACEBACK, WRONG)]
        write_results(path, about | {"parts": ordered, "figures": [figure.to_dict() for figure in figures]})
    console.print(_table(_by_command(parts)))
    return 1 if _whole(parts).troubles else 0


def _made_before(path: Path, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Parts of the same campaign that are recorded; none of another one."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return found["parts"] if all(found.get(key) == value for key, value in about.items()) else {}


def _part(name: str, made: Made, args: argparse.Namespace, work: Path, console: Console) -> dict[str, Tally]:
    """What came of the cases of a part, by command; troubles are shown as they come."""
    tallies: dict[str, Tally] = {each: Tally() for each in made}
    cases = PARTS[name](made, args)
    console.print(f"{name}: {len(cases)} cases")
    folder, shown = work / name, 0
    folder.mkdir()
    for case, tally in run_cases(cases, folder, 1 if name in _ONE_AT_A_TIME else args.processes):
        tallies.setdefault(case.command, Tally()).add(tally)
        for kind, what in tally.troubles:
            shown += 1
            if shown <= args.keep_going:
                console.print(f"{kind}: {case.command}, {case.what}: {what}", markup=False, soft_wrap=True)
    return tallies


def _by_command(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Tally]:
    """What came of all parts, by command."""
    found: dict[str, Tally] = {}
    for part in parts.values():
        for command, tally in part["tallies"].items():
            found.setdefault(command, Tally()).add(Tally.from_dict(tally))
    return found


def _whole(parts: Mapping[str, Mapping[str, Any]]) -> Tally:
    return summed(_by_command(parts).values())


def _figure(kind: str, whole: Tally, on: str) -> Figure:
    number = sum(each == kind for each, _ in whole.troubles)
    names = {LOST: "results lost", TRACEBACK: "tracebacks and unclear ends", WRONG: "wrong results"}
    return Figure(names[kind], on, number, 0, "", dict(whole.counts))


def _table(tallies: Mapping[str, Tally]) -> Table:
    table = Table(title="faults", title_justify="left")
    table.add_column("command")
    whole = summed(tallies.values())
    columns = [name for name in _COLUMNS if whole.counts[name]]
    for name in (*columns, LOST, TRACEBACK, WRONG):
        table.add_column(name, justify="right")
    for name, tally in [*tallies.items(), ("all", whole)]:
        counts = [str(tally.counts[column] or "-") for column in columns]
        table.add_row(name, *counts, *(_number(tally, kind) for kind in (LOST, TRACEBACK, WRONG)))
    return table


def _number(tally: Tally, kind: str) -> str:
    number = sum(each == kind for each, _ in tally.troubles)
    return f"[bold]{number}[/bold]" if number else "0"
