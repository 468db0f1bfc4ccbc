"""`longrope extend`: all stages of a small model, plans, resumes after kills, stages that were changed, bad input."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from commands import SHAPE, TARGET, Ran, contents, longrope, refused, start, write_checkpoint, write_documents
from longrope import __version__
from longrope.checkpoint import LoadOptions
from longrope.documents import hold_out, read_sources
from longrope.errors import UserError
from longrope.extension.finish import as_trained
from longrope.extension.going import Texts, Watching, check_documents
from longrope.extension.plan import PLANS, Measures, Plan, Stage, default_plan, make_plan, read_plan, search_settings
from longrope.extension.run import extend
from longrope.factors import FactorTable
from longrope.files import as_line, read_lines
from longrope.model import load_model
from longrope.search import driver
from longrope.search.driver import choose_search_windows, search
from longrope.training.run import finetune
from longrope.windows import windows_of
from longrope.workers import open_workers
from models import ORIGINAL, tokens

FLOAT32 = LoadOptions(device="cpu", dtype="float32", threads=1)
FAR = 8 * ORIGINAL
STEPS = 100  # of a training that is ended on its way
PLAN = """
[[stages]]
do = "search"
to = "4x"
windows = 2
evaluations = 5

[[stages]]
do = "finetune"
to = "4x"
steps = 6
batch = 2
learning_rate = 1e-3
save_every = 2

[[stages]]
do = "second"
to = "8x"
windows = 2
evaluations = 5

[[stages]]
do = "recovery"
to = ["1x", "2x"]
windows = 3
evaluations = 5

[[stages]]
do = "recovery"
to = "4x"
objective = "both"
needle_template = { needle = " {key}: {number}. ", question = " {key}", lead = ":", names = ["nut", "oak"] }
windows = 2
evaluations = 12

[measure]
windows = 2
passkey = 0
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts", characters=3000)
    (folder / "plan.toml").write_text(PLAN)
    return folder


def command(*more: object, out: str = "run", to: int = FAR) -> list[object]:
    given = ["--to", to, "-d", "texts", "--out", out, "--dtype", "float32", "--threads", 1, "--tracker", "none"]
    return ["extend", "model", *given, *more]


