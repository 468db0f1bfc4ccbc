"""A folder that is made whole or not at all: after failures, after kills, and with another process at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longrope.errors import UserError
from longrope.folders import is_free, replaced_folder, whole_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from longrope.folders import whole_folder
out, kill_at = Path(sys.argv[1]), int(sys.argv[2])
real = Path.rename
def rename(self, target):
    global kill_at
    kill_at -= 1
    if kill_at == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.rename = rename
with whole_folder(out) as unfinished:
    for name in ("config.json", "a", "b"):
        (unfinished / name).write_text(name)
    if sys.argv[3:]:
        print("here", flush=True)
        sys.stdin.read()
"""


def write(out: Path, last: str = "b") -> None:
    with whole_folder(out) as unfinished:
        for name in ("config.json", "a", last):
            (unfinished / name).write_text(name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_what_fails_leaves_nothing(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(UserError, match=r"^output: got "):
        write(out, last="deep/b")
    assert names(tmp_path) == (["out"] if there else [])
    assert is_free(out)
    write(out)
    assert names(out) == ["a", "b", "config.json"]
    assert not is_free(out)


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4])
def test_what_was_killed_while_it_moved_into_an_empty_folder_is_made_again(tmp_path: Path, kill_at: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(kill_at)], capture_output=True, text=True)
    if kill_at == 4:  # after the last move
        assert done.returncode == 0, done.stderr
        assert names(out) == ["a", "b", "config.json"]
        return
    assert done.returncode == -9, done.stderr
    assert "config.json" not in names(out), "that comes last"
    assert len(names(out)) == kill_at
    assert is_free(out)
    write(out)
    assert names(out) == ["a", "b", "config.json"]


def test_files_of_others_beside_what_was_killed_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished = out / ".out.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / ".names.json").write_text(json.dumps(["a", "b"]))
    (out / "a").write_text("ours")
    assert is_free(out)
    (out / "theirs").write_text("not ours")
    assert not is_free(out)


def test_what_was_whole_when_its_process_was_killed_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished = out / ".out.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / ".names.json").write_text(json.dumps(["a", "config.json"]))
    (out / "a").write_text("ours")
    assert is_free(out)
    (out / "config.json").write_text("ours")
    assert not is_free(out)


def test_a_second_process_is_told_and_the_first_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out), "9", "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "here\n"
        with pytest.raises(UserError) as caught:
            write(out)
        rule = "another process is writing there; wait for it, or choose another folder"
        assert str(caught.value) == f"output: got {out}; {rule}"
        first.communicate("")
    assert first.returncode == 0
    assert names(out) == ["a", "b", "config.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_weights_of_a_replaced_folder_have_the_permissions_of_other_new_files(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        with replaced_folder(tmp_path / "checkpoint") as folder:
            save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")  # written for their owner alone
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint").iterdir()}
    assert modes == {"model.safetensors": mode, "config.json": mode}
