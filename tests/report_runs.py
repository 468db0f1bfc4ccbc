"""Run folders for the tests of the report: a search as the run folder writes it, and every further measurement."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from longrope.baselines import RopeShape
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.runs import RunFolder

SHAPE = RopeShape(rope_theta=200.0, rotary_dim=64, original_length=256)
LENGTHS = [256, 1024, 2048]
VALUES: dict[str, list[float | None]] = {
    "none": [5.1, 35.0, math.inf],
    "pi": [5.1, 6.9, 9.1],
    "dynamic-ntk": [5.1, 4.95, 5.4],
    "yarn": [5.1, 4.6, 4.49],
    "yarn+su": [5.1, 4.61, 4.52],
    "searched": [5.1, 4.5, 4.268],
}
CONFIG: dict[str, Any] = {
    "command": "search",
    "longrope": "0.1.0",
    "model": {"name": "tiny", "rope_theta": 200.0, "rotary_dim": 64, "original_length": 256, "fingerprint": "f00d"},
    "settings": {"to": 2048, "seed": 3, "documents": ["stdlib", "my texts"], "hours": None},
    "documents": {
        "search": [{"name": "asyncio/events.py", "sha256": "ab" * 32, "start": 17}],
        "unseen": [{"name": "typing.py", "sha256": "cd" * 32, "start": 0}],
    },
    "ignored": {"workers": 2, "command_line": ["longrope", "search", "tiny", "--documents", "my texts"]},
}


def interval(value: float | None) -> list[float] | None:
    return None if value is None else [value * 0.9, value * 1.1]


def results(values: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    return [
        {"method": method, "length": length, "value": value, "tokens": 4096, "ci": interval(value)}
        for method, row in values.items()
        for length, value in zip(LENGTHS, row, strict=True)
    ]


def make_run(path: Path, name: str = "tiny", document: str = "asyncio/events.py", method: str = "searched") -> Path:
    """A finished run written by the run folder itself, with names that a file could hold."""
    documents = {**CONFIG["documents"], "search": [{**CONFIG["documents"]["search"][0], "name": document}]}
    config = {**CONFIG, "model": {**CONFIG["model"], "name": name}, "documents": documents}
    searched = tuple(np.linspace(1, 9, 32).tolist())
    rows = (unscaled(32, 256), RopeFactors(2048, searched, start_tokens=4, attention_factor=1.17))
    values = {method if key == "searched" else key: row for key, row in VALUES.items()}
    with RunFolder.open(path, config) as run:
        run.save_factors(FactorTable(200.0, 64, 256, rows, model=name))
        for index, value in enumerate([9.1, 4.49, math.nan, 4.6, 4.3, 4.35, 4.268]):
            origin = {0: "pi", 1: "yarn", 3: document}.get(index, "mutation")
            run.log_evaluation({"index": index, "origin": origin, "value": value, "tokens": 2048, "seconds": 0.5})
        run.save_metrics({"command": "search", "model": name, "measure": "perplexity", "results": results(values)})
        run.finish()
    (path / "DONE").write_text("")  # as earlier versions left it: tests change the files of these runs
    return path


LONG = ("none", "yarn", "searched")


def further(path: Path, **more: dict[str, Any]) -> Path:
    """Every other measurement, as runs inside a run; `more` replaces some of them."""
    made = {
        "passkey": measured("passkey", {"by_depth": lambda s: [[0.0, 0.5, s, 5], [0.5, 1.0, 1.0, 5]]}),
        "needle": measured("needle", {"by_depth": lambda s: [[d / 4, s, 4, 1.5] for d in range(5)]}),
        "ruler": measured(
            "ruler",
            {"tasks": lambda s: {"niah_single_1": {"score": 1.0, "samples": 10}, "vt": {"score": s, "samples": 10}}},
        ),
        "harness": measured(
            "harness",
            {"tasks": lambda s: {"arc_easy": {"acc,none": s, "acc_stderr,none": 0.01}, "wiki": {"ppl,none": 9.5}}},
            lengths=[256],
        ),
        "nonuniformity": measured(
            "nonuniformity",
            {
                "groups": lambda s: [[0, 7, 40.0 + s, 5.0], [8, 31, 5.0, 40.0]],
                "start_tokens": lambda s: [[0, "pi", 9.0], [4, "pi", 8.5], [0, "yarn", 4.6], [4, "yarn", 4.5 + s]],
                "attention": lambda s: [["none", "yarn", 5.0], ["su", "yarn", 4.6]],
            },
            methods=["none"],
        ),
    }
    for name, data in (made | more).items():
        folder = path / name
        folder.mkdir(exist_ok=True)
        typed = ["longrope", "evaluate", name, "tiny", "--out", f"RUN/{name}"]
        config = {**CONFIG, "command": f"evaluate {name}", "ignored": {"command_line": typed}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.json").write_text(json.dumps(data))
    return path


def measured(
    measure: str, details: dict[str, Any], *, lengths: list[int] = LENGTHS, methods: Any = LONG
) -> dict[str, Any]:
    """A metrics file; shares fall with the length for all methods but the searched one."""
    results = []
    for method in methods:
        for index, length in enumerate(lengths):
            share = 0.9 if method == "searched" else round(0.9 - 0.4 * index, 2)
            made = {name: make(share) for name, make in details.items()}
            record = {"method": method, "length": length, "value": share, "tokens": 100, "details": made}
            results.append({**record, "of_a_later_version": {"a": 1}})
    return {"command": f"evaluate {measure}", "model": "tiny", "measure": measure, "results": results}


def add_positions(path: Path) -> Path:
    """Perplexity by position in the results of metrics.json."""
    data = json.loads((path / "metrics.json").read_text())
    for result in data["results"]:
        result["details"] = {"by_position": [[64, 9.0], [256, 5.0], [2048, result["value"]]]}
    (path / "metrics.json").write_text(json.dumps(data))
    return path
