from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from byte_tokenizer import byte_tokenizer
from longrope.baselines import su_attention_factor, yarn_attention_factor
from longrope.checkpoint import TINY, LoadOptions
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.model import LoadedModel, load_model
from models import ARCHITECTURES, ORIGINAL, SCALED, build, save, tokens

LONG = 4 * ORIGINAL
FLOAT32 = LoadOptions(dtype="float32")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def loaded_from(folder: Path, name: str, options: LoadOptions = FLOAT32, **changes: Any) -> LoadedModel:
    return load_model(str(save(build(name, **changes), folder / name)), options)


def edit_config(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(config | changes))


def refusal(name: str | Path, options: LoadOptions | None = None) -> str:
    """The line with which a model is refused."""
    with pytest.raises(UserError) as error:
        load_model(str(name), options)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is loaded


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_a_linear_scaling_of_any_factor_loads(factor: float, tmp_path: Path) -> None:
    """Also of the one that a model is tried with, which has to be another than its own."""
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 500.0}
    loaded = loaded_from(tmp_path, "llama", rope_parameters=rope)
    assert set(loaded.own.rows[0].rescale) == {factor}


def test_phimoe_loads_with_the_attention_factors_of_its_lists(tmp_path: Path) -> None:
    """Released checkpoints have no other, and the class computes one that it does not use."""
    lists = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "short_mscale": 1.243, "long_mscale": 1.243}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, "rope_theta": 500.0, **lists}
    loaded = loaded_from(tmp_path, "phimoe", rope_parameters=rope, max_position_embeddings=LONG)
    ids = tokens(40)
    own = loaded.model(ids, use_cache=False).logits
    with loaded.patch() as patch:
        patch.install(loaded.own)
        assert torch.allclose(loaded.model(ids, use_cache=False).logits, own, atol=1e-5)


