"""Exports for engines: what each is given, what is refused, what is read back. For the engines see tests/engines."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import longrope as package
from commands import longrope, table, write_checkpoint, write_documents
from longrope.baselines import RopeShape, su_attention_factor
from longrope.errors import UserError
from longrope.export.engines import ENGINES, losses, row_of_engine, table_for_window
from longrope.export.gguf_file import DTYPES, interleaved
from longrope.export.gguf_tokenizer import Vocabulary
from longrope.export.verify import gguf_fields, verify
from longrope.factors import FactorTable
from models import ORIGINAL

STANDARD = su_attention_factor(4.0, ORIGINAL)
TABLE = replace(table(), rows=tuple(row.with_values(attention_factor=STANDARD) for row in table().rows))
TARGET = TABLE.rows[-1].up_to


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ground") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ground") / "phi3", "phi3")


def export(model: Path, out: Path, engine: str, window: str = "long", **more: Any) -> tuple[Path, dict[str, Any]]:
    folder = package.export(str(model), more.pop("factors", TABLE), out, engine=engine, window=window, **more)
    path = folder / "config.json"
    return folder, json.loads(path.read_text()) if path.is_file() else {}


@pytest.mark.parametrize("engine", ["transformers", "vllm", "sglang", "mlx"])
def test_each_engine_finds_its_keys_and_stock_transformers_loads_it(engine: str, model: Path, tmp_path: Path) -> None:
    folder, config = export(model, tmp_path / "out", engine)
    rope, last = config["rope_scaling"], TABLE.rows[-1]
    assert rope == config["rope_parameters"]
    assert rope["rope_type"] == rope["type"] == "longrope"
    assert rope["short_factor"] == rope["long_factor"] == list(last.rescale)
    assert rope["original_max_position_embeddings"] == ORIGINAL
    assert config["max_position_embeddings"] == TARGET
    assert config["rope_theta"] == rope["rope_theta"] == TABLE.rope_theta
    assert rope["short_mscale"] == rope["long_mscale"] == rope["attention_factor"] == STANDARD
    assert config["head_dim"] == 16
    assert ("original_max_position_embeddings" in config) == (engine != "vllm"), "vLLM would start with that length"
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert [said for said in verify(folder, against=str(model)) if said.ok is False] == []
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert loaded(torch.arange(60)[None]).logits.shape[1] == 60
    assert f"Engine: `{engine}`" in (folder / "README.md").read_text()


def test_vllm_has_an_attention_factor_for_each_row(model: Path, tmp_path: Path) -> None:
    rows = TABLE.rows[0].with_values(attention_factor=1.0), TABLE.rows[1]
    both = replace(TABLE, rows=rows)
    folder, config = export(model, tmp_path / "out", "vllm", "dynamic", factors=both)
    rope = config["rope_parameters"]
    assert (rope["short_mscale"], rope["long_mscale"]) == (1.0, STANDARD)
    assert rope["short_factor"] == list(rows[0].rescale)
    assert [said for said in verify(folder) if said.ok is False] == []
    with pytest.raises(UserError, match=r"attention factors 1\.0 and "):
        export(model, tmp_path / "other", "transformers", "dynamic", factors=both)
    with pytest.raises(
        UserError, match=r"^--engine gguf: got attention factors of 1 and .*: gguf has one for all lengths"
    ):
        export(model, tmp_path / "other", "gguf", "dynamic", factors=both)


@pytest.mark.parametrize(
    ("engine", "window", "factors", "match"),
    [
        ("sglang", "dynamic", TABLE, "two regimes: SGLang chooses for all requests of a pass together"),
        ("mlx", "dynamic", TABLE, "two regimes: mlx-lm uses the long factors at every length"),
        ("mlx", "long", table(), r"attention factor 1(\.\d+)?: mlx-lm computes 1\.\d+ from the lengths"),
        ("vllm", "dynamic", replace(TABLE, rows=(TABLE.rows[0], TABLE.rows[1].with_values(up_to=96), TABLE.rows[1])),
         "3 rows: engines have two, short and long"),
        ("vllm", "long", replace(TABLE, rows=(TABLE.rows[0], TABLE.rows[1].with_values(start_tokens=4))),
         r"start tokens \(4, 4\): no engine keeps them unscaled"),
        ("gguf", "long", replace(TABLE, rows=(TABLE.rows[0], TABLE.rows[1].with_values(start_tokens=4))),
         "start tokens"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_express_is_refused_with_the_reason(
    engine: str, window: str, factors: FactorTable, match: str, model: Path, tmp_path: Path
) -> None:
    factors = replace(factors, rows=tuple(row.with_values(attention_factor=1.1) for row in factors.rows)) if (
        engine == "mlx" and window == "long") else factors  # fmt: skip
    with pytest.raises(UserError, match=rf"^--engine {engine}: got {match}.*nothing is dropped silently.*--force"):
        export(model, tmp_path / "out", engine, window, factors=factors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("window", "start_tokens", "do"),
    [
        ("dynamic", 4, "give --force, "),
        ("long", 4, "give --force, "),
        ("dynamic", 0, "choose --window long, another engine, or --force, "),
    ],
)
def test_what_is_to_be_done_about_a_loss_helps(
    window: str, start_tokens: int, do: str, model: Path, tmp_path: Path
) -> None:
    short, long = TABLE.rows
    factors = replace(TABLE, rows=(short, long.with_values(start_tokens=start_tokens)))
    with pytest.raises(UserError) as error:
        export(model, tmp_path / "out", "sglang", window, factors=factors)
    assert error.value.do.startswith(do)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "gguf"])
def test_the_type_of_matrices_is_of_a_gguf_alone(engine: str, model: Path, tmp_path: Path) -> None:
    TABLE.save(tmp_path / "factors.json")
    out = tmp_path / "out"
    done = longrope("export", model, "-f", tmp_path, "--engine", engine, "--dtype", "q8_0", "--out", out)
    assert (done.code, out.exists()) == (2, False)
    assert done.err.startswith(f"longrope: --dtype: got q8_0 for {engine}; weights are converted for gguf alone, ")
    assert done.err.count("\n") == 1


def test_documents_that_nothing_is_measured_on_are_refused(model: Path, tmp_path: Path) -> None:
    TABLE.save(tmp_path / "factors.json")
    done = longrope("export", model, "-f", tmp_path, "-d", "docs/nope", "--out", tmp_path / "out")
    assert (done.code, (tmp_path / "out").exists()) == (2, False)
    assert done.err == (
        "longrope: --documents: got documents without --force; what --force costs is measured on them; "
        "leave them out, or give --force\n"
    )


def test_force_leaves_it_out_and_the_card_has_what_that_costs(model: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "texts")
    started = replace(TABLE, rows=tuple(row.with_values(start_tokens=2) for row in TABLE.rows))
    folder, config = export(
        model, tmp_path / "out", "vllm", "long", factors=started, force=True, documents=[str(tmp_path / "texts")]
    )
    assert config["rope_parameters"]["long_factor"] == list(TABLE.rows[-1].rescale)
    card = (folder / "README.md").read_text()
    assert "Left out, because the engine cannot express it:" in card
    assert "* start tokens (2, 2): no engine keeps them unscaled" in card
    rows = [
        line for line in card.splitlines() if line.startswith(f"| {ORIGINAL} |") or line.startswith(f"| {TARGET} |")
    ]
    values = [[float(cell) for cell in row.split("|")[2:4]] for row in rows if row.count("|") == 4]
    assert len(values) == 2
    assert all(math.isfinite(value) and value > 1 for pair in values for value in pair)
    assert values[0][0] != values[0][1]
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("too short")
    folder, _ = export(
        model, tmp_path / "again", "vllm", "long", factors=started, force=True, documents=[str(tmp_path / "short")]
    )
    assert "not measured" in (folder / "README.md").read_text()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("window", ["long", "dynamic", "short"])
def test_what_is_served_loses_nothing_where_nothing_is_lost(engine: str, window: str) -> None:
    served = table_for_window(TABLE, window)
    lost = losses(served, engine, window, "llama")
    assert bool(lost) == ((window == "dynamic" and engine in ("sglang", "mlx")) or (window, engine) == ("short", "mlx"))
    for length in (ORIGINAL, TARGET):
        row = row_of_engine(served, engine, window, length, TARGET)
        assert row.rescale in [each.rescale for each in served.rows]


def test_other_engines_choose_by_what_they_serve() -> None:
    short, long = TABLE.rows
    for engine in ("vllm", "gguf"):
        assert row_of_engine(TABLE, engine, "dynamic", 10, TARGET) == long
        assert row_of_engine(TABLE, engine, "dynamic", 10, ORIGINAL) == short
    assert row_of_engine(TABLE, "transformers", "dynamic", 10, TARGET) == short


# GGUF


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", ["long", "dynamic", "short"])
def test_a_gguf_has_factors_lengths_and_weights(dtype: str, window: str, model: Path, tmp_path: Path) -> None:
    folder, _ = export(model, tmp_path / "out", "gguf", window, dtype=dtype)
    (path,) = folder.glob("*.gguf")
    assert path.name == f"model-{dtype}.gguf"
    fields, tensors = gguf_fields(path)
    assert fields["general.architecture"] == "llama"
    assert "llama.rope.scaling.factor" not in fields
    assert fields["llama.context_length"] == (ORIGINAL if window == "short" else TARGET)
    assert fields["llama.rope.scaling.attn_factor"] == pytest.approx(STANDARD, rel=1e-6)
    if window == "dynamic":
        assert fields["llama.rope.scaling.type"] == "longrope"
        assert fields["llama.rope.scaling.original_context_length"] == ORIGINAL
        assert set(tensors) == {"rope_factors_long.weight", "rope_factors_short.weight"}
        assert np.allclose(tensors["rope_factors_long.weight"], TABLE.rows[1].rescale)
    else:
        assert "llama.rope.scaling.type" not in fields
        assert set(tensors) == ({"rope_freqs.weight"} if window == "long" else set())
    assert [said for said in verify(folder) if said.ok is False] == []
    told = verify(path)
    assert [said for said in told if said.ok is False] == []
    scaling = {said.name: said.what for said in told}["scaling"]
    assert scaling == ("longrope" if window == "dynamic" else "none is written")
    _same_weights(path, model, 4e-2 if dtype == "q8_0" else 1e-2 if dtype == "bf16" else 1e-3)


@pytest.mark.parametrize("alike", [True, False])
def test_a_head_that_is_not_the_embedding_is_written_though_the_configuration_ties_them(
    alike: bool, tmp_path: Path
) -> None:
    """As transformers reads such a checkpoint."""
    model = write_checkpoint(tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone() if alike else embedding + 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    folder, _ = export(model, tmp_path / "out", "gguf", "long")
    (path,) = folder.glob("*.gguf")
    assert ("output.weight" in {tensor.name for tensor in gguf.GGUFReader(str(path)).tensors}) is not alike


def _same_weights(path: Path, model: Path, tolerance: float) -> None:
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    with safe_open(str(model / "model.safetensors"), "pt") as opened:
        down = opened.get_tensor("model.layers.1.mlp.down_proj.weight").float().numpy()
        query = opened.get_tensor("model.layers.0.self_attn.q_proj.weight").float().numpy()
    for name, wanted in (("blk.1.ffn_down.weight", down), ("blk.0.attn_q.weight", interleaved(query, 2))):
        tensor = written[name]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_rows_of_queries_go_from_halves_to_pairs() -> None:
    rows = np.arange(8).reshape(8, 1)  # two heads of four: halves (0 1 | 2 3) and (4 5 | 6 7)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_phi3_has_both_lists_in_every_window(phi3: Path, tmp_path: Path) -> None:
    from longrope.model import load_model

    shape = load_model(str(phi3)).rope.shape
    own = replace(
        table(shape=shape), rows=tuple(row.with_values(attention_factor=STANDARD) for row in table(shape=shape).rows)
    )
    for window in ("long", "dynamic"):
        folder, _ = export(phi3, tmp_path / window, "gguf", window, factors=own, dtype="f32")
        fields, tensors = gguf_fields(next(folder.glob("*.gguf")))
        assert fields["general.architecture"] == "phi3"
        assert fields["phi3.rope.dimension_count"] == own.rotary_dim
        assert set(tensors) == {"rope_factors_long.weight", "rope_factors_short.weight"}
        short = own.rows[-1] if window == "long" else own.rows[0]
        assert np.allclose(tensors["rope_factors_short.weight"], short.rescale)
        assert [said for said in verify(folder) if said.ok is False] == []


def test_the_tokenizer_is_written_token_by_token(model: Path) -> None:
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    vocabulary = Vocabulary.of(model, {"vocab_size": size})
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert vocabulary.tokens == tokenizer.convert_ids_to_tokens(list(range(size)))
    assert vocabulary.kinds == [1] * 256 + [3] * 3
    assert vocabulary.special == {"bos": 256, "eos": 257, "pad": 258}
    assert vocabulary.begins_with_bos
    assert vocabulary.merges


def test_a_tokenizer_of_sentencepiece_has_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "ab", "▁ab"]
    described = {
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": [["a", "b"], ["▁", "ab"]],
                  "vocab": {token: index for index, token in enumerate(tokens)}},
        "added_tokens": [{"id": index, "content": tokens[index], "special": True} for index in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    vocabulary = Vocabulary.of(tmp_path, {"vocab_size": 10})
    assert (vocabulary.model, vocabulary.space_prefix, vocabulary.begins_with_bos) == ("llama", True, True)
    assert vocabulary.kinds == [2, 3, 3, 6, 1, 1, 1, 1, 1, 5]
    assert vocabulary.scores is not None
    assert vocabulary.scores[7] > vocabulary.scores[8] > vocabulary.scores[5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "--engine gguf: got qwen2; longrope writes llama, mistral, phi3 as GGUF; "),
        ({"quantization_config": {"quant_method": "gptq"}}, "--engine gguf: got quantised weights; "),
    ],
)
def test_what_cannot_be_a_gguf_is_refused(change: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    from longrope.export.gguf_file import check_architecture

    config = json.loads((model / "config.json").read_text()) | change
    with pytest.raises(UserError) as raised:
        check_architecture(config, model)
    assert str(raised.value).startswith(message)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="without them; weights are read from safetensors"):
        check_architecture({"model_type": "llama"}, tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "rotary_dim", "can"), [("llama", 16, True), ("qwen3", 24, False), ("gemma3", 16, False)]
)
def test_verify_tells_of_a_folder_that_can_be_no_gguf(name: str, rotary_dim: int, can: bool, tmp_path: Path) -> None:
    """As export does: llama.cpp's graphs of most classes rotate without factors."""
    model = write_checkpoint(tmp_path / "model", name)
    shaped = table(shape=RopeShape(500.0, rotary_dim, ORIGINAL))
    folder, _ = export(model, tmp_path / "out", "transformers", factors=shaped)
    said = [each for each in verify(folder, engine="gguf") if each.name == "engine"]
    assert bool(said) == (not can)
    for each in said:
        assert each.ok is False
        assert each.what.startswith(f"--engine gguf: got {name}")
    if not can:
        with pytest.raises(UserError, match=r"^--engine gguf: got "):
            export(model, tmp_path / "gguf", "gguf", factors=shaped)


