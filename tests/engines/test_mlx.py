"""mlx-lm itself on what we export: the long factors at every length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import load

import longrope
from byte_tokenizer import BOS
from commands import write_checkpoint
from longrope.baselines import baseline, su_attention_factor
from longrope.checkpoint import TINY, LoadOptions
from longrope.export.verify import verify
from longrope.factors import FactorTable, unscaled
from longrope.model import load_model

FLOAT32 = LoadOptions(device="cpu", dtype="float32", threads=2)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "phi3", "gemma3", "olmo2", "smollm3", "granite"])
def test_verify_runs_mlx_lm_on_each_class_that_it_has_factors_for(name: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", name)
    shape = load_model(str(model), FLOAT32).rope.shape
    factor = su_attention_factor(4, shape.original_length)
    rows = unscaled(shape.pairs, shape.original_length), baseline("yarn", shape, 4 * shape.original_length)
    table = FactorTable(
        shape.rope_theta, shape.rotary_dim, shape.original_length,
        tuple(row.with_values(attention_factor=factor) for row in rows),
    )  # fmt: skip
    folder = longrope.export(str(model), table, tmp_path / "out", engine="mlx", window="long")
    said = verify(folder, against=str(model), options=FLOAT32)
    assert [each for each in said if each.ok is False] == []
    assert [each.what.split(" to ours")[0] for each in said if each.name == "logits"] == [
        "largest gap of stock transformers", "largest gap of mlx-lm",
    ]  # fmt: skip


@pytest.mark.parametrize("length", [200, 1400])
def test_logits_are_those_of_the_long_row(length: int, tmp_path: Path) -> None:
    ours = load_model(TINY, FLOAT32)
    shape = ours.rope.shape
    factor = su_attention_factor(8, shape.original_length)
    rows = unscaled(shape.pairs, shape.original_length), baseline("yarn", shape, 8 * shape.original_length)
    table = FactorTable(
        shape.rope_theta, shape.rotary_dim, shape.original_length,
        tuple(row.with_values(attention_factor=factor) for row in rows),
    )  # fmt: skip
    folder = longrope.export(TINY, table, tmp_path / "out", engine="mlx", window="long")
    loaded: Any = load(str(folder))
    model = loaded[0]
    text = ("The quick brown fox jumps over the lazy dog. " * 60).encode()
    ids = [BOS, *text[: length - 1]]
    theirs = np.array(model(mx.array([ids])).astype(mx.float32))[0]

    def logits(row: Any) -> np.ndarray[Any, Any]:
        with ours.patch() as patch, torch.inference_mode():
            patch.install(row)
            whole: Any = ours.model
            answer: np.ndarray[Any, Any] = whole(torch.tensor([ids])).logits[0].numpy()
        return answer

    short, long = (logits(row) for row in table.rows)
    # bf16 there, float32 here
    assert np.abs(theirs - long).max() < 0.5
    assert np.abs(theirs - short).max() > 4 * np.abs(theirs - long).max()
    assert (theirs.argmax(1) == long.argmax(1)).mean() > 0.98
