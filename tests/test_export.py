from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.export.card import model_card
from longrope.export.run import export
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.model import LoadedModel, load_model
from models import ORIGINAL, build, save, tokens

LONG = 4 * ORIGINAL
LENGTHS = [ORIGINAL - 8, ORIGINAL, ORIGINAL + 1, 100]
COVERED = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma2", "gemma3", "olmo2", "mixtral"]
ALSO = ["cohere", "gpt_oss", "phi", "stablelm", "granite", "smollm3", "olmo3", "llama4", "falcon"]
FLOAT32 = LoadOptions(dtype="float32")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def saved(folder: Path, name: str = "llama", **changes: Any) -> LoadedModel:
    return load_model(str(save(build(name, **changes), folder / name)), FLOAT32)


def table_for(loaded: LoadedModel, *, attention_factor: float = 1.2, start_tokens: int = 0) -> FactorTable:
    """Two rows that both differ from the base model, with one attention factor."""
    pairs = loaded.rope.shape.pairs
    short = RopeFactors(ORIGINAL, tuple(1.0 + 0.1 * i for i in range(pairs)), attention_factor=1.2)
    long = RopeFactors(
        LONG,
        tuple(1.5 + 0.7 * i for i in range(pairs)),
        attention_factor=attention_factor,
        start_tokens=start_tokens,
    )
    return FactorTable(loaded.rope.rope_theta, loaded.rope.rotary_dim, ORIGINAL, (short, long), model="test")