def test_a_sliding_window_that_no_layer_has_is_not_spoken_of(tmp_path: Path) -> None:
    loaded = loaded_from(tmp_path, "gemma2", layer_types=["full_attention"] * 2, sliding_window=16)
    loaded.widen_window(LONG)
    assert loaded.notes == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_loads_with_its_own_logits_and_rope(name: str, tmp_path: Path) -> None:
    loaded = loaded_from(tmp_path, name)
    ids = tokens(40)
    assert torch.equal(loaded.model(ids).logits, build(name)(ids).logits)
    assert loaded.model.dtype == torch.float32
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert not loaded.model.training
    share = {"phi3": 0.75, "gpt_neox": 0.25, "phi": 0.5, "stablelm": 0.25}.get(name, 1.0)
    head = {"qwen3": 24, "gpt_neox": 32}.get(name, 16)
    assert (loaded.rope.rope_theta, loaded.rope.rotary_dim) == (500.0, int(share * head))
    assert (loaded.rope.original_length, loaded.rope.scaling, loaded.table) == (ORIGINAL, "default", None)
    assert loaded.own.rows == (unscaled(loaded.rope.shape.pairs, ORIGINAL),)
    assert loaded.tokenizer("a")["input_ids"] == [256, 97]
    # The class of Qwen2's tokenizer adds one that the byte tokenizer, and so this model, does not have.
    added = ["the tokenizer has 1 token that the model has no weights for, the first '<|endoftext|>': texts that hold"]
    assert [note.removesuffix(" one are refused") for note in loaded.notes] == (added if name == "qwen2" else [])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_by_chunk_are_the_whole_logits(
    name: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_from(tmp_path, name)
    ids = tokens(50, batch)
    whole = loaded.model(ids).logits
    monkeypatch.setattr("longrope.model.chunk_rows", lambda *_: batch * 7)
    chunks = list(loaded.logits(ids))
    assert [start for start, _ in chunks] == list(range(0, 50, 7))
    assert [chunk.shape[1] for _, chunk in chunks] == [7] * 7 + [1]
    torch.testing.assert_close(torch.cat([chunk for _, chunk in chunks], 1), whole, rtol=0, atol=1e-5)
    assert torch.equal(loaded.model(ids).logits, whole)


def test_logits_by_chunk_under_autocast_are_those_of_the_model_and_its_weights_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(
        str(save(build("llama", tie_word_embeddings=True), tmp_path / "llama")), LoadOptions(dtype="autocast")
    )
    monkeypatch.setattr("longrope.model.chunk_rows", lambda *_: 7)
    head: Any = loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight, ids = head.weight, tokens(50)
    with loaded.autocast():
        whole = loaded.model(ids).logits
        chunks = torch.cat([chunk for _, chunk in loaded.logits(ids)], 1)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(chunks, whole, rtol=1e-2, atol=1e-2)  # two roundings of bfloat16
    assert head.weight is weight is loaded.model.get_input_embeddings().weight
    assert weight.dtype == torch.float32


def test_a_reader_who_stops_after_one_chunk_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, ids = loaded_from(tmp_path, "llama"), tokens(20)
    whole = loaded.model(ids).logits
    monkeypatch.setattr("longrope.model.chunk_rows", lambda *_: 1)
    chunks = loaded.logits(ids)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert torch.equal(loaded.model(ids).logits, whole)


def test_logits_by_chunk_keep_a_forward_that_a_library_put_on_the_decoder(tmp_path: Path) -> None:
    loaded, ids = loaded_from(tmp_path, "llama"), tokens(20)
    decoder: Any = loaded.model.get_decoder()  # type: ignore[no-untyped-call]
    calls: list[int] = []
    own = decoder.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    decoder.forward = counted
    list(loaded.logits(ids))
    loaded.model(ids)
    assert len(calls) == 2


def test_factors_work_on_logits_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ids = loaded_from(tmp_path, "llama"), tokens(100)
    before = loaded.model(ids).logits
    monkeypatch.setattr("longrope.model.chunk_rows", lambda *_: 9)
    with loaded.patch() as patch:
        patch.install(RopeFactors(LONG, tuple(1.0 + i for i in range(8))))
        whole = loaded.model(ids).logits
        torch.testing.assert_close(torch.cat([chunk for _, chunk in loaded.logits(ids)], 1), whole, rtol=0, atol=1e-5)
    assert not torch.allclose(whole, before, atol=1e-2)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa"])
def test_dtype_and_attention_pass_through(attention: str, dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    loaded = loaded_from(tmp_path, "llama", LoadOptions(dtype=dtype, attention=attention))
    assert loaded.model.dtype == expected
    assert loaded.model.config._attn_implementation == ("sdpa" if attention == "auto" else attention)
    [(_, chunk)] = loaded.logits(tokens(4))
    assert chunk.dtype == expected


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_class_without_sdpa_loads_by_default_and_says_so_when_it_is_asked_for(name: str, tmp_path: Path) -> None:
    assert loaded_from(tmp_path, name).model.config._attn_implementation == "eager"
    assert "does not support an attention implementation" in refusal(tmp_path / name, LoadOptions(attention="sdpa"))


@pytest.mark.parametrize(
    ("fast", "resolved", "computed"), [(True, "autocast", torch.bfloat16), (False, "float32", torch.float32)]
)
def test_auto_on_a_cpu_is_under_autocast_where_the_processor_multiplies_bfloat16(
    fast: bool, resolved: str, computed: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longrope.checkpoint.half_is_fast_on_cpu", lambda: fast)
    loaded = loaded_from(tmp_path, "llama", LoadOptions(device="cpu"))
    assert loaded.model.dtype == torch.float32
    assert loaded.options.dtype == resolved  # what a run writes down
    with loaded.autocast():
        assert loaded.model(tokens(4)).logits.dtype == computed


def test_autocast_can_be_asked_for_and_float32_is_never_under_it(tmp_path: Path) -> None:
    for dtype, computed in (("autocast", torch.bfloat16), ("float32", torch.float32)):
        loaded = loaded_from(tmp_path, "llama", LoadOptions(device="cpu", dtype=dtype))
        assert loaded.model.dtype == torch.float32
        with loaded.autocast():
            assert loaded.model(tokens(4)).logits.dtype == computed


def test_the_precision_of_angles_reaches_the_patch(tmp_path: Path) -> None:
    patch = loaded_from(tmp_path, "llama", LoadOptions(dtype="float32", rope_precision="float64")).patch()
    assert patch.precision == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "int8"},
            "--dtype: got 'int8'; it is one of auto, autocast, float32, bfloat16, float16; choose one of them",
        ),
        (
            {"device": "nowhere"},
            "--device: got 'nowhere'; it is auto, cpu, cuda, cuda:N, mps, balanced or sequential; choose one of them",
        ),
        (
            {"rope_precision": "float16"},
            "--rope-precision: got 'float16'; it is one of float32, float64; choose one of them",
        ),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        LoadOptions(**options)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_an_attention_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    assert '`attn_implementation="nonsense"` is not supported' in refusal(folder, LoadOptions(attention="nonsense"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError) as error:
        LoadOptions(device="cuda:1")
    assert str(error.value) == (
        "--device: got 'cuda:1'; torch sees no CUDA device here; use --device cpu, or install torch for CUDA"
    )


# What a checkpoint says of itself


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_checkpoint_is_accepted_and_its_scaling_is_its_own_table(kind: str, tmp_path: Path) -> None:
    loaded, ids = loaded_from(tmp_path, f"llama-{kind}"), tokens(80)
    stock = loaded.model(ids).logits
    assert loaded.rope.scaling == kind
    last = loaded.own.rows[-1]
    assert last.up_to == LONG or (kind, last.up_to) == ("linear", 4 * LONG)
    attention = {"yarn": yarn_attention_factor(4.0), "longrope": su_attention_factor(4.0, ORIGINAL)}
    assert last.attention_factor == pytest.approx(attention.get(kind, 1.0))
    if kind == "dynamic":
        assert loaded.own.rows[0] == unscaled(8, ORIGINAL)
        return  # its factors follow the length; test_patch compares them at one
    with loaded.patch() as patch:
        patch.install(loaded.own)
        torch.testing.assert_close(loaded.model(ids).logits, stock, rtol=0, atol=1e-5)


def table(**changes: Any) -> FactorTable:
    rows = (unscaled(8, ORIGINAL), RopeFactors(LONG, tuple(1.0 + i for i in range(8))))
    return replace(FactorTable(500.0, 16, ORIGINAL, rows), **changes)


def test_the_factors_beside_the_weights_are_read(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    table().save(folder / "factors.json")
    assert load_model(str(folder)).table == table()


def test_the_original_length_is_the_option_else_that_of_the_factors_else_that_of_the_configuration(
    tmp_path: Path,
) -> None:
    folder = save(build("llama", max_position_embeddings=LONG), tmp_path / "llama")
    assert load_model(str(folder)).rope.original_length == LONG
    table().save(folder / "factors.json")
    assert load_model(str(folder)).rope.original_length == ORIGINAL
    message = refusal(folder, LoadOptions(original_length=64))
    assert message == (
        "factors: got original_length 48; the model has original_length 64; "
        "give the factors that were searched for this model, or --original-length"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 501.0}, "factors: got rope_theta 501; the model has rope_theta 500; "),
        ({"rotary_dim": 8, "rows": (unscaled(4, ORIGINAL),)}, "factors: got rotary_dim 8; the model has rotary_dim 16"),
    ],
)
def test_factors_of_another_model_beside_the_weights_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    table(**changes).save(folder / "factors.json")
    assert refusal(folder).startswith(message)


