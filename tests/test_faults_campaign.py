"""A short campaign of faults; the whole one is benchmarks/faults.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "faults.py"
COMMANDS = ["search evolution", "finetune full", "export into a folder"]


def test_a_short_campaign_loses_nothing_and_ends_as_undisturbed(tmp_path: Path) -> None:
    words = ["--quick", "--processes", "2", "--every", "60", "--out", str(tmp_path)]
    words += ["--parts", "kills,writes,damage,signals", "--commands", ",".join(COMMANDS)]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "faults-quick.json").read_text())
    figures = {each["figure"]: each["value"] for each in document["figures"]}
    assert figures == {"results lost": 0, "tracebacks and unclear ends": 0, "wrong results": 0}
    assert document["commands"] == COMMANDS
    assert list(document["parts"]) == ["kills", "writes", "damage", "signals"]
    tried = document["figures"][0]["details"]
    for name in (
        "kills",
        "damaged files",
        "refused",
        "repaired or not needed",
        "signals",
        "second processes",
        "clocks",
    ):
        assert tried[name] > 0, name
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here: nothing was tried at single writes")
    assert tried["crashes"] > 0
    assert tried["disk faults"] > 0
