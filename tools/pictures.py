"""The pictures of docs/method.md: `python tools/pictures.py` writes docs/img/*.svg, `--check` says which are old.

What a picture shows is computed here from the package and from a committed result. A picture carries a digest of its
numbers and of this script, so that a test tells when one has to be drawn again, whatever version of matplotlib draws.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longrope.baselines import RopeShape, baseline, critical_dimension
from longrope.factors import FactorTable, RopeFactors

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "img"
SEARCHED = ROOT / "examples" / "tiny-2k.json"  # how it was found: docs/files.md

TINY = RopeShape(rope_theta=200.0, rotary_dim=64, original_length=256)
LLAMA2 = RopeShape(rope_theta=10000.0, rotary_dim=128, original_length=4096)
RATIO = 8
METHODS = {"pi": "position interpolation", "ntk": "NTK-aware", "yarn": "YaRN", "llama3": "Llama 3.1's scaling"}
COLOURS = {"pi": "#b3541e", "ntk": "#7a6ad8", "yarn": "#2c8c6a", "llama3": "#8a8a8a", "searched": "#c2185b"}
SEEN, UNSEEN, MARK = "#1f5fa8", "#d9822b", "#777777"

Data = dict[str, Any]


def rounded(values: Any) -> list[float]:
    """Numbers to six digits: enough to draw, and equal on every machine."""
    return [float(f"{value:.6g}") for value in np.asarray(values, dtype=float)]


def turns_data() -> Data:
    """Full turns of each pair inside the training window, and where the critical dimension lies."""
    shapes = {"tiny: base 200, 256 tokens, 32 pairs": TINY, "LLaMA2-7B: base 10,000, 4,096 tokens, 64 pairs": LLAMA2}
    return {
        name: {
            "turns": rounded(shape.original_length / shape.periods),
            "critical": rounded([critical_dimension(shape)])[0],
        }
        for name, shape in shapes.items()
    }


def draw_turns(data: Data) -> Figure:
    figure, axes = _panels(1, 2, (9.0, 3.6), sharey=True)
    for axis, (name, each) in zip(axes, data.items(), strict=True):
        turns, critical = np.array(each["turns"]), each["critical"]
        pairs = np.arange(len(turns))
        whole = turns >= 1
        axis.bar(pairs[whole], turns[whole] - 0.005, bottom=0.005, color=SEEN, label="every angle was seen")
        axis.bar(pairs[~whole], turns[~whole] - 0.005, bottom=0.005, color=UNSEEN, label="less than one turn")
        axis.axhline(1, color=MARK, linewidth=1)
        axis.axvline(critical, color=MARK, linewidth=1, linestyle="--")
        axis.text(
            critical - 0.4, turns.max(), f"critical dimension: pair {critical:.1f}", ha="right", va="top", fontsize=8
        )
        axis.set(title=name, xlabel="pair, fastest first", yscale="log", ylim=(0.05, 1500))
    axes[0].set_ylabel("full turns in the training window")
    axes[0].legend(loc="upper left", fontsize=8, framealpha=1)
    return figure


def angles_data() -> Data:
    """cos of a fast, a middle and the slowest pair of `tiny` over 512 positions, stretched by 2 and not."""
    positions = np.arange(512)
    shown = {}
    for pair in (6, 20, 31):
        frequency = 2 * math.pi / TINY.periods[pair]
        shown[f"pair {pair}, {TINY.original_length / TINY.periods[pair]:.2g} turns in training"] = {
            "as it is": rounded(np.round(np.cos(positions * frequency), 6)),
            "stretched by 2": rounded(np.round(np.cos(positions * frequency / 2), 6)),
        }
    return shown


def draw_angles(data: Data) -> Figure:
    figure, axes = _panels(3, 1, (9.0, 5.2), sharex=True, sharey=True)
    window = TINY.original_length
    for axis, (name, each) in zip(axes, data.items(), strict=True):
        own, stretched = np.array(each["as it is"]), np.array(each["stretched by 2"])
        inside, beyond = np.arange(window), np.arange(window - 1, len(own))
        low = own[:window].min()
        axis.axhspan(low, 1, color=SEEN, alpha=0.08, linewidth=0)
        axis.plot(stretched, color=MARK, linewidth=0.9, linestyle=":", label="stretched by 2")
        axis.plot(inside, own[:window], color=SEEN, linewidth=1.1, label="seen in training")
        axis.plot(beyond, own[window - 1 :], color=UNSEEN, linewidth=1.1, label="beyond the window, not stretched")
        axis.axvline(window, color=MARK, linewidth=1)
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_ylabel("cos of the angle", fontsize=8)
    axes[-1].set_xlabel("position; the training window ends at 256")
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False, ncols=3)
    return figure


def searched() -> RopeFactors:
    """The row for 8 times the original length that a search found for `tiny`."""
    return FactorTable.load(SEARCHED).rows[-1]


def factors_data() -> Data:
    """Rescale factors by pair for 8 times `tiny`'s length: baselines, and what a search found."""
    target = RATIO * TINY.original_length
    known = {METHODS[name]: rounded(baseline(name, TINY, target).rescale) for name in METHODS}
    critical = rounded([critical_dimension(TINY)])[0]
    return {"critical": critical, "lines": known | {"searched": rounded(searched().rescale)}}