def test_a_broken_factors_file_beside_the_weights_is_refused(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    (folder / "factors.json").write_text("{")
    assert refusal(folder).startswith(f"factors file: got {folder / 'factors.json'} (")


LEGACY: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 500.0}),
    ("llama-linear", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("gpt_neox", {"rotary_emb_base": 500, "rotary_pct": 0.25}),
    ("gemma3", {"rope_theta": 500.0, "rope_local_base_freq": 100.0}),
    ("phi3", {"rope_theta": 500.0, "partial_rotary_factor": 0.75}),
]


@pytest.mark.parametrize(("name", "old_keys"), LEGACY)
def test_a_configuration_with_the_keys_of_old_is_read_as_the_new_one(
    name: str, old_keys: dict[str, Any], tmp_path: Path
) -> None:
    folder = save(build(name), tmp_path / name)
    new = load_model(str(folder), FLOAT32)
    edit_config(folder, drop=("rope_parameters",), **old_keys)
    old = load_model(str(folder), FLOAT32)
    assert (old.rope, old.own) == (new.rope, new.own)
    ids = tokens(40)
    torch.testing.assert_close(old.model(ids).logits, new.model(ids).logits, rtol=0, atol=1e-5)


def test_a_sliding_window_of_every_layer_is_widened_and_noted(tmp_path: Path) -> None:
    loaded, ids = loaded_from(tmp_path, "mistral"), tokens(60)
    narrow = loaded.model(ids).logits
    loaded.widen_window(100)
    assert loaded.notes == ["sliding window widened from 24 to 100 tokens"]
    wide = loaded.model(ids).logits
    torch.testing.assert_close(wide, build("mistral", sliding_window=None)(ids).logits, rtol=0, atol=1e-5)
    assert torch.allclose(wide[:, :24], narrow[:, :24], atol=1e-5)
    assert not torch.allclose(wide[:, 40:], narrow[:, 40:], atol=1e-3)
    loaded.widen_window(80)
    assert len(loaded.notes) == 1


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo3", "gpt_oss"])
def test_the_window_of_local_layers_stays(name: str, tmp_path: Path) -> None:
    loaded, ids = loaded_from(tmp_path, name), tokens(60)
    before = loaded.model(ids).logits
    loaded.widen_window(100)
    shared = " and share the rescaled RoPE" if name in ("gemma2", "gpt_oss") else ""
    assert loaded.notes == [f"local layers keep their sliding window of 16 tokens{shared}"]
    assert torch.equal(loaded.model(ids).logits, before)


