"""Hostile factors, configurations, plans and run folders: one clear line or a proper result, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from commands import TARGET, longrope, refused, table, write_checkpoint, write_documents
from hostility import (
    BYTES,
    CONFIG_KEYS,
    CONTROL,
    FACTORS_KEYS,
    PLAN,
    PLAN_KEYS,
    Hostile,
    csv_file,
    damaged,
    document,
    extended,
    is_table,
    sparse,
    toml,
    tried,
)
from longrope.cli import run
from longrope.convert import to_csv
from longrope.errors import UserError
from longrope.extension.plan import read_plan
from models import ORIGINAL
from report_runs import make_run


def examples(count: int) -> settings:
    """So many inputs, the same at every run; benchmarks/hostile.py tries more."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts", count=2)
    table().save(folder / "good.json")
    return folder


@examples(25)
@given(case=damaged(table().to_dict(), FACTORS_KEYS))
def test_a_damaged_factors_file_is_read_or_refused(here: Path, case: Hostile) -> None:
    (here / "f.json").write_bytes(case.data)
    ran, wrong = tried("factors", "f.json", folder=here)
    assert wrong == "", case.done
    assert ran is not None
    assert (ran.code == 0) == is_table(case.data), case.done
    assert tried("factors", "f.json", "--to", "csv", "--json", folder=here)[1] == "", case.done


@examples(15)
@given(case=csv_file(to_csv(table())))
def test_a_damaged_csv_is_read_or_refused(here: Path, case: Hostile) -> None:
    (here / "f.csv").write_bytes(case.data)
    given = ("--rope-theta", 500, "--original-length", 48, "--row", "192_small")
    assert tried("factors", "f.csv", *given, folder=here)[1] == "", case.done


@examples(25)
@given(case=document())
def test_a_damaged_document_is_read_or_refused(here: Path, case: tuple[str, Hostile]) -> None:
    ending, made = case
    (here / f"d{ending}").write_bytes(made.data)
    assert tried("documents", f"d{ending}", folder=here)[1] == "", made.done


@pytest.mark.parametrize("how", BYTES)
def test_a_factors_file_of_other_bytes_is_refused(here: Path, how: str) -> None:
    (here / "f.json").write_bytes(BYTES[how]((here / "good.json").read_bytes()))
    ran, wrong = tried("factors", "f.json", folder=here)
    assert wrong == ""
    assert ran is not None
    assert ran.code == (0 if how == "byte order mark" else 2)


@examples(20)
@given(case=damaged(extended(), CONFIG_KEYS))
def test_a_damaged_configuration_is_examined_or_refused(here: Path, case: Hostile) -> None:
    (here / "c").mkdir(exist_ok=True)
    (here / "c" / "config.json").write_bytes(case.data)
    shutil.rmtree(here / "fixed", ignore_errors=True)
    assert tried("factors", "c/config.json", folder=here)[1] == "", case.done
    assert tried("doctor", "c/config.json", "--json", folder=here, ends=(0, 1, 2))[1] == "", case.done
    assert tried("doctor", "c", "--fix", "fixed", folder=here, ends=(0, 1, 2))[1] == "", case.done


@examples(6)
@given(case=damaged(extended(), CONFIG_KEYS))
def test_a_checkpoint_of_a_damaged_configuration_is_exported_or_refused(here: Path, case: Hostile) -> None:
    (here / "model" / "config.json").write_bytes(case.data)
    shutil.rmtree(here / "out", ignore_errors=True)
    assert tried("export", "model", "--factors", "good.json", "--out", "out", folder=here)[1] == "", case.done


@examples(40)
@given(case=toml(PLAN, PLAN_KEYS))
def test_a_damaged_plan_is_read_or_refused(here: Path, case: Hostile) -> None:
    (here / "plan.toml").write_bytes(case.data)
    command = ("extend", "nowhere/at/all", "--to", TARGET, "-d", "texts", "--stages", "plan.toml", "--dry-run")
    assert tried(*command, folder=here)[1] == "", case.done  # the model is looked for last
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        with suppress(UserError):
            read_plan("plan.toml", ORIGINAL)


PLANS: dict[str, bytes] = {
    "lists in lists": b"a = " + b"[" * 100_000,
    "a number of many digits": b"a = " + b"1" * 10_000,
    "a hexadecimal number of many digits": b"[[stages]]\ndo = 'search'\nto = 0x1" + b"0" * 10_000,
    "a giant ratio": b"[[stages]]\ndo = 'search'\nto = '999999x'\n[[stages]]\ndo = 'search'\nto = 2199023255552",
    "other digits": "[[stages]]\ndo = 'search'\nto = '\u0663\u0662x'".encode(),
    "ten thousand stages": b"".join(b"[[stages]]\ndo = 'search'\nto = %d\n" % (100 + i) for i in range(10_000)),
    "a list of what to do": b"[[stages]]\ndo = ['search']\nto = 96",
    "a time": b"[[stages]]\ndo = 'search'\nto = 2020-01-01",
}


