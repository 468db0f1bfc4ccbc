"""`longrope plan`: its formulas against models that are there, and what it says of those that are not."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import CacheLayerMixin

import longrope as public
from architectures_small import model_types, small_config
from commands import longrope
from common import random_llama, random_windows
from cost_table import PAGE, models, row, stages_of
from longrope.baselines import baseline
from longrope.checkpoint import TINY, LoadOptions
from longrope.cli_plan import plan as command
from longrope.configs import rope_config
from longrope.console_tables import plan_table
from longrope.errors import UserError
from longrope.factors import RopeFactors
from longrope.model import LoadedModel, decoder_of, load_model
from longrope.patch import Patch, global_layers_turn
from longrope.planning import activations, memory
from longrope.planning.flops import window_flops
from longrope.planning.machines import machine_of
from longrope.planning.precision import HALF, MIXED
from longrope.planning.shape import ModelShape, all_pairs, pairs
from longrope.planning.speed import Rates, seconds
from longrope.planning.subject import shape_of, subject
from longrope.rotating import said_to_turn_globally
from longrope.runtime.caches import CACHE
from longrope.search.objective import Evaluator
from longrope.search.tasks import Task
from longrope.training.lora import LoraSettings, with_lora
from longrope.training.loss import chunked_loss
from page_blocks import ROOT, blocks, commands

TOKENS, VOCABULARY, RANK = 512, 250, 8


@pytest.fixture
def loaded() -> LoadedModel:
    return random_llama(vocabulary=VOCABULARY, hidden=128, layers=3, seed=0, device="cpu", dtype="autocast")


def shape_at(config: dict[str, Any], folder: Path) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(config))
    return shape_of(subject(str(folder / "config.json"), LoadOptions(device="cpu")).model)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-3.1-8B", 8_030_261_248),
        ("Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen3-32B", 32_762_123_264),
        ("Llama-3.3-70B", 70_553_706_496),
    ],
)
def test_published_models_have_the_parameters_that_were_published(name: str, parameters: int, tmp_path: Path) -> None:
    assert shape_at(models()[name], tmp_path).parameters == parameters


def test_of_a_mixture_a_token_passes_its_experts_only(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 999,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50,
        "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128, "rope_theta": 1e4,
    }  # fmt: skip
    shape = shape_at(config, tmp_path)
    attention, router, experts = 64 * 16 * 2 * (4 + 2), 64 * 8, 3 * 64 * 32
    assert shape.active == 2 * (attention + router + 2 * experts)
    assert shape.linear == 2 * (attention + router + 8 * experts)
    assert (shape.inner, shape.inner_matrices) == (64, 3)


def test_pairs_of_attention_are_those_of_a_mask() -> None:
    at = torch.arange(40)
    for window in (None, 1, 7, 40, 100):
        seen = at[:, None] >= at
        if window is not None:
            seen &= at[:, None] - at < window
        assert pairs(40, window) == int(seen.sum())
        assert pairs(30, window, past=10) == int(seen[10:].sum())
    assert all_pairs(40, (7, None, 7)) == 2 * pairs(40, 7) + pairs(40)


def test_local_layers_count_their_window_and_a_window_of_all_layers_is_widened(tmp_path: Path) -> None:
    small = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 50, "max_position_embeddings": 128, "num_hidden_layers": 6,
    }  # fmt: skip
    gemma = shape_at({"model_type": "gemma3_text", "sliding_window": 32, **small}, tmp_path)
    assert gemma.windows == (32, 32, 32, 32, 32, None)
    assert gemma.cache_bytes(1000) == 2 * 2 * 16 * 2 * (5 * 32 + 1000)
    flops = window_flops(gemma, 1000)
    assert flops.attention == 4 * 64 * (5 * (32 * 33 / 2 + 968 * 32) + 1000 * 1001 / 2)
    mistral = shape_at({"model_type": "mistral", "sliding_window": 32, "rope_theta": 1e4, **small}, tmp_path)
    assert mistral.windows == (None,) * 6
    assert activations.masks(gemma, 1000) == 1e6
    assert activations.masks(mistral, 1000) == 0


@pytest.mark.parametrize("family", ["qwen3_next", "bamba", "falcon_h1", "lfm2", "minimax", "llama", "gemma3_text"])
def test_layers_have_the_keys_that_they_have_in_transformers_own_cache(family: str, tmp_path: Path) -> None:
    config = small_config(family)
    shape = shape_at(config.to_dict(), tmp_path)
    layers = DynamicCache(config=config).layers
    caching = [layer for layer in layers if isinstance(layer, CacheLayerMixin)]
    assert shape.attending == len(caching) > 0
    seen = [min(100, getattr(layer, "sliding_window", None) or 100) for layer in caching]
    assert shape.cached_tokens(100) == sum(seen)
    attention = 4 * shape.queries * sum(pairs(100, window) for window in seen)
    assert window_flops(shape, 100).attention == attention
    assert shape.local_layers(100) == sum(window < 100 for window in seen)


def test_of_a_released_hybrid_a_quarter_of_the_layers_has_keys(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "partial_rotary_factor": 0.25, "rope_theta": 1e7, "max_position_embeddings": 262144, "vocab_size": 151936,
    }  # fmt: skip
    shape = shape_at(config, tmp_path)
    assert shape.cache_bytes(262_144) == 6 * 2**30
    assert activations.masks(shape, 262_144) == 0, "no layer has a window"
    assert sum(window is None for window in shape.windows) == 12


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of products, and of those of attention, which has them in batches, as torch's own formulas count them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            name = func._overloadpacket.__name__
            self.of[name] = self.of.get(name, 0.0) + formula(*args, **(kwargs or {}), out_val=out)
        return out


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors that were made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and (key := each.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = each.untyped_storage().nbytes()
                weakref.finalize(each.untyped_storage(), self.sizes.pop, key, 0)
        self.most = max(self.most, sum(self.sizes.values()))
        return out


def run(loaded: LoadedModel, kind: str, *, again: bool, tokens: int = TOKENS) -> Callable[[], object]:
    """One window as the search or the fine-tuning computes it; made ready here, run when called."""
    [window] = random_windows(VOCABULARY, length=tokens, count=1, seed=0)
    if kind in ("forward", "gradient"):
        loaded.checkpoint_from = 1 if again else 1 + tokens

        def evaluate() -> None:
            with Evaluator(loaded, [window]) as evaluator:
                evaluator(Task(baseline("yarn", loaded.rope.shape, tokens), (0,), gradient=kind == "gradient"))

        return evaluate
    model: Any = loaded.model
    model.train()
    trained: Any = with_lora(model, LoraSettings(RANK), 0) if kind == "lora" else model.requires_grad_(True)
    if again:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.from_numpy(window.ids)[None]

    def step() -> None:
        with chunked_loss(model):
            with loaded.autocast():
                loss = trained(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()

    return step


def test_flops_of_a_forward_pass_are_torchs_count(loaded: LoadedModel) -> None:
    shape = shape_of(loaded.model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(loaded, "forward", again=False)()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    ours = window_flops(shape, TOKENS)
    assert counts.pop("aten.bmm") == 4 * shape.queries * shape.layers * TOKENS**2  # with what the mask leaves out
    assert ours.attention == 4 * shape.queries * shape.layers * TOKENS * (TOKENS + 1) / 2
    assert sum(counts.values()) == ours.matrices + ours.head


CASES = [(kind, again) for kind in ("gradient", "train", "lora") for again in (False, True)]


@pytest.mark.parametrize(("kind", "again"), CASES)
def test_flops_of_gradients_and_steps_are_torchs_count(loaded: LoadedModel, kind: str, again: bool) -> None:
    shape, rank = shape_of(loaded.model), RANK if kind == "lora" else 0
    go = run(loaded, kind, again=again)
    with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
        go()
    ours = window_flops(shape, TOKENS, kind, rank=rank, again=again)
    # Of adapters the first layer's gradient by its input, or the last product, is left out of the formula.
    assert counted.of["mm"] == pytest.approx(ours.matrices + ours.head, rel=5e-3 if rank else 1e-9)


@pytest.mark.parametrize(("kind", "again"), [("forward", False), *CASES])
def test_predicted_memory_is_that_of_the_tensors_alive(loaded: LoadedModel, kind: str, again: bool) -> None:
    shape, rank = shape_of(loaded.model), RANK if kind == "lora" else 0
    go = run(loaded, kind, again=again, tokens=2048)
    with Live() as live:
        go()
    if kind == "forward":
        parts = memory.forward(shape, MIXED, 2048, "cpu")
    elif kind == "gradient":
        parts = memory.gradient(shape, MIXED, 2048, "cpu", again=again)
    else:
        parts = memory.train(shape, MIXED, 2048, "cpu", again=again, rank=rank)
    predicted = sum(value for name, value in parts.items() if name not in ("weights", "optimizer"))
    assert predicted == pytest.approx(live.most, rel=0.15)


@pytest.mark.parametrize("tokens", [64, 500])
def test_a_cache_has_the_bytes_predicted(loaded: LoadedModel, tokens: int) -> None:
    cache: Any = DynamicCache(config=loaded.model.config)
    model: Any = loaded.model
    with torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), **{CACHE: cache})
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert held == shape_of(model).cache_bytes(tokens, 4)


def test_the_shape_is_that_of_the_loaded_model() -> None:
    bare = subject(TINY, LoadOptions(device="cpu"))
    assert shape_of(bare.model) == shape_of(load_model(TINY).model)
    assert bare.rope == load_model(TINY).rope


def test_seconds_are_work_over_rates(tmp_path: Path) -> None:
    shape = shape_at(models()["Llama-3.1-8B"], tmp_path)
    flops = window_flops(shape, 4096, "gradient", again=True)
    took = seconds(shape, HALF, 4096, Rates.of_peak(1e15, 0.4), "gradient", again=True)
    assert took == pytest.approx(flops.total / 4e14)


def plan_of(config: dict[str, Any], folder: Path, *arguments: str) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return longrope("plan", folder / "config.json", *arguments)


def test_a_plan_needs_a_configuration_only_and_agrees_with_the_dry_run(tmp_path: Path) -> None:
    ran = longrope("plan", TINY, "--to", "32k", "--gpus", "8xH100-80GB", "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    assert (document["command"], document["model"], document["settings"]["to"]) == ("plan", TINY, 32768)
    dry = longrope("extend", TINY, "--to", "32k", "--documents", "stdlib", "--dry-run", "--json").document
    stages = document["results"]
    passes = [(each["method"], each["tokens"]) for each in stages]
    assert passes[:-1] == [(each["method"], each["tokens"]) for each in dry["results"]]
    assert passes[-1] == ("prompt-32k", 32768)
    for each in stages:
        assert each["fits"]
        assert each["hours"] > 0
        assert each["value"] == pytest.approx(sum(each["memory"].values()), abs=10)
    assert document["settings"]["mfu"]["train"] == 0.35


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    config = models()["Llama-3.1-8B"]
    by_name = {
        each["method"]: each
        for each in plan_of(config, tmp_path, "--to", "128k", "--gpus", "1xH100-80GB", "--json").document["results"]
    }
    assert not by_name["01-search-128k"]["fits"]
    assert "2 such GPUs with --device balanced" in by_name["01-search-128k"]["advice"]
    assert not by_name["02-finetune-128k"]["fits"]
    assert by_name["02-finetune-128k"]["advice"].startswith("4 such GPUs (FSDP over 4; a window over 4")
    assert by_name["prompt-128k"]["fits"]
    more = plan_of(config, tmp_path, "--to", "128k", "--gpus", "4xH100-80GB", "--json").document["results"]
    assert all(each["fits"] for each in more), "the advice holds"
    shown = plan_of(config, tmp_path, "--to", "128k", "--gpus", "1xH100-80GB")
    assert "NO:" in shown.err
    assert "--mfu" in shown.err
    assert shown.out == ""


def test_a_shorter_search_is_advised_where_there_can_be_one_and_fits_then(tmp_path: Path) -> None:
    config, arguments = models()["Llama-3.1-8B"], ("--to", "256k", "--gpus", "1xH200-141GB", "--json")
    (search, *_) = plan_of(config, tmp_path, *arguments).document["results"]
    assert not search["fits"]
    written = re.search(r'search_length = "\w+"', search["advice"])
    assert written, search["advice"]
    stages = tmp_path / "plan.toml"
    stages.write_text(f'[[stages]]\ndo = "search"\nto = "256k"\n{written[0]}\n')
    (search, *_) = plan_of(config, tmp_path, *arguments, "--stages", str(stages)).document["results"]
    assert search["fits"]
    assert (
        "search_length" not in plan_of(config, tmp_path, "--to", "2m", *arguments[2:]).document["results"][4]["advice"]
    )


def test_adapters_take_less_and_a_higher_utilisation_less_time(tmp_path: Path) -> None:
    config = models()["Llama-3.1-8B"]

    def tuned(*more: str) -> Any:
        ran = plan_of(config, tmp_path, "--to", "128k", "--gpus", "8xH200-141GB", "--json", *more)
        return next(each for each in ran.document["results"] if "finetune" in each["method"])

    whole, adapters, faster = tuned(), tuned("--lora", "16"), tuned("--mfu", "0.7")
    assert whole["memory"]["optimizer"] == 8 * 8_030_261_248 / 8, "sharded over eight"
    inputs_and_outputs = 2 * 4096 * 2 + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert adapters["memory"]["optimizer"] == 8 * 16 * 32 * inputs_and_outputs, "copies, of adapters only"
    assert faster["hours"] == pytest.approx(whole["hours"] * 0.35 / 0.7)


def test_without_a_peak_there_are_no_hours_and_with_one_there_are(tmp_path: Path) -> None:
    arguments = ["plan", TINY, "--to", "1k", "--gpus", "2x24GB", "--json"]
    assert {each["hours"] for each in longrope(*arguments).document["results"]} == {None}
    assert all(each["hours"] for each in longrope(*arguments, "--flops", "100").document["results"])


def test_python_takes_the_commands_words_and_gives_its_document(tmp_path: Path) -> None:
    words = {*signature(command).parameters} - {"no_finetune", "as_json", "verbose", "quiet"}
    assert words | {"train"} == {*signature(public.plan).parameters}, "--no-finetune is train=False, as in extend"
    (tmp_path / "config.json").write_text(json.dumps(models()["Llama-3.1-8B"]))
    options = ["--flops", "400", "--mfu", "0.5", "--lora", "16", "--quantize", "4bit", "--dtype", "bfloat16"]
    arguments = ("plan", tmp_path, "--to", "128k", "--gpus", "2x80GB", *options, "--json")
    given: dict[str, Any] = {"flops": 400, "mfu": 0.5, "lora": 16, "quantize": "4bit", "dtype": "bfloat16"}
    assert longrope(*arguments).document == public.plan(tmp_path, to="128k", gpus="2x80GB", **given)
    untrained = public.plan(TINY, to="8k", gpus="1x80GB", train=False)
    assert untrained == longrope("plan", TINY, "--to", "8k", "--gpus", "1x80GB", "--no-finetune", "--json").document
    unknown: dict[str, Any] = {"utilisation": 0.5}
    with pytest.raises(TypeError, match="utilisation"):
        public.plan(TINY, to="8k", **unknown)


def test_the_commands_of_the_page_on_lora_plan_a_training_of_adapters(tmp_path: Path) -> None:
    """On Llama 3 8B, which is Llama 3.1 8B before it was extended."""
    (tmp_path / "Llama-3-8B").mkdir()
    config = models()["Llama-3.1-8B"] | {"rope_scaling": None, "max_position_embeddings": 8192}
    (tmp_path / "Llama-3-8B" / "config.json").write_text(json.dumps(config))
    found = list(blocks(ROOT / "docs" / "lora.md"))
    (stages,) = (block for block in found if block.file is not None)
    (tmp_path / str(stages.file)).write_text(stages.text)
    planned = [words[1:] for block in found for words in commands(block) if words[:2] == ["longrope", "plan"]]
    assert len(planned) == 3
    for words in planned:
        with chdir(tmp_path):
            ran = longrope(*words, "--json")
        assert ran.code == 0, ran.err
        assert [each["layout"] for each in ran.document["results"] if "LoRA of rank 16" in each["layout"]]


def test_this_machine_is_measured() -> None:
    ran = longrope("plan", TINY, "--to", "1k", "--json")
    assert ran.code == 0, ran.err
    assert all(rate > 0 for rate in ran.document["settings"]["measured_rates"].values())
    assert all(each["hours"] > 0 for each in ran.document["results"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((TINY, "--to", "1k", "--gpus", "8xH900-80GB"), "--gpus: got '8xH900-80GB'"),
        ((TINY, "--to", "1k", "--gpus", "0xH100-80GB"), "--gpus: got '0xH100-80GB'"),
        ((TINY, "--to", "1k", "--gpus", "many"), "--gpus: got 'many'"),
        (
            (TINY, "--to", "128", "--gpus", "1xH100-80GB"),
            "is longer than the model's original length of 256",
        ),
        ((TINY, "--to", "1k", "--gpus", "1xH100-80GB", "--mfu", "1.5"), "--mfu: got 1.5"),
        ((TINY, "--to", "1k", "--gpus", "1x80GB", "--flops", "-1"), "--flops: got -1"),
        ((TINY, "--to", "1k", "--gpus", "1xH100-80GB", "--dtype", "int8"), "--dtype: got 'int8'"),
        ((TINY, "--to", "1k", "--gpus", "1xH100-80GB", "--lora", "0"), "--lora: got 0"),
        ((TINY, "--to", "1k", "--gpus", "1xH100-80GB", "--quantize", "2bit"), "--quantize: got '2bit'"),
        ((TINY, "--to", "8k", "--gpus", "1xH100-80GB", "--quantize", "4bit"), "--quantize: got 4bit without --lora"),
        ((TINY, "--to", "1k", "--gpus", "1xH100-80GB", "--lora", "8"), "--lora: got 8 without a stage that trains"),
        ((TINY, "--to", "8k", "--gpus", "1xH100-80GB", "--lora", "8", "--no-finetune"), "leave out --no-finetune or"),
        ((TINY, "--to", "1k", "--flops", "400"), "--flops: got 400 with --gpus cpu; the rates of this machine are"),
        ((TINY, "--to", "1k", "--mfu", "0.4"), "--mfu: got 0.4 with --gpus cpu"),
        ((TINY, "--to", "1k", "--gpus", "2x80GB", "--mfu", "0.4"), "--mfu: got 0.4 without a peak"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    ran = longrope("plan", *arguments)
    assert ran.code == 2
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1}, "RoPE"),
        ({"model_type": "bert"}, "only a model with RoPE"),
        ({"model_type": "clip"}, "model_type 'clip'"),
        ({"hidden_size": 64}, "model_type None"),
        ({"model_type": "llama", "hidden_size": "wide"}, "config"),
    ],
)
def test_a_configuration_that_cannot_be_planned_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    ran = plan_of(config, tmp_path, "--to", "1k", "--gpus", "1xH100-80GB")
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1


SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rope_theta": 1e4,
}  # fmt: skip
LOCAL = "whose local layers alone use RoPE"
SCOUT = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama", "num_hidden_layers": 0}, "config: num_hidden_layers: got 0"),
        ({"model_type": "llama", "num_hidden_layers": -1}, "config: num_hidden_layers: got -1"),
        ({"model_type": "llama", "vocab_size": 0}, "config: vocab_size: got 0"),
        ({"model_type": "falcon", "alibi": True, "head_dim": None}, "FalconForCausalLM, which does not use its RoPE"),
        (
            {"model_type": "granitemoehybrid", "position_embedding_type": "nope", "layer_types": ["attention"] * 4},
            "GraniteMoeHybridForCausalLM, which has no rotary embedding",
        ),
        (
            {"model_type": "zamba2", "num_hidden_layers": 54, "use_mem_rope": False},
            "Zamba2ForCausalLM, which has no rotary embedding",
        ),
        ({"model_type": "cohere2", "sliding_window": 32}, f"Cohere2ForCausalLM, {LOCAL}"),
        ({"model_type": "exaone4", "sliding_window": 32}, f"Exaone4ForCausalLM, {LOCAL}"),
        ({"model_type": "exaone_moe", "sliding_window": 32}, f"ExaoneMoeForCausalLM, {LOCAL}"),
        (
            {"model_type": "llama4_text", "rope_scaling": {**SCOUT, "original_max_position_embeddings": 64}},
            f"Llama4ForCausalLM, {LOCAL}",
        ),
    ],
)
def test_what_could_not_be_extended_is_not_planned(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole = {key: value for key, value in {**SMALL, **config}.items() if value is not None}
    ran = plan_of(whole, tmp_path, "--to", "1k", "--gpus", "1xH100-80GB")
    assert ran.code == 2, ran.out
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1


def test_exaone_without_a_window_is_planned(tmp_path: Path) -> None:
    config = {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 4}
    assert shape_at({**SMALL, **config}, tmp_path).windows == (None,) * 4


def mixed_layers() -> Iterator[tuple[str, Any]]:
    """Every small model with layers of several kinds whose RoPE is read, its configuration's type before it."""
    for family in model_types():
        try:
            config = small_config(family)
            kinds = getattr(config.get_text_config(), "layer_types", None) or ()
            rope_config(config.get_text_config().to_dict())
        except (UserError, ValueError, StrictDataclassError):  # not extended, or not built from a text alone
            continue
        if len(set(kinds)) > 1 and family != "gemma3n":  # which needs timm
            torch.manual_seed(0)
            yield family, cast(Any, AutoModelForCausalLM).from_config(config).eval()


