"""Exports that would be wrong without a word: each is refused, written right, or found by verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import LagunaConfig, LagunaForCausalLM

import longrope as package
from byte_tokenizer import BOS, EOS, PAD
from commands import table, write_checkpoint
from longrope.baselines import RopeShape, su_attention_factor
from longrope.errors import UserError
from longrope.export.engines import check_family, expressible
from longrope.export.gguf_file import check_graph
from longrope.export.gguf_tokenizer import Vocabulary
from longrope.export.verify import verify
from longrope.factors import FactorTable
from models import ORIGINAL, config, save

STANDARD = su_attention_factor(4.0, ORIGINAL)
TARGET = 4 * ORIGINAL
Config = dict[str, Any]


def standard_table(rotary_dim: int = 16) -> FactorTable:
    """Two rows that differ from each other and from 1, with the attention factor that every engine has."""
    made = table(shape=RopeShape(500.0, rotary_dim, ORIGINAL))
    short, long = made.rows
    own = short.with_values(rescale=[1.0 + 0.1 * pair for pair in range(rotary_dim // 2)])
    return replace(made, rows=tuple(row.with_values(attention_factor=STANDARD) for row in (own, long)))


def wrong(folder: Path, **options: Any) -> set[str]:
    return {said.name for said in verify(folder, **options) if said.ok is False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ground") / "model")


@pytest.fixture(scope="module")
def exports(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exports: ENGINE-WINDOW."""
    ground = tmp_path_factory.mktemp("exports")
    for engine, window in (("vllm", "dynamic"), ("sglang", "long"), ("mlx", "long"), ("gguf", "dynamic")):
        package.export(str(model), standard_table(), ground / f"{engine}-{window}", engine=engine, window=window)
    return ground


# What an engine would drop