@pytest.mark.parametrize("case", PLANS)
def test_a_hostile_plan_is_refused(here: Path, case: str) -> None:
    (here / "plan.toml").write_bytes(PLANS[case])
    refused("extend", "model", "--to", TARGET, "-d", "texts", "--stages", "plan.toml", "--dry-run")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "layers that would never end": ({"num_hidden_layers": 10**12}, "layers"),
    "more layers than tensors": ({"num_hidden_layers": 9_999}, "layers"),
    "terabytes of words": ({"vocab_size": 10**12}, "vocab_size"),
    "terabytes of a feed-forward": ({"intermediate_size": 10**11}, "intermediate_size"),
    "a part of it": ({"text_config": {"num_hidden_layers": 10**12}}, "layers"),
    "a head of a trillion": ({"head_dim": 2**40}, "head_dim"),
    "an endless window": ({"max_position_embeddings": 10**15}, "max_position_embeddings"),
    "architectures that are a number": ({"architectures": 7}, "causal language models"),
    "attention from elsewhere": ({"attn_implementation": "someone/kernel"}, "only where it is asked for"),
    "a scaling of infinity": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e308}, "rope_parameters": None},
        "factor",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_no_weights_belong_to_is_refused_at_once(here: Path, case: str) -> None:
    changes, told = CONFIGS[case]
    path = here / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    search = ("search", "model", "--to", TARGET, "-d", "texts", "--out", "run")
    for command in (search, ("export", "model", "--factors", "good.json", "--out", "out")):
        assert told in refused(*command)


FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a circle": lambda path: path.symlink_to(path),
    "a terabyte": sparse,
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_file_is_never_waited_for(here: Path, case: str) -> None:
    for name in ("f.json", "plan.toml", "prompt.txt", "c/config.json"):
        path = here / name
        path.parent.mkdir(exist_ok=True)
        FILES[case](path)
    if case == "a folder":
        (here / "f.json" / "factors.json").write_text("{")
    commands: list[tuple[object, ...]] = [
        ("factors", "f.json"),
        ("doctor", "c"),
        ("doctor", "c/config.json"),
        ("extend", "tiny", "--to", "1k", "-d", "texts", "--stages", "plan.toml", "--dry-run"),
        ("generate", "model", "--prompt-file", "prompt.txt"),
        ("documents", "prompt.txt"),
        ("search", "c", "--to", TARGET, "-d", "texts"),
    ]
    for command in commands:
        before = sorted(os.listdir(here))
        code = run([*map(str, command), "-q"])
        assert code == 2, command
        assert sorted(os.listdir(here)) == before


def test_a_pipe_that_a_shell_puts_there_is_read(here: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write((here / "good.json").read_bytes())
    ran = longrope("factors", f"/dev/fd/{reading}", "--json")
    os.close(reading)
    assert ran.document["factors"]["original_length"] == ORIGINAL


@examples(8)
@given(case=damaged(json.loads(json.dumps({"a": 1})), ()))
def test_lines_of_a_run_that_others_wrote_are_shown_or_refused(here: Path, case: Hostile) -> None:
    shutil.rmtree(here / "run", ignore_errors=True)
    path = make_run(here / "run") / "evaluations.jsonl"
    path.write_bytes(path.read_bytes() + case.data.replace(b"\n", b" ") + b"\n")
    for command in (("report", "run"), ("watch", "run", "--once")):
        assert tried(*command, folder=here)[1] == "", case.done


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "factors.json"])
def test_files_of_a_run_that_others_wrote_are_shown_or_refused(here: Path, name: str) -> None:
    good = json.loads((make_run(here / "good") / name).read_text())
    good.pop("crc", None)  # as of a run of an earlier version, which anybody may write

    @examples(8)
    @given(case=damaged(good, ("stages", "measure", "ignored", "details", "by_position", "documents")))
    def check(case: Hostile) -> None:
        shutil.rmtree(here / "run", ignore_errors=True)
        shutil.copytree(here / "good", here / "run")
        (here / "run" / name).write_bytes(case.data)
        for command in (("report", "run"), ("watch", "run", "--once")):
            assert tried(*command, folder=here)[1] == "", case.done

    check()


@pytest.mark.parametrize("length", ["\u0661\u0662k", "1e9k", "-5", "0", "9999999999m", "", " ", "4k\x1b[31m", "0x10"])
def test_what_is_no_length_is_refused(here: Path, length: str) -> None:
    refused("search", "model", f"--to={length}", "-d", "texts")


OUTS = ["good.json", "good.json/run", "/", "/proc/run", "/dev/null", "x" * 300, "a/" * 3000, ""]


@pytest.mark.parametrize("out", OUTS, ids=[out[:12] or "empty" for out in OUTS])
def test_a_folder_that_cannot_be_is_refused(here: Path, out: str) -> None:
    refused("search", "model", "--to", TARGET, "-d", "texts", "--out", out)
    refused("export", "model", "--factors", "good.json", "--out", out)


@pytest.mark.parametrize("option", ["--device", "--dtype", "--attention", "--rope-precision", "--policy", "--cache"])
@pytest.mark.parametrize("value", ["", "\x1b[31m", "../x", "cuda:999999999999"])
def test_what_is_no_choice_is_refused(here: Path, option: str, value: str) -> None:
    refused("generate", "model", "--prompt", "a", option, value)


def test_special_tokens_of_a_prompt_and_none_are_text(here: Path) -> None:
    for prompt in ("<s></s><pad>", CONTROL.encode("utf-8", "replace").decode(), "\0"):
        ran = longrope("generate", "model", f"--prompt={prompt}", "-n", 2, "--device", "cpu", "--json")
        assert ran.code == 0, ran
        assert len(ran.document["results"]) == 1