def run_rescaled(model: Any, patch: Patch, rescale: float) -> None:
    patch.install(RopeFactors(8, (rescale,) * patch.shape.pairs))
    model(input_ids=torch.arange(1, 8)[None], use_cache=False)


def test_layers_that_see_all_are_said_to_rotate_where_they_do() -> None:
    seen: dict[str, bool] = {}
    for family, model in mixed_layers():
        text = model.config.get_text_config()
        try:
            with torch.no_grad(), Patch(model, rope_config(text.to_dict()).shape) as patch:
                run = partial(run_rescaled, model, patch)
                seen[family] = global_layers_turn(text, decoder_of(model), partial(run, 1.0), partial(run, 2.0))
        except UserError:  # a RoPE of several positions
            continue
        assert said_to_turn_globally(text.to_dict()) == seen[family], family
    assert {family for family, turned in seen.items() if not turned} >= {"cohere2", "exaone4", "afmoe"}
    assert {family for family, turned in seen.items() if turned} >= {"gemma3_text", "gpt_oss", "olmo3"}


def test_machines_are_read_as_they_are_written() -> None:
    machine = machine_of("8xh100-80gb")
    assert (machine.name, machine.count, machine.peak, machine.bytes_each) == ("8xH100-80GB", 8, 989e12, 72e9)
    assert machine_of("A100-40GB").count == 1
    assert machine_of("2x24GB", 1e14).peak == 1e14
    with pytest.raises(UserError, match="8x80GB"):
        machine_of("H100")