def test_qwen_in_gguf_is_refused_from_the_command_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "qwen2")
    TABLE.save(tmp_path / "factors.json")
    arguments = ("-f", tmp_path / "factors.json", "--engine", "gguf", "--out", tmp_path / "out")
    done = longrope("export", tmp_path / "model", *arguments)
    assert done.code == 2
    assert done.err.startswith("longrope: --engine gguf: got qwen2; longrope writes llama, mistral, phi3 as GGUF; ")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    done = longrope(
        "export", tmp_path / "model", *arguments[:2], "--engine", "gguf", "--dtype", "q2", "--out", tmp_path / "o"
    )
    assert done.code == 2


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    folder, config = export(model, tmp_path / "out", "gguf", dtype="f32")
    names = {tensor.name for tensor in gguf.GGUFReader(str(next(folder.glob("*.gguf")))).tensors}
    assert "output.weight" not in names
    folder, config = export(model, tmp_path / "hf", "vllm")
    assert config["tie_word_embeddings"]


def test_an_export_looks_at_a_skeleton_and_loads_no_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for engine in ENGINES:
        export(model, tmp_path / engine, engine)


def test_verify_finds_what_was_changed_afterwards(model: Path, tmp_path: Path) -> None:
    folder, config = export(model, tmp_path / "out", "vllm")
    config["rope_scaling"]["long_factor"][3] += 0.5
    (folder / "config.json").write_text(json.dumps(config))
    wrong = {said.name for said in verify(folder) if said.ok is False}
    assert {"factors", "configuration"} <= wrong
    assert longrope("verify", folder).code == 1
    config["rope_scaling"]["long_factor"][3] -= 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert longrope("verify", folder).code == 0
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4] + b"abcd")
    assert {said.name for said in verify(folder, against=str(model)) if said.ok is False} >= {"weights"}


def test_verify_says_what_the_engine_will_do(model: Path, tmp_path: Path) -> None:
    folder, _ = export(model, tmp_path / "out", "vllm", "dynamic")
    done = longrope("verify", folder, "--json")
    said = {each["name"]: each["what"] for each in done.document["said"]}
    assert (
        said["regime"] == f"vLLM uses the long factors for everything where --max-model-len is beyond {ORIGINAL} tokens"
    )
    assert said["ignored"].startswith("vllm ignores attention_factor and factor")
    assert longrope("verify", tmp_path / "missing").code == 2
    assert longrope("verify", model).code == 2
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    TABLE.save(tmp_path / "factors.json")
    done = longrope("verify", tmp_path / "broken.gguf")
    assert done.code == 2
    assert "it is a whole GGUF file" in done.err