@pytest.mark.parametrize(
    ("engine", "name", "rule"),
    [
        ("mlx", "gemma2", "mlx-lm's gemma2 rotates without factors"),
        ("mlx", "mixtral", "mlx-lm's mixtral rotates without factors"),
        ("mlx", "olmo3", "mlx-lm's olmo3 has one rope_theta for local and global layers"),
        ("vllm", "cohere", "its LongRoPE rotates halves of a head, cohere neighbouring pairs"),
        ("sglang", "cohere", "its LongRoPE rotates halves of a head, cohere neighbouring pairs"),
    ],
)
def test_an_engine_whose_model_knows_no_factors_is_refused(engine: str, name: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^--engine {engine}: got {name}; {rule}"):
        check_family(engine, config(name).to_dict())
    if name == "cohere":
        write_checkpoint(tmp_path / "model", name)
        with pytest.raises(UserError, match=rule):
            package.export(str(tmp_path / "model"), standard_table(), tmp_path / "out", engine=engine, force=True)
        assert not (tmp_path / "out").exists()


def test_gemma_3_has_its_flat_keys_for_engines_that_know_no_others(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "gemma3")
    out = package.export(str(model), standard_table(), tmp_path / "out", engine="mlx")
    written = json.loads((out / "config.json").read_text())
    assert written["rope_scaling"] == written["rope_parameters"]["full_attention"]
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (500.0, 100.0)
    assert written["sliding_window_pattern"] == 2
    assert written["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 100.0}
    assert wrong(out) == set()


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_a_class_that_cannot_read_its_engines_keys_is_refused(tmp_path: Path) -> None:
    """Laguna's class wants a RoPE by layer type, and takes the flat keys of engines in the place of it."""
    own = LagunaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_attention_heads_per_layer=[2, 2], num_key_value_heads=1, head_dim=16, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_experts=2, num_experts_per_tok=1, sliding_window=16,
        max_position_embeddings=ORIGINAL, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    folder = save(LagunaForCausalLM(own), tmp_path / "model")
    rows = table(shape=RopeShape(500_000.0, 8, ORIGINAL))
    message = r"^export: got KeyError \('full_attention'\) from LagunaRotaryEmbedding; .*use --engine transformers$"
    with pytest.raises(UserError, match=message):
        package.export(str(folder), rows, tmp_path / "out", engine="vllm", window="long")
    package.export(str(folder), rows, tmp_path / "stock", window="long")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "stock"]


def test_partial_rotation_is_at_the_top_level_too(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "phi3")
    out = package.export(str(model), standard_table(12), tmp_path / "out", engine="mlx")
    written = json.loads((out / "config.json").read_text())
    assert written["partial_rotary_factor"] == 0.75
    assert wrong(out) == set()
    (out / "config.json").write_text(json.dumps(written | {"partial_rotary_factor": 1.0}))
    assert "keys" in wrong(out)


@pytest.mark.parametrize("engine", ["transformers", "vllm", "gguf"])
def test_a_short_window_is_a_right_export(engine: str, model: Path, tmp_path: Path) -> None:
    out = package.export(str(model), standard_table(), tmp_path / "out", engine=engine, window="short")
    assert wrong(out) == set()


def test_the_short_row_is_the_one_that_reaches_the_original_length() -> None:
    whole = standard_table()
    lower = whole.rows[1].with_values(up_to=ORIGINAL // 2)
    served = expressible(replace(whole, rows=(lower, *whole.rows)), "vllm", "dynamic", "llama")
    assert served.rows == whole.rows


# What verify must find


def both(change: Callable[[Config], object]) -> Callable[[Config], None]:
    def apply(written: Config) -> None:
        change(written["rope_parameters"])
        change(written["rope_scaling"])

    return apply


def swap(rope: Config) -> None:
    rope["short_factor"], rope["long_factor"] = rope["long_factor"], rope["short_factor"]


CORRUPT: list[tuple[str, str, Callable[[Config], object]]] = [
    ("vllm-dynamic", "factors", both(swap)),
    ("vllm-dynamic", "factors", both(lambda rope: rope["long_factor"].pop())),
    ("vllm-dynamic", "factors", both(lambda rope: rope["short_factor"].__setitem__(0, 1.01))),
    ("vllm-dynamic", "factors", both(lambda rope: rope.pop("long_factor"))),
    ("vllm-dynamic", "lengths", lambda written: written.update(max_position_embeddings=2 * TARGET)),
    ("vllm-dynamic", "lengths", both(lambda rope: rope.update(original_max_position_embeddings=ORIGINAL // 2))),
    ("vllm-dynamic", "attention factor", both(lambda rope: rope.update(short_mscale=1.0))),
    ("vllm-dynamic", "keys", lambda written: written.pop("rope_parameters")),
    ("sglang-long", "keys", lambda written: written.pop("rope_scaling")),
    ("mlx-long", "keys", lambda written: written.pop("rope_scaling")),
    ("mlx-long", "keys", lambda written: written.pop("rope_theta")),
    ("mlx-long", "attention factor", lambda written: written.update(max_position_embeddings=2 * TARGET)),
]


@pytest.mark.parametrize("case", range(len(CORRUPT)))
def test_verify_notices_a_configuration_that_was_changed(case: int, exports: Path, tmp_path: Path) -> None:
    name, found, change = CORRUPT[case]
    folder = Path(shutil.copytree(exports / name, tmp_path / "out"))
    written = json.loads((folder / "config.json").read_text())
    change(written)
    (folder / "config.json").write_text(json.dumps(written))
    assert found in wrong(folder)


def test_verify_says_what_another_engine_cannot_do(exports: Path) -> None:
    assert wrong(exports / "vllm-dynamic" / "config.json") == set()
    assert "engine" in wrong(exports / "vllm-dynamic", engine="mlx")
    assert "engine" in wrong(exports / "vllm-dynamic", engine="sglang")


CORRUPT_GGUF: list[tuple[str, str, Any]] = [
    ("llama.rope.freq_base", "rotation", 10000.0),
    ("llama.rope.dimension_count", "rotation", 8),
    ("llama.context_length", "lengths", 2 * TARGET),
    ("llama.rope.scaling.original_context_length", "original length", TARGET),
    ("llama.rope.scaling.attn_factor", "attention factor", 1.0),
    ("llama.rope.scaling.type", "scaling", b"longXope"),
    ("rope_factors_short.weight", "factors", 2.0),
    ("rope_factors_long.weight", "factors", 2.0),
]


@pytest.mark.parametrize(("key", "found", "value"), CORRUPT_GGUF)
def test_verify_notices_a_gguf_that_was_changed(
    key: str, found: str, value: Any, exports: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports / "gguf-dynamic", tmp_path / "out"))
    assert wrong(folder) == set()
    reader = gguf.GGUFReader(str(next(folder.glob("*.gguf"))), "r+")
    tensor = [each for each in reader.tensors if each.name == key]
    if tensor:
        tensor[0].data[3] = value
    else:
        field = reader.fields[key]
        field.parts[field.data[0]][:] = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
    reader.data.flush()
    assert found in wrong(folder)


# What llama.cpp does otherwise


def test_what_llama_cpp_computes_otherwise_is_refused() -> None:
    served = standard_table()
    check_graph({"hidden_act": "silu", "sliding_window": 24}, served)  # widened to the target
    with pytest.raises(UserError, match=r"got hidden_act gelu; llama\.cpp's graphs of these architectures have silu"):
        check_graph({"hidden_act": "gelu"}, served)
    with pytest.raises(UserError, match="got a sliding window of 24 tokens"):
        check_graph({"hidden_act": "silu", "sliding_window": 24}, replace(served, rows=served.rows[:1]))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def tokenizer(folder: Path, splitter: Any, normalizer: Any = None, **model: Any) -> Vocabulary:
    described = {
        "model": {"type": "BPE", "merges": [["a", "b"]], "vocab": {"a": 0, "b": 1, "ab": 2, "<e>": 3}, **model},
        "pre_tokenizer": splitter, "normalizer": normalizer,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return Vocabulary.of(folder, {"vocab_size": 4, "eos_token_id": [3, 1], "bos_token_id": None})


def test_a_way_to_split_is_written_only_where_llama_cpp_has_it(tmp_path: Path) -> None:
    plain = tokenizer(tmp_path, BYTES)
    assert (plain.pre, plain.special) == ("gpt-2", {"eos": 3})  # or llama.cpp ends a text at token 11
    assert tokenizer(tmp_path, {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}).pre == "smollm"
    assert tokenizer(tmp_path, BYTES, {"type": "NFC"}).pre == "gpt-2"
    for refused in (
        {**BYTES, "add_prefix_space": True},
        {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTES]},
        {"type": "Sequence", "pretokenizers": [DIGITS | {"individual_digits": False}, BYTES]},
    ):
        with pytest.raises(UserError, match="splits texts in a way of its own"):
            tokenizer(tmp_path, refused)
    with pytest.raises(UserError, match="splits texts in a way of its own"):
        tokenizer(tmp_path, BYTES, ignore_merges=True)
    with pytest.raises(UserError, match="changes texts by Lowercase"):
        tokenizer(tmp_path, BYTES, {"type": "Lowercase"})
    with pytest.raises(UserError, match="a tokenizer with NFKC before its merges"):
        tokenizer(tmp_path, None, {"type": "NFKC"}, byte_fallback=True)


# What the card says


def test_the_card_says_what_is_true_of_its_engine_and_class(exports: Path, tmp_path: Path) -> None:
    card = (exports / "gguf-dynamic" / "README.md").read_text()
    assert "converted to GGUF with matrices in f16." in card
    assert "llama.cpp chooses once" in card
    assert "`generate`" not in card
    assert "`generate`" not in (exports / "vllm-dynamic" / "README.md").read_text()
    model = write_checkpoint(tmp_path / "model", "phi3")
    run = tmp_path / "run"
    run.mkdir()
    standard_table(12).save(run / "factors.json")
    result = {"method": "longrope", "length": 192, "value": 4.5, "tokens": 1528, "windows": "search"}
    (run / "metrics.json").write_text(json.dumps({"measure": "perplexity", "results": [result]}))
    out = package.export(str(model), run, tmp_path / "out", window="dynamic")
    card = (out / "README.md").read_text()
    assert "of this class makes its cache again" in card
    assert "Measured by the run that made the factors, perplexity:" in card
    assert "| longrope | 192 | 4.500 | search |" in card