def test_a_window_that_is_wide_enough_or_not_there_is_not_noted(tmp_path: Path) -> None:
    for name in ("mistral", "llama"):
        loaded = loaded_from(tmp_path, name)
        loaded.widen_window(24)
        assert loaded.notes == []


def test_weights_that_the_configuration_does_not_use_are_noted(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    edit_config(folder, num_hidden_layers=1)
    [note] = load_model(str(folder)).notes
    assert note == "9 weights of the checkpoint are not used, the first model.layers.1.input_layernorm.weight"


def test_the_fingerprint_follows_the_weights_the_configuration_and_the_dtype(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    first = load_model(str(folder), FLOAT32).fingerprint
    assert load_model(str(folder), FLOAT32).fingerprint == first
    assert load_model(str(folder), LoadOptions(dtype="bfloat16")).fingerprint != first
    assert load_model(str(folder), LoadOptions(dtype="float32", rope_precision="float64")).fingerprint != first
    edit_config(folder, rms_norm_eps=1e-4)
    assert load_model(str(folder), FLOAT32).fingerprint != first
    other: Any = build("llama")
    other.lm_head.weight *= 2.0
    assert load_model(str(save(other, tmp_path / "other")), FLOAT32).fingerprint != first


def test_a_sharded_checkpoint_loads(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(load_model(str(folder), FLOAT32).model(tokens(9)).logits, build("llama")(tokens(9)).logits)


# What cannot be extended


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "a gpt2 model whose configuration has no RoPE; only a model with RoPE can be extended; choose a RoPE"),
        ("opt", "a opt model whose configuration has no RoPE; only a model with RoPE can be extended; choose a RoPE"),
        ("gptj", "a gptj model whose configuration has no RoPE; only a model with RoPE can be extended; choose a RoPE"),
        ("falcon_alibi", "FalconForCausalLM, which does not use its RoPE; only a model with RoPE can be extended; "),
        ("cohere2", "Cohere2ForCausalLM, whose local layers alone use RoPE; factors extend layers that see the whole"),
        ("exaone4", "Exaone4ForCausalLM, whose local layers alone use RoPE; factors extend layers that see the whole"),
        ("llama4_nope", "Llama4ForCausalLM, whose local layers alone use RoPE; factors extend layers that see"),
        ("bert", "a BertModel; only causal language models of transformers can be extended; give a ...ForCausalLM"),
        ("t5", "a T5ForConditionalGeneration; only causal language models of transformers can be extended; "),
        ("deepseek_v2", "config: got kv_lora_rank 8; multi-head latent attention is not supported; "),
        ("deepseek_v3", "config: got kv_lora_rank 8; multi-head latent attention is not supported; "),
        ("multimodal_rope", "config: got mrope_section [2, 1, 1]; multimodal RoPE is not supported; "),
    ],
)
def test_a_model_that_cannot_be_extended_is_refused(name: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(save(build(name), tmp_path / name))


def test_weights_that_are_not_numbers_are_refused_as_such(tmp_path: Path) -> None:
    model: Any = build("llama")
    model.model.norm.weight[3] = torch.nan
    folder = save(model, tmp_path / "llama")
    assert refusal(folder) == (
        f"model: got {folder}, whose weights give values that are not numbers; logits are finite; "
        "try --dtype float32, or restore the weights"
    )


def test_a_decoder_without_its_head_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    assert isinstance(model, LlamaForCausalLM)
    folder = save(model.model, tmp_path / "base")
    assert refusal(folder) == (
        f"model: got {folder}, a LlamaModel; only causal language models of transformers can be extended; "
        "give a ...ForCausalLM checkpoint"
    )
    edit_config(folder, architectures=None)  # as old checkpoints are
    assert refusal(folder).startswith(f"model: got {folder} without 1 of its weights, the first lm_head.weight; ")


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    classifier: Any = LlamaForSequenceClassification
    folder = save(classifier(build("llama").config), tmp_path / "classifier")
    assert refusal(folder).startswith(f"model: got {folder}, a LlamaForSequenceClassification; only causal language")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/folder/below", "~/nowhere"])
def test_a_folder_that_does_not_exist_is_refused(name: str) -> None:
    assert refusal(name) == (
        f"model: got {name}, which does not exist; a model is a folder, a Hub id or tiny; check the path"
    )


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "not a name", "", "tiny-"])
def test_a_name_that_nobody_knows_is_refused_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(name).startswith("model: got ")


