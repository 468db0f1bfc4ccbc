"""What goes wrong from outside: signals, kills, full disks, damaged files, two processes. Nothing is lost by it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import (
    TARGET,
    Ran,
    contents,
    longrope,
    longrope_process,
    refused,
    start,
    table,
    write_checkpoint,
    write_documents,
)

EVALUATIONS = 90
PATIENCE = 60.0
LONG = 24 * 1024  # tokens: one forward pass of the small model takes several seconds


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, documents, and searches that nothing disturbed: `undisturbed` and `evolution`."""
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts")
    write_documents(folder / "long", count=1, characters=2 * LONG)
    table().save(folder / "good.json")
    for command in (search("undisturbed"), evolution("evolution")):
        ran = longrope_process(*command, cwd=folder)
        assert (ran.code, ran.out) == (0, "")
    return folder


def search(out: str, *more: object) -> list[object]:
    start = ["search", "model", "--to", TARGET, "-d", "texts", "--dtype", "float32", "--windows", 8, "--out", out]
    return [*start, "--evaluations", EVALUATIONS, "-q", *more]


def evolution(out: str) -> list[object]:
    return search(out, "--method", "evolution")


def long_search(out: str) -> list[object]:
    start = ["search", "model", "--to", LONG, "-d", "long", "--dtype", "float32", "--windows", 1, "--out", out]
    return [*start, "--evaluations", 3, "-q"]


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def evaluated(run: Path) -> int:
    path = run / "evaluations.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def ended(process: subprocess.Popen[str]) -> Ran:
    out, err = process.communicate(timeout=PATIENCE)
    return Ran(process.returncode, out, err)


def results(run: Path) -> tuple[bytes, list[dict[str, Any]], Any]:
    """What must not depend on what happened to a run: factors.json, the evaluations, and the measurements."""
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    evaluations = [
        {key: value for key, value in line.items() if key not in ("seconds", "elapsed", "crc")} for line in lines
    ]
    return (run / "factors.json").read_bytes(), evaluations, json.loads((run / "metrics.json").read_text())["results"]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_forward_pass_at_once_and_names_the_command_that_resumes(
    here: Path, which: signal.Signals
) -> None:
    command = long_search("run")
    with start(*command, cwd=here) as process:
        wait_for((here / "run" / "config.json").exists, process)
        time.sleep(0.5)
        assert process.poll() is None
        sent = time.monotonic()
        process.send_signal(which)
        ran = ended(process)
    assert time.monotonic() - sent < 5
    assert evaluated(here / "run") == 0, "the signal came in the middle of the first evaluation"
    resumed_by = shlex.join(["longrope", *map(str, command)])
    assert ran == Ran(130, "", f"longrope: interrupted; this goes on with it: {resumed_by}\n")


def test_a_signal_is_not_for_the_threads_that_libraries_start(here: Path) -> None:
    """numpy starts some when it is imported, as many as there are cores; here `start` would keep it from that."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    words = [sys.executable, "-m", "longrope", *map(str, long_search("run"))]
    with subprocess.Popen(words, cwd=here, env=environment, text=True, stderr=subprocess.PIPE) as process:
        wait_for((here / "run" / "config.json").exists, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.startswith("longrope: interrupted; ")) == (130, True), err


def disturb(command: list[object], run: Path, moments: list[int], signals: list[signal.Signals]) -> Ran:
    """Start a command again and again, and end it by a signal when its run has so many lines; the last one's end."""
    rng = np.random.default_rng(20240221)
    reached = []
    for least, which in zip(moments, signals, strict=True):
        at = max(least, evaluated(run) + 1)  # the last one may have written more before it was ended
        with start(*command, cwd=run.parent) as process:
            wait_for(lambda at=at: evaluated(run) >= at, process)  # type: ignore[misc]
            time.sleep(float(rng.uniform(0, 0.02)))
            process.send_signal(which)
            ran = ended(process)
        assert ran.code == (130 if which == signal.SIGINT else -signal.SIGKILL)
        assert not (run / "DONE").exists()
        reached.append(evaluated(run))
    assert reached == sorted(set(reached)), "every start went on from where the last one was ended"
    return ran