def stock(folder: Path) -> PreTrainedModel:
    """The exported model as anyone loads it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return cast(PreTrainedModel, model.eval())


def logits(model: PreTrainedModel, length: int) -> Tensor:
    return cast(Tensor, model(tokens(length), use_cache=False).logits)


def assert_same_logits(exported: PreTrainedModel, loaded: LoadedModel, factors: FactorTable | RopeFactors) -> None:
    loaded.widen_window(LONG)
    with loaded.patch() as patch:
        for length in LENGTHS:
            patch.install(None)
            base = logits(loaded.model, length)
            patch.install(factors)
            ours = logits(loaded.model, length)
            torch.testing.assert_close(logits(exported, length), ours, rtol=0, atol=1e-5)
            assert (ours - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*COVERED, *ALSO, "phimoe"])
def test_the_long_window_gives_our_logits_with_the_long_row_at_every_length(name: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path, name)
    table = table_for(loaded, start_tokens=0)
    out = export(loaded, table, tmp_path / "out", window="long")
    assert out == tmp_path / "out"
    exported = stock(out)
    assert exported.config.max_position_embeddings == LONG
    assert_same_logits(exported, loaded, table.rows[-1])


@pytest.mark.parametrize("name", [*COVERED, *ALSO])
def test_the_dynamic_window_gives_our_logits_on_both_sides_of_the_boundary(name: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path, name)
    table = table_for(loaded)
    exported = stock(export(loaded, table, tmp_path / "out", window="dynamic"))
    assert_same_logits(exported, loaded, table)


@pytest.mark.parametrize("name", COVERED)
def test_the_short_window_gives_our_logits_with_the_short_row_up_to_the_original_length(
    name: str, tmp_path: Path
) -> None:
    loaded = saved(tmp_path, name)
    table = table_for(loaded)
    exported = stock(export(loaded, table, tmp_path / "out", window="short"))
    assert exported.config.max_position_embeddings == ORIGINAL
    with loaded.patch() as patch:
        patch.install(table.rows[0])
        for length in (8, ORIGINAL):
            ours = logits(loaded.model, length)
            torch.testing.assert_close(logits(exported, length), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_an_exported_folder_is_a_model_for_us_with_its_table_and_its_scaling(name: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path, name)
    table = table_for(loaded)
    again = load_model(str(export(loaded, table, tmp_path / "out", window="dynamic")), FLOAT32)
    assert again.table == table
    assert again.own.rows == table.rows
    assert (again.rope.scaling, again.rope.original_length) == ("longrope", ORIGINAL)
    assert (again.rope.rope_theta, again.rope.rotary_dim) == (loaded.rope.rope_theta, loaded.rope.rotary_dim)
    with again.patch() as patch, loaded.patch() as first:
        patch.install(table)
        first.install(table)
        torch.testing.assert_close(logits(again.model, 100), logits(loaded.model, 100), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", ["long", "short", "dynamic"])
def test_the_table_beside_the_weights_is_what_stock_transformers_does(window: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    table = table_for(loaded)
    out = export(loaded, table, tmp_path / "out", window=window)
    again = load_model(str(out), FLOAT32)
    assert again.table is not None
    long = table.rows[-1]
    rows = {"long": (long.with_values(up_to=ORIGINAL), long), "short": table.rows[:1], "dynamic": table.rows}[window]
    assert again.table == replace(table, rows=rows)
    assert again.table.rows == again.own.rows
    with again.patch() as patch:
        patch.install(again.table)
        for length in (8, ORIGINAL, again.table.rows[-1].up_to):
            torch.testing.assert_close(logits(again.model, length), logits(stock(out), length), rtol=0, atol=1e-5)


def test_a_half_precision_checkpoint_is_exported_by_name_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(build("llama").to(torch.float16), tmp_path / "llama")  # type: ignore[arg-type]
    table = table_for(load_model(str(folder), FLOAT32))

    def never(*given: object) -> None:
        raise AssertionError("its weights are copied, not loaded")

    monkeypatch.setattr(sys.modules["longrope.export.skeleton"], "load_model", never)
    out = export(str(folder), table, tmp_path / "out", device="cpu")
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_export_can_be_exported_again(name: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path, name)
    table = table_for(loaded)
    first = load_model(str(export(loaded, table, tmp_path / "first", window="dynamic")), FLOAT32)
    second = stock(export(first, table, tmp_path / "second", window="long"))
    assert_same_logits(second, loaded, table.rows[-1])


@pytest.mark.parametrize("kind", ["llama3", "yarn", "longrope"])
def test_a_checkpoint_that_is_scaled_already_gets_the_new_factors_alone(kind: str, tmp_path: Path) -> None:
    loaded, base = saved(tmp_path, f"llama-{kind}"), saved(tmp_path, "llama")
    base.model.load_state_dict(loaded.model.state_dict())
    table = table_for(loaded)
    exported = stock(export(loaded, table, tmp_path / "out", window="dynamic"))
    assert_same_logits(exported, base, table)


LEGACY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 500.0}),
    ("gpt_neox", {"rotary_emb_base": 500, "rotary_pct": 0.25}),
    (
        "gemma3",
        {
            "rope_theta": 500.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},  # as the larger Gemma 3 have it
        },
    ),
    ("phi3", {"rope_theta": 500.0, "partial_rotary_factor": 0.75}),
]


@pytest.mark.parametrize(("name", "old_keys"), LEGACY)
def test_a_configuration_with_the_keys_of_old_is_exported_too(
    name: str, old_keys: dict[str, Any], tmp_path: Path
) -> None:
    folder = save(build(name), tmp_path / name)
    config = json.loads((folder / "config.json").read_text()) | old_keys
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder), FLOAT32)
    table = table_for(loaded)
    assert_same_logits(stock(export(loaded, table, tmp_path / "out", window="dynamic")), loaded, table)


def test_an_original_length_that_was_given_replaces_that_of_the_configuration(tmp_path: Path) -> None:
    folder = save(build("phi3", original_max_position_embeddings=4096), tmp_path / "phi3")
    loaded = load_model(str(folder), LoadOptions(dtype="float32", original_length=ORIGINAL))
    table = table_for(loaded)
    out = export(loaded, table, tmp_path / "out", window="dynamic")
    assert_same_logits(stock(out), loaded, table)
    (out / "factors.json").unlink()
    assert load_model(str(out), FLOAT32).own.rows == table.rows


def test_a_sliding_window_is_widened_in_the_configuration_and_not_in_the_model_at_hand(tmp_path: Path) -> None:
    loaded = saved(tmp_path, "mistral")
    out = export(loaded, table_for(loaded), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["sliding_window"] == LONG
    assert f"In config.json: sliding window widened from 24 to {LONG} tokens." in (out / "README.md").read_text()
    short = export(loaded, table_for(loaded), tmp_path / "short", window="short")
    assert json.loads((short / "config.json").read_text())["sliding_window"] == 24
    assert "widened" not in (short / "README.md").read_text()
    assert loaded.model.config.sliding_window == 24


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_the_window_and_the_rotation_of_local_layers_stay(name: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path, name)
    config = stock(export(loaded, table_for(loaded), tmp_path / "out")).config
    assert config.sliding_window == 16
    if name == "gemma3":
        assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 100.0}


def test_the_configuration_carries_the_keys_of_old_and_new_readers(tmp_path: Path) -> None:
    loaded = saved(tmp_path, "phi3")
    table = table_for(loaded)
    config = json.loads((export(loaded, table, tmp_path / "out") / "config.json").read_text())
    assert config["rope_scaling"] == config["rope_parameters"]
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "longrope"
    assert config["rope_scaling"]["partial_rotary_factor"] == 0.75
    assert config["rope_scaling"]["long_factor"] == list(table.rows[-1].rescale)
    assert config["original_max_position_embeddings"] == ORIGINAL
    assert (config["max_position_embeddings"], config["rope_theta"]) == (LONG, 500.0)
    assert config["architectures"] == ["Phi3ForCausalLM"]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    loaded = saved(tmp_path, "llama", tie_word_embeddings=True)
    exported: Any = stock(export(loaded, table_for(loaded), tmp_path / "out"))
    assert exported.lm_head.weight.data_ptr() == exported.model.embed_tokens.weight.data_ptr()
    assert torch.equal(exported.lm_head.weight, loaded.model.state_dict()["lm_head.weight"])


def test_sharded_weights_are_copied_with_their_index(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama", max_shard_size="20KB")
    loaded = load_model(str(folder), FLOAT32)
    table = table_for(loaded)
    out = export(loaded, table, tmp_path / "out")
    assert {path.name for path in out.glob("model-*")} == {path.name for path in folder.glob("model-*")} != set()
    assert_same_logits(stock(out), loaded, table.rows[-1])


def test_settings_of_generation_and_the_tokenizer_are_kept_and_other_weights_are_not(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.repetition_penalty = 1.5
    folder = save(model, tmp_path / "llama")
    (folder / "pytorch_model.bin").write_bytes(b"not ours")
    (folder / ".cache").mkdir()
    (folder / "LICENSE").write_text("of the model")
    loaded = load_model(str(folder), FLOAT32)
    out = export(loaded, table_for(loaded), tmp_path / "out")
    assert stock(out).generation_config.repetition_penalty == 1.5
    assert AutoTokenizer.from_pretrained(out)("héllo")["input_ids"] == loaded.tokenizer("héllo")["input_ids"]
    assert (out / "LICENSE").read_text() == "of the model"
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "factors.json",
        "generation_config.json",
        "LICENSE",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_tokenizer_passes_as_many_tokens_as_the_model(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    out = export(loaded, table_for(loaded), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert loaded.tokenizer.model_max_length == ORIGINAL
    assert tokenizer.model_max_length == LONG
    assert len(tokenizer("a" * 100, truncation=True)["input_ids"]) == 101


def test_a_tokenizer_without_a_maximum_is_left_as_it_is(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    path = tmp_path / "llama" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": None}))
    out = export(loaded, table_for(loaded), tmp_path / "out")
    assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "written"), [("mixtral", 16), ("falcon", None), ("gpt_neox", None), ("qwen3", 24), ("llama", 16)]
)
def test_a_head_dimension_is_written_only_where_the_class_has_none(
    name: str, written: int | None, tmp_path: Path
) -> None:
    loaded = saved(tmp_path, name)
    out = export(loaded, table_for(loaded), tmp_path / "out", window="dynamic")
    assert json.loads((out / "config.json").read_text()).get("head_dim") == written
    assert_same_logits(stock(out), loaded, table_for(loaded))


def test_the_weights_are_copied_byte_for_byte_and_may_be_written_whatever_the_source_allows(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    source = tmp_path / "llama" / "model.safetensors"
    source.chmod(0o444)
    out = export(loaded, table_for(loaded), tmp_path / "out") / "model.safetensors"
    assert out.read_bytes() == source.read_bytes()
    assert out.stat().st_mode & 0o200


@pytest.mark.parametrize("window", ["long", "dynamic", "short"])
def test_the_model_card_says_what_the_window_means(window: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    card = (export(loaded, table_for(loaded), tmp_path / "out", window=window) / "README.md").read_text()
    title = "with rescaled RoPE for 48 tokens" if window == "short" else "extended to 192 tokens"
    assert card.startswith(f"# llama, {title}\n")
    assert f"Window: `{window}`." in card
    assert ("Stock `generate` keeps keys" in card) == (window == "dynamic")
    first = "| 48 | 0 | 1.2000 | 1.5 to 6.4 |" if window == "long" else "| 48 | 0 | 1.2000 | 1 to 1.7 |"
    rows = [line for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert rows == [first, *(["| 192 | 0 | 1.2000 | 1.5 to 6.4 |"] if window != "short" else [])]


def test_the_model_card_keeps_what_the_hub_reads_of_the_original_and_names_the_model(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    about = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n"
    (tmp_path / "llama" / "README.md").write_text(f"{about}# Llama\n---\nA model.\n")
    (tmp_path / "llama").rename(tmp_path / "checkpoint")
    table_for(loaded).to_be_given_away().save(tmp_path / "checkpoint" / "factors.json")
    table = replace(table_for(loaded), model="acme/llama")
    out = export(load_model(str(tmp_path / "checkpoint")), table, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert card.startswith(f"{about}\n# llama, extended to 192 tokens\n")
    assert "A model." not in card


def test_a_snapshot_in_the_cache_of_the_hub_is_named_by_its_repository() -> None:
    table = FactorTable(500.0, 16, ORIGINAL, (unscaled(8, ORIGINAL),))
    for name in ("/cache/hub/models--me--q/snapshots/0a1b2c3d", "me/q"):
        assert model_card(name, table, "short").splitlines()[0].startswith("# q, ")


def test_the_model_card_has_no_figures_beyond_what_is_served() -> None:
    rows = (unscaled(8, ORIGINAL), RopeFactors(LONG, (2.0,) * 8))
    results = [{"method": "longrope", "length": length, "value": 2.0 + length} for length in (ORIGINAL, LONG)]
    for served, shown in ((rows[:1], ["50.000"]), (rows, ["50.000", "194.000"])):
        card = model_card("a", FactorTable(500.0, 16, ORIGINAL, served), "short", measured={"results": results})
        assert [
            line.split(" | ")[2].strip(" |") for line in card.splitlines() if line.startswith("| longrope")
        ] == shown


def test_an_export_works_while_factors_are_on_the_model(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    table = table_for(loaded)
    with loaded.patch() as patch:
        patch.install(table.rows[0])
        out = export(loaded, table, tmp_path / "out")
    assert_same_logits(stock(out), loaded, table.rows[-1])


def test_a_table_of_one_row_is_exported_at_every_length(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    table = FactorTable(500.0, 16, ORIGINAL, table_for(loaded).rows[1:])
    assert_same_logits(stock(export(loaded, table, tmp_path / "out")), loaded, table.rows[-1])


def test_a_table_that_extends_nothing_is_exported_as_it_is(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    table = FactorTable(500.0, 16, ORIGINAL, table_for(loaded).rows[:1])
    exported = stock(export(loaded, table, tmp_path / "out"))
    assert exported.config.max_position_embeddings == ORIGINAL
    with loaded.patch() as patch:
        patch.install(table.rows[0])
        torch.testing.assert_close(logits(exported, 40), logits(loaded.model, 40), rtol=0, atol=1e-5)


def test_more_than_two_rows_have_their_last_one_exported(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    short, long = table_for(loaded).rows
    table = FactorTable(500.0, 16, ORIGINAL, (short, unscaled(8, 100).with_values(start_tokens=3), long))
    assert_same_logits(stock(export(loaded, table, tmp_path / "out", window="long")), loaded, long)
    message = refusal(loaded, table, tmp_path / "other", window="dynamic")
    assert message.startswith("factor table: got start tokens [0, 3, 0]; no engine keeps start tokens unscaled; ")
    assert "; export with --window long, or keep factors.json" in message


def test_the_command_takes_the_factors_beside_the_weights(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    with pytest.raises(UserError) as error:
        export(str(folder), None, tmp_path / "out", options=FLOAT32)
    assert str(error.value).startswith(f"--factors: got none, and no factors.json in {folder}; an export needs factors")
    loaded = load_model(str(folder), FLOAT32)
    table_for(loaded).save(folder / "factors.json")
    out = export(str(folder), None, tmp_path / "out", options=FLOAT32)
    assert_same_logits(stock(out), loaded, table_for(loaded).rows[-1])


# What is refused


def refusal(loaded: LoadedModel, table: FactorTable, out: Path, **options: Any) -> str:
    """The line with which an export is refused; it leaves nothing behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        export(loaded, table, out, **options)
    assert sorted(out.parent.rglob("*")) == before
    return str(error.value)


