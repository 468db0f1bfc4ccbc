"""Every command undisturbed: what it leaves behind, how long it takes, and which operations change its files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faulting.child import run
from faulting.commands import BY_NAME, Command, differing, left_behind, write_ground
from faulting.shim import Fault, Operation, is_loaded


@dataclass(frozen=True)
class Undisturbed:
    """A command as it goes when nothing happens. ground: what it reads; made: a folder with what it has made, too."""

    command: Command
    ground: Path
    made: Path
    left: Mapping[str, object]
    seconds: float
    operations: Sequence[Operation]

    def fresh(self, name: str = "here") -> Path:
        """A copy of what it reads, in the current folder."""
        folder = Path(name).resolve()
        shutil.copytree(self.ground, folder, symlinks=True)
        if self.command.prepare:
            self.command.prepare(folder)
        return folder

    def finished(self, name: str = "here") -> Path:
        """A copy of that and of what it has made, in the current folder."""
        folder = Path(name).resolve()
        shutil.copytree(self.made, folder, symlinks=True)
        return folder

    def differs(self, folder: Path) -> list[str]:
        """Paths in which what was left in a folder differs from what the undisturbed command left."""
        return differing(self.left, left_behind(folder, self.command))


def undisturbed(names: Sequence[str], work: Path) -> dict[str, Undisturbed]:
    """Run commands, and those whose results they read, each in its own folder. Raises RuntimeError if one fails."""
    base = work / "ground"
    write_ground(base)
    found: dict[str, Undisturbed] = {}

    def make(name: str) -> None:
        if name in found:
            return
        command = BY_NAME[name]
        for each in command.before:
            make(each)
        place = work / "undisturbed" / name.replace(" ", "-")
        ground, made = place / "ground", place / "made"
        shutil.copytree(base, ground)
        for each in command.before:
            for path in BY_NAME[each].makes:
                shutil.copytree(found[each].made / path, ground / path, dirs_exist_ok=True)
        shutil.copytree(ground, made)
        if command.prepare:
            command.prepare(made)
        fault = Fault(made) if is_loaded() else None
        ran = run(command.arguments, made, fault)
        if ran.code != 0:
            raise RuntimeError(f"{name}, with nothing done to it: {ran}")
        operations = fault.operations() if fault else []
        found[name] = Undisturbed(command, ground, made, left_behind(made, command), ran.seconds, operations)

    for name in names:
        make(name)
    return found