OFFLINE = """
import sys
from longrope.errors import UserError
from longrope.model import load_model
try:
    load_model(sys.argv[1])
    print("loaded")
except UserError as error:
    print(error)
"""


def offline(name: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Load a Hub id in a fresh process whose Hub is a port that nobody listens on."""
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(home), "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-W", "error", "-c", OFFLINE, name]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)


def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(tmp_path: Path) -> None:
    done = offline("nobody/no-such-model", tmp_path)
    assert done.stdout.startswith("model: got nobody/no-such-model (OSError: We couldn't connect to ")
    assert done.stdout.count("\n") == 1
    assert "Retry" not in done.stderr


def test_a_model_in_the_cache_loads_without_a_network(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--someone--small"
    save(build("llama"), cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    done = offline("someone/small", tmp_path)
    assert done.stdout == "loaded\n"
    assert "Retry" not in done.stderr


# Bad files: each change breaks a good checkpoint.


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def edit(drop: tuple[str, ...] = (), **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, drop, **changes)


def remove(pattern: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return apply


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def sharded(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        build("llama").save_pretrained(folder, max_shard_size="20KB")
        change(folder)

    return apply


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(build("llama").state_dict(), folder / "pytorch_model.bin")


SHARD = "model-00002-of-00006.safetensors"
INDEX = "model.safetensors.index.json"
RANDOM = torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes()
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.json"), "model: got folder {} without config.json; a model folder has one; give a "),
    "config cut off": (write("config.json", b'{"a": '), "{} (OSError: It looks like the config file at "),
    "empty config": (write("config.json", b""), "{} (OSError: It looks like the config file at "),
    "binary config": (write("config.json", b"\xff\xfe\x00"), "{} (OSError: It looks like the config file at "),
    "config is a list": (write("config.json", b"[]"), "{} (ValueError: Unrecognized model in "),
    "no model type": (edit(drop=("model_type",)), "{} (ValueError: Unrecognized model in "),
    "unknown model type": (edit(model_type="nonsense"), "model type `nonsense` but Transformers does not recognize"),
    "text for a number": (edit(hidden_size="x"), "Field 'hidden_size' expected int, got str (value: 'x'))"),
    "no heads": (edit(num_attention_heads=0), "{} (ZeroDivisionError: "),
    "another class": (edit(architectures=["MyForCausalLM"]), "model: got {}, a MyForCausalLM; only causal language"),
    "unknown scaling": (
        edit(rope_parameters={"rope_type": "wild", "rope_theta": 500.0}),
        "config: rope_type: got 'wild'; known are default, linear, dynamic, yarn, llama3, longrope; choose another",
    ),
    "no base": (edit(rope_parameters={"rope_type": "default", "rope_theta": 0}), "config: rope_theta: got 0; it is a"),
    "weights cut off": (cut("model.safetensors"), "model: got {}/model.safetensors (Error while deserializing header"),
    "random weights": (write("model.safetensors", RANDOM), "{}/model.safetensors (Error while deserializing header"),
    "empty weights": (write("model.safetensors", b""), "{}/model.safetensors (Error while deserializing header"),
    "git-lfs pointer": (
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "; a safetensors file is whole; copy or download it again",
    ),
    "no weights": (remove("*.safetensors"), "model: got {} with no weights; weights are read from safetensors only; "),
    "pickled weights": (pickled, "model: got {} with pytorch_model.bin; weights are read from safetensors only; "),
    "missing shard": (
        sharded(remove(SHARD)),
        f"index of weights: got {{}}/{INDEX} with '{SHARD}', which does not exist; every file of weights is there",
    ),
    "shard cut off": (sharded(cut(SHARD)), "model: got {}/" + SHARD + " (Error while deserializing header"),
    "no index of shards": (sharded(remove("*.index.json")), "{} (OSError: Error no file named model.safetensors"),
    "broken index": (sharded(write(INDEX, b"{")), f"index of weights: got {{}}/{INDEX} ("),
    "more layers": (
        edit(num_hidden_layers=3),
        "model: got {} without 9 of its weights, the first model.layers.2.input_layernorm.weight; every weight is in "
        "the checkpoint, in the shape that config.json says; restore the .safetensors files or config.json",
    ),
    "another vocabulary": (
        edit(vocab_size=300),
        "model: got {} with another shape of 2 of its weights, the first lm_head.weight; every weight is in",
    ),
    "no tokenizer": (remove("tok*"), "model: got {}'s tokenizer (ValueError: Couldn't instantiate the backend "),
    "broken tokenizer": (write("tokenizer.json", b"{"), "model: got {}'s tokenizer (JSONDecodeError: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BROKEN[case]
    folder = save(build("llama"), tmp_path / "llama")
    load_model(str(folder))
    change(folder)
    capsys.readouterr()
    assert message.format(folder) in refusal(folder)
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_is_no_model(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    file = folder / "model.safetensors"
    assert refusal(file) == f"model: got file {file}; a model is a folder or a Hub id; give its folder"


class Spy:
    """Unpickled, it creates a file: the sign that code was run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    folder, mark = save(build("llama"), tmp_path / "llama"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Spy(mark)))
    refusal(folder, LoadOptions(trust_remote_code=True))
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert mark.exists()


