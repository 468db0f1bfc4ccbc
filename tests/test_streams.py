"""Streams that are closed, in another encoding, or hold no text: a command does what it does with any others."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from commands import COMMAND


def shell(words: str, redirected: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command by a shell that redirects or closes its streams."""
    line = f"{shlex.join(COMMAND)} {words} {redirected}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(["sh", "-c", line], cwd=cwd, env=environment, capture_output=True, timeout=120, **options)


@pytest.mark.parametrize(
    ("words", "code"), [("factors good.json --json", 0), ("--version", 0), ("factors nothing.json", 2)]
)
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_exit_code_and_nothing_is_told_in_another_place(
    here: Path, words: str, code: int, closed: str
) -> None:
    ran = shell(words, closed, here)
    assert ran.returncode == code, ran.stderr
    if code:
        assert ran.stdout == b""
    assert b"Traceback" not in ran.stderr


def test_a_signal_ends_a_command_without_stderr(here: Path) -> None:
    words = f"search model --to 192 -d texts --out run --evaluations 500 --threads 1 --windows 8 -q {'2>&-'}"
    line = f"exec {shlex.join(COMMAND)} {words}"
    with subprocess.Popen(["sh", "-c", line], cwd=here, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not (here / "run" / "config.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 130
        finally:
            process.kill()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii:strict", "latin-1"])
def test_a_prompt_that_is_no_text_is_refused_whatever_the_encoding(here: Path, encoding: str) -> None:
    words = "generate model --factors good.json --prompt-file - -n 2 -q"
    ran = shell(words, "", here, input=b"abc\xff", env={"PYTHONIOENCODING": encoding})
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr == b"longrope: prompt: got bytes that are no text; a prompt is UTF-8; convert it\n"


def test_what_stdout_cannot_say_is_escaped(here: Path) -> None:
    script = "from longrope.console import print_out; print_out('a \\u0936 b')"
    command = [COMMAND[0], "-c", script]
    ran = subprocess.run(command, cwd=here, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}, capture_output=True)
    assert (ran.returncode, ran.stdout) == (0, b"a \\u0936 b"), ran.stderr
