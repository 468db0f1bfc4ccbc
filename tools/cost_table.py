"""Write the table of docs/cost-model.md: four published models to three lengths on five machines, all of it computed.

A test holds the page to what this prints. published.json has the models' shapes, as their configurations state them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from longrope.checkpoint import LoadOptions
from longrope.extension.costs import costs
from longrope.extension.run import plan_for
from longrope.lengths import format_length, parse_length
from longrope.model import LoadedModel
from longrope.planning.machines import machine_of
from longrope.planning.shape import ModelShape
from longrope.planning.stages import Settings, StageCost, stage_costs
from longrope.planning.subject import shape_of, subject

MODELS = Path(__file__).with_name("published.json")
PAGE = Path(__file__).parents[1] / "docs" / "cost-model.md"
LENGTHS = ("128k", "256k", "2048k")
MACHINES = ("1xH100-80GB", "8xH100-80GB", "8xH200-141GB", "64xH100-80GB")
BEGIN, END = "<!-- tools/cost_table.py -->\n", "<!-- end -->\n"


def models() -> dict[str, dict[str, Any]]:
    """Configurations by name."""
    read: dict[str, dict[str, Any]] = json.loads(MODELS.read_text())
    return read


@cache
def built(name: str) -> tuple[LoadedModel, ModelShape]:
    """A model without weights, and its shape."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(models()[name]))
        loaded = subject(str(path), LoadOptions(device="cpu"))
    return loaded, shape_of(loaded.model)


def stages_of(name: str, length: int) -> Iterator[tuple[str, list[StageCost]]]:
    """(machine, its stages) of one model to one length, with the stages that the ratio asks for."""
    loaded, shape = built(name)
    work = costs(loaded, plan_for(loaded.rope.original_length, length, None))
    for machine in MACHINES:
        yield machine, stage_costs(shape, work, machine_of(machine), Settings())


def cell(stages: list[StageCost], kind: str) -> str:
    """`hours (GB a device)` of the stages of one kind, or what keeps them from fitting."""
    found = [each for each in stages if f"-{kind}-" in each.stage or each.stage.startswith(f"{kind}-")]
    if not found:
        return "none"
    worst = max(found, key=lambda each: each.peak)
    if all(each.fits for each in found):
        return f"{_hours(sum(each.hours or 0.0 for each in found))} ({worst.peak / 1e9:.0f})"
    return f"no ({next(each for each in found if not each.fits).peak / 1e9:.0f})"


def _hours(hours: float) -> str:
    """Hours, or minutes below one."""
    if hours < 1:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:,.1f} h" if hours < 10 else f"{hours:,.0f} h"


def row(name: str, length: int, machine: str, stages: list[StageCost]) -> str:
    """One line of the table."""
    cells = [cell(stages, kind) for kind in ("search", "finetune", "second", "recovery", "prompt")]
    where = f"{machine}{', computed only' if machine.startswith('64x') else ''}"
    return f"| {name} | {format_length(length)} | {where} | {' | '.join(cells)} |"


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| model | to | on | search | fine-tune | second | recovery | one prompt |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in models():
        for length in map(parse_length, LENGTHS):
            for machine, stages in stages_of(name, length):
                lines.append(row(name, length, machine, stages))
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page's text with the table as it is now."""
    return re.sub(f"(?s){BEGIN}.*{END}", lambda _: BEGIN + "\n" + table() + "\n" + END, text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    print(f"wrote {PAGE.name}")