def with_code(folder: Path, mark: Path, **changes: Any) -> Path:
    """A checkpoint that carries code which leaves a mark when it is imported."""
    save(build("llama"), folder)
    edit_config(folder, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}, **changes)
    (folder / "own.py").write_text(
        f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_code_in_a_checkpoint_does_not_run_unless_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "mark"
    folder = with_code(tmp_path / "own", mark, model_type="own", architectures=["OwnModel"])
    message = refusal(folder)
    assert message.startswith(f"model: got {folder} (ValueError: The repository {folder} contains custom code")
    assert message.endswith("give --trust-remote-code if you trust its author")
    assert not mark.exists()
    loaded = load_model(str(folder), LoadOptions(dtype="float32", trust_remote_code=True))
    assert mark.exists()
    assert type(loaded.model).__name__ == "OwnModel"


def test_code_beside_a_class_that_transformers_has_is_ignored(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = with_code(tmp_path / "own", mark)
    assert type(load_model(str(folder)).model) is LlamaForCausalLM
    assert not mark.exists()


def test_a_tokenizer_alone_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    from longrope.checkpoint import load_tokenizer

    byte_tokenizer(ORIGINAL).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).model_max_length == ORIGINAL
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_of_one_window_by_chunks_are_plain_products(monkeypatch: pytest.MonkeyPatch, gradient: bool) -> None:
    """A slice of one window would be multiplied as a batch, for which torch copies the output projection each time."""
    loaded = load_model(TINY, LoadOptions(device="cpu"))
    vocabulary = loaded.model.config.get_text_config().vocab_size
    monkeypatch.setattr("longrope.model._CHUNK_LOGITS", {"cpu": 128 * vocabulary})

    names: list[str] = []

    class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    ids = torch.arange(512)[None] % vocabulary
    with torch.set_grad_enabled(gradient), Products():  # type: ignore[no-untyped-call]
        chunks = list(loaded.logits(ids))
    assert len(chunks) == 4
    assert "mm" in names
    assert "bmm" not in names