def draw_factors(data: Data) -> Figure:
    figure, (axis,) = _panels(1, 1, (9.0, 3.8))
    for name, colour in zip(data["lines"], COLOURS.values(), strict=True):
        wide = name == "searched"
        axis.plot(
            data["lines"][name], color=colour, linewidth=2.2 if wide else 1.2, label=name, zorder=3 if wide else 2
        )
    axis.axvline(data["critical"], color=MARK, linewidth=1, linestyle="--")
    axis.text(data["critical"] + 0.3, 1.05, "critical dimension", fontsize=8)
    axis.set(xlabel="pair, fastest first", ylabel="rescale factor", yscale="log", yticks=[1, 2, 4, 8])
    axis.set_yticklabels(["1", "2", "4", "8"])
    axis.minorticks_off()
    axis.legend(fontsize=8, framealpha=1)
    return figure


def wavelengths_data() -> Data:
    """Tokens of one turn by pair for `tiny`: as it is, and under the factors of the picture before."""
    lines = factors_data()["lines"]
    told = {name: rounded(TINY.periods * np.array(lines[name])) for name in ("position interpolation", "searched")}
    return {"as it is": rounded(TINY.periods)} | told


def draw_wavelengths(data: Data) -> Figure:
    figure, (axis,) = _panels(1, 1, (9.0, 3.8))
    for (name, line), colour in zip(data.items(), (SEEN, COLOURS["pi"], COLOURS["searched"]), strict=True):
        axis.plot(line, color=colour, linewidth=1.6, label=name)
    for length, text in ((TINY.original_length, "original length, 256"), (RATIO * TINY.original_length, "target, 2k")):
        axis.axhline(length, color=MARK, linewidth=1, linestyle="--")
        axis.text(0, length * 1.1, text, fontsize=8)
    axis.set(xlabel="pair, fastest first", ylabel="tokens of one turn", yscale="log")
    axis.legend(fontsize=8, framealpha=1, loc="lower right")
    return figure


def regimes_data() -> Data:
    """A text that grows from 1 to 1,400 tokens under rows up to 256, 1k and 2k: tokens run through the model so far."""
    rows, end = [256, 1024, 2048], 1400
    spent, total = [], 0
    for length in range(1, end + 1):
        total += length if length - 1 in rows else 1  # one past a row's end: the whole text once more
        spent.append(total)
    return {"rows": rows, "spent": spent}


def draw_regimes(data: Data) -> Figure:
    figure, (axis,) = _panels(1, 1, (9.0, 3.8))
    spent, rows = data["spent"], data["rows"]
    lengths = np.arange(1, len(spent) + 1)
    starts = [0, *rows]
    for index, (start, row) in enumerate(zip(starts, rows, strict=False)):
        inside = (lengths > start) & (lengths <= row)
        axis.axvspan(start, min(row, len(spent)), color=SEEN, alpha=0.06 + 0.07 * index, linewidth=0)
        axis.text(start + 8, max(spent) * 1.17, f"row {index + 1}, up to {row}", fontsize=8, va="top")
        axis.plot(lengths[inside], np.array(spent)[inside], color=SEEN, linewidth=1.6)
    for row in rows[:-1]:
        axis.plot([row, row + 1], [spent[row - 1], spent[row]], color=UNSEEN, linewidth=2.2)
        # above the line, where nothing crosses it
        axis.text(row + 8, spent[row] + 420, f"cache made again: {row} tokens", fontsize=8, va="center")
    axis.plot(lengths, lengths, color=MARK, linewidth=1, linestyle=":")
    axis.text(len(spent) - 8, len(spent) * 0.78, "without a boundary", fontsize=8, ha="right", va="top")
    axis.set(xlabel="length of the text so far, in tokens", ylabel="tokens run through the model", xlim=(0, len(spent)))
    axis.set_ylim(0, max(spent) * 1.2)
    return figure


PICTURES: dict[str, tuple[Callable[[], Data], Callable[[Data], Figure]]] = {
    "turns": (turns_data, draw_turns),
    "angles": (angles_data, draw_angles),
    "factors": (factors_data, draw_factors),
    "wavelengths": (wavelengths_data, draw_wavelengths),
    "regimes": (regimes_data, draw_regimes),
}


def _panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    grid: Any = figure.subplots(rows, columns, squeeze=False, **shared)
    axes: list[Axes] = list(grid.flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
    return figure, axes


def digest(name: str) -> str:
    """What a picture is drawn from: its numbers and this script."""
    data = PICTURES[name][0]()
    return hashlib.sha256(json.dumps(data).encode() + Path(__file__).read_bytes()).hexdigest()


def written_digest(path: Path) -> str | None:
    """The digest that a picture carries; None where there is no picture."""
    found = re.search(r"drawn from ([0-9a-f]{64})", path.read_text()) if path.is_file() else None
    return found[1] if found else None


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Write one picture; the same numbers and the same matplotlib give the same bytes."""
    make, paint = PICTURES[name]
    path = folder / f"{name}.svg"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        paint(make()).savefig(path, format="svg", metadata={"Date": None, "Description": f"drawn from {digest(name)}"})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when a picture is not current")
    old = [name for name in PICTURES if written_digest(FOLDER / f"{name}.svg") != digest(name)]
    if parser.parse_args().check:
        sys.exit(f"not current: {', '.join(old)}; run python tools/pictures.py" if old else 0)
    for name in PICTURES:
        print(f"wrote {draw(name).name}")


if __name__ == "__main__":
    main()
