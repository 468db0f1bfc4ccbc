"""The code blocks of README and docs: what they are, what stands in place of what they name, and how they are run.

A comment before a block says what to do with it:

* `<!-- not run: REASON -->`: it is not run here. It still has to parse: see test_docs.py.
* `<!-- file: NAME -->`: it is the content of a file that the page's next blocks use.

Without one, `sh` and `python` blocks are run as they stand, in the order of the page, each in a process of its own, in
a folder that the page's blocks share. `text` blocks are what commands print.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longrope.checkpoint import model_source

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "toml", "yaml", "json", "text"}

FOUND = ("docs", "examples", "benchmarks", "tools")
"""Folders of the repository that stand in a page's folder, as they do where a reader types the commands."""
PLACEHOLDERS = {"path/of/a/checkpoint": model_source("tiny")}
"""What stands for something of the reader's own in a block that is run."""

_FENCE = re.compile(
    r"^(?:<!-- (?P<what>not run|file): (?P<said>.+?) -->\n+)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block. not_run: why. file: what it is the content of."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    file: str | None

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page in their order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        said = {match["what"]: match["said"]}
        found.append(Block(page, line, match["language"], match["text"], said.get("not run"), said.get("file")))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of an `sh` block in words: continued lines together, those of a pipe or a list apart."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        redirected = False
        for word in [*lexer, ";"]:
            if word[:1] in {"<", ">"}:
                redirected = True  # what follows is a file
            elif word[:1] not in {"|", "&", ";", "(", ")"}:
                words += [] if redirected else [word]
                redirected = False
            elif words:
                yield words
                words = []


def run(block: Block, folder: Path) -> None:
    """Do what a block says, in a folder. Raises AssertionError with what it wrote when it fails."""
    text = block.text
    for name, stands_for in PLACEHOLDERS.items():
        text = text.replace(name, stands_for)
    if block.file is not None:
        (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.file).write_text(text)
        return
    if block.language not in {"sh", "python"} or block.not_run is not None:
        return
    shell = ["bash", "-euo", "pipefail", "-c"]
    command = [*shell, text] if block.language == "sh" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}: exit code {done.returncode}\n{text}\n{done.stdout}\n{done.stderr}"


def environment() -> dict[str, str]:
    """This checkout's package and this Python's commands first, one thread, no network."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    only = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return os.environ | only | {"PATH": path, "PYTHONPATH": str(ROOT / "src")}


def furnish(folder: Path) -> None:
    """Put the repository's folders that commands name into a page's folder."""
    for name in FOUND:
        (folder / name).symlink_to(ROOT / name)
