"""The live view of a run: what its files say, whether it runs, and how the view ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from commands import longrope
from longrope.errors import UserError
from longrope.report.read import read_run
from longrope.report.tensorboard_files import EventLog
from longrope.runs import RunFolder
from longrope.watch import holder, last_lines, look_at, watch
from report_runs import CONFIG, further, make_run

AGAIN = "longrope search tiny --documents 'my texts'"


def text_of(path: Path) -> str:
    console = Console(file=io.StringIO(), width=100)
    watch(path, once=True, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def unfinished(path: Path) -> Path:
    make_run(path)
    for name in ("DONE", "metrics.json"):
        (path / name).unlink()
    return path


def test_a_finished_run_is_shown_with_its_command_progress_and_results(tmp_path: Path) -> None:
    shown = text_of(further(make_run(tmp_path / "run")))
    for words in (AGAIN, "7 evaluations", "value 4.268", "14.3k in 4 s of work, 4.1k tokens/s", "finished"):
        assert words in shown
    assert "6 methods at 256, 1k, 2k" in shown
    assert [line.strip() for line in shown.splitlines()[-2:]] == ["5. mutation 4.350", "6. mutation 4.268"]


def test_a_run_without_a_process_is_interrupted_and_its_command_goes_on_with_it(tmp_path: Path) -> None:
    view = look_at(unfinished(tmp_path / "run"))
    assert view.state == "interrupted"
    assert view.facts["state"].endswith(f"the same command goes on with it: {AGAIN}")


def test_a_run_whose_lock_is_held_runs(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "run")
    with RunFolder.open(path, json.loads((path / "config.json").read_text())):
        assert holder(path) == str(os.getpid())
        assert look_at(path).facts["state"] == f"running, process {os.getpid()}"
    assert holder(path) is None


BEGAN = 1_700_000_000
"""When the process that trains wrote its lock, in the tests below."""


def trained(path: Path, *, steps: int = 12, now: float = BEGAN + 24) -> None:
    """Losses of some steps of a training that has 40, written until `now`."""
    path.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "command": "finetune", "settings": {"length": 2048, "steps": 40}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "training.jsonl").write_text(
        "".join(f'{{"step": {step}, "loss": {9 - step / 2}}}\n' for step in range(1, steps + 1))
    )
    (path / ".lock").touch()
    os.utime(path / ".lock", (BEGAN, BEGAN))
    os.utime(path / "training.jsonl", (now, now))


def saved(path: Path, step: int, at: float) -> Path:
    folder = path / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    os.utime(folder, (at, at))
    return folder


def test_a_training_shows_its_step_loss_pace_and_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "run"
    trained(path)
    assert "pace" not in look_at(path).facts, "nobody trains"
    with RunFolder.open(path, json.loads((path / "config.json").read_text())):
        trained(path)
        view = look_at(path)
        facts = {name: text.replace("\N{NO-BREAK SPACE}", " ") for name, text in view.facts.items()}
        assert view.state == "running"
        assert facts["training"] == "step 12 of 40"
        assert facts["loss"] == "3.000"
        assert facts["pace"] == "2 s a step, 56 s left"
        assert view.last[-1] == "step 12 loss 3.000"
        older = saved(path, 10, BEGAN - 100)  # what this process goes on from
        assert look_at(path).facts["pace"].startswith("12 s a step, ")
        saved(path, 11, BEGAN + 20)
        assert look_at(path).facts["pace"].startswith("12 s a step, ")
        older.rmdir()  # as checkpoints are that are not kept
        assert look_at(path).facts["pace"].startswith("4 s a step, ")
        saved(path, 12, BEGAN + 24)
        (path / "checkpoints" / "checkpoint-11").rmdir()
        assert "pace" not in look_at(path).facts, "of no step since then"


def test_an_extension_shows_the_stage_that_is_made_and_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run"
    make_run(path / "01-search")
    stages = {name: {"do": name[3:], "to": 2048} for name in ("01-search", "02-finetune", "03-search")}
    (path / "config.json").write_text(json.dumps({**CONFIG, "command": "extend", "settings": {"stages": stages}}))
    done = [json.dumps({"stage": name, "inputs": {}, "outputs": "", "seconds": 5.0}) for name in stages]
    looks = []
    for count in range(4):
        (path / "stages.jsonl").write_text("".join(f"{line}\n" for line in done[:count]))
        if count == 1:
            trained(path / "02-finetune")
        looks.append(look_at(path))
    searching, training, next_one, measuring = looks
    assert (searching.facts["stage"], searching.facts["search"]) == ("01-search, 1 of 3", "7 evaluations")
    assert searching.last[-1].startswith("6. mutation")
    assert (training.facts["stage"], training.facts["training"]) == ("02-finetune, 2 of 3", "step 12 of 40")
    assert training.last[-1] == "step 12 loss 3.000"
    assert next_one.facts["stage"] == "03-search, 3 of 3, about to begin"
    assert next_one.last == ()
    assert measuring.facts["stages"] == "all 3 done"


def test_lines_that_are_half_written_wait_for_the_next_look(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "run")
    with (path / "evaluations.jsonl").open("a") as file:
        file.write('{"index": 7, "origin": "muta')
    assert last_lines(path)[-1] == "6. mutation 4.268"
    records = [{"loss": 9.0, "count": 6, "document": "a"}, {"depth": 0.1, "found": True}]
    records += [{"depth": 0.1, "found": False}, {"task": "vt", "score": 0.5}, {"loss": None, "count": 6}, {"found": {}}]
    lines = [{"method": "yarn", "length": 2048, "item": f"i{n}", "record": record} for n, record in enumerate(records)]
    (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path / "results.jsonl", (2e9, 2e9))
    view = look_at(path)
    outcomes = ["perplexity 4.482", "found", "not found", "vt 0.500", "-", "-"]
    assert view.last == tuple(f"yarn at 2k i{n} {outcome}" for n, outcome in enumerate(outcomes))
    assert view.facts["measured so far"] == "6 items in results.jsonl"


def test_a_file_that_is_broken_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "metrics.json").write_text('{"results": [')
    view = look_at(path)
    assert "metrics.json" in view.facts["trouble"]
    assert view.last


def test_names_cannot_move_the_cursor_or_be_markup(tmp_path: Path) -> None:
    shown = text_of(make_run(tmp_path / "run", name="[red]\x1b[2Jname", document="\x1b]0;title\x07"))
    assert "\x1b" not in shown
    assert "[red]?[2Jname" in shown


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run is a folder that a command wrote"):
        watch(tmp_path, once=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for name in ("none", "model"):
        ran = longrope("watch", tmp_path / name, "--once")
        assert (ran.code, len(ran.err.splitlines())) == (2, 1)


def test_the_view_of_a_run_ends_with_it(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "run")
    with RunFolder.open(path, json.loads((path / "config.json").read_text())) as run:
        viewer = subprocess.Popen(started(path), stderr=subprocess.PIPE)
        assert viewer.stderr is not None
        while b"running" not in (line := viewer.stderr.readline()):
            assert line, "the view ended before the run"
        run.finish()
    rest = viewer.communicate(timeout=60)[1]
    assert viewer.returncode == 0
    assert b"finished" in rest


def test_event_files_grow_with_the_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = unfinished(tmp_path / "run")
    with EventLog(tmp_path / "events") as log:
        log.update(read_run(path))
        (before,) = (tmp_path / "events").iterdir()
        size = before.stat().st_size
        log.update(read_run(path))
        assert before.stat().st_size == size, "nothing is written twice"
        make_run(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "metrics.json", path)
        log.update(read_run(path))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("perplexity/yarn")] == [256, 1024, 2048]
    assert [round(event.value, 3) for event in events.Scalars("search/best")] == [9.1, 4.49, 4.3, 4.268]
    ran = longrope("watch", path, "--once", "--tensorboard", tmp_path / "here")
    assert ran.code == 0
    assert [file.suffix for file in (tmp_path / "here" / "run").iterdir()] == [".longrope"]


def test_ctrl_c_ends_the_view_without_calling_it_an_interruption(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "run")
    viewer = subprocess.Popen(started(path), stderr=subprocess.PIPE)
    assert viewer.stderr is not None
    while b"interrupted (" not in (line := viewer.stderr.readline()):
        assert line
    time.sleep(0.3)
    viewer.send_signal(signal.SIGINT)
    rest = viewer.communicate(timeout=60)[1]
    assert (viewer.returncode, b"Traceback" in rest) == (0, False)


def started(path: Path) -> list[str]:
    """The real command line, with its own way with signals."""
    code = "from longrope.cli import main; main()"
    return [sys.executable, "-c", code, "watch", str(path), "--every", "0.1"]


def test_watching_imports_no_torch(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    code = (
        "import sys; from longrope.cli import run\n"
        f"assert run(['watch', {str(path)!r}, '--once']) == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_configuration_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert look_at(tmp_path).facts["model"] == "tiny"
