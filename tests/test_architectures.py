"""Classes that do something in another way than most: what `benchmarks/architectures.py` found, one test each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import architectures_checks as checks
from architectures_small import ORIGINAL, build, save
from byte_tokenizer import byte_tokenizer
from commands import longrope, longrope_process
from longrope.errors import UserError
from longrope.export.run import export
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.model import LoadedModel, load_model
from longrope.training.lora import LoraSettings, with_lora

TARGET = 6 * ORIGINAL


def checkpoint(folder: Path, model_type: str) -> Path:
    return save(build(model_type, seed=0), byte_tokenizer(ORIGINAL), folder / "model")


def long_table(loaded: LoadedModel) -> FactorTable:
    rope, pairs = loaded.rope, loaded.rope.shape.pairs
    rows = (unscaled(pairs, ORIGINAL), RopeFactors(TARGET, tuple(1.0 + pair for pair in range(pairs))))
    return FactorTable(rope.rope_theta, rope.rotary_dim, ORIGINAL, rows)


# Falcon calls torch's attention by itself, MiniMax has a cache of its own with states beside its layers, Bamba counts
# positions from 0 in every pass, LFM2's layers have no keys, Gemma 3n's share them, Granite SWA asks for its config.
@pytest.mark.parametrize(
    "model_type", ["falcon", "minimax", "bamba", "lfm2", "gemma3n_text", "granite_swa", "phi4_multimodal"]
)
@pytest.mark.parametrize("check", [checks.cached_run, checks.generated])
def test_a_text_that_grows_past_boundaries_is_as_run_whole(
    model_type: str, check: Callable[[Path], str], tmp_path: Path
) -> None:
    assert check(checkpoint(tmp_path, model_type)) == ""


def test_a_cache_of_a_class_of_its_own_is_not_asked_for_in_another_kind(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "minimax")
    long_table(checks.loaded_model(folder)).save(folder / "factors.json")
    options = ("--prompt", "The quick brown fox", "-n", 4, "--device", "cpu")
    assert longrope("generate", folder, *options).code == 0
    refused = longrope("generate", folder, *options, "--cache", "quantized")
    assert (refused.code, refused.err) == (
        2,
        "longrope: --cache: got 'quantized'; MiniMaxForCausalLM has a cache of its own kind; leave it out\n",
    )


@pytest.mark.parametrize("model_type", ["modernbert-decoder", "gemma3n_text"])
def test_what_lies_between_the_decoder_and_the_output_projection_is_trained_too(
    model_type: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, model_type)
    assert checks.gradients(folder) == ""
    assert checks.losses(folder) == ""


@pytest.mark.parametrize(("model_type", "adapted"), [("phimoe", False), ("falcon", True)])
def test_adapters_leave_out_routers_and_no_other_linear_layers(model_type: str, adapted: bool) -> None:
    pytest.importorskip("peft")
    model: Any = with_lora(build(model_type, seed=0), LoraSettings(rank=2), seed=0)
    own = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert own
    assert any("router" in name for name in own) is False
    assert any("query_key_value" in name for name in own) is adapted
    assert model(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all()


def test_layers_of_images_are_not_taken_for_those_of_the_text(tmp_path: Path) -> None:
    model: Any = build("gemma3", seed=0)
    lists = [len(each) for each in model.modules() if isinstance(each, torch.nn.ModuleList)]
    assert lists[0] == lists[1], "as many layers of images as of text, and before them"
    folder = save(model, byte_tokenizer(ORIGINAL), tmp_path / "model")
    assert load_model(str(folder)).rope.original_length == ORIGINAL


def test_several_positions_for_each_token_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model: got a rotary embedding .*: it rotates by several positions for each"):
        load_model(str(checkpoint(tmp_path, "qwen3_5_text")))


def test_what_a_class_keeps_beside_its_scaling_is_written_with_the_factors(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "ministral3")
    table = long_table(checks.loaded_model(folder))
    out = export(str(folder), table, tmp_path / "out")
    written = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert written["llama_4_scaling_beta"] == 0.1
    said = longrope("verify", out, "--against", folder)
    assert said.code == 0, said.err


def test_an_export_that_changes_local_layers_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "modernbert-decoder")
    table = long_table(checks.loaded_model(folder))
    with pytest.raises(UserError, match=r"^export: got other frequencies of sliding_attention layers"):
        export(str(folder), table, tmp_path / "out", engine="vllm")
    assert not (tmp_path / "out").exists()


def test_a_head_dimension_that_a_class_computes_is_not_written(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "falcon")
    out = export(str(folder), long_table(checks.loaded_model(folder)), tmp_path / "out", engine="vllm")
    assert "head_dim" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "gemma3n_text", "modernbert-decoder", "zamba2"])
def test_a_plan_reads_what_the_class_writes(model_type: str, tmp_path: Path) -> None:
    planned = longrope("plan", checkpoint(tmp_path, model_type), "--to", TARGET, "--gpus", "1xH100-80GB")
    assert planned.code == 0, planned.err


def test_a_refusal_is_one_line_where_a_library_warns(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "laguna")
    long_table(checks.loaded_model(folder)).save(tmp_path / "f.json")
    ran = longrope_process("export", folder, "--factors", "f.json", "--engine", "vllm", "--out", "out", cwd=tmp_path)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
