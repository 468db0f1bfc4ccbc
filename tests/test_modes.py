"""What a program has set for torch changes nothing of what is computed here, and is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import longrope
from commands import TARGET
from longrope.checkpoint import LoadOptions
from longrope.model import load_model
from models import ORIGINAL, tokens

FLOAT32 = LoadOptions(device="cpu", dtype="float32", threads=1)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def around(name: str) -> AbstractContextManager[Any]:
    made: dict[str, AbstractContextManager[Any]] = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "float64": default_dtype(torch.float64),
        "float16": default_dtype(torch.float16),
        "meta": torch.device("meta"),
    }
    return made[name]


MODES = ("autocast", "no_grad", "inference_mode", "float64", "float16", "meta")


def computed(name: str) -> list[Any]:
    """What a search, a training and a measurement come to, in folders of that name."""
    given: dict[str, Any] = {"documents": ["texts"], "options": FLOAT32}
    table = longrope.search("model", to=TARGET, out=f"{name}-search", evaluations=4, windows=2, **given)
    losses = longrope.finetune(
        "model", length=TARGET, factors=table, steps=2, batch=1, tracker="none", out=f"{name}-ft", **given
    )
    measured = longrope.evaluate("perplexity", f"{name}-ft/checkpoint", lengths=[TARGET], windows=2, **given)
    return [table.rows, table.provenance["value"], losses["losses"], measured["results"][0]["value"]]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", MODES)
def test_modes_around_a_call_change_no_figure(name: str) -> None:
    plain = computed("plain")
    with around(name):
        before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
        assert computed(name) == plain
        assert before == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["float64", "float16"])
def test_a_table_is_put_on_a_model_whatever_the_default_dtype(name: str) -> None:
    model = longrope.load("model", "good.json", dtype="float32", threads=1)
    with torch.no_grad():
        expected = model(tokens(ORIGINAL + 8)).logits
        with around(name):
            again = longrope.load("model", "good.json", dtype="float32", threads=1)
            assert torch.equal(again(tokens(ORIGINAL + 8)).logits, expected)


@pytest.mark.usefixtures("here")
def test_the_threads_that_a_call_is_given_are_its_own() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        given: dict[str, Any] = {"lengths": [ORIGINAL], "documents": ["texts"], "windows": 1, "dtype": "float32"}
        longrope.evaluate("perplexity", "model", threads=1, **given)
        assert torch.get_num_threads() == 2
        loaded = load_model("model", FLOAT32)  # which is asked to be used with one
        torch.set_num_threads(2)
        told = longrope.evaluate("perplexity", loaded, lengths=[ORIGINAL], documents=["texts"], windows=1)
        assert told["settings"]["threads"] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("here")
def test_a_loaded_model_stays_as_it_is_when_it_is_trained_and_an_interrupted_training_begins_as_it_did() -> None:
    given: dict[str, Any] = {"length": TARGET, "factors": "good.json", "documents": ["texts"], "steps": 3, "batch": 1}
    given |= {"tracker": "none", "learning_rate": 1e-3}
    expected = longrope.finetune("model", out="plain", options=FLOAT32, **given)["losses"]
    loaded = load_model("model", FLOAT32)
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}

    def interrupt(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        longrope.finetune(loaded, out="run", on_progress=interrupt, **given)
    assert longrope.finetune(loaded, out="run", **given)["losses"] == expected
    assert longrope.finetune(loaded, out="another", **given)["losses"] == expected
    after = loaded.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_models_may_be_loaded_by_several_threads(here: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(lambda _: load_model(str(here / "model"), FLOAT32), range(8)))
    assert len({each.fingerprint for each in loaded}) == 1
