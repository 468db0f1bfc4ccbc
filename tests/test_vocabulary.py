"""A tokenizer with tokens that the model has no weights for: told, and refused in a line once a text holds one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from commands import longrope, table, write_checkpoint, write_documents
from longrope import UserError
from longrope.model import load_model

ADDED = "[PAD]"
RULE = "the model has weights for 259 tokens"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    write_documents(tmp_path / "texts", count=3)
    table().save(tmp_path / "good.json")
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_special_tokens({"pad_token": ADDED})
    tokenizer.save_pretrained("model")
    assert tokenizer.pad_token_id == 259
    return tmp_path


def test_texts_without_such_a_token_are_read_and_the_tokenizer_is_told_of(here: Path) -> None:
    [note] = load_model("model").notes
    told = "the tokenizer has 1 token that the model has no weights for, the first '[PAD]': texts that hold one are"
    assert note == f"{told} refused"
    ran = longrope(
        "evaluate", "perplexity", "model", "--lengths", 96, "-d", "texts", "--windows", 1, "-q", "--out", "run"
    )
    assert ran.code == 0, ran.err


def test_an_end_of_texts_without_weights_is_refused_before_a_training_begins(here: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.eos_token = ADDED
    tokenizer.save_pretrained("model")
    ran = longrope("finetune", "model", "--length", 96, "-f", "good.json", "-d", "texts", "--steps", 1, "--out", "run")
    told = f"longrope: model: got model, whose tokenizer ends texts with '{ADDED}', token 259; {RULE}; restore its"
    assert ran.code == 2
    assert ran.err.splitlines()[-1] == f"{told} tokenizer's files"
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["search", "model", "--to", 96, "-d", "texts", "--windows", 1, "--evaluations", 2, "--out", "run"],
        ["finetune", "model", "--length", 96, "-f", "good.json", "-d", "texts", "--steps", 1, "--out", "run"],
        ["evaluate", "perplexity", "model", "--lengths", 96, "-d", "texts", "--windows", 1],
        ["generate", "model", "-f", "good.json", "--prompt", f"a {ADDED}"],
    ],
    ids=lambda words: words[0],
)
def test_a_text_with_such_a_token_is_refused_in_a_line(here: Path, words: list[object]) -> None:
    for path in Path("texts").iterdir():
        path.write_text(f"{ADDED} " * 400)
    ran = longrope(*words, "-q")
    told = f"longrope: text: got '[PAD]', token 259 of model's tokenizer; {RULE}; take it out of the text, or restore"
    assert (ran.code, ran.err) == (2, f"{told} the tokenizer\n"), ran


def test_a_beginning_that_has_no_weights_is_refused_at_once(here: Path) -> None:
    file = Path("model/tokenizer_config.json")
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"bos_token": "<bot>"}))
    with pytest.raises(UserError, match=f"whose tokenizer begins texts with .<bot>., token 2..; {RULE}"):
        load_model("model")


def test_a_tokenizer_of_the_model_costs_no_comparison(tmp_path: Path) -> None:
    loaded = load_model(str(write_checkpoint(tmp_path / "model")))
    assert loaded.notes == []
    assert not loaded.model.get_input_embeddings()._forward_pre_hooks
    with pytest.raises(IndexError):
        loaded.model(input_ids=torch.tensor([[259]]))
