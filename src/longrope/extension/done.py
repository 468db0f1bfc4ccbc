"""Which stages are done, of what they were made, and that nobody has changed it since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope import seals
from longrope.errors import UserError
from longrope.factors import FACTORS
from longrope.files import append_line, disk_errors, read_lines
from longrope.runs import CHECKPOINT, DONE, STAGES
from longrope.seals import content_to_hash


def digest(folder: Path) -> str:
    """`sha256:...` of what the next stage reads of a folder: factors, configuration and weights."""
    found = hashlib.sha256()
    names = ("config.json", FACTORS)
    # Not what lies in folders inside: a run may lie inside the model's own.
    paths = [path for path in sorted(folder.iterdir()) if path.name in names or path.suffix == ".safetensors"]
    for path in paths:
        found.update(f"{path.relative_to(folder)}:{path.stat().st_size}:".encode())
        with disk_errors(path):
            for piece in content_to_hash(path):
                found.update(piece)
    return f"sha256:{found.hexdigest()}"


class Done:
    """The record of stages: a line in stages.jsonl for each that is finished, with hashes of its inputs and outputs."""

    def __init__(self, run: Path) -> None:
        self.run = run
        lines = read_lines(
            run / STAGES, repair=True, required={"stage": str, "inputs": dict, "outputs": str, "seconds": float}
        )
        self._lines: dict[str, Mapping[str, Any]] = {line["stage"]: line for line in lines}

    def outputs(self, folder: Path) -> str:
        """Hash of what a stage has written."""
        return digest(folder / CHECKPOINT) if (folder / CHECKPOINT).is_dir() else digest(folder)

    def has(self, stage: str, inputs: Mapping[str, str]) -> bool:
        """Whether a stage is done, of these inputs. Raises UserError for one made of others, or with changed files."""
        line, folder = self._lines.get(stage), self.run / stage
        if line is None or not (folder / DONE).exists():
            return False
        again = f"remove {folder}: the same command makes it again"
        if dict(line["inputs"]) != dict(inputs):
            differing = sorted(set(line["inputs"].items()) ^ set(inputs.items()))
            got = f"{stage}, which was made of another {differing[0][0]}"
            raise UserError("stage", got=got, rule="a stage goes on from the one before it", do=again)
        if self.outputs(folder) != line["outputs"]:
            got = f"{stage}, whose files have changed since it was made"
            raise UserError("stage", got=got, rule="later stages are made of it", do=f"restore them, or {again}")
        seals.check_folder(folder)  # nothing later reads the rest, and the finished run holds it as the stage's result
        return True

    def seconds(self, stage: str) -> float | None:
        """How long a stage took, None where it is not done."""
        line = self._lines.get(stage)
        return None if line is None else float(line["seconds"])

    def add(self, stage: str, inputs: Mapping[str, str], seconds: float) -> None:
        """Write down that a stage is done."""
        line: dict[str, Any] = {"stage": stage, "inputs": dict(inputs), "outputs": self.outputs(self.run / stage)}
        line["seconds"] = round(seconds, 1)
        append_line(self.run / STAGES, line)
        self._lines[stage] = line
