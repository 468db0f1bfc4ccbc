"""The cells of benchmarks/search.py as a table, its verdicts and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from common import write_results
from longrope.evaluate.paired import Difference, perplexity_difference

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "longrope"  # the same cells give the same file

CellData = Mapping[str, Any]

LIMITS = {"cost": 1 / 20, "race": 0.5, "race value": 1.001}
AIMS = {8: 0.015, 16: 0.02, 32: 0.03}  # below Algorithm 1 and the best baseline on unseen windows, by ratio
NAMES = {
    "evolution": "Algorithm 1",
    "race": "Algorithm 1, raced",
    "hybrid": "hybrid (default)",
    "further-windows": "hybrid, gradients on 64 others",
}


def read_cells(folder: Path) -> list[CellData]:
    """Every cell that is there."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]


def paired_difference(ours: CellData, theirs: CellData, documents: Sequence[str]) -> Difference:
    """Relative difference in perplexity on the same windows, with its paired 95% interval."""
    return perplexity_difference(ours["losses"], theirs["losses"], ours["counts"], documents)


def reached(cell: CellData, value: float) -> float | None:
    """Token-passes, in evaluations, after which a search stood at a value or below for the first time."""
    spent = next((tokens for tokens, best in cell["curve"] if best <= value), None)
    return None if spent is None else spent / cell["evaluation_tokens"]


def value_at(cell: CellData, evaluations: float) -> float:
    """The best value of a search after so many evaluations' worth of token-passes."""
    tokens = evaluations * cell["evaluation_tokens"]
    return min((best for spent, best in cell["curve"] if spent <= tokens), default=math.inf)


def evaluations(cell: CellData) -> float:
    """What a search cost, in evaluations of all search windows."""
    return float(cell["token_passes"] / cell["evaluation_tokens"])


def best_baseline(cell: CellData) -> str:
    """The baseline that is best on the unseen windows: chosen with hindsight, so the hardest to beat."""
    return str(min(cell["unseen"], key=lambda name: cell["unseen"][name]["value"]))


def rows(cells: Sequence[CellData]) -> list[dict[str, Any]]:
    """One line of the table for each search, with its cost and differences."""
    made = []
    for cell in cells:
        if cell["method"] == "baselines":
            continue
        case = [other for other in cells if _case(other) == _case(cell)]
        base = next((other for other in case if other["method"] == "baselines"), None)
        plain = [other for other in case if other["method"] == "evolution"]
        # That of the same seed; where Algorithm 1 ran only once, that one.
        first = next((other for other in plain if other["seed"] == cell["seed"]), plain[0] if plain else None)
        row = {
            "model": cell["model"],
            "ratio": cell["ratio"],
            "method": cell["method"],
            "seed": cell["seed"],
            "evaluations": evaluations(cell),
            "search": cell["search"]["value"],
            "unseen": cell["unseen"]["value"],
        }
        documents = cell["windows"]["unseen"]["documents"]
        if base:
            name = best_baseline(base)
            row["best baseline"] = f"{name} {base['unseen'][name]['value']:.4f}"
            row["against baseline"] = paired_difference(cell["unseen"], base["unseen"][name], documents)
        if first and cell["method"] != "evolution":
            spent = reached(cell, first["search"]["value"])
            row["reached"] = spent
            row["share"] = None if spent is None else spent / evaluations(first)
            row["against algorithm 1"] = paired_difference(cell["unseen"], first["unseen"], documents)
        made.append(row)
    return made


def _case(cell: CellData) -> tuple[str, int]:
    return cell["model"], cell["ratio"]


def verdicts(cells: Sequence[CellData]) -> list[tuple[str, str, bool]]:
    """(what must hold, what was found, whether it does) of every case whose cells are there."""
    found = []
    for row in rows(cells):
        if row["method"] != "hybrid":
            continue
        on = f"{row['model']} {row['ratio']}x, seed {row['seed']}"
        if "against algorithm 1" in row:
            share = row["share"]
            told = "never" if share is None else f"{row['reached']:.1f} evaluations, 1/{1 / share:.0f}"
            within = share is not None and share <= LIMITS["cost"]
            found.append((f"{on}: Algorithm 1's end value with at most 1/20 of its token-passes", told, within))
            gap = row["against algorithm 1"]
            found.append((f"{on}: below Algorithm 1 on unseen documents", str(gap), gap.high < 0))
        if "against baseline" in row:
            gap = row["against baseline"]
            found.append((f"{on}: below the best baseline on unseen documents", str(gap), gap.high < 0))
    return found + race_verdict(cells)


def aims(cells: Sequence[CellData]) -> list[tuple[str, str, bool]]:
    """What is aimed at beyond the verdicts, as they are: the mean over seeds against Algorithm 1's and the baseline."""
    found = []
    for model, ratio in sorted({_case(cell) for cell in cells}):
        of_case = [row for row in rows(cells) if (row["model"], row["ratio"]) == (model, ratio)]
        ours = [row for row in of_case if row["method"] == "hybrid"]
        if ratio not in AIMS or not ours:
            continue
        for key in ("against algorithm 1", "against baseline"):
            gaps = [row[key].value for row in ours if key in row]
            if gaps:
                says = f"{model} {ratio}x, mean of {len(gaps)} seeds, unseen {key}: aim -{100 * AIMS[ratio]:.1f}%"
                found.append((says, f"{100 * np.mean(gaps):+.2f}%", bool(np.mean(gaps) <= -AIMS[ratio])))
    return found