def test_an_evolution_killed_or_interrupted_at_any_moment_ends_as_if_undisturbed(here: Path) -> None:
    rng = np.random.default_rng(20240221)
    moments = sorted(int(moment) for moment in rng.choice(np.arange(1, EVALUATIONS - 20), size=3, replace=False))
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGINT]
    ran = disturb(evolution("run"), here / "run", moments, signals)
    name, *arguments = shlex.split(ran.err.rpartition(": ")[2])
    assert name == "longrope"
    assert longrope(*arguments).code == 0
    assert results(here / "run") == results(here / "evolution")


def test_a_search_killed_among_its_seeds_its_gradients_and_its_polish_ends_as_if_undisturbed(here: Path) -> None:
    lines = [json.loads(line) for line in (here / "undisturbed" / "evaluations.jsonl").read_text().splitlines()]
    gradients = [index for index, line in enumerate(lines) if "gradient" in line]
    polish = [index for index, line in enumerate(lines) if line["origin"] == "polish"]
    # So many lines are there, that the next one is of this kind.
    moments = [gradients[0] // 2, gradients[0], gradients[len(gradients) // 2], polish[len(polish) // 4]]
    assert moments == sorted(set(moments))
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT]
    disturb(search("run"), here / "run", moments, signals)
    assert longrope(*search("run")).code == 0
    assert results(here / "run") == results(here / "undisturbed")


def test_an_interrupted_demonstration_names_the_folder_it_goes_on_in(here: Path) -> None:
    write_documents(here / "more", count=1, characters=250_000)
    with start("demo", "-d", "more", "-q", cwd=here) as process:
        wait_for(lambda: any(here.glob("runs/demo-*/config.json")), process)
        process.send_signal(signal.SIGTERM)
        ran = ended(process)
    (run,) = (here / "runs").iterdir()
    message = f"longrope: interrupted; this goes on with it: longrope demo -d more -q --out runs/{run.name}\n"
    assert ran == Ran(130, "", message)


def compare(out: str) -> list[object]:
    return ["compare", "model", "--lengths", "96,192,384", "-d", "texts", "--dtype", "float32", "--out", out, "-q"]


