"""Every measure as a command: a run that goes on after a kill, in one process or with Ray workers, and bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from commands import TARGET, contents, longrope, refused, start, table
from longrope.checkpoint import LoadOptions
from longrope.compare import compare
from longrope.evaluate.execute import Step
from longrope.evaluate.run import evaluate
from longrope.evaluate.templates import SHORT
from longrope.report import write_report
from longrope.report.read import read_run

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROWS = [{"country": "Norway", "choices": [" Oslo", " Bergen"], "answer": 0}] * 3


@pytest.fixture(scope="module")
def ground(ground: Path) -> Path:
    (ground / "tasks").mkdir()
    (ground / "tasks" / "capitals.yaml").write_text(TASK)
    (ground / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ground


def command(measure: str, *more: object) -> list[object]:
    given: Mapping[str, list[object]] = {
        "perplexity": ["--lengths", f"96,{TARGET}", "-d", "texts", "--windows", 2, "-f", "good.json"],
        "passkey": ["--lengths", f"128,{TARGET}", "--tries", 3, "-f", "good.json"],
        "needle": ["--lengths", TARGET, "-d", "texts", "--depths", 3, "--tries", 2, "-f", "good.json"],
        "ruler": ["--lengths", 512, "--tasks", "niah_single_1,vt", "--samples", 2],
        "nonuniformity": ["--lengths", TARGET, "-d", "texts", "--windows", 1, "--groups", 2, "-f", "good.json"],
        "harness": ["--tasks", "capitals", "--include-path", "tasks", "-f", "good.json"],
    }
    return ["evaluate", measure, "model", "--dtype", "float32", *given[measure], *more]


MEASURES = ["perplexity", "passkey", "needle", "ruler", "nonuniformity", "harness"]


@pytest.mark.usefixtures("here")
def test_every_measure_writes_a_run_that_is_read_again_and_stands_on_the_page_of_the_run_around_it() -> None:
    shown = longrope("compare", "model", "--lengths", f"48,{TARGET}", "-d", "texts", "-f", "good.json", "--out", "run")
    assert shown.code == 0
    for measure in MEASURES:
        out = f"run/{measure}" if measure != "perplexity" else "elsewhere"
        ran = longrope(*command(measure, "--json", "--out", out))
        assert ran.code == 0, ran.err
        document = ran.document
        assert (document["command"], document["measure"], document["model"]) == (
            f"evaluate {measure}",
            measure,
            "model",
        )
        assert re.fullmatch("[0-9a-f]{64}|sha256:[0-9a-f]{64}", document["fingerprint"])
        assert set(document["versions"]) == {"longrope", "torch", "transformers"}
        assert "seed" in document["settings"]
        for result in document["results"]:
            assert {"method", "length", "value", "tokens", "ci"} <= set(result)
            assert result["value"] >= 0
        before = contents(Path(out))
        again = longrope(*command(measure, "--json", "--out", out))
        assert (again.code, again.document) == (0, document), "a finished run is read"
        assert contents(Path(out)) == before
    assert set(read_run(Path("run")).measures) == set(MEASURES)
    page = write_report(Path("run")).read_text()
    assert "Not measured" not in page
    for title in ("Passkey", "Needle", "RULER", "Short benchmarks"):
        assert title in page


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("measure", ["passkey", "needle", "ruler", "nonuniformity"])
def test_a_measurement_that_was_killed_goes_on_with_the_next_item_and_ends_in_the_same_files(measure: str) -> None:
    assert longrope(*command(measure, "--out", "run")).code == 0
    files = contents(Path("run"))
    lines = Path("run/results.jsonl").read_bytes().splitlines(keepends=True)
    for keep in (0, len(lines) // 2):
        Path("run/DONE").unlink()
        Path("run/metrics.json").unlink()
        Path("run/results.jsonl").write_bytes(b"".join(lines[:keep]) + lines[keep][:-9])
        ran = longrope(*command(measure, "--out", "run"))
        assert ran.code == 0
        assert contents(Path("run")) == files
        first = re.search(r"measuring .*, (\d+)/(\d+)$", ran.err, re.MULTILINE)
        assert first
        assert int(first[1]) <= keep, "no item is left out"
        assert measure not in ("ruler", "nonuniformity") or int(first[1]) == keep, "what is done alone is done once"


@pytest.mark.parametrize("measure", ["perplexity", "passkey"])
def test_two_workers_measure_what_one_process_does(here: Path, measure: str) -> None:
    common: dict[str, Any] = {
        "measure": measure,
        "lengths": [128, TARGET],
        "methods": ["none", "yarn"],
        "factors": {"good": table()},
        "options": LoadOptions(device="cpu", dtype="float32", threads=1),
    }
    common |= {"documents": ["texts"], "windows": 3} if measure == "perplexity" else {"tries": 4}
    steps: list[Step] = []
    alone = compare("model", out=here / "alone", **common)
    shared = compare("model", out=here / "shared", workers=2, on_step=steps.append, **common)
    assert shared["results"] == alone["results"]
    lines = [set((here / run / "results.jsonl").read_text().splitlines()) for run in ("alone", "shared")]
    assert lines[0] == lines[1]
    assert [step.done for step in steps] == sorted(step.done for step in steps)


@pytest.mark.usefixtures("here")
def test_methods_are_compared_in_a_task_of_lm_eval_and_go_on_after_a_kill() -> None:
    words = ["compare", "model", "--measure", "harness", "--lengths", f"96,{TARGET}", "--methods", "none,pi,yarn"]
    words += ["--tasks", "capitals", "--include-path", "tasks", "-f", "good.json", "--dtype", "float32"]
    ran = longrope(*words, "--out", "run", "--json")
    assert ran.code == 0, ran.err
    results = ran.document["results"]
    methods = ["none", "pi", "yarn", "good"]
    assert [(each["method"], each["length"]) for each in results] == [(method, TARGET) for method in methods]
    # Prompts of up to 96 tokens: the checkpoint as it is, PI for 192 at every length, a row of ones.
    rows = [each["details"]["requests"]["capitals"]["rows"] for each in results]
    assert rows == [{"none": 6}, {"96": 6}, {"96": 6}, {"48": 6}]
    alone = evaluate("harness", "model", tasks=["capitals"], include_path="tasks", dtype="float32", factors="good.json")
    assert results[-1]["value"] == alone["results"][0]["value"]
    shown = longrope(*words, "--out", "run")
    assert "capitals acc" in shown.err
    metrics = Path("run/metrics.json").read_bytes()
    Path("run/DONE").unlink()
    Path("run/metrics.json").unlink()
    assert longrope(*words, "--out", "run").code == 0
    assert Path("run/metrics.json").read_bytes() == metrics
    assert refused(*words, "--workers", 2) == ("--workers: got 2; one process asks lm-eval's tasks; leave it out")


@pytest.mark.usefixtures("here")
def test_answers_to_other_questions_are_not_gone_on_with() -> None:
    assert longrope(*command("harness", "--out", "run")).code == 0
    Path("run/DONE").unlink()
    Path("capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    assert "items.capitals was " in refused(*command("harness", "--out", "run", "-q"))
    assert "settings.batch_size was not set, now 1" in refused(*command("harness", "--out", "run", "--batch-size", 1))


@pytest.mark.usefixtures("here")
def test_answers_that_are_damaged_and_tasks_that_are_no_yaml_are_told() -> None:
    assert longrope(*command("harness", "--out", "run")).code == 0
    Path("run/DONE").unlink()
    (answers,) = Path("run").glob("answers_rank*.db")
    answers.write_bytes(b"no database" * 999)
    message = refused(*command("harness", "--out", "run"))
    assert re.match(r"answers: got run/answers_rank0\.db \(.*\); .*; remove it, and they are asked for again", message)
    Path("tasks/broken.yaml").write_text("task: [")
    message = refused(*command("harness"))
    assert message.startswith("--include-path: got tasks/broken.yaml: ")
    assert message.endswith("; its files are YAML; mend the file, or take it out")


@pytest.mark.usefixtures("here")
def test_a_passkey_run_goes_on_with_the_very_prompts_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert longrope(*command("passkey", "--out", "run")).code == 0
    Path("run/DONE").unlink()
    # As another version might word it.
    monkeypatch.setattr(import_module("longrope.evaluate.passkey"), "SHORT", replace(SHORT, filler="Snow is white. "))
    assert "items.128 was " in refused(*command("passkey", "--out", "run"))
    assert "--digits: got 19; a number has at most 18; give a smaller number" in refused(
        *command("needle", "--digits", 19)
    )


def test_the_library_has_every_measure_under_one_name(here: Path) -> None:
    found = evaluate("harness", "model", tasks=["capitals"], include_path="tasks", dtype="float32")
    assert found["measure"] == "harness"
    assert set(found["results"][0]["details"]["tasks"]) == {"capitals"}
    other = evaluate("passkey", "model", lengths=["128"], tries=2, dtype="float32")
    assert other["results"][0]["tokens"] == 2 * 128


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (command("harness", "--tasks", "capitls", "-q"), r"--tasks: got 'capitls'; .*did you mean capitals"),
        (command("ruler", "--tasks", "niah_singel_1"), r"--tasks: got .*niah_singel_1.*; .*niah_single_1"),
        (command("ruler", "--lengths", 64), r"ruler: got a window of 64 tokens; .*measure at \d+ tokens or more"),
        (command("passkey", "--lengths", 16), r"passkey: got a window of 16 tokens; .*measure at \d+ tokens or more"),
        (command("needle", "--lengths", 16), r"needle: got a window of 16 tokens; .*measure at \d+ tokens or more"),
        (command("nonuniformity", "--lengths", 48), r"--lengths: got 48; .*give a longer one"),
        (command("nonuniformity", "--lengths", "96,192"), r"--lengths: got 2 lengths; .*give one"),
        (command("nonuniformity", "--groups", 99), r"--groups: got 99; the model has 8 pairs"),
        (command("passkey", "--template", "missing.toml"), r"template.*missing\.toml"),
        (command("passkey", "--chat"), r"chat.*template"),
        (
            ["compare", "model", "--lengths", 96, "--measure", "speed"],
            r"measure: got 'speed'; it is one of perplexity, passkey, needle, ruler, harness; choose one of them",
        ),
        (
            ["compare", "model", "--lengths", 96, "--measure", "passkey", "--stride", 5],
            r"^--stride: got --measure passkey; it is an option of perplexity; leave it out$",
        ),
        (["compare", "model", "--lengths", 96], r"--documents: got none; perplexity is measured on documents"),
        (["compare", "model", "--lengths", 96, "--measure", "needle"], r"--documents: got none; needle is measured on"),
    ],
)
def test_bad_input_is_one_line(arguments: list[object], message: str) -> None:
    assert re.search(message, refused(*arguments))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("measure", ["passkey", "harness"])
def test_a_run_that_is_half_written_or_of_another_measure_is_told(measure: str) -> None:
    run = Path("run")
    run.mkdir()
    (run / "config.json").write_text('{"command": "evaluate')
    assert re.match(r"config of the run: got run/config\.json", refused(*command(measure, "--out", "run")))
    shutil.rmtree(run)
    assert longrope(*command("perplexity", "--out", "run")).code == 0
    message = refused(*command(measure, "--out", "run"))
    assert f'command was "evaluate perplexity", now "evaluate {measure}"' in message


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("measure", ["perplexity", "passkey", "needle", "ruler", "nonuniformity"])
def test_a_record_or_a_metrics_file_of_another_shape_is_told(measure: str) -> None:
    assert longrope(*command(measure, "--out", "run")).code == 0
    lines = Path("run/results.jsonl").read_text().splitlines()
    metrics = json.loads(Path("run/metrics.json").read_text())
    Path("run/DONE").write_text("")  # as earlier versions left it: nothing says what the files were
    for broken in ({}, {**metrics, "results": None}, {**metrics, "results": [True]}, {**metrics, "results": [{}]}):
        Path("run/metrics.json").write_text(json.dumps(broken))
        message = refused(*command(measure, "--out", "run"))
        assert message.startswith("measurements of the run: got run/metrics.json; it holds results")
    Path("run/DONE").unlink()
    for record in ({}, {**json.loads(lines[1])["record"], "found": "x", "loss": "x", "score": None}):
        line = json.dumps({**json.loads(lines[1]), "crc": None, "record": record})
        Path("run/results.jsonl").write_text("\n".join([lines[0], line]) + "\n")
        message = refused(*command(measure, "--out", "run"))
        assert re.match(
            r"lines: got run/results\.jsonl, line 2 with no proper '\w+' in its record; every line", message
        )


@pytest.mark.usefixtures("here")
def test_another_tokenizer_or_chat_template_is_another_harness_run() -> None:
    assert longrope(*command("harness", "--out", "run")).code == 0
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    assert "settings.tokenizer was " in refused(*command("harness", "--out", "run", "-q"))


@pytest.mark.usefixtures("here")
def test_a_function_of_a_task_that_fails_is_told_with_its_file() -> None:
    Path("tasks/odd.py").write_text("def wrong(doc, results):\n    raise KeyError('boom')\n")
    Path("tasks/odd.yaml").write_text(TASK.replace("capitals\n", "odd\n", 1) + "process_results: !function odd.wrong\n")
    ran = longrope(*command("harness", "--tasks", "odd", "-q"))
    assert ran.code == 2
    assert re.search(r"longrope: --tasks: got odd: KeyError: 'boom' in .*tasks/odd\.py; .*; mend the function", ran.err)


def test_a_limit_of_file_sizes_under_kept_answers_is_told_and_the_run_goes_on(here: Path) -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
        "from longrope.cli import main; main()"
    )
    with start(*command("harness", "--out", "run", "-q"), cwd=here, code=limited) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("longrope: output: got run/answers_rank*.db (")
    assert line.endswith("; the disk takes the answers that are kept; free space there; the same command goes on")
    assert longrope(*command("harness", "--out", "run")).code == 0


@pytest.mark.usefixtures("here")
def test_measurements_of_another_version_are_refused_with_the_line() -> None:
    assert longrope(*command("passkey", "--out", "run")).code == 0
    Path("run/DONE").unlink()
    old = '{"method": "factors", "length": 128, "value": 0.5, "tokens": 128, "ci": null}\n'
    Path("run/results.jsonl").write_text(old)
    message = refused(*command("passkey", "--out", "run"))
    assert message.startswith("lines: got run/results.jsonl, line 1 with no proper 'item'; every line is a record")
