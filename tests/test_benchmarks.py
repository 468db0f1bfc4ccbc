"""The benchmarks run and say what they measured; what they measure is no matter of tests."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import Figure, paired, spread, write_results

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "evaluation.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The JSON that a quick run writes, and what it shows on stderr."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(SCRIPT), "--quick", "--threads=1", "--device=cpu", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["evaluation-quick.json"]
    return (out / "evaluation-quick.json").read_text(), done.stderr


def test_every_figure_of_the_evaluation_has_its_limit_and_verdict(written: tuple[str, str]) -> None:
    figures = json.loads(written[0])["figures"]
    assert [(figure["unit"], figure["limit"]) for figure in figures] == [
        ("times", 1.05),
        ("times", 1.05),
        ("times", 0.25),
        ("times", 2.5),
        ("ms", 1.0),
        ("s", 0.5),
        ("", 0),
    ]
    for figure in figures:
        assert set(figure) == {"figure", "on", "limit", "value", "ok", "unit", "details"}
        assert figure["ok"] == (figure["value"] <= figure["limit"])
    assert all(figure["value"] > 0 for figure in figures[:-1])
    assert [figure["on"].split(";")[0] for figure in figures[:2]] == [
        "tiny",
        "random Llama, vocabulary 32,000, hidden 64, layers 1",
    ]


def test_the_results_say_what_they_were_measured_with(written: tuple[str, str]) -> None:
    document = json.loads(written[0])
    assert (document["benchmark"], document["seed"], document["threads"]) == ("evaluation-quick", 0, 1)
    assert document["device"] == "cpu"
    assert document["versions"]["python"] == platform.python_version()
    assert set(document["versions"]) == {"python", "longrope", "torch", "transformers"}
    assert set(document["machine"]) == {"cpu", "cores", "ram_gib", "gpu", "load_before"}
    assert document["machine"]["ram_gib"] > 0
    assert len(document["date"].split("-")) == 3
    assert document["sizes"]["memory_tokens"] == 512


def test_the_results_name_no_host_and_no_path(written: tuple[str, str]) -> None:
    assert platform.node() not in json.loads(written[0])["machine"].values()
    for folder in (SCRIPT.parents[1], sys.prefix):
        assert str(folder) not in written[0]


def test_the_table_shows_every_figure(written: tuple[str, str]) -> None:
    shown = " ".join(written[1].split())
    for words in ("evaluation-quick", "time of a", "peak memory", "changing", "longrope", "1.05 times", "0.25 times"):
        assert words in shown


def test_two_ways_are_timed_in_turn_and_both_orders() -> None:
    order: list[str] = []

    def way(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return seconds

        return run

    measured = paired(way("ours", 3.0), way("bare", 2.0), blocks=2)
    assert order == ["bare", "ours", *["bare", "ours", "ours", "bare"], *["ours", "bare", "bare", "ours"]]
    assert measured.ratios.tolist() == [1.5, 1.5]
    assert measured.details()["seconds_ours"] == 3.0


def test_a_machine_that_slows_down_steadily_favours_neither_way() -> None:
    clock = iter(np.arange(1.0, 100.0))
    measured = paired(lambda: float(next(clock)), lambda: float(next(clock)), blocks=6)
    assert measured.ratios.tolist() == [1.0] * 6


@pytest.mark.parametrize(("value", "ok"), [(1.0, True), (1.05, True), (1.0501, False), (float("nan"), False)])
def test_a_figure_keeps_its_limit_up_to_it(value: float, ok: bool) -> None:
    assert Figure("time", "this", value, 1.05, "times").ok is ok


def test_a_spread_is_the_quartiles() -> None:
    assert list(spread([1.0, 2.0, 3.0, 4.0, 9.0]).values()) == [1.0, 2.0, 3.0, 4.0, 9.0]


def test_results_with_a_value_that_is_no_number_are_not_written(tmp_path: Path) -> None:
    document: dict[str, Any] = {"figures": [Figure("time", "this", float("nan"), 1.05, "times").to_dict()]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path / "new" / "x.json", document)
    assert not (tmp_path / "new" / "x.json").exists()


def test_architectures_are_tried_each_by_itself_and_told_step_by_step(tmp_path: Path) -> None:
    script = SCRIPT.with_name("architectures.py")
    command = [sys.executable, str(script), "--quick", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "architectures-quick.json").read_text())
    assert document["counts"] == {"works": 1, "refused in one line": 1, "trouble": 0, "not built": 0}
    refused, works = document["architectures"]
    assert (works["class"], works["outcome"]) == ("GPTNeoXForCausalLM", "works")
    assert {"search", "cached run", "generated", "finetune", "lora", "verify transformers"} <= {
        step["step"] for step in works["steps"] if step["outcome"] == "works"
    }
    assert "multi-head latent attention is not supported" in refused["steps"][-1]["said"]
    for words in ("gpt_neox: works", "deepseek_v3: refused in one line", "1 works, 1 refused in one line"):
        assert words in done.stderr
