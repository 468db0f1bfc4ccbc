"""The run folder: atomic writes, whole lines, the lock, resuming and refusing."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.files import append_line, disk_errors, read_lines, read_object, write_atomically
from longrope.runs import RunFolder, command_line, default_run_path, fresh_run_path

CONFIG: dict[str, Any] = {
    "command": "search",
    "longrope": "0.1.0",
    "model": {"name": "tiny", "rope_theta": 200.0, "rotary_dim": 64, "original_length": 256, "fingerprint": "abc"},
    "settings": {"to": 2048, "seed": 0, "evaluations": 100},
    "documents": {"search": [{"name": "a.py", "sha256": "00", "start": 0}], "unseen": []},
    "ignored": {"workers": 1},
}


def changed(**settings: object) -> dict[str, Any]:
    return {**CONFIG, "settings": {**CONFIG["settings"], **settings}}


def python(code: str, *arguments: object, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


# --- files -----------------------------------------------------------------------------------------------------------


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    write_atomically(path, "né\n")
    write_atomically(tmp_path / "b", b"\x00\xff")
    assert path.read_bytes() == "né\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b"]


def test_an_atomic_write_gives_the_file_the_usual_permissions_and_keeps_a_link_a_link(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_kill_in_the_middle_of_writing_keeps_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    code = """
import sys
from pathlib import Path
from longrope.files import write_atomically
for number in range(10**9):
    write_atomically(Path(sys.argv[1]), f"{number}," * 200_000)
"""
    for round_ in range(4):
        before = path.stat().st_ino if path.exists() else None
        with python(code, path) as process:
            deadline = time.monotonic() + 30
            while not path.exists() or path.stat().st_ino == before:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(0.003 * round_)
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        numbers = path.read_text().split(",")
        assert len(numbers) == 200_001
        assert len(set(numbers[:-1])) == 1


def test_a_file_size_limit_keeps_the_old_file_and_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    code = """
import sys
from pathlib import Path
from longrope.errors import UserError
from longrope.files import write_atomically
try:
    write_atomically(Path(sys.argv[1]), "x" * 100_000)
except UserError as error:
    print(error)
"""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    output, errors = python(code, path, limit=limit).communicate()
    rule = "the limit on file sizes must allow it; raise the limit, then run the same command again"
    assert output == f"output: got {path} (File too large); {rule}\n", errors
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_and_a_device_is_never_replaced_by_a_file() -> None:
    with pytest.raises(UserError) as caught:
        write_atomically(Path("/dev/full"), "x")
    rule = "the disk must have room for it; free some space, then run the same command again"
    assert str(caught.value) == f"output: got /dev/full (No space left on device); {rule}"
    write_atomically(Path("/dev/null"), "x")
    assert Path("/dev/full").is_char_device()
    assert Path("/dev/null").is_char_device()


def test_a_folder_that_takes_no_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = [
        (tmp_path / "none" / "a", "No such file or directory", "the folder above it must exist"),
        (tmp_path / "file" / "a", "Not a directory", "the folder above it must exist"),
        (tmp_path, "Is a directory", "a folder is in its place"),
        (tmp_path / ("a" * 300), "File name too long", "choose a shorter path"),
        (Path("/proc/self/a"), "No such file or directory", "choose a folder that can be written to"),
    ]
    for path, reason, advice in cases:
        with pytest.raises(UserError, match=re.escape(f"output: got {path} ({reason});")) as caught:
            write_atomically(path, "x")
        assert advice in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", "No space left on device"),
        ("I/O error: Read-only file system (os error 30)", "Read-only file system"),
        ("open file failed with strerror: Read-only file system", "Read-only file system"),
        ("unexpected pos 64 vs 0", "a write failed"),
        ("basic_ios::clear: iostream error", "a write failed"),
        ("1536 requested and 768 written", "a write failed"),
    ],
)
def test_disks_of_which_libraries_tell_in_words_of_their_own_are_told(tmp_path: Path, said: str, told: str) -> None:
    with pytest.raises(UserError) as caught, disk_errors(tmp_path / "deep" / "file"):
        raise RuntimeError(said)
    assert caught.value.got == f"{tmp_path / 'deep' / 'file'} ({told})"
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_disks_is_not_told_as_a_disks(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such layer"), disk_errors(tmp_path):
        raise RuntimeError("no such layer")


# --- lines -----------------------------------------------------------------------------------------------------------


def test_lines_come_back_with_numpy_numbers_plain_and_nan_as_null(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, {"value": math.nan, "rescale": np.array([1.0, np.inf]), "tokens": np.int64(3)})
    append_line(path, {"value": np.float32(0.5), "name": "é\n"})
    assert read_lines(path) == [
        {"value": None, "rescale": [1.0, None], "tokens": 3},
        {"value": 0.5, "name": "é\n"},
    ]
    assert path.read_bytes().count(b"\n") == 2
    assert read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_half_written_last_line_is_dropped_and_repaired_when_asked(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    half = b'{"index": 1'[:cut]
    path.write_bytes(b'{"index": 0}\n' + half)
    assert read_lines(path) == [{"index": 0}]
    assert path.read_bytes().endswith(half)
    assert read_lines(path, repair=True) == [{"index": 0}]
    append_line(path, {"index": 1})
    assert read_lines(path) == [{"index": 0}, {"index": 1}]


def test_a_last_line_that_lacks_only_its_end_is_kept_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"index": 0}')
    assert read_lines(path, repair=True) == [{"index": 0}]
    assert path.read_bytes() == b'{"index": 0}\n'


@pytest.mark.parametrize("broken", [b"{", b"[1]", b"", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_line_that_is_not_the_last_is_told_with_its_number(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"index": 0}\n' + broken + b'\n{"index": 2}\n')
    with pytest.raises(UserError) as caught:
        read_lines(path, repair=True)
    rule = "every line but the last is a JSON object, as it was written; restore the file or start anew"
    assert str(caught.value) == f"lines: got {path}, line 2 broken; {rule}"


def test_lines_in_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"lines: got {tmp_path} (Is a directory); it is a readable file")):
        read_lines(tmp_path)


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    code = """
import sys
from pathlib import Path
from longrope.errors import UserError
from longrope.files import append_line
try:
    for index in range(100):
        append_line(Path(sys.argv[1]), {"index": index, "padding": "x" * 280})