def measured(run: Path) -> int:
    path = run / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_comparison_killed_or_interrupted_goes_on_to_the_same_measurements(here: Path) -> None:
    assert longrope_process(*compare("whole"), cwd=here).code == 0
    for least, which in ((1, signal.SIGKILL), (90, signal.SIGINT)):
        at = max(least, measured(here / "run") + 1)
        with start(*compare("run"), cwd=here) as process:
            wait_for(lambda at=at: measured(here / "run") >= at, process)  # type: ignore[misc]
            process.send_signal(which)
            ran = ended(process)
        assert measured(here / "run") >= at
        assert not (here / "run" / "DONE").exists()
    command = shlex.join(["longrope", *map(str, compare("run"))])
    assert ran == Ran(130, "", f"longrope: interrupted; this goes on with it: {command}\n")
    assert longrope_process(*compare("run"), cwd=here).code == 0
    for name in ("metrics.json", "results.jsonl"):
        assert (here / "run" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_an_interrupted_command_that_writes_no_run_promises_nothing(here: Path) -> None:
    command = ["evaluate", "perplexity", "model", "--lengths", LONG, "-d", "long", "--windows", 1]
    for more, promised in (([], False), (["--out", "run"], True)):
        with start(*command, *more, cwd=here) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == "measuring none at 24k, 0/1\n"
            process.send_signal(signal.SIGINT)
            ran = ended(process)
        resume = shlex.join(["longrope", *map(str, [*command, *more])])
        promise = f"; this goes on with it: {resume}" if promised else ""
        assert ran == Ran(130, "", f"longrope: interrupted{promise}\n")


def test_a_second_process_on_a_run_is_told_who_writes_it(here: Path) -> None:
    with start(*long_search("run"), cwd=here) as process:
        wait_for((here / "run" / "config.json").exists, process)
        assert refused(*long_search("run")) == (
            f"--out: got run; another process is writing this run (pid {process.pid}); "
            "wait for it, end it, or choose another --out"
        )
        assert process.poll() is None, "the first one goes on"
        process.kill()


# Damaged files


def unfinish(run: Path) -> None:
    """Make of a finished run one that was killed before its end."""
    for name in ("DONE", "factors.json", "metrics.json"):
        (run / name).unlink()


def unsummed(lines: bytes) -> bytes:
    """Lines as earlier versions wrote them, without checksums."""
    return re.sub(rb', "crc": "\w{8}"\}', b"}", lines)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_half_written_evaluation_is_dropped_and_evaluated_again(here: Path, cut: int) -> None:
    shutil.copytree("undisturbed", "run")
    unfinish(here / "run")
    path = here / "run" / "evaluations.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert longrope(*search("run")).code == 0
    assert results(here / "run") == results(here / "undisturbed")


def test_lost_evaluations_are_made_again(here: Path) -> None:
    shutil.copytree("undisturbed", "run")
    unfinish(here / "run")
    (here / "run" / "evaluations.jsonl").unlink()
    assert longrope(*search("run")).code == 0
    assert results(here / "run") == results(here / "undisturbed")


def test_a_broken_evaluation_in_the_middle_is_told_with_its_line(here: Path) -> None:
    shutil.copytree("undisturbed", "run")
    unfinish(here / "run")
    path = here / "run" / "evaluations.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:10], b"garbage\n", *lines[11:]]))
    rule = "every line but the last is a JSON object, as it was written; restore the file or start anew"
    assert refused(*search("run")) == f"lines: got run/evaluations.jsonl, line 11 broken; {rule}"


def test_an_evaluation_without_its_key_is_told_with_its_line(here: Path) -> None:
    shutil.copytree("undisturbed", "run")
    unfinish(here / "run")
    path = here / "run" / "evaluations.jsonl"
    path.write_bytes(unsummed(path.read_bytes()).replace(b'"key"', b'"kez"', 1))
    rule = "every line is a record of this run; restore the file or start anew"
    assert refused(*search("run")) == f"lines: got run/evaluations.jsonl, line 1 with no proper 'key'; {rule}"


@pytest.mark.parametrize("damage", [(b'"losses"', b'"lozzes"'), (b'"tokens": ', b'"tokens": "many", "x": ')])
def test_an_evaluation_that_is_not_whole_is_told(here: Path, damage: tuple[bytes, bytes]) -> None:
    shutil.copytree("undisturbed", "run")
    unfinish(here / "run")
    path = here / "run" / "evaluations.jsonl"
    path.write_bytes(unsummed(path.read_bytes()).replace(*damage, 1))
    assert refused(*search("run")) == (
        "run: got run/evaluations.jsonl with a line that is not whole; every line is an evaluation; "
        "remove that line, and it is evaluated again"
    )


@pytest.mark.parametrize("name", ["config.json", "factors.json", "metrics.json", "evaluations.jsonl", "DONE"])
def test_a_damaged_file_of_a_finished_run_is_told_by_its_name(here: Path, name: str) -> None:
    text = (here / "undisturbed" / name).read_bytes()
    at = len(text) // 2
    changed = text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
    for damage in (text[:at], changed, b"") if name != "DONE" else (text[:at], b"{}"):
        shutil.copytree("undisturbed", "run")
        (here / "run" / name).write_bytes(damage)
        assert f"run/{name}" in refused(*search("run")), damage
        shutil.rmtree("run")


def test_factors_of_a_finished_run_that_were_changed_are_used_by_nobody(here: Path) -> None:
    shutil.copytree("undisturbed", "run")
    path = here / "run" / "factors.json"
    path.write_text(path.read_text().replace('"up_to": 192', '"up_to": 191'))
    measured = ["evaluate", "perplexity", "model", "--lengths", 96, "-d", "texts", "-f"]
    told = "run: got run/factors.json, which is not as it was when the run ended; the files of a finished run stay as "
    told += "they are; restore it, or remove run/DONE: the same command ends the run again; to change a file, copy it "
    told += "elsewhere"
    for words in ([*measured, "run"], ["report", "run"], ["factors", "run/factors.json"]):
        assert refused(*words) == told
    shutil.copy(path, "own.json")
    assert longrope(*measured, "own.json").code == 0
    (here / "run" / "DONE").unlink()
    assert longrope(*search("run")).code == 0
    assert results(here / "run") == results(here / "undisturbed")


# Disks


def test_a_search_that_hits_a_limit_of_file_sizes_says_so_and_resumes(here: Path) -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)); "
        "from longrope.cli import main; main()"
    )
    with start(*search("run"), cwd=here, code=limited) as process:
        ran = ended(process)
    rule = "the limit on file sizes must allow it; raise the limit, then run the same command again"
    assert ran == Ran(2, "", f"longrope: output: got run/evaluations.jsonl (File too large); {rule}\n")
    assert 0 < evaluated(here / "run") < EVALUATIONS
    assert longrope(*search("run")).code == 0
    assert results(here / "run") == results(here / "undisturbed")


