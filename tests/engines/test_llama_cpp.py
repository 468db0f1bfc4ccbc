"""llama.cpp itself on what we export: the same logits and the same greedy tokens, on both sides of the boundary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import longrope
from byte_tokenizer import BOS
from commands import write_checkpoint
from longrope.baselines import baseline, su_attention_factor
from longrope.checkpoint import TINY, LoadOptions
from longrope.export.beside import open_llama
from longrope.export.verify import verify
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.model import LoadedModel, load_model

FLOAT32 = LoadOptions(device="cpu", dtype="float32", threads=2)
# Largest logit gap: of the same weights in two programs, and of weights that were rounded; bf16 has three bits less
# than f16, so that eight times as much is rounded off.
TOLERANCE = {"f32": 0.02, "f16": 0.05, "bf16": 8 * 0.05, "q8_0": 0.6}


# No partial rotation, and an original length that llama.cpp, which rounds its context up to 256, can serve
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "max_position_embeddings": 256, "original_max_position_embeddings": 256,
}  # fmt: skip


def table_of(loaded: LoadedModel, ratio: int) -> FactorTable:
    """The model as it is, and YaRN's row, both with the attention factor of the lengths."""
    shape = loaded.rope.shape
    factor = su_attention_factor(ratio, shape.original_length)
    rows = unscaled(shape.pairs, shape.original_length), baseline("yarn", shape, ratio * shape.original_length)
    return FactorTable(
        shape.rope_theta,
        shape.rotary_dim,
        shape.original_length,
        tuple(row.with_values(attention_factor=factor) for row in rows),
    )


@pytest.fixture(scope="module", params=["tiny", "phi3"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    if request.param == "tiny":
        return load_model(TINY, FLOAT32)
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("ground") / "phi3", "phi3", **SIZES)), FLOAT32)


def ids_of(length: int) -> list[int]:
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps under the old tree by the river. " * 60
    return [BOS, *text.encode()[: length - 1]]


def open_engine(path: Path, context: int) -> Any:
    return open_llama(path, context, threads=2)


def gguf_of(ours: LoadedModel, table: FactorTable, out: Path, window: str, dtype: str) -> Path:
    folder = longrope.export(ours.name, table, out, engine="gguf", window=window, dtype=dtype)
    (path,) = folder.glob("*.gguf")
    return path


def logits_under(ours: LoadedModel, row: RopeFactors, ids: list[int]) -> np.ndarray[Any, Any]:
    with ours.patch() as patch, torch.inference_mode():
        patch.install(row)
        model: Any = ours.model
        answer: np.ndarray[Any, Any] = model(torch.tensor([ids])).logits[0].float().numpy()
    return answer


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", ["dynamic", "long"])
def test_logits_are_ours_on_both_sides_of_the_boundary(
    ours: LoadedModel, window: str, dtype: str, tmp_path: Path
) -> None:
    table = table_of(ours, 8)
    short, long = table.rows
    path = gguf_of(ours, table, tmp_path / "out", window, dtype)
    original = table.original_length
    for context, length in ((original, original - 8), (8 * original, original - 8), (8 * original, 3 * original)):
        row = short if window == "dynamic" and context <= original else long
        ids, engine = ids_of(length), open_engine(path, context)
        engine.eval(ids)
        theirs = np.array(engine.scores[:length])
        engine.close()
        mine = logits_under(ours, row, ids)
        scale = TOLERANCE[dtype] * max(1.0, float(mine.std()) / 3)
        assert np.abs(theirs[:, : mine.shape[1]] - mine).max() < scale, (context, length)
        other = logits_under(ours, long if row is short else short, ids)
        assert np.abs(theirs[:, : mine.shape[1]] - other).max() > np.abs(theirs[:, : mine.shape[1]] - mine).max()


def test_greedy_tokens_are_those_of_our_generate(ours: LoadedModel, tmp_path: Path) -> None:
    table = table_of(ours, 8)
    path = gguf_of(ours, table, tmp_path / "out", "dynamic", "f32")
    original = table.original_length
    for context, row in ((original, table.rows[0]), (8 * original, table.rows[1])):
        ids, engine = ids_of(original - 40), open_engine(path, context)
        model: Any = ours.model
        with longrope.apply(model, row.with_values(up_to=8 * original), original_length=original):
            made = model.generate(
                torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        theirs = []
        for token in engine.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            theirs.append(int(token))
            if len(theirs) == 24:
                break
        engine.close()
        assert theirs == made[0, len(ids) :].tolist(), context


def test_a_text_is_split_into_the_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    ours = load_model(TINY, FLOAT32)
    path = gguf_of(ours, table_of(ours, 8), tmp_path / "out", "long", "f16")
    engine = open_engine(path, 512)
    for text in ("Hello, world\n\n  indented", "Zürich, 東京 and 🦊", "a ~~ b ``~ c"):
        expected = ours.tokenizer(text)["input_ids"]
        assert engine.tokenize(text.encode(), add_bos=True, special=False) == list(expected)
        assert engine.detokenize(list(expected)[1:]) == text.encode()
    engine.close()


def test_verify_runs_llama_cpp_where_it_is_installed(ours: LoadedModel, tmp_path: Path) -> None:
    table = table_of(ours, 8)
    path = gguf_of(ours, table, tmp_path / "out", "dynamic", "f32")
    said = verify(path, against=ours.name, options=FLOAT32)
    assert [each for each in said if each.ok is False] == []
    assert sum(each.name == "logits" for each in said) == 2
    lost = replace(table, rows=(table.rows[0], table.rows[1].with_values(rescale=(2.0,) * len(table.rows[1].rescale))))
    lost.save(path.parent / "factors.json")
    assert {each.name for each in verify(path, against=ours.name, options=FLOAT32) if each.ok is False} >= {"factors"}


@pytest.mark.parametrize("name", ["phi3", "mistral"])
def test_partial_rotation_and_a_window_that_was_widened(name: str, tmp_path: Path) -> None:
    partial = {"rope_parameters": SIZES["rope_parameters"] | {"partial_rotary_factor": 0.75}}
    changes = {"phi3": partial, "mistral": {"sliding_window": 100, "num_key_value_heads": 1, "head_dim": 32}}[name]
    model = write_checkpoint(tmp_path / name, name, **{**SIZES, **changes})
    ours = load_model(str(model), FLOAT32)
    path = gguf_of(ours, table_of(ours, 8), tmp_path / "out", "dynamic", "f32")
    said = verify(path, against=ours.name, options=FLOAT32)
    assert [each for each in said if each.ok is False] == []
    assert sum(each.name == "logits" for each in said) == 2
