"""Which stages are done, of what they were made, and that nobody has changed it since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope import seals
from longrope.errors import UserError
from longrope.factors import FACTORS
from longrope.files import append_line, as_line, disk_errors, read_lines, write_atomically
from longrope.runs import CHECKPOINT, DONE, STAGES
from longrope.seals import content_to_hash

DOCUMENTS = ("documents", "short_documents")
"""Inputs that are a stage's own documents; earlier versions did not write them down."""


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
        line, folder = self._line(stage), self.run / stage
        if line is None:
            return False
        if differing := _differing(line["inputs"], inputs):
            raise self._made_of_others(stage, differing[0])
        if self.outputs(folder) != line["outputs"]:
            got, do = f"{stage}, whose files have changed since it was made", f"restore them, or {self.again(stage)}"
            raise UserError("stage", got=got, rule="later stages are made of it", do=do)
        seals.check_folder(folder)  # nothing later reads the rest, and the finished run holds it as the stage's result
        return True

    def check_documents(self, stage: str, documents: Mapping[str, str]) -> None:
        """Raise UserError for a stage that is done and was trained on others than these documents of its own."""
        line = self._line(stage)
        if line is not None and (differing := _differing(line["inputs"], {**line["inputs"], **documents})):
            raise self._made_of_others(stage, differing[0])

    def forget(self, stage: str) -> None:
        """Take back that a stage is done, before it is made again: its line is of what it was."""
        if self._lines.pop(stage, None) is not None:
            write_atomically(self.run / STAGES, "".join(as_line(line) for line in self._lines.values()))

    def _line(self, stage: str) -> Mapping[str, Any] | None:
        """What is written down of a stage that is done, None of any other."""
        return self._lines.get(stage) if (self.run / stage / DONE).exists() else None

    def again(self, stage: str) -> str:
        """What to do so that a stage is made again, for messages."""
        ended = f" and {self.run / DONE}" if (self.run / DONE).exists() else ""
        return f"remove {self.run / stage}{ended}: the same command makes it again"

    def _made_of_others(self, stage: str, what: str) -> UserError:
        rule, do = "a stage goes on from the one before it", self.again(stage)
        if what in DOCUMENTS:
            rule, do = "documents of a stage stay as they were when it was trained", f"restore them, or {do}"
        made_of = "another model" if what == "model" else f"other {what.replace('_', ' ')}"
        return UserError("stage", got=f"{stage}, which was made of {made_of}", rule=rule, do=do)

    def seconds(self, stage: str) -> float | None:
        """How long a stage took, None where it is not done; of one that was resumed, since it last was."""
        line = self._lines.get(stage)
        return None if line is None else float(line["seconds"])

    def resumed(self, stage: str) -> bool:
        """Whether a stage was ended on its way and went on: what it took before is counted nowhere."""
        return bool(self._lines.get(stage, {}).get("resumed"))

    def add(self, stage: str, inputs: Mapping[str, str], seconds: float, *, resumed: bool = False) -> None:
        """Write down that a stage is done."""
        line: dict[str, Any] = {"stage": stage, "inputs": dict(inputs), "outputs": self.outputs(self.run / stage)}
        line |= {"seconds": round(seconds, 1)} | ({"resumed": True} if resumed else {})
        append_line(self.run / STAGES, line)
        self._lines[stage] = line


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The inputs that are not what they were, by name; those that were not written down are not known to differ."""
    names = sorted({*before, *now})
    return [name for name in names if before.get(name) != now.get(name) and (name in before or name not in DOCUMENTS)]