def test_other_commands_that_hit_a_limit_of_file_sizes_leave_nothing_behind(here: Path) -> None:
    (here / "kept.json").write_text("kept")
    code = """
import resource, sys
from longrope.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
print(run(["export", "model", "-f", "good.json", "--out", "exported"]))
print(run(["factors", "good.json", "--out", "kept.json"]))
print(run(["compare", "model", "--lengths", "192", "-d", "texts", "--out", "compared"]))
"""
    before = contents(Path())
    with start(cwd=here, code=code) as process:
        ran = ended(process)
    rule = "the limit on file sizes must allow it; raise the limit, then run the same command again"
    places = [str(here / "exported"), "kept.json", "compared/config.json"]
    assert ran.err.splitlines() == [f"longrope: output: got {place} (File too large); {rule}" for place in places]
    assert ran.out == "2\n2\n2\n"
    after = contents(Path())
    assert {name for name in after if name not in before} <= {"compared"}
    assert {name: after[name] for name in before} == before


def test_a_full_and_a_read_only_file_system_are_told(here: Path) -> None:
    """Real ones, where this machine lets a process have mounts of its own."""
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounts = "mkdir full ro && mount -t tmpfs -o size=16k tmpfs full && mount -t tmpfs -o ro tmpfs ro"
    try:
        can = subprocess.run([*own, f"{mounts} && rmdir full ro; true"], cwd=here, capture_output=True, timeout=20)
        able = can.returncode == 0 and b"unshare" not in can.stderr and b"mount" not in can.stderr
    except OSError:
        able = False
    for name in ("full", "ro"):
        if (here / name).exists():
            (here / name).rmdir()
    if not able:
        pytest.skip("no mounts of one's own on this machine")
    code = f"""
import subprocess
from longrope.cli import run
print(run({[str(word) for word in search("full/run")]}))
print(run({[str(word) for word in search("ro/run")]}))
"""
    script = here / "script.py"
    script.write_text(code)
    python = shlex.join([sys.executable, str(script)])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*own, f"{mounts} && {python}"], cwd=here, capture_output=True, text=True, env=environment)
    assert done.stdout == "2\n2\n"
    assert done.stderr.splitlines() == [
        "longrope: output: got full/run/evaluations.jsonl (No space left on device); "
        "the disk must have room for it; free some space, then run the same command again",
        "longrope: output: got ro/run (Read-only file system); "
        "the file system must be writable; choose a folder that can be written to",
    ]