@pytest.mark.parametrize("window", ["long", "dynamic"])
def test_start_tokens_are_refused(window: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    message = refusal(loaded, table_for(loaded, start_tokens=4), tmp_path / "out", window=window)
    assert "factor table: got start tokens " in message
    assert message.endswith(
        "; no engine keeps start tokens unscaled; export with --force, which leaves them out, or keep factors.json, "
        "which longrope reads"
    )


def test_start_tokens_of_the_short_row_are_no_matter_in_the_long_window(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    short, long = table_for(loaded).rows
    table = FactorTable(500.0, 16, ORIGINAL, (short.with_values(start_tokens=2), long))
    assert_same_logits(stock(export(loaded, table, tmp_path / "out")), loaded, long)


def test_two_attention_factors_are_refused_in_the_dynamic_window_only(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    table = table_for(loaded, attention_factor=1.3)
    message = refusal(loaded, table, tmp_path / "out", window="dynamic")
    assert message.startswith("factor table: got attention factors 1.2 and 1.3; the longrope format has one for both")
    assert "; export with --window long, or keep factors.json" in message
    assert_same_logits(stock(export(loaded, table, tmp_path / "out", window="long")), loaded, table.rows[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 400.0}, "factors: got rope_theta 400; the model has rope_theta 500; "),
        ({"rotary_dim": 8, "rows": (unscaled(4, LONG),)}, "factors: got rotary_dim 8; the model has rotary_dim 16; "),
        ({"original_length": 64}, "factors: got original_length 64; the model has original_length 48; "),
    ],
)
def test_factors_of_another_model_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    table = replace(table_for(loaded), **changes)
    assert refusal(loaded, table, tmp_path / "out").startswith(message)


def test_an_unknown_window_or_engine_is_refused(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    message = refusal(loaded, table_for(loaded), tmp_path / "out", window="wide")
    assert message == "--window: got 'wide'; it is one of dynamic, long, short; choose one of them"
    with pytest.raises(UserError, match="--engine: got 'abacus'; it is one of transformers, vllm, sglang, mlx, gguf; "):
        export(loaded, table_for(loaded), tmp_path / "out", engine="abacus")


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    for name in ("folder", "file"):
        out = tmp_path / name
        if name == "folder":
            out.mkdir()
            (out / "mine.txt").write_text("keep me")
        else:
            out.write_text("keep me")
        message = refusal(loaded, table_for(loaded), out)
        state = "not empty" if name == "folder" else "a file"
        assert message == f"--out: got {out}, which is {state}; an export is a new folder; choose another"


def test_an_empty_folder_may_be_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = saved(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert export(loaded, table_for(loaded), ".") == tmp_path / "out"
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_empty_folder_is_filled_and_neither_removed_nor_replaced(tmp_path: Path) -> None:
    """As a mount point can be neither; what a killed export left in it goes."""
    loaded = saved(tmp_path)
    out = tmp_path / "out"
    (out / ".out.unfinished").mkdir(parents=True)
    (out / ".out.unfinished" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    inode = out.stat().st_ino
    export(loaded, table_for(loaded), out)
    assert out.stat().st_ino == inode
    assert not [path for path in out.iterdir() if path.name.startswith(".") or "00001" in path.name]
    assert_same_logits(stock(out), loaded, table_for(loaded).rows[-1])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EBUSY, os.strerror(errno.EBUSY))])
def test_an_export_that_fails_while_it_fills_a_folder_leaves_it_empty(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = saved(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    rename, renamed = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        renamed.append(path.name)
        if path.name == "config.json":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        export(loaded, table_for(loaded), out)
    assert (len(renamed), renamed[-1]) == (7, "config.json")  # last: a folder without it does not load
    assert not list(out.iterdir())
    if isinstance(error, OSError):
        assert str(raised.value) == (
            f"output: got {out} ([Errno {errno.EBUSY}] Device or resource busy); "
            "the folder must take the files of a checkpoint; choose another folder"
        )


@pytest.mark.parametrize(
    ("error", "message"),
    [(KeyboardInterrupt(), None), (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device")],
)
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_export_leaves_nothing(
    error: BaseException, message: str | None, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = saved(tmp_path)
    if there:
        (tmp_path / "out").mkdir()
    copy = shutil.copyfile

    def interrupted(source: Path, target: Path) -> None:
        copy(source, target)
        raise error

    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", interrupted)
        with pytest.raises(UserError if message else type(error), match=message):
            export(loaded, table_for(loaded), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert export(loaded, table_for(loaded), tmp_path / "out").is_dir()


def test_what_a_killed_export_left_is_replaced(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    out = export(loaded, table_for(loaded), tmp_path / "out")
    assert not left.exists()
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]


def test_a_class_that_keeps_one_row_at_every_length_is_refused_in_the_dynamic_window(tmp_path: Path) -> None:
    """PhiMoE's buffers follow the length, and its forward does not use them."""
    loaded = saved(tmp_path, "phimoe")
    assert refusal(loaded, table_for(loaded), tmp_path / "out", window="dynamic") == (
        "export: got other factors from transformers at 49 tokens; PhimoeRotaryEmbedding must read back what was "
        "written; use --window long: this class does not change its factors with the length"
    )


def test_a_class_that_reads_other_factors_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a class would that overrides the frequencies of longrope."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    loaded = saved(tmp_path)
    table = table_for(loaded)
    own = ROPE_INIT_FUNCTIONS["longrope"]

    def doubled(*args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        frequencies, attention = own(*args, **kwargs)
        return 2 * frequencies, attention

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "longrope", doubled)
    assert refusal(loaded, table, tmp_path / "out") == (
        "export: got other factors from transformers at 1 tokens; LlamaRotaryEmbedding must read back what was "
        "written; this class cannot be exported for transformers; please report it"
    )
