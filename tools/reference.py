"""Write docs/commands.md from the commands' own --help; a test holds the file to the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

COMMANDS = [
    "demo",
    "documents",
    "search",
    "compare",
    "evaluate perplexity",
    "evaluate passkey",
    "evaluate needle",
    "evaluate ruler",
    "evaluate nonuniformity",
    "evaluate harness",
    "finetune",
    "extend",
    "factors",
    "export",
    "verify",
    "doctor",
    "plan",
    "generate",
    "chat",
    "report",
    "watch",
]
_BEGINNING = """# Commands

What `longrope COMMAND --help` prints. Tables, progress and messages go to stderr; stdout has the one document of
`--json`, the text of `generate` and `chat`, and what `factors --to` converts ([files](files.md#metricsjson)).
"""
PAGE = Path(__file__).parents[1] / "docs" / "commands.md"


def help_text(command: str) -> str:
    """What `longrope COMMAND --help` prints on a terminal of 100 columns."""
    code = f"import sys; sys.argv = ['longrope', *{command.split()!r}, '--help']; from longrope.cli import main; main()"
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return re.sub(r"[ \t]+\n", "\n", done.stdout).strip()


def page() -> str:
    """The whole page."""
    parts = [_BEGINNING]
    parts += [f"## longrope {command}\n\n```text\n{help_text(command)}\n```\n" for command in COMMANDS]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}")