@pytest.fixture(scope="module")
def made(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole extension that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(ground, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        ran = longrope(*command("--stages", "plan.toml", "--json"))
    assert ran.code == 0, ran.err
    (folder / "stdout.json").write_text(ran.out)
    return folder


def test_an_extension_ends_with_the_table_the_checkpoint_the_measurements_and_the_page(made: Path) -> None:
    run = made / "run"
    names = [f"01-search-{TARGET}", f"02-finetune-{TARGET}", f"03-second-{FAR}", f"04-recovery-{ORIGINAL}"]
    names += [f"05-recovery-{2 * ORIGINAL}", f"06-recovery-{TARGET}"]
    assert sorted(path.name for path in run.iterdir() if path.name[0] == "0") == names
    table = FactorTable.load(run / "factors.json")
    assert table.lengths == [ORIGINAL, 2 * ORIGINAL, TARGET, FAR]
    found = {name: FactorTable.load(run / name / "factors.json") for name in names}
    for index, name in ((0, names[3]), (1, names[4]), (2, names[5]), (3, names[2])):
        assert table.rows[index] == found[name].row_for(table.lengths[index])
    assert found[names[1]].row_for(TARGET) == found[names[0]].row_for(TARGET), "trained with what was found"
    measured = json.loads((made / "stdout.json").read_text())
    assert [(each["method"], each["length"]) for each in measured["results"]] == [
        ("none", ORIGINAL),
        *(("longrope", length) for length in table.lengths),
    ]
    assert [each["stage"] for each in measured["stages"]] == names
    page = (run / "report.html").read_text()
    assert "<h2>Stages</h2>" in page
    assert all(name in page for name in names)
    assert "in 6 steps" in page
    assert "The convergence: there is no" not in page, "that of its stages is there"
    counted = re.findall(r"<summary>Documents: ([^<]*)", page)
    assert counted == ["train: 4 documents", "search: 4 documents", "unseen: 2 documents"]
    for checkpoint, longest in ((run, FAR), (run / names[1], TARGET)):
        tokenizer = json.loads((checkpoint / "checkpoint" / "tokenizer_config.json").read_text())
        assert tokenizer["model_max_length"] == longest


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_embeddings_that_are_tied_stay_so_where_they_are_trained_beside_adapters(here: Path) -> None:
    """PEFT trains a copy; untied, the base's configuration would say something else of the extension's weights."""
    write_checkpoint(here / "tied", tie_word_embeddings=True)
    words = [each if each != "model" else "tied" for each in command("--stages", "tied.toml", to=TARGET)]
    stages = f"{PLAN.partition('[[stages]]')[0]}[[stages]]{PLAN.split('[[stages]]')[1]}"
    stages += '[[stages]]\ndo = "finetune"\nto = "4x"\nsteps = 2\nlearning_rate = 0.1\nlora = 2\nembeddings = true\n'
    Path("tied.toml").write_text(stages + "[measure]\nwindows = 1\npasskey = 0\n")
    ran = longrope(*words)
    assert ran.code == 0, ran.err
    final, trained = (Path("run") / path / "checkpoint" for path in ("", f"02-finetune-{TARGET}"))
    before = load_file(here / "tied" / "model.safetensors")["model.embed_tokens.weight"]
    for folder in (final, trained):
        weights = load_file(folder / "model.safetensors")
        assert "lm_head.weight" not in weights
        assert not torch.equal(weights["model.embed_tokens.weight"], before)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    ids = tokens(TARGET)
    with torch.no_grad():
        ours, theirs = (load_model(str(each), FLOAT32).model(input_ids=ids).logits for each in (final, trained))
    assert torch.equal(ours, theirs)


def test_a_checkpoint_has_one_dtype_under_whatever_name_its_base_had_it() -> None:
    old, new = {"torch_dtype": "bfloat16", "vocab_size": 9}, {"dtype": "float32", "vocab_size": 9}
    assert as_trained(old, new) == new
    assert as_trained({"text_config": old}, {"text_config": new, "dtype": "float32"}) == {
        "text_config": new,
        "dtype": "float32",
    }
    assert as_trained(old, {}) == old


def test_the_checkpoint_is_the_fine_tuned_weights_with_the_whole_table(made: Path) -> None:
    final = load_model(str(made / "run" / "checkpoint"), FLOAT32)
    trained = load_model(str(made / "run" / f"02-finetune-{TARGET}" / "checkpoint"), FLOAT32)
    assert final.table == FactorTable.load(made / "run" / "factors.json")
    for (name, ours), (_, theirs) in zip(final.model.named_parameters(), trained.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad(), final.patch() as mine, trained.patch() as others:
        mine.install(trained.table)
        others.install(trained.table)
        assert torch.equal(final.model(tokens(TARGET)).logits, trained.model(tokens(TARGET)).logits)
    config = json.loads((made / "run" / "checkpoint" / "config.json").read_text())
    assert config["max_position_embeddings"] == ORIGINAL, "four rows: config.json cannot say them"
    card = (made / "run" / "checkpoint" / "README.md").read_text()
    assert f"02-finetune-{TARGET}" in card
    assert "The weights were fine-tuned." in card


def test_a_recovery_at_the_trained_length_begins_with_its_row_and_those_towards_the_longer_one(
    made: Path,
) -> None:
    run = made / "run"
    here = FactorTable.load(run / f"02-finetune-{TARGET}" / "factors.json").row_for(TARGET)
    longer = FactorTable.load(run / f"03-second-{FAR}" / "factors.json").row_for(FAR)
    lines = read_lines(run / f"06-recovery-{TARGET}" / "evaluations.jsonl")
    tried = {each["origin"]: each for each in reversed(lines)}
    assert lines[0]["origin"] == "row-0", "whose loss is what the others are dropped by"
    for share in (0.0, 0.5, 1.0):
        expected = here.vector ** (1 - share) * longer.vector**share
        row = tried[f"row-{share:g}"]
        assert row["rescale"] == pytest.approx(expected.tolist(), abs=0.006), "on the grid of the search"
        factor = here.attention_factor ** (1 - share) * longer.attention_factor**share
        assert row["attention_factor"] == pytest.approx(factor)
    config = json.loads((run / f"06-recovery-{TARGET}" / "config.json").read_text())
    assert config["settings"]["needle_template"]["lead"] == ":"
    inputs = {each["stage"]: each["inputs"] for each in read_lines(run / "stages.jsonl")}
    assert set(inputs[f"06-recovery-{TARGET}"]) == {"model", "rows"}
    assert set(inputs[f"05-recovery-{2 * ORIGINAL}"]) == {"model"}, "it is between the original and what was trained"


def test_measurements_are_on_documents_that_no_stage_read(made: Path) -> None:
    config = json.loads((made / "run" / "config.json").read_text())
    search, unseen = ({each["sha256"] for each in config["documents"][use]} for use in ("search", "unseen"))
    trained = json.loads((made / "run" / f"02-finetune-{TARGET}" / "config.json").read_text())["documents"]["train"]
    assert unseen
    assert not unseen & search
    assert {each["sha256"] for each in trained} == search


def test_a_finished_extension_is_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    before = contents(Path("run"))
    ran = longrope(*command("--stages", "plan.toml", "--json"))
    assert (ran.code, ran.out) == (0, (made / "stdout.json").read_text())
    assert contents(Path("run")) == before


# A file of each stage: the run is killed as soon as it is there.
MOMENTS = [
    f"01-search-{TARGET}/evaluations.jsonl",
    f"02-finetune-{TARGET}/checkpoints/checkpoint-2",
    f"02-finetune-{TARGET}/checkpoint",
    f"03-second-{FAR}/evaluations.jsonl",
    f"04-recovery-{ORIGINAL}/factors.json",
    f"06-recovery-{TARGET}/evaluations.jsonl",
    "checkpoint",
    "results.jsonl",
]


def test_an_extension_killed_in_every_stage_ends_as_if_undisturbed(here: Path, made: Path) -> None:
    for moment in MOMENTS:
        with start(*command("--stages", "plan.toml", "-q"), cwd=here) as process:
            until = time.monotonic() + 300  # of a machine that does other things, too
            while not (here / "run" / moment).exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            assert (here / "run" / moment).exists(), moment
            process.send_signal(signal.SIGKILL)
    ran = longrope(*command("--stages", "plan.toml", "--json"))
    assert ran.code == 0, ran.err
    results = json.loads((made / "stdout.json").read_text())["results"]
    assert ran.document["results"] == results
    for name in ("factors.json", "checkpoint/factors.json", "checkpoint/model.safetensors", "checkpoint/config.json"):
        assert (here / "run" / name).read_bytes() == (made / "run" / name).read_bytes(), name
    for stage in MOMENTS[:5]:
        losses = Path("run", stage.split("/")[0], "training.jsonl")
        if losses.exists():
            assert losses.read_bytes() == (made / losses).read_bytes()


def test_a_run_that_was_moved_goes_on_with_the_model_that_it_has_fine_tuned(here: Path, made: Path) -> None:
    """Three ways to name the folder of a run: as it was, from its root, and where it was moved to."""
    second, recovery = f"03-second-{FAR}/evaluations.jsonl", f"04-recovery-{ORIGINAL}/evaluations.jsonl"
    ways = (("run", "run", second), ("run", str(here / "run"), recovery))
    for folder, out, moment in ways:
        with start(*command("--stages", "plan.toml", "-q", out=out), cwd=here) as process:
            until = time.monotonic() + 300
            while not (here / folder / moment).exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, moment
    evaluated = (here / "run" / second).read_bytes()
    trained = (here / "run" / f"02-finetune-{TARGET}" / "checkpoint" / "model.safetensors").stat()
    Path("moved").mkdir()
    (here / "run").rename(here / "moved" / "away")
    ran = longrope(*command("--stages", "plan.toml", "--json", out="moved/away"))
    assert ran.code == 0, ran.err
    assert f"02-finetune-{TARGET} is done" in ran.err
    run = here / "moved" / "away"
    assert (run / second).read_bytes() == evaluated, "a stage that is done"
    assert (run / f"02-finetune-{TARGET}" / "checkpoint" / "model.safetensors").stat() == trained
    assert ran.document["results"] == json.loads((made / "stdout.json").read_text())["results"]
    for name in ("factors.json", "checkpoint/model.safetensors", f"02-finetune-{TARGET}/training.jsonl"):
        assert (run / name).read_bytes() == (made / "run" / name).read_bytes(), name


@pytest.mark.usefixtures("here")
def test_a_run_that_was_moved_goes_on_among_its_passkeys() -> None:
    Path("plan.toml").write_text(
        '[[stages]]\ndo = "search"\nto = "8x"\nwindows = 1\nevaluations = 2\n[measure]\nwindows = 1\npasskey = 2\n'
    )
    whole = longrope(*command("--stages", "plan.toml", "--json"))
    assert whole.code == 0, whole.err
    for name in ("DONE", "metrics.json", "passkey/DONE", "passkey/metrics.json"):
        Path("run", name).unlink()
    measured = Path("run/passkey/results.jsonl").read_bytes()
    assert measured.count(b"\n") >= 2
    Path("run").rename("moved")
    ran = longrope(*command("--stages", "plan.toml", "--json", out="moved"))
    assert ran.code == 0, ran.err
    assert ran.document["results"] == whole.document["results"]
    assert Path("moved/passkey/results.jsonl").read_bytes() == measured


def test_one_stage_a_call_ends_as_all_in_one(here: Path, made: Path) -> None:
    names = [each["stage"] for each in json.loads((made / "stdout.json").read_text())["stages"]]
    given: dict[str, Any] = {"to": FAR, "documents": ["texts"], "stages": "plan.toml", "out": "run", "tracker": "none"}
    for number in range(len(names)):
        told = extend("model", **given, options=FLOAT32, at_most=1)
        assert [each["stage"] for each in told["stages"] if each["seconds"] is not None] == names[: number + 1]
        assert "results" not in told
        assert not (here / "run" / "checkpoint").exists()
    assert extend("model", **given, options=FLOAT32, at_most=1)["results"]
    assert Path("run/DONE").exists()
    for name in ("factors.json", "checkpoint/model.safetensors"):
        assert (here / "run" / name).read_bytes() == (made / "run" / name).read_bytes(), name


def copied(made: Path, here: Path, *, unfinished: bool = True) -> None:
    shutil.copytree(made / "run", here / "run")
    if unfinished:
        (here / "run" / "DONE").unlink()


def test_a_stage_that_was_removed_is_made_again(here: Path, made: Path) -> None:
    copied(made, here)
    shutil.rmtree(here / "run" / f"02-finetune-{TARGET}")
    ran = longrope(*command("--stages", "plan.toml"))
    assert ran.code == 0, ran.err
    assert f"01-search-{TARGET} is done" in ran.err
    assert f"03-second-{FAR} is done" in ran.err, "the same weights came of it again"
    assert [line["stage"] for line in read_lines(here / "run" / "stages.jsonl")].count(f"02-finetune-{TARGET}") == 1
    assert "resumed" not in Path("run/metrics.json").read_text(), "its seconds are all that it took"
    assert (here / "run" / "factors.json").read_bytes() == (made / "run" / "factors.json").read_bytes()


def test_the_seconds_of_a_stage_that_was_resumed_say_since_when_they_are(here: Path, made: Path) -> None:
    copied(made, here)
    name = f"06-recovery-{TARGET}"
    Path("run", name, "DONE").unlink()
    stages = Path("run/stages.jsonl")
    stages.write_text("".join(stages.read_text().splitlines(keepends=True)[:-1]))
    assert "resumed" not in Path("run/metrics.json").read_text()
    assert "since it was resumed" not in Path("run/report.html").read_text()
    ran = longrope(*command("--stages", "plan.toml", "--json"))
    assert ran.code == 0, ran.err
    assert [each["stage"] for each in ran.document["stages"] if each.get("resumed")] == [name]
    before = json.loads((made / "stdout.json").read_text())["stages"]
    assert ran.document["stages"][:-1] == before[:-1]
    assert [line["stage"] for line in read_lines(stages) if line.get("resumed")] == [name]
    page = Path("run/report.html").read_text()
    assert page.count("since it was resumed") == 1


def test_a_stage_that_was_changed_and_one_of_other_inputs_are_refused(here: Path, made: Path) -> None:
    copied(made, here)
    stage = Path("run", f"02-finetune-{TARGET}")
    weights = stage / "checkpoint" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    told = f"stage: got {stage.name}, whose files have changed since it was made; later stages are made of it; "
    assert told + f"restore them, or remove {stage}: the same command makes it again" in ran_into(here)
    weights.write_bytes(whole)
    lines = read_lines(Path("run/stages.jsonl"))
    lines[2]["inputs"]["model"] = "sha256:of another"
    Path("run/stages.jsonl").write_text("".join(as_line(line) for line in lines))
    told = f"stage: got 03-second-{FAR}, which was made of another model; a stage goes on from the one before it; "
    assert told in ran_into(here)


@pytest.mark.parametrize("name", [f"01-search-{TARGET}", f"02-finetune-{TARGET}"])
def test_a_stage_whose_folder_is_no_run_any_more_is_told_with_what_makes_it_again(
    here: Path, made: Path, name: str
) -> None:
    copied(made, here)
    Path("run", name, "DONE").unlink()
    Path("run", name, "config.json").write_text("{}\n")
    told = ran_into(here)
    assert told.startswith("longrope: stage: got ")
    assert told.endswith(f"; remove run/{name}: the same command makes it again\n")
    shutil.rmtree(Path("run", name))
    assert longrope(*command("--stages", "plan.toml", "-q")).code == 0
    assert Path("run/factors.json").read_bytes() == (made / "run" / "factors.json").read_bytes()


@pytest.mark.parametrize("name", ["documents", "short_documents"])
def test_a_training_whose_own_documents_have_changed_is_refused(here: Path, name: str) -> None:
    for folder, text in (("tasks", "0.txt"), ("other", "1.txt")):
        Path(folder).mkdir()
        Path("texts", text).rename(Path(folder, text))
    search = Stage(1, "search", TARGET, "base", {"windows": 2, "evaluations": 2})
    train = Stage(2, "finetune", TARGET, settings={name: ["tasks"], "steps": 2, "batch": 2, "mixed": 0.5})
    given: dict[str, Any] = {"to": TARGET, "documents": ["texts"], "unseen": ["other"], "out": "run", "tracker": "none"}
    given |= {"stages": Plan((search, train), Measures(windows=1, passkey=0)), "options": FLOAT32}
    told = f"stage: got {train.name}, which was made of other {name.replace('_', ' ')}; "
    told += "documents of a stage stay as they were when it was trained; "
    told += f"restore them, or remove run/{train.name}: the same command makes it again"
    task = Path("tasks/0.txt")
    whole = task.read_text()

    assert "results" not in extend("model", **given, at_most=2)
    task.write_text(whole.replace("rope", "cord"))
    with pytest.raises(UserError) as refusal:
        extend("model", **given)
    assert str(refusal.value) == told
    task.write_text(whole)
    Path("tasks/renamed").mkdir()
    task = task.rename("tasks/renamed/0.txt")
    trained = Path("run", train.name, "checkpoint", "model.safetensors").stat()
    finished = extend("model", **given)["results"]
    assert Path("run", train.name, "checkpoint", "model.safetensors").stat() == trained, "the same, elsewhere"
    task.write_text(whole.replace("rope", "cord"))
    with pytest.raises(UserError) as refusal:
        extend("model", **given)
    assert str(refusal.value) == told.replace(train.name + ":", f"{train.name} and run/DONE:"), "of a finished run, too"

    lines = read_lines(Path("run/stages.jsonl"))
    assert lines[1]["inputs"].pop(name)
    Path("run/DONE").unlink()
    Path("run/stages.jsonl").write_text("".join(as_line(line) for line in lines))
    assert extend("model", **given)["results"], "an earlier version did not write down which they were"
    assert Path("run", train.name, "checkpoint", "model.safetensors").stat() == trained

    task.write_text(whole[::-1])
    shutil.rmtree(Path("run", train.name))  # as it was told
    Path("run/DONE").unlink()
    again = extend("model", **given)["results"]
    # Of short documents so few steps may have drawn none.
    assert again != finished or name == "short_documents", "what was measured before is of other weights"
    assert again == extend("model", **given | {"out": "fresh"})["results"]


@pytest.mark.parametrize("name", ["results.jsonl", "evaluations.jsonl", "metrics.json"])
def test_a_file_of_a_stage_that_no_later_one_reads_is_refused_when_it_has_changed(
    here: Path, made: Path, name: str
) -> None:
    copied(made, here)
    file = Path("run", f"01-search-{TARGET}", name)
    whole = file.read_bytes()
    file.write_bytes(b"")
    assert name in ran_into(here)
    file.write_bytes(whole)
    ran = longrope(*command("--stages", "plan.toml", "-q"))
    assert ran.code == 0, ran.err


def ran_into(here: Path) -> str:
    ran: Ran = longrope(*command("--stages", "plan.toml", "-q"))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    return ran.err


@pytest.mark.usefixtures("here")
def test_other_settings_are_another_run(made: Path, here: Path) -> None:
    copied(made, here)
    Path("plan.toml").write_text(PLAN.replace("steps = 6", "steps = 7"))
    told = ran_into(here)
    assert f"settings.stages.02-finetune-{TARGET}.steps was 6, now 7" in told


@pytest.mark.usefixtures("here")
def test_without_training_it_is_one_search_and_says_what_that_costs() -> None:
    Path("plan.toml").write_text(
        '[[stages]]\ndo="search"\nto="10x"\nwindows=1\nevaluations=2\n[measure]\nwindows=1\npasskey=2\n'
    )
    words = ["extend", "model", "--to", 10 * ORIGINAL, "-d", "texts/1.txt", "--unseen", "texts/0.txt", "--out", "run"]
    ran = longrope(*words, "--no-finetune", "--stages", "plan.toml", "--dtype", "float32")
    assert ran.code == 0, ran.err
    assert "beyond 8 times the original length factors alone lose much" in ran.err
    assert FactorTable.load("run/checkpoint/factors.json").lengths == [ORIGINAL, 10 * ORIGINAL]
    assert "unchanged" in Path("run/checkpoint/README.md").read_text()
    assert json.loads(Path("run/passkey/metrics.json").read_text())["measure"] == "passkey"
    assert "passkey" in Path("run/report.html").read_text()


def test_what_a_training_would_refuse_is_refused_before_the_searches(here: Path) -> None:
    stages = (Stage(1, "search", TARGET, "base"), Stage(2, "finetune", TARGET, settings={"steps": 1, "lora": 2}))
    plan = Plan(stages, Measures(windows=1, passkey=0))
    given: dict[str, Any] = {"documents": "texts", "stages": plan, "device": "cpu", "tracker": "none", "out": "run"}
    for more in ({"dtype": "float16"}, {"dtype": "float16", "dry_run": True}):
        with pytest.raises(UserError, match=r"^--dtype: got float16; the gradient of one token"):
            extend("model", to=TARGET, **given, **more)
    with pytest.raises(UserError, match=r"^--seed: got 4294967296; it is from 0 to below 2\^32"):
        extend("model", to=TARGET, seed=2**32, **given)
    assert not (here / "run").exists()


def test_searches_without_a_training_leave_a_row_each(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stages = tuple(
        Stage(number, "search", to, "base", {"windows": 2, "evaluations": 2})
        for number, to in ((1, 2 * ORIGINAL), (2, TARGET))
    )
    plan = Plan(stages, Measures(windows=1, passkey=0))
    extend("model", to=TARGET, documents="texts", out="rows", stages=plan, options=FLOAT32)
    table = FactorTable.load(here / "rows" / "factors.json")
    assert table.lengths == [ORIGINAL, 2 * ORIGINAL, TARGET]
    trained, held = hold_out(read_sources(["texts"]))
    each = [
        side[0].name if len(side) == 1 else f"{len(side)} documents, such as {side[0].name}" for side in (held, trained)
    ]
    assert f"held out of all stages and measured on: {each[0]}; left for the stages: {each[1]}" in caplog.messages
    for row, stage in zip(table.rows[1:], stages, strict=True):
        assert row == FactorTable.load(here / "rows" / stage.name / "factors.json").row_for(stage.to)
    names = f"01-search-{2 * ORIGINAL}, 02-search-{TARGET}"
    assert table.provenance == {"command": "extend", "stages": names, "longrope": __version__}


def test_a_second_fine_tuning_goes_on_with_the_first_ones_weights_under_factors_of_its_own_length(here: Path) -> None:
    """Progressive extension: both lengths are searched on the base, and the weights go from one to the next."""
    near, few = 2 * ORIGINAL, {"windows": 2, "evaluations": 4}
    trained = {"steps": 3, "batch": 2, "learning_rate": 1e-3}
    stages = (
        Stage(1, "search", near, "base", few),
        Stage(2, "search", TARGET, "base", few),
        Stage(3, "finetune", near, settings=trained),
        Stage(4, "search", FAR, "last", few),
        Stage(5, "finetune", TARGET, settings=trained),
        Stage(6, "finetune", FAR, settings=trained | {"steps": 1}),
    )
    whole = Plan(stages, Measures(windows=1, passkey=0))
    given: dict[str, Any] = {"unseen": "held/8.txt", "stages": whole, "options": FLOAT32, "tracker": "none"}
    write_documents(here / "held", characters=3000, count=9)
    extend("model", to=FAR, documents="texts", out="steps", **given)
    made = [here / "steps" / stage.name for stage in stages]
    model = "model"
    for at, factors in ((2, 0), (4, 1), (5, 3)):
        by_hand = finetune(
            model, length=stages[at].to, factors=made[factors] / "factors.json", documents="texts", tracker="none",
            options=FLOAT32, out=f"by-hand-{at}", **stages[at].settings,
        )  # fmt: skip
        assert [line["loss"] for line in read_lines(made[at] / "training.jsonl")] == by_hand["losses"]
        model = f"by-hand-{at}/checkpoint"
    weights = [(here / folder / "checkpoint/model.safetensors").read_bytes() for folder in ("steps", "by-hand-5")]
    assert weights[0] == weights[1]
    search("model", to=TARGET, documents="texts", out="on-base", options=FLOAT32, windows=2, evaluations=4)
    search("by-hand-2/checkpoint", to=FAR, documents="texts", out="on-last", options=FLOAT32, windows=2, evaluations=4)
    for out, at in (("on-base", 1), ("on-last", 3)):
        assert FactorTable.load(f"{out}/factors.json").rows == FactorTable.load(made[at] / "factors.json").rows


def test_workers_of_an_extension_are_those_of_its_searches(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan((Stage(1, "search", TARGET, "base", {"windows": 2, "evaluations": 6}),), Measures(windows=1, passkey=0))
    asked: list[str | None] = []

    def opened(workers: str | None, *given: Any) -> Any:
        asked.append(workers)
        return open_workers(workers, *given)

    monkeypatch.setattr(driver, "open_workers", opened)
    found = []
    for workers, out in ((None, "alone"), (2, "together")):
        extend("model", to=TARGET, documents="texts", out=out, stages=plan, options=FLOAT32, workers=workers)
        found.append(FactorTable.load(here / out / "factors.json").rows)
    assert found[0] == found[1]
    assert asked == [None, "2"]


def test_a_recovery_begins_with_the_scaling_that_the_base_had(here: Path) -> None:
    scaled = write_checkpoint(here / "scaled")
    config = json.loads((scaled / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": ORIGINAL // 2, "rope_theta": 500.0}
    (scaled / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling, "rope_scaling": None}))
    own = load_model(str(scaled), FLOAT32).meaning.rows[-1]
    assert set(own.rescale) != {1.0}
    base = load_model(str(scaled), FLOAT32).rope.original_length
    few = {"windows": 2, "evaluations": 20}
    stages = (
        Stage(1, "search", TARGET, "base", few),
        Stage(2, "finetune", TARGET, settings={"steps": 2, "batch": 2}),
        Stage(3, "recovery", base, settings=few),
    )
    plan = Plan(stages, Measures(windows=1, passkey=0))
    extend("scaled", to=TARGET, documents="texts", out="back", stages=plan, options=FLOAT32, tracker="none")
    lines = read_lines(here / "back" / stages[2].name / "evaluations.jsonl")
    tried = [line for line in lines if line["origin"].startswith("init")]
    assert tried
    assert any(line["rescale"] == pytest.approx(own.rescale, rel=1e-5) for line in tried)


def test_documents_that_change_while_it_runs_are_told_before_they_are_trained_on(here: Path) -> None:
    """What is held out is named by all texts: one more of them would be trained on what is measured on."""
    plan = read_plan("plan.toml", ORIGINAL)
    given: dict[str, Any] = {"documents": "texts", "stages": plan, "options": FLOAT32, "tracker": "none", "out": "run"}

    def add(stage: str) -> None:
        if stage == f"02-finetune-{TARGET} begins":
            write_documents(here / "more", count=20, characters=3000)
            shutil.move(here / "more" / "19.txt", here / "texts" / "another.txt")

    with pytest.raises(UserError, match=r"^--documents: got other texts than when this began; all stages are made of"):
        extend("model", to=FAR, watching=Watching(stage=add), **given)
    assert not Path(f"run/02-finetune-{TARGET}").exists()
    Path("texts/another.txt").unlink()
    extend("model", to=FAR, at_most=1, **given)
    assert Path(f"run/02-finetune-{TARGET}/DONE").exists()


def test_a_launcher_trains_the_stage(here: Path, made: Path) -> None:
    launcher = f"{sys.executable} -m torch.distributed.run --nproc-per-node 1"
    plan = PLAN.partition('[[stages]]\ndo = "second"')[0] + "[measure]\nwindows = 1\npasskey = 0\n"
    Path("plan.toml").write_text(plan)
    with start(
        *command("--stages", "plan.toml", "--launcher", launcher, "--device", "cpu", to=TARGET), cwd=here
    ) as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    stage = f"02-finetune-{TARGET}/training.jsonl"
    assert (here / "run" / stage).read_bytes() == (made / "run" / stage).read_bytes()


def others_in(folder: Path) -> list[str]:
    """The command lines of all other processes whose folder this is."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.cwd() == str(folder):
                found.append(" ".join(process.cmdline()))
    return found


def test_a_training_of_several_processes_ends_with_the_command_that_launched_it(here: Path) -> None:
    plan = PLAN.partition('[[stages]]\ndo = "second"')[0] + "[measure]\nwindows = 1\npasskey = 0\n"
    Path("plan.toml").write_text(plan.replace("steps = 6", f"steps = {STEPS}"))
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    words = command("--stages", "plan.toml", "--launcher", launcher, "--device", "cpu", "-q", to=TARGET)
    resumed_by = shlex.join(["longrope", *map(str, words)])
    losses = here / "run" / f"02-finetune-{TARGET}" / "training.jsonl"
    errors = here.parent / "errors"  # no pipe: its end would be that of all processes
    trained = 0
    for which in (signal.SIGTERM, signal.SIGINT):
        with errors.open("w") as file, start(*words, cwd=here, stderr=file) as process:
            until = time.monotonic() + 120
            while steps_in(losses) <= trained and process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            assert steps_in(losses) > trained, errors.read_text()
            assert len(others_in(here)) >= 4, "the command, its launcher and two that train"
            process.send_signal(which)
            code = process.wait(timeout=30)
        assert not any("finetune" in each for each in others_in(here)), "the next command would find a lock"
        trained = steps_in(losses)
        assert trained < STEPS
        assert code == 130
        told = [line for line in errors.read_text().splitlines() if line.startswith("longrope: ")]
        assert told[-1] == f"longrope: interrupted; this goes on with it: {resumed_by}"
        assert set(told[:-1]) <= {"longrope: interrupted; the same command goes on with it"}, "of one that trains"
    ran = longrope(*words)
    assert ran.code == 0, ran.err
    assert steps_in(losses) == STEPS


def steps_in(losses: Path) -> int:
    return losses.read_bytes().count(b"\n") if losses.exists() else 0


@pytest.mark.usefixtures("here")
def test_a_launcher_that_cannot_start_is_told() -> None:
    ran = longrope(*command("--stages", "plan.toml", "--launcher", "no-such-command", "-q"))
    assert ran.code == 2
    assert "--launcher: got no-such-command (No such file or directory)" in ran.err


@pytest.mark.usefixtures("here")
def test_a_dry_run_prints_every_stage_and_writes_nothing() -> None:
    before = contents(Path())
    ran = longrope(*command("--stages", "plan.toml", "--dry-run", "--json"))
    assert ran.code == 0, ran.err
    assert contents(Path()) == before
    rows = {each["method"]: each for each in ran.document["results"]}
    assert rows[f"02-finetune-{TARGET}"]["tokens"] == 3 * 6 * 2 * TARGET
    measured = 6  # the found factors and five baselines, at the end
    assert rows[f"01-search-{TARGET}"]["tokens"] == (5 + measured) * 2 * TARGET
    assert rows[f"03-second-{FAR}"]["tokens"] == (5 + measured) * 2 * FAR
    measured = 3  # the found factors, the checkpoint's own and none
    assert rows[f"05-recovery-{2 * ORIGINAL}"]["tokens"] == (5 + measured) * 3 * 2 * ORIGINAL
    assert rows[f"06-recovery-{TARGET}"]["tokens"] == (12 * 4 + measured * 2) * TARGET, "two windows of either kind"
    assert rows["perplexity"]["tokens"] == 2 * (ORIGINAL + ORIGINAL + 2 * ORIGINAL + TARGET + FAR), "the base, too"
    given: dict[str, Any] = {"to": FAR, "documents": "texts", "stages": "plan.toml"}
    assert extend(Path("model"), **given, options=FLOAT32, dry_run=True, workers=2) == ran.document
    assert contents(Path()) == before
    told = longrope(*command("--stages", "plan.toml", "--dry-run"))
    assert "token-passes at most" in told.err
    assert "refused" not in told.err
    Path("short.txt").write_text("A short one. " * 8)
    words = command("--stages", "plan.toml", "--dry-run")
    words[words.index("texts")] = "short.txt"
    ran = longrope(*words)
    assert (ran.code, "token-passes at most" in ran.err) == (0, True)
    assert "with these documents it is going to be refused: --documents: got " in ran.err
    words[words.index("short.txt")] = "nothing"
    assert "'nothing', which does not exist" in refused(*words)


@pytest.mark.usefixtures("here")
def test_stages_of_a_plan_that_need_training_are_named_where_they_are_left_out() -> None:
    words = command("--no-finetune", "--dry-run")
    told = longrope(*words, "--stages", "plan.toml").err
    names = [f"01-search-{TARGET}", f"02-finetune-{TARGET}", f"03-second-{FAR}", f"04-recovery-{ORIGINAL}"]
    names += [f"05-recovery-{2 * ORIGINAL}", f"06-recovery-{TARGET}"]
    left_out = f"one search at the target, and leaves out {', '.join(names)} of the plan"
    assert left_out in " ".join(told.split())
    assert "leaves out" not in longrope(*words, "--to", 16 * ORIGINAL).err, "of the ratio's own plan it is what it says"
    Path("search.toml").write_text('[[stages]]\ndo = "search"\nto = "8x"\n')
    assert "leaves out" not in longrope(*words, "--stages", "search.toml").err


@pytest.mark.parametrize(
    ("ratio", "stages"),
    [
        (8, ["search 8"]),
        (32, ["search 32", "finetune 32", "recovery 1", "recovery 2"]),
        (64, ["search 32", "search 64", "finetune 32", "finetune 64", "recovery 1", "recovery 2"]),
        (48, ["search 32", "search 48", "finetune 32", "finetune 48", "recovery 1", "recovery 2"]),
        (
            512,
            ["search 32", "search 64", "finetune 32", "finetune 64", "second 512", "recovery 1", "recovery 2"],
        ),
    ],
)
def test_the_default_stages_follow_from_the_ratio(ratio: int, stages: list[str]) -> None:
    plan = default_plan(4096, ratio * 4096)
    assert [f"{stage.do} {stage.to // 4096}" for stage in plan.stages] == stages
    steps = [stage.settings["steps"] for stage in plan.stages if stage.do == "finetune"]
    assert steps == [400, 600][: len(steps)], "the paper's"
    assert all(stage.on == "base" for stage in plan.stages if stage.do == "search")


def test_the_plans_of_the_papers_are_the_default_stages_and_one_with_mixed_windows() -> None:
    plan = read_plan("longrope", 4096)
    assert plan.stages == default_plan(4096, 512 * 4096).stages
    second = read_plan("longrope2", 8192)
    assert [stage.do for stage in second.stages] == ["search", "finetune"]
    assert second.stages[1].settings["mixed"] == 0.3
    mistral = read_plan("longrope-mistral", 4096)
    assert [(stage.do, stage.to) for stage in mistral.stages] == [(stage.do, stage.to) for stage in plan.stages]
    trained = [stage for stage in mistral.stages if stage.do == "finetune"]
    assert [(stage.window, stage.settings["recipe"]) for stage in trained] == [(16384, "longrope-mistral")] * 2
    assert set(PLANS) == {"longrope", "longrope-mistral", "longrope2"}


def plan_of(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"stages": list(stages), **more}


SEARCH = {"do": "search", "to": "4x"}
TRAIN = {"do": "finetune", "to": "4x", "steps": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "stages: got None; a plan has one or more [[stages]]"),
        (plan_of(SEARCH, name="x"), "plan: got name; its keys are measure, stages"),
        (plan_of({"do": "dance", "to": 4}), "stage 1: do: got 'dance'; it is one of search, finetune, "),
        (plan_of({"do": "search"}), 'stage 1: to: got None; it is a length such as "128k"'),
        (plan_of({"do": "search", "to": "0x"}), "stage 1: to: got '0x'; it is a length"),
        (plan_of({"do": "search", "to": True}), "stage 1: to: got True; it is a length"),
        (plan_of({"do": "search", "to": "1.5x"}), "stage 1: to: got '1.5x'; it is a length such as"),
        (plan_of({"do": "search", "to": "2x"}, SEARCH, TRAIN), "01-search-96: got nothing that uses it; a search on"),
        (plan_of({"do": "search", "to": "many"}), "length: got 'many'; a length is"),
        (plan_of({"do": "search", "to": ["4x", "8x"]}), "stage 1: to: got 2 lengths; it is one length"),
        (plan_of(SEARCH | {"steps": 4}), "stage 1: got steps; its keys are"),
        (plan_of(SEARCH | {"method": "luck"}), "stage 1: --method: got 'luck'; it is one of"),
        (plan_of(SEARCH | {"on": "top"}), "stage 1: on: got 'top'; it is base or last"),
        (plan_of(SEARCH, TRAIN | {"on": "base"}), "stage 2: on: got 'base'; it is base or last, and of a search only"),
        (plan_of(SEARCH, TRAIN | {"steps": "many"}), "stage 2: steps: got 'many'; it is a number"),
        (plan_of(SEARCH, {"do": "finetune", "to": "4x"}), "stage 2: --steps: got none; a training has"),
        (plan_of(SEARCH, TRAIN | {"documents": 5}), "stage 2: documents: got 5; it is a list"),
        (plan_of(SEARCH, TRAIN | {"documents": ["x", 5]}), "stage 2: documents: got ['x', 5]; it is a list"),
        (
            plan_of(SEARCH, TRAIN | {"mixed": 0.3, "short_documents": [5]}),
            "stage 2: short_documents: got [5]; it is a list of the short documents of this stage",
        ),
        (
            plan_of(SEARCH, TRAIN | {"short_documents": ["x"]}),
            "stage 2: short_documents: got no mixed; they are what windows of mixed are packed of",
        ),
        (
            plan_of(SEARCH, TRAIN | {"window_length": "5x"}),
            "stage 2 (finetune): window_length: got 240; it is above the original length of 48, and at most 192, whose",
        ),
        (plan_of(SEARCH, TRAIN | {"window_length": 48}), "stage 2 (finetune): window_length: got 48; it is above"),
        (plan_of(SEARCH, TRAIN | {"window_length": True}), "stage 2: window_length: got True; it is a length such as"),
        (plan_of(SEARCH | {"window_length": "2x"}), "stage 1: got window_length; its keys are"),
        (plan_of(TRAIN), "stage 1 (finetune): got no search for 192 before it; a fine-tuning uses"),
        (plan_of({"do": "search", "to": "1x"}), "stage 1 (search): got 48; a search goes beyond the original length"),
        (plan_of(SEARCH, {"do": "second", "to": "8x"}), "stage 2 (second): got no fine-tuning before it; "),
        (plan_of(SEARCH, TRAIN, {"do": "second", "to": "4x"}), "stage 3 (second): got 192; a second interp"),
        (plan_of(SEARCH, TRAIN, {"do": "recovery", "to": "5x"}), "stage 3 (recovery): got 240; a recovery is from"),
        (plan_of(SEARCH | {"needle_template": "x"}), "stage 1: needle_template: got 'x'; it is a table of needle,"),
        (
            plan_of(SEARCH | {"objective": "both", "needle_template": {"needle": "{key}"}}),
            "stage 1: needle_template question: got no such field; a needle template has it",
        ),
        (
            plan_of(SEARCH | {"needle_template": {"needle": "{key} {number}", "question": "{key}"}}),
            "stage 1: --needle-template: got --objective perplexity; it is the wording of the needle objective",
        ),
        (plan_of(SEARCH, SEARCH), "stages: got two of search to 192; each is there once"),
        (plan_of(SEARCH, TRAIN, {"do": "second", "to": "8x"}, TRAIN), "03-second-384: got a fine-tuning after it; "),
        (plan_of(SEARCH, measure=3), "measure: got 3; it is a table"),
        (plan_of(SEARCH, {"do": "search", "to": "8x"}, TRAIN), "02-search-384: got nothing that uses it; "),
        (plan_of(SEARCH, TRAIN | {"mixed": 1.5}), "stage 2: mixed: got 1.5; it is a share between 0 and 1"),
        (plan_of(SEARCH, TRAIN | {"lora": "16"}), "stage 2: lora: got '16'; it is a whole number of at least 1"),
        (plan_of(SEARCH, TRAIN | {"save_dtype": "int8"}), "stage 2: save_dtype: got 'int8'; it is one of float32, bfl"),
        (plan_of(SEARCH, TRAIN | {"norms": True}), "stage 2: norms: got no lora; it is a setting of LoRA"),
        (plan_of(SEARCH | {"start_tokens": 400}), "stage 1 (search): --start-tokens: got '400'; it is a number of"),
        (plan_of(SEARCH | {"attention_factor": "much"}), "stage 1 (search): --attention-factor: got 'much'; it is su"),
        (
            plan_of(SEARCH, TRAIN, {"do": "second", "to": "16x", "search_length": "2x"}),
            "stage 3 (second): --search-length: got 96 tokens; it is an extension that is shorter",
        ),
        (plan_of(SEARCH, measure={"lengths": []}), "measure: lengths: got none; there is at least one"),
        (plan_of(SEARCH, measure={"lengths": ["8x"]}), "measure: lengths: got 384; there is at least one, and none"),
        (plan_of(SEARCH, measure={"windows": 0}), "measure: windows: got 0; lengths are a list"),
        (plan_of(SEARCH, measure={"seed": 0}), "measure: got seed; its keys are lengths, passkey, windows"),
        (plan_of(SEARCH, measure={"lengths": [1, "4x"]}), "measure: lengths: got 1; a window is of at least 2 tokens"),
        (
            plan_of(SEARCH | {"windows": 2, "token_passes": 2 * TARGET - 1}),
            "stage 1 (search): --token-passes: got 383; one evaluation of all search windows takes 384; ",
        ),
        (
            plan_of(SEARCH | {"windows": 2, "objective": "both", "token_passes": 2 * TARGET}),
            "stage 1 (search): --token-passes: got 384; one evaluation of all search windows takes 768; ",
        ),
        (
            plan_of({"do": "search", "to": "8x", "search_length": "4x", "windows": 2, "token_passes": 383}),
            "stage 1 (search): --token-passes: got 383; one evaluation of all search windows takes 384; ",
        ),
    ],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_told(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        make_plan(data, ORIGINAL)
    assert str(told.value).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("windows = 2.5", "--windows: got 2.5; it is a whole number; give one"),
        ("windows = true", "--windows: got True; it is a whole number; give one"),
        ("evaluations = nan", "--evaluations: got nan; it is a whole number; give one"),
        ("evaluations = '5'", "--evaluations: got '5'; it is a whole number; give one"),
        ("token_passes = inf", "--token-passes: got inf; it is a whole number; give one"),
        ("gradient_windows = [1]", "--gradient-windows: got [1]; it is a whole number; give one"),
        ("needle_digits = 5.0", "--needle-digits: got 5.0; it is a whole number; give one"),
        ("hours = true", "--hours: got True; it is a finite number; give one"),
        ("hours = nan", "--hours: got nan; it is a number above 0; give a larger number"),
        ("hours = inf", "--hours: got inf; it is a number above 0; give a larger number"),
        ("hours = '3'", "--hours: got '3'; it is a finite number; give one"),
        (f"hours = 1{'0' * 400}", "--hours: got 1000"),
        ("race = 'no'", "--race: got 'no'; it is true or false; give one"),
        ("race = 1", "--race: got 1; it is true or false; give one"),
        ("method = ['hybrid']", "--method: got ['hybrid']; it is one of"),
        ("start_tokens = [1]", "--start-tokens: got [1]; it is a word, or a finite number; give one"),
        ("attention_factor = inf", "--attention-factor: got inf; it is a word, or a finite number; give one"),
    ],
)
def test_a_setting_of_a_search_that_is_of_another_type_is_told(line: str, message: str) -> None:
    with pytest.raises(UserError) as told:
        make_plan(tomllib.loads(f'[[stages]]\ndo = "search"\nto = "4x"\n{line}'), ORIGINAL)
    assert str(told.value).startswith(f"stage 1: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("recipe = ['longrope2']", "recipe: got ['longrope2']; it is one of longrope-llama2, longrope-mistral, long"),
        ("recipe = 2", "recipe: got 2; it is one of longrope-llama2"),
        ("learning_rate = inf", "learning_rate: got inf; it is a finite number"),
        ("weight_decay = inf", "weight_decay: got inf; it is a finite number"),
        ("clip = nan", "clip: got nan; it is a finite number"),
        (f"learning_rate = 1{'0' * 400}", "learning_rate: got 1000"),
        ("batch = 2.0", "batch: got 2.0; it is a number, of schedule a word"),
        ("mixed = nan", "mixed: got nan; it is a share between 0 and 1"),
    ],
)
def test_a_setting_of_a_training_that_is_of_another_type_is_told(line: str, message: str) -> None:
    text = f'[[stages]]\ndo = "search"\nto = "4x"\n[[stages]]\ndo = "finetune"\nto = "4x"\nsteps = 2\n{line}'
    with pytest.raises(UserError) as told:
        make_plan(tomllib.loads(text), ORIGINAL)
    assert str(told.value).startswith(f"stage 2: {message}")


def test_numbers_of_a_plan_are_taken_as_they_may_be_written() -> None:
    line = {"start_tokens": 4, "attention_factor": 1, "hours": 2, "race": True, "method": "evolution", "windows": 2}
    (stage,) = make_plan(plan_of(SEARCH | line), ORIGINAL).stages
    settings = search_settings(stage, 0)
    assert (settings.start_tokens, settings.attention_factor, settings.hours) == ("4", "1", 2)
    train = TRAIN | {"learning_rate": 1, "mixed": 0.3, "documents": "one", "short_documents": "two"}
    told = make_plan(plan_of(SEARCH, train), ORIGINAL).stages[1].settings
    assert (told["learning_rate"], told["documents"], told["short_documents"]) == (1, ["one"], ["two"])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "none.toml"], "--stages: got none.toml, which is no file; it is a TOML file, or one of longrope"),
        (["--stages", "texts/0.txt"], "--stages: got texts/0.txt ("),
        (["--stages", "longrope"], "--to: got 384; the stages end at 24k"),
        (["--to", "40"], "--to: got 40 tokens; the target is longer than the model's original length of 48"),
        (["--to", "64k"], "--documents: got documents to search on, the longest of "),
        (["--unseen", "texts"], "--unseen: got 6 documents, all of them used before"),
        (["--search-documents", "texts/1.txt"], "--unseen: got none, with --search-documents; "),
        (
            ["--stages", "plan.toml", "--tracker", "mirror"],
            "--tracker: got 'mirror'; it is none, all, or some of",
        ),
        (
            ["--launcher", 'torchrun "x'],
            "--launcher: got 'torchrun \"x'; it is a command as a shell reads it (no closing quotation); correct its",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(words: list[object], message: str) -> None:
    assert message in refused(*command(*words))


@pytest.mark.usefixtures("here")
def test_documents_that_are_too_short_to_be_measured_on_are_told_first() -> None:
    Path("short").mkdir()
    Path("short/one.txt").write_text("too short")
    told = refused(*command("--stages", "plan.toml", "--unseen", "short"))
    found = f"--unseen: got held-out documents, the longest of 10 tokens, which hold 0 windows of {FAR}; "
    assert told == found + (
        f"2 windows of {FAR} tokens are measured at the end; "
        "give longer or more of them, or fewer windows or shorter lengths under [measure]"
    )


BOTH = """
[[stages]]
do = "search"
to = "8x"
search_length = "4x"

[[stages]]
do = "finetune"
to = "8x"
steps = 1

[[stages]]
do = "recovery"
to = "4x"
objective = "both"
windows = 6
gradient_windows = 64
"""


def test_documents_are_refused_before_any_stage_exactly_where_a_stage_or_the_end_would_refuse_them(here: Path) -> None:
    loaded, settled = load_model("model", FLOAT32), []
    plan = make_plan(tomllib.loads(BOTH), ORIGINAL)
    lengths = {ORIGINAL, TARGET, FAR}
    for size in range(300, 3900, 190):
        texts = read_sources([str(write_documents(here / f"of-{size}", count=1, characters=size))])
        other = read_sources([str(write_documents(here / "long", count=2, characters=6000))])
        for searched, unseen in ((texts, other), (other, texts)):
            begun = partial(check_documents, loaded, plan, Texts(("any",), False, other, searched, unseen), 0)
            searches = [search_settings(stage, 0) for stage in plan.stages if stage.do != "finetune"]
            later: list[Callable[[], object]] = [
                partial(choose_search_windows, loaded, settings, searched) for settings in searches
            ]
            later += [partial(windows_of, loaded, unseen, length, None, 0) for length in lengths]
            settled.append(any(map(is_refused, later)))
            assert is_refused(begun) == settled[-1], (size, len(searched))
    assert {True, False} == set(settled[::2]) == set(settled[1::2]), "of those to search on, and of those unseen"


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except UserError:
        return True
    return False


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            BOTH,
            "--documents: got documents to search on, the longest of 1501 tokens, which hold 7 windows of 192; "
            "01-search-384 searches on 8 windows of 192 tokens; "
            "give longer or more of them, --search-documents, or a plan with fewer windows",
        ),
        (
            BOTH.replace('"8x"\nsearch', '"8x"\nwindows = 3\nsearch').replace("windows = 6", "windows = 8"),
            "--documents: got documents to search on, the longest of 1501 tokens, which hold 7 windows of 192; "
            "03-recovery-192 searches on 8 windows of 192 tokens; ",
        ),
        (
            BOTH.replace('"8x"\nsearch', '"8x"\nwindows = 3\nsearch'),
            "--unseen: got held-out documents, the longest of 1300 tokens, which hold 3 windows of 384; "
            "8 windows of 384 tokens are measured at the end; ",
        ),
        (
            BOTH.replace('"8x"\nsearch', '"8x"\nwindows = 3\nsearch').replace('to = "4x"', 'to = "1x"'),
            "03-recovery-48: --objective: got a window of 48 tokens; the needle's prompt without a document takes ",
        ),
    ],
)
def test_too_few_windows_are_told_before_any_stage(stages: str, message: str) -> None:
    Path("plan.toml").write_text(stages)
    Path("one.txt").write_text(Path("texts/0.txt").read_text()[:1500])
    Path("two.txt").write_text(Path("texts/1.txt").read_text()[:1299])
    words = ["extend", "model", "--to", FAR, "-d", "one.txt", "--unseen", "two.txt", "--stages", "plan.toml"]
    assert refused(*words, "--out", "run").startswith(message)


MIXED = PLAN.partition('[[stages]]\ndo = "second"')[0].replace(
    "steps = 6", 'steps = 2\nmixed = 0.5\nshort_documents = ["short/0.txt", "short/1.txt"]'
)


def test_short_documents_of_a_stage_are_what_its_windows_are_packed_of(here: Path) -> None:
    write_documents(here / "short", count=3, characters=90)
    Path("plan.toml").write_text(
        MIXED.replace("mixed =", 'window_length = "3x"\nlora = 2\nnorms = true\nembeddings = false\nmixed =')
        + "[measure]\nwindows = 1\npasskey = 0\n"
    )
    words = command("--stages", "plan.toml", to=TARGET)
    told = refused(*words)
    assert told.startswith(f"--unseen: got documents of its own in 02-finetune-{TARGET}; then what is held out has to")
    words += ["--unseen", "short/2.txt"]
    told = refused(*words)
    assert told.startswith("--unseen: got held-out documents, the longest of 91 tokens, which hold 0 windows of 192; ")
    words[-1] = "short/1.txt"
    assert refused(*words).startswith(f"--unseen: got 1 document of 02-finetune-{TARGET}; no stage reads what is ")
    write_documents(here / "held", count=7)
    words[-1] = "held/6.txt"
    Path("launch.py").write_text(
        "import json, os, sys\n"
        "open('words.json', 'w').write(json.dumps(sys.argv[1:]))\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    for more, run in ((["--launcher", f"{sys.executable} launch.py", "--device", "cpu"], "launched"), ([], "run")):
        ran = longrope(*[run if word == "run" else word for word in words], *more, "-q")
        assert ran.code == 0, ran.err
    launched = json.loads(Path("words.json").read_text())
    flags = [launched[at + 1] for at, word in enumerate(launched) if word == "--short-documents"]
    assert launched[launched.index("--length") + 1] == str(3 * ORIGINAL), "of its windows"
    assert flags == ["short/0.txt", "short/1.txt"]
    stages = [Path(run, f"02-finetune-{TARGET}") for run in ("run", "launched")]
    for stage in stages:
        config = json.loads((stage / "config.json").read_text())
        assert config["settings"]["short_documents"] == flags
        assert {"0.txt", "1.txt"} <= {each["name"] for each in config["documents"]["train"][-2:]}
    losses, others = ((stage / "training.jsonl").read_bytes() for stage in stages)
    assert losses == others
    weights = [(stage / "checkpoint" / "model.safetensors").read_bytes() for stage in stages]
    assert weights[0] == weights[1], "adapters are merged, and trained beside the same others"
    whole = json.loads(Path("run/config.json").read_text())["settings"]["stages"][f"02-finetune-{TARGET}"]
    assert whole["short_documents"] == flags


def test_windows_of_a_stage_may_be_shorter_than_the_length_whose_factors_they_have(here: Path) -> None:
    """As the paper trains Mistral: on 16k tokens under the factors of 128k."""
    short = 2 * ORIGINAL
    Path("plan.toml").write_text(PLAN.replace("steps = 6", 'steps = 6\nwindow_length = "2x"'))
    write_documents(here / "held", characters=3000, count=9)
    words = command("--stages", "plan.toml", "--unseen", "held/8.txt")
    asked = longrope(*words, "--dry-run", "--json")
    assert asked.code == 0, asked.err
    [cost] = [each for each in asked.document["results"] if each["method"] == f"02-finetune-{TARGET}"]
    assert (cost["length"], cost["tokens"]) == (short, 6 * 2 * 3 * short)
    write_documents(here / "short", characters=short + 20, count=3)
    assert "have windows of" not in longrope(*words, "--dry-run", "-d", "short").err
    ran = longrope(*words, "-q")
    assert ran.code == 0, ran.err
    stage = Path(f"run/02-finetune-{TARGET}")
    assert json.loads((stage / "config.json").read_text())["settings"]["length"] == short
    assert [row.up_to for row in FactorTable.load(stage / "factors.json").rows] == [TARGET]
    assert json.loads((stage / "checkpoint" / "config.json").read_text())["max_position_embeddings"] == TARGET
    by_hand = finetune(
        "model", length=short, factors=f"run/01-search-{TARGET}/factors.json", documents="texts", steps=6, batch=2,
        learning_rate=1e-3, tracker="none", options=FLOAT32, out="by-hand",
    )  # fmt: skip
    assert [line["loss"] for line in read_lines(stage / "training.jsonl")] == by_hand["losses"]
    reached = [row.up_to for row in FactorTable.load("run/factors.json").rows]
    assert reached == [ORIGINAL, 2 * ORIGINAL, TARGET, FAR], "the second interpolation begins at the factors' length"


@pytest.mark.usefixtures("here")
def test_prompts_that_no_packed_window_holds_are_told_before_any_stage() -> None:
    row = {"prompt": "too long for the original length, " * 2, "completion": "which packed texts lie within"}
    Path("short.jsonl").write_text(json.dumps(row) + "\n")
    Path("other.txt").write_text("a text that nothing else reads " * 20)
    Path("plan.toml").write_text(MIXED.replace('["short/0.txt", "short/1.txt"]', '"short.jsonl"'))
    told = refused(*command("--stages", "plan.toml", "--unseen", "other.txt", to=TARGET))
    found = "--documents: got 1 prompt with completions, all of them longer than 46 tokens; "
    assert told.startswith(f"{found}mixed windows of 02-finetune-{TARGET} are packed of texts within {ORIGINAL} tokens")


@pytest.mark.usefixtures("here")
def test_documents_of_a_stage_are_checked_before_any() -> None:
    Path("short.txt").write_text("too short to train on")
    far = ["--search-documents", "texts/0.txt", "--unseen", "texts/1.txt"]
    words = ["extend", "model", "--to", FAR, "-d", "short.txt", "--out", "run", "--stages", "plan.toml"]
    told = refused(*words, *far)
    assert told.startswith(
        "--documents: got documents to train on, the longest of 23 tokens with its ends; 02-finetune"
    )
    Path("short.jsonl").write_text('{"prompt": "a prompt fills no window", "completion": "it fits"}\n')
    words[words.index("short.txt")] = "short.jsonl"
    told = refused(*words, "--search-documents", "texts/0.txt", "--unseen", "short.txt")
    assert told.startswith("--unseen: got held-out documents, the longest of"), "which is checked after"
    words[words.index("short.jsonl")] = "short.txt"
    Path("plan.toml").write_text(PLAN.replace("steps = 6", 'steps = 6\ndocuments = ["texts/1.txt"]'))
    words[words.index("short.txt")] = "texts/2.txt"
    assert refused(*words, *far).startswith(f"--unseen: got 1 document of 02-finetune-{TARGET}; no stage reads")


def test_the_shape_of_the_model_is_what_the_plans_count_from() -> None:
    assert make_plan(plan_of(SEARCH | {"search_length": "2x"}), SHAPE.original_length).stages[0].settings == {
        "search_length": 2 * ORIGINAL
    }