def spreads(cells: Sequence[CellData]) -> list[dict[str, Any]]:
    """Of each method with several seeds: mean, least and largest perplexity on the unseen windows."""
    found = []
    for case in sorted({_case(cell) for cell in cells}):
        for method in NAMES:
            values = [
                row["unseen"] for row in rows(cells) if (row["model"], row["ratio"], row["method"]) == (*case, method)
            ]
            if len(values) > 1:
                found.append(
                    {
                        "case": f"{case[0]} {case[1]}x",
                        "method": method,
                        "seeds": len(values),
                        "mean": float(np.mean(values)),
                        "least": min(values),
                        "largest": max(values),
                    }
                )
    return found


def race_verdict(cells: Sequence[CellData]) -> list[tuple[str, str, bool]]:
    """Whether the race ends where Algorithm 1 does, in the mean over seeds, with half of its token-passes."""
    plain, raced = (
        [cell for cell in cells if cell["method"] == name and cell["ratio"] == 8 and cell["model"] == "tiny"]
        for name in ("evolution", "race")
    )
    if not plain or len(plain) != len(raced):
        return []
    wanted = np.mean([cell["search"]["value"] for cell in plain]) * LIMITS["race value"]
    whole = np.mean([evaluations(cell) for cell in plain])
    costs = np.arange(0, whole + 1)
    spent = next((cost for cost in costs if np.mean([value_at(cell, cost) for cell in raced]) <= wanted), None)
    told = "never" if spent is None else f"{spent:.0f} of {whole:.0f} evaluations, {spent / whole:.2f}"
    says = (
        f"tiny 8x, mean of {len(raced)} seeds: the race at Algorithm 1's end value (+0.1%) with half its token-passes"
    )
    return [(says, told, spent is not None and bool(spent <= LIMITS["race"] * whole))]


def show(folder: Path) -> int:
    """Print the table and its verdicts, write summary.json and the plot beside the cells; 1 when a verdict is no."""
    cells = read_cells(folder)
    if not cells:
        return 0
    console = Console(stderr=True, highlight=False, width=200)
    table = Table(title="search", title_justify="left")
    columns = ("case", "method", "seed", "evaluations", "reached Alg. 1 at", "search", "unseen")
    for name in (*columns, "unseen against Algorithm 1", "unseen against best baseline"):
        table.add_column(name)
    made = rows(cells)
    for row in sorted(
        made, key=lambda row: (row["model"], row["ratio"], list(NAMES).index(row["method"]), row["seed"])
    ):
        spent = row.get("reached")
        table.add_row(
            f"{row['model']} {row['ratio']}x",
            NAMES[row["method"]],
            str(row["seed"]),
            f"{row['evaluations']:.0f}",
            "" if "share" not in row else "never" if spent is None else f"{spent:.1f} (1/{1 / row['share']:.0f})",
            f"{row['search']:.4f}",
            f"{row['unseen']:.4f}",
            str(row.get("against algorithm 1", "")),
            f"{row.get('against baseline', '')} {row.get('best baseline', '')}",
        )
    console.print(table)
    judged = verdicts(cells)
    for says, told, holds in judged:
        console.print(f"{'ok    ' if holds else 'MISSED'} {says}: {told}")
    aimed, spread = aims(cells), spreads(cells)
    for says, told, holds in aimed:
        console.print(f"{'met   ' if holds else 'short '} {says}: {told}")
    for each in spread:
        gap = (each["largest"] - each["least"]) / each["mean"]
        console.print(
            f"spread {each['case']}, {NAMES[each['method']]}, {each['seeds']} seeds, unseen: mean {each['mean']:.4f}, "
            f"{each['least']:.4f} to {each['largest']:.4f} ({100 * gap:.2f}%)"
        )
    plain = [
        {key: vars(value) if isinstance(value, Difference) else value for key, value in row.items()} for row in made
    ]
    told_all, told_aims = (
        [{"what": says, "found": told, "holds": holds} for says, told, holds in each] for each in (judged, aimed)
    )
    summary = {"rows": plain, "verdicts": told_all, "aims": told_aims, "spreads": spread}
    write_results(folder / "summary.json", summary)
    plot(cells, folder / "search.svg")
    return 0 if all(holds for *_, holds in judged) else 1


def plot(cells: Sequence[CellData], path: Path) -> None:
    """Best value against token-passes, one panel a case."""
    cases = sorted({_case(cell) for cell in cells if cell["method"] != "baselines"})
    colours = dict(zip(NAMES, ("#7f7f7f", "#1f77b4", "#d62728", "#ff9896"), strict=True))
    figure, panels = pyplot.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.8), squeeze=False)
    for panel, case in zip(panels[0], cases, strict=True):
        for cell in (cell for cell in cells if _case(cell) == case and cell["method"] in NAMES):
            tokens, best = zip(*[*cell["curve"], (cell["token_passes"], cell["curve"][-1][1])], strict=True)
            label = NAMES[cell["method"]] if cell["seed"] == 0 else None
            panel.step(tokens, best, where="post", color=colours[cell["method"]], label=label, linewidth=1.2)
        ends = [cell["curve"][-1][1] for cell in cells if _case(cell) == case and cell["method"] in NAMES]
        panel.set_ylim(min(ends) * 0.99, max(ends) * 1.15)
        panel.set_xscale("log")
        panel.set_title(f"{case[0]} {case[1]}x", fontsize=10)
        panel.set_xlabel("token-passes")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("perplexity, search windows")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
