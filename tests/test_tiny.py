"""The embedded model is what its card says: small, byte-level, with a use for its context, and able to recall."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from longrope.baselines import critical_dimension
from longrope.checkpoint import model_source
from longrope.documents import read_sources
from longrope.evaluate.passkey import passkey
from longrope.evaluate.perplexity import token_losses
from longrope.model import LoadedModel, load_model
from longrope.windows import choose_windows

FOLDER = Path(model_source("tiny"))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny")


def test_it_is_small_bfloat16_safetensors_with_a_card() -> None:
    weights = FOLDER / "model.safetensors"
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118  (not a dict)
    assert "passkey" in json.loads((FOLDER / "figures.json").read_text())["figures"]
    assert (FOLDER / "README.md").is_file()


def test_it_has_the_shape_of_the_design(tiny: LoadedModel) -> None:
    assert (tiny.rope.original_length, tiny.rope.rope_theta, tiny.rope.rotary_dim) == (256, 200.0, 64)
    assert critical_dimension(tiny.rope.shape) / tiny.rope.shape.pairs == pytest.approx(0.70, abs=0.005)
    assert 2.5e6 < tiny.model.num_parameters() < 4e6
    assert tiny.model.config.use_cache


def test_its_tokens_are_bytes_behind_a_bos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "def f():\n\treturn 'naïve 长 \u202e'  # done\r\n\n  "
    ids = tokenizer(text)["input_ids"]
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (257, 258)


def test_perplexity_falls_steadily_with_context_on_modules_it_was_not_trained_on(tiny: LoadedModel) -> None:
    documents = read_sources(["stdlib"], share="unseen")
    windows = choose_windows(documents, tiny.tokenizer, length=256, count=128, seed=1)
    losses = token_losses(tiny, torch.from_numpy(np.stack([window.ids for window in windows]))).double()
    by_context = [float(losses[:, low:high].mean()) for low, high in [(8, 32), (32, 64), (64, 128), (128, 255)]]
    assert by_context == sorted(by_context, reverse=True)


def test_it_finds_a_key_anywhere_in_its_window(tiny: LoadedModel) -> None:
    assert passkey(tiny, 256, tries=100, seed=7).value >= 0.95