except UserError as error:
    print(error)
"""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    output, errors = python(code, path, limit=limit).communicate()
    assert output.startswith(f"output: got {path} (File too large); the limit on file sizes must allow it;"), errors
    assert [record["index"] for record in read_lines(path)] == [0, 1, 2]
    assert path.read_bytes().endswith(b"}\n")


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_new_run_writes_its_config_and_done_comes_last(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    row = RopeFactors(up_to=2048, rescale=(1.0, 2.0))
    table = FactorTable(rope_theta=200.0, rotary_dim=4, original_length=256, rows=(row,))
    with RunFolder.open(path, CONFIG) as run:
        assert (run.path, run.config, run.finished, run.resumed) == (path, CONFIG, False, False)
        assert read_object(path / "config.json", "config") == CONFIG
        run.log_evaluation({"key": "a", "value": math.nan})
        run.save_factors(table)
        run.save_metrics({"results": [{"method": "yarn", "value": math.inf}]})
        assert not (path / "DONE").exists()
        run.finish()
        assert run.finished
        assert run.evaluations() == [{"key": "a", "value": None}]
    assert FactorTable.load(path / "factors.json") == table
    assert json.loads((path / "metrics.json").read_text()) == {"results": [{"method": "yarn", "value": None}]}
    assert (path / "DONE").exists()


def test_the_same_command_resumes_an_unfinished_run_and_finds_a_finished_one(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG) as run:
        run.log_evaluation({"key": "a", "value": 0})
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"index": 1, "val')
    (tmp_path / ".longrope-0123.tmp").write_text("left by a process that was killed")
    with RunFolder.open(tmp_path, {**CONFIG, "ignored": {"workers": 8, "verbosity": 2}}) as run:
        assert (run.resumed, run.finished) == (True, False)
        run.log_evaluation({"key": "b", "value": 1})
        assert run.evaluations() == [{"key": "a", "value": 0}, {"key": "b", "value": 1}]
        assert not list(tmp_path.glob(".longrope-*"))
        run.finish()
    with RunFolder.open(tmp_path, CONFIG) as run:
        assert (run.resumed, run.finished) == (True, True)


def test_tuples_and_numpy_numbers_in_a_config_equal_what_was_written(tmp_path: Path) -> None:
    config = changed(lengths=(256, np.int64(512)), documents=[Path("a"), Path("b")])
    RunFolder.open(tmp_path, config).close()
    with RunFolder.open(tmp_path, config) as run:
        assert run.resumed
        assert run.config["settings"]["lengths"] == [256, 512]


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIG).close()
    other = {
        **changed(seed=7, method="hybrid"),
        "documents": {"search": [{"name": "a.py", "sha256": "ff", "start": 0}]},
    }
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path, other)
    assert str(caught.value) == (
        f"--out: got {tmp_path}, a run where settings.seed was 0, now 7; "
        'settings.method was not set, now "hybrid"; '
        'documents.search.0.sha256 was "00", now "ff"; documents.unseen was [], now not set; '
        "a run is continued with its own settings; choose another --out"
    )
    assert read_object(tmp_path / "config.json", "config") == CONFIG
    with RunFolder.open(tmp_path, CONFIG) as run:  # the refusal let the lock go
        assert run.resumed


def test_the_same_model_may_lie_elsewhere_and_another_one_is_refused_by_its_name(tmp_path: Path) -> None:
    def of(model: dict[str, Any]) -> dict[str, Any]:
        return {**CONFIG, "model": {**CONFIG["model"], **model}}

    RunFolder.open(tmp_path, CONFIG).close()
    with RunFolder.open(tmp_path, of({"name": "elsewhere/tiny"})) as run:
        assert run.resumed
    assert read_object(tmp_path / "config.json", "config") == CONFIG
    rule = "a run is continued with its own settings; choose another --out"
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path, of({"name": "elsewhere/tiny", "fingerprint": "def"}))
    told = f'--out: got {tmp_path}, a run where model.name was "tiny", now "elsewhere/tiny"; '
    assert str(caught.value) == f'{told}model.fingerprint was "abc", now "def"; {rule}'
    without = {**CONFIG, "model": {"name": "tiny"}}
    RunFolder.open(tmp_path / "without", without).close()
    with pytest.raises(UserError, match=r'a run where model\.name was "tiny", now "tony"; a run'):
        RunFolder.open(tmp_path / "without", {**without, "model": {"name": "tony"}})


def test_many_differences_are_named_shortly(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIG).close()
    with pytest.raises(UserError, match=r'settings\.a was not set, now "x{50,56}\.\.\.; .* and 2 more; ') as caught:
        RunFolder.open(tmp_path, changed(a="x" * 500, b=1, c=2, d=3, e=4, f=5))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("larger", [200, None])
def test_a_larger_budget_continues_a_finished_run(tmp_path: Path, larger: int | None) -> None:
    with RunFolder.open(tmp_path, CONFIG) as run:
        run.finish()
    with RunFolder.open(tmp_path, changed(evaluations=larger), budget_keys=["evaluations"]) as run:
        assert (run.resumed, run.finished) == (True, False)
    assert not (tmp_path / "DONE").exists()
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["evaluations"] == larger


def test_a_budget_may_be_a_group_of_settings(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, changed(budget={"evaluations": 10, "hours": 1.0})).close()
    config = changed(budget={"evaluations": 20, "hours": None})
    with RunFolder.open(tmp_path, config, budget_keys=["budget"]) as run:
        assert run.resumed
    with pytest.raises(UserError, match=r"settings\.budget\.evaluations was 20, now 30"):
        RunFolder.open(tmp_path, changed(budget={"evaluations": 30}))


def test_a_smaller_budget_is_refused(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIG).close()
    message = r"settings\.evaluations was 100, now 50; a run is continued with its own settings, only a budget may grow"
    with pytest.raises(UserError, match=message):
        RunFolder.open(tmp_path, changed(evaluations=50), budget_keys=["evaluations"])


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path, CONFIG)
    rule = "the output folder holds other files and no run; choose another --out or an empty folder"
    assert str(caught.value) == f"--out: got {tmp_path}, which has thesis.txt; {rule}"
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_checkpoint_folder_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"which has config\.json; the output folder holds other files and no run"):
        RunFolder.open(tmp_path, CONFIG)


def test_a_run_killed_before_its_config_was_written_starts_anew(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("4194304")
    (tmp_path / ".longrope-0123.tmp").write_text("{")
    with RunFolder.open(tmp_path, CONFIG) as run:
        assert not run.resumed


def test_a_corrupt_config_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"command": ')
    with pytest.raises(UserError, match=r"config of the run: got .*config\.json \(Expecting value.*\); it is JSON;"):
        RunFolder.open(tmp_path, CONFIG)


def test_a_run_in_the_place_of_a_file_or_where_nothing_can_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: got .*/file, a file; a run is a folder; choose another --out"):
        RunFolder.open(tmp_path / "file", CONFIG)
    for path in (tmp_path / "file" / "run", Path("/proc/self/run")):
        with pytest.raises(UserError, match=f"output: got {path} .*the folder above it must exist and take new files"):
            RunFolder.open(path, CONFIG)


def test_measurements_come_back_and_a_half_written_one_is_dropped(tmp_path: Path) -> None:
    record = {"method": "pi", "length": 256, "item": "a@0", "record": {"loss": 0.1 + 0.2}, "windows": "unseen"}
    with RunFolder.open(tmp_path, CONFIG) as run:
        assert run.results() == []
        run.log_result(record)
        run.log_result({**record, "length": 512, "record": {"loss": math.nan}})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"method": "pi", "len')
    with RunFolder.open(tmp_path, CONFIG) as run:
        assert run.results() == [record, {**record, "length": 512, "record": {"loss": None}}]
        run.log_result({**record, "length": 1024})
        assert [each["length"] for each in run.results()] == [256, 512, 1024]


def test_a_larger_budget_forgets_what_was_measured_of_the_smaller_ones_factors(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG) as run:
        run.log_evaluation({"key": "a", "value": 1.0})
        run.log_result({"method": "longrope", "length": 256, "item": "a@0", "record": {"loss": 1.0}})
    with RunFolder.open(tmp_path, changed(evaluations=200), budget_keys=["evaluations"]) as run:
        assert (len(run.evaluations()), run.results()) == (1, [])


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('{"value": 1.0}', "key"),
        ('{"key": 7, "value": 1.0}', "key"),
        ('{"key": "b"}', "value"),
        ('{"key": "b", "value": "low"}', "value"),
    ],
)
def test_an_evaluation_that_is_none_is_told_with_its_line(tmp_path: Path, line: str, name: str) -> None:
    with RunFolder.open(tmp_path, CONFIG) as run:
        run.log_evaluation({"key": "a", "value": None})
        path = tmp_path / "evaluations.jsonl"
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(UserError) as caught:
            run.evaluations()
    rule = "every line is a record of this run; restore the file or start anew"
    assert str(caught.value) == f"lines: got {path}, line 2 with no proper {name!r}; {rule}"


def test_measurements_of_another_version_are_told_with_their_line(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG) as run:
        run.log_result({"method": "pi", "length": 256, "item": "a@0", "record": {"loss": 1.0}})
        path = tmp_path / "results.jsonl"
        path.write_text(path.read_text() + '{"method": "pi", "length": 512, "value": 9.1, "tokens": 511}\n')
        with pytest.raises(UserError) as caught:
            run.results()
    rule = "every line is a record of this run; restore the file or start anew"
    assert str(caught.value) == f"lines: got {path}, line 2 with no proper 'item'; {rule}"


HOLD = """
import json, sys, time
from pathlib import Path
from longrope.runs import RunFolder
with RunFolder.open(Path(sys.argv[1]), json.loads(sys.argv[2])) as run:
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_told_who_writes_and_gets_the_run_once_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with python(HOLD, path, json.dumps(CONFIG)) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "locked\n"
            with pytest.raises(UserError) as caught:
                RunFolder.open(path, CONFIG)
            rule = f"another process is writing this run (pid {first.pid})"
            assert str(caught.value) == f"--out: got {path}; {rule}; wait for it, end it, or choose another --out"
        finally:
            first.kill()
    with RunFolder.open(path, CONFIG) as run:
        assert run.resumed
        with pytest.raises(UserError, match=rf"another process is writing this run \(pid {os.getpid()}\)"):
            RunFolder.open(path, CONFIG)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiny", "search-tiny-2k"),
        ("meta-llama/Llama-3.1-8B", "search-Llama-3.1-8B-2k"),
        ("/data/models/mistral/", "search-mistral-2k"),
        ("/cache/hub/models--me--q/snapshots/0a1b2c3d", "search-q-2k"),
        ("/cache/hub/models--gpt2/snapshots/0a1b2c3d/", "search-gpt2-2k"),
        ("/data/snapshots/0a1b2c3d", "search-0a1b2c3d-2k"),
        ("../..", "search-model-2k"),
        ("C:\\models\\a b", "search-C_models_a_b-2k"),
        ("模型", "search-模型-2k"),
        ("x" * 500, f"search-{'x' * 60}-2k"),
    ],
)
def test_a_run_is_named_after_its_command_model_and_length(model: str, name: str) -> None:
    assert default_run_path("search", model, 2048) == Path("runs") / name


def test_the_folder_one_stands_in_is_named_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "phi").mkdir()
    monkeypatch.chdir(tmp_path / "phi")
    assert default_run_path("search", ".", 300) == Path("runs/search-phi-300")


@pytest.mark.parametrize(
    ("program", "ours"),
    [
        ("/venv/bin/longrope", True),
        ("/venv/lib/python3.12/site-packages/longrope/__main__.py", True),  # python -m longrope, as torchrun starts it
        ("/venv/lib/python3.12/site-packages/pytest/__main__.py", False),
        ("train.py", False),
    ],
)
def test_the_command_line_is_told_however_the_program_was_started(
    program: str, monkeypatch: pytest.MonkeyPatch, *, ours: bool
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "search", "tiny"])
    assert command_line() == (["longrope", "search", "tiny"] if ours else None)


def test_a_fresh_run_has_a_path_that_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        paths.append(fresh_run_path("demo"))
        paths[-1].mkdir(parents=True)
    assert len(set(paths)) == 3
    assert re.fullmatch(r"runs/demo-\d{8}-\d{6}", str(paths[0]))
    if len({str(path)[:25] for path in paths}) == 1:  # all within one second
        assert [str(path)[25:] for path in paths] == ["", "-2", "-3"]