def rows(name: str, length: int) -> Iterator[str]:
    for machine, stages in stages_of(name, length):
        yield row(name, length, machine, stages)


@pytest.mark.parametrize(("name", "length"), [("Llama-3.1-8B", 131072), ("Llama-3.3-70B", 2097152)])
def test_the_table_in_the_docs_is_what_the_script_prints(name: str, length: int) -> None:
    text = PAGE.read_text()
    found = list(rows(name, length))
    assert len(found) == 4
    for each in found:
        assert each in text, "run python tools/cost_table.py"


def test_shards_divide_weights_and_shared_windows_activations(tmp_path: Path) -> None:
    shape = shape_at(models()["Llama-3.1-8B"], tmp_path)
    alone = memory.train(shape, MIXED, 131072, "cuda", again=True)
    spread = memory.train(shape, MIXED, 131072, "cuda", memory.Spread(8, 8, True), again=True)
    assert spread["weights"] == alone["weights"] / 8 == 4 * shape.parameters / 8
    assert spread["optimizer"] == alone["optimizer"] / 8 == shape.parameters
    assert spread["kept"] == alone["kept"] / 8 == 32 * 4 * 4096 * 131072 / 8
    assert replace(shape, layers=1).cached_tokens(10) == 320, "windows are one a layer"


def test_the_table_writes_large_work_and_short_times_out() -> None:
    stages = [("01-search-128k", 3.08e18, 1.3), ("prompt-128k", 6.33e15, 0.0059), ("unknown", 5e13, None)]
    results = [
        {"method": name, "tokens": 1e6, "flops": flops, "hours": hours, "memory": {}, "value": 0.0}
        | {"fits": True, "layout": "one device", "advice": ""}
        for name, flops, hours in stages
    ]
    settings = {"to": 131_072, "gpus": "8xH100-80GB", "bytes_each": 72e9, "mfu": None}
    table = plan_table({"model": "M", "parameters": 8, "settings": settings, "results": results})
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["PFLOP"] == ["3,080", "6.33", "0.05"]
    assert columns["time"] == ["78\N{NO-BREAK SPACE}min", "21\N{NO-BREAK SPACE}s", "-"]
