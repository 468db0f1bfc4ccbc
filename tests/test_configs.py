from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    HunYuanDenseV1Config,
    JetMoeConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    Olmo3Config,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from longrope import configs
from longrope.baselines import yarn_attention_factor
from longrope.configs import RopeConfig, rope_config, table_from_config
from longrope.convert import read_factors, to_transformers_config
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors, unscaled
from tables import long_table, two_row_tables

QUICK = settings(max_examples=40, deadline=None, database=None)


def frequencies(table: FactorTable, row: RopeFactors) -> NDArray[np.float64]:
    exponents = np.arange(0, table.rotary_dim, 2) / table.rotary_dim
    return 1.0 / (row.vector * table.rope_theta**exponents)


def assert_equals_transformers(config: PreTrainedConfig, layer_type: str | None = None) -> None:
    """Every row gives the frequencies and the attention factor that transformers computes at its length."""
    table = table_from_config(config.to_dict())
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    for row in table.rows:
        reference, attention = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
            config, "cpu", seq_len=row.up_to, layer_type=layer_type
        )
        # transformers blends in float32: where 1/factor of a frequency is left, it has lost that many digits.
        rtol = max(1e-6, (parameters.get("factor") or 1.0) * float(np.finfo(np.float32).eps))
        np.testing.assert_allclose(frequencies(table, row), reference.double().numpy(), rtol=rtol)
        assert row.attention_factor == pytest.approx(attention, rel=1e-6)


def make(model_class: Callable[..., PreTrainedConfig], **keys: Any) -> PreTrainedConfig:
    """A config from keys that the class reads from a file without naming them in its signature."""
    return model_class(**keys)


def llama(theta: float = 10000.0, dim: int = 64, length: int = 4096, **rope: Any) -> LlamaConfig:
    rope_parameters = {"rope_theta": theta, **rope}
    return LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=length,
        rope_parameters=rope_parameters,
    )


SHAPES = [
    *(
        (theta, dim, original)
        for theta in (200.0, 1e4, 5e5, 1e6)
        for dim in (32, 64, 96, 128)
        for original in (256, 8192)
    ),
    (1e4, 64, 4),  # turns below one at every pair
]
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear"},
    "dynamic": {"rope_type": "dynamic"},
    "yarn": {"rope_type": "yarn"},
    "yarn, not truncated": {"rope_type": "yarn", "truncate": False},
    "yarn, betas": {"rope_type": "yarn", "beta_fast": 128.0, "beta_slow": 2.0},
    "yarn, attention factor": {"rope_type": "yarn", "attention_factor": 1.3},
    "yarn, mscale": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn, mscale alone": {"rope_type": "yarn", "mscale": 0.7},
    "yarn, mscale zero": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3, no band between": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    "llama3, other bands": {"rope_type": "llama3", "low_freq_factor": 2.0, "high_freq_factor": 32.0},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("factor", [2.0, 8.0, 30.5])
def test_every_scaling_has_the_frequencies_and_attention_factor_of_transformers(name: str, factor: float) -> None:
    for theta, dim, original in SHAPES:
        rope, length = {"factor": factor, **SCALINGS[name]}, original
        if rope["rope_type"] in ("yarn", "llama3"):
            rope["original_max_position_embeddings"], length = original, int(factor * original)
        assert_equals_transformers(llama(theta, dim, length, **rope))


@pytest.mark.parametrize("extra", [{}, {"factor": 5.0}, {"factor": 1.0}, {"attention_factor": 1.25}])
def test_longrope_lists_have_the_frequencies_and_attention_factor_of_transformers(extra: dict[str, float]) -> None:
    generator = np.random.default_rng(0)
    for theta, dim, original in SHAPES:
        lists = {name: generator.uniform(1, 40, dim // 2).tolist() for name in ("short_factor", "long_factor")}
        rope = {"rope_type": "longrope", "original_max_position_embeddings": original, **lists, **extra}
        config = llama(theta, dim, 8 * original, **rope)
        assert_equals_transformers(config)
        table = table_from_config(config.to_dict())
        assert (table.original_length, table.lengths) == (original, [original, 8 * original])
        assert [list(row.rescale) for row in table.rows] == [lists["short_factor"], lists["long_factor"]]


def test_an_alpha_of_hunyuan_is_a_base_of_its_own_at_every_length() -> None:
    """Its checkpoints call it dynamic; no other class knows it."""
    rope = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
    config = HunYuanDenseV1Config(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=256, rope_parameters=rope
    )
    table = table_from_config(config.to_dict())
    (row,) = table.rows
    stock = HunYuanDenseV1RotaryEmbedding(config)
    plain = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert row.rescale == pytest.approx((plain / stock.inv_freq).tolist(), rel=1e-5)
    assert row.up_to == 256
    assert row.rescale[-1] == pytest.approx(1000.0)


def test_a_truncate_of_one_layer_type_is_read_by_nobody() -> None:
    """transformers looks for it beside the layer types."""
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "truncate": False}
    rope |= {"original_max_position_embeddings": 256}
    by_type = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    config = Olmo3Config(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=2048, rope_parameters=by_type,
        layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2,
    )  # fmt: skip
    stock: Any = Olmo3RotaryEmbedding(config).full_attention_inv_freq
    plain = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert table_from_config(config.to_dict()).rows[0].rescale == pytest.approx((plain / stock).tolist(), rel=1e-5)


def test_phimoe_has_an_attention_factor_for_each_list() -> None:
    lists = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "short_mscale": 1.1, "long_mscale": 1.2}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 10000.0, **lists}
    config = PhimoeConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope)
    stock = PhimoeRotaryEmbedding(config)
    for row, length in zip(table_from_config(config.to_dict()).rows, (64, 256), strict=True):
        cos, sin = stock(torch.zeros(1), torch.arange(length)[None])
        assert float((cos**2 + sin**2).max().sqrt()) == pytest.approx(row.attention_factor, rel=1e-5)


def test_a_null_yarn_factor_is_the_ratio_of_the_lengths() -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 256}
    config = llama(length=2048).to_dict() | {"rope_parameters": {"rope_theta": 1e4, **rope}}
    assert table_from_config(config).rows[0].attention_factor == yarn_attention_factor(8.0)


def test_the_lengths_of_each_scaling() -> None:
    def lengths(config: PreTrainedConfig, **options: int) -> tuple[int, list[int]]:
        table = table_from_config(config.to_dict(), **options)
        return table.original_length, table.lengths

    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
    assert lengths(llama(length=4096)) == (4096, [4096])
    assert lengths(llama(length=4096), original_length=8192) == (8192, [8192])
    assert lengths(llama(length=4096, rope_type="linear", factor=4.0)) == (4096, [16384])
    assert lengths(llama(length=16384, rope_type="linear", factor=4.0), original_length=4096) == (4096, [16384])
    assert lengths(llama(length=4096, rope_type="dynamic", factor=4.0)) == (4096, [4096, 16384])
    assert lengths(llama(length=4096, rope_type="dynamic", factor=1.0)) == (4096, [4096])
    assert lengths(llama(length=256, **yarn)) == (256, [2048])
    assert lengths(llama(length=4096, **yarn)) == (256, [4096])


def test_another_original_length_leaves_the_frequencies_alone() -> None:
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
    config = llama(length=4096, **rope).to_dict()
    plain, told = table_from_config(config), table_from_config(config, original_length=256)
    assert told.rows == plain.rows
    assert (plain.original_length, told.original_length) == (512, 256)


def test_longrope_without_room_for_the_long_list_has_one_row() -> None:
    lists: dict[str, Any] = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    table = table_from_config(llama(length=4096, rope_type="longrope", **lists).to_dict())
    assert table.rows == (unscaled(32, 4096),)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), RopeConfig(10000.0, 128, 2048, 2048, "default")),
        (Qwen3Config(head_dim=80), RopeConfig(10000.0, 80, 32768, 32768, "default")),
        (MixtralConfig(), RopeConfig(1e6, 128, 131072, 131072, "default")),
        (make(Phi3Config, partial_rotary_factor=0.75), RopeConfig(10000.0, 72, 4096, 4096, "default")),
        (make(GPTNeoXConfig, rotary_emb_base=25000), RopeConfig(25000.0, 24, 2048, 2048, "default")),
        (make(GPTNeoXConfig, rotary_pct=0.5), RopeConfig(10000.0, 48, 2048, 2048, "default")),
        (Gemma3TextConfig(), RopeConfig(1e6, 256, 131072, 131072, "default")),
        (Gemma3Config(), RopeConfig(1e6, 256, 131072, 131072, "default")),
        (Olmo3Config(), RopeConfig(500000.0, 128, 2048, 2048, "default")),
        (JetMoeConfig(), RopeConfig(10000.0, 128, 4096, 4096, "default")),
        (make(MiniMaxM2Config, rotary_dim=64, head_dim=128, max_position_embeddings=512), (64, 512)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else "",
)
def test_the_config_of_a_model_class_is_understood(config: PreTrainedConfig, expected: object) -> None:
    found = rope_config(config.to_dict())
    assert expected in (found, (found.rotary_dim, found.max_length))
    assert found.shape.rotary_dim == found.rotary_dim


BASE = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, RopeConfig(10000.0, 32, 4096, 4096, "default")),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5, 32, 4096, 4096, "default")),
        ({"head_dim": None, "rope_theta": None}, RopeConfig(10000.0, 32, 4096, 4096, "default")),
        ({"model_type": "gpt_neox", "rotary_emb_base": 300}, RopeConfig(300.0, 8, 4096, 4096, "default")),
        ({"model_type": "gpt_neox", "rotary_pct": 0.5}, RopeConfig(10000.0, 16, 4096, 4096, "default")),
        ({"head_dim": 128, "rotary_dim": 64}, RopeConfig(10000.0, 64, 4096, 4096, "default")),
        ({"partial_rotary_factor": 0.5}, RopeConfig(10000.0, 16, 4096, 4096, "default")),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(10000.0, 32, 4096, 4096, "linear")),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8}}, RopeConfig(8.0, 32, 4096, 4096, "default")),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, RopeConfig(1e4, 32, 4096, 4096, "yarn")),
        ({"rope_scaling": {"type": "mine", **YARN}}, RopeConfig(1e4, 32, 4096, 4096, "yarn")),
        ({"original_max_position_embeddings": 256, "rope_scaling": YARN}, RopeConfig(1e4, 32, 256, 4096, "yarn")),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 256}}, RopeConfig(1e4, 32, 256, 4096, "yarn")),
        (
            {
                "original_max_position_embeddings": 512,
                "rope_scaling": {**YARN, "original_max_position_embeddings": 256},
            },
            RopeConfig(1e4, 32, 512, 4096, "yarn"),
        ),
        ({"rope_scaling": {"type": "su"}}, RopeConfig(1e4, 32, 4096, 4096, "longrope")),
    ],
)
def test_a_config_file_is_read_under_old_and_new_names(keys: dict[str, Any], expected: RopeConfig) -> None:
    assert rope_config(BASE | keys) == expected
    assert rope_config({"text_config": BASE | keys, "max_position_embeddings": 7, "hidden_size": 9}) == expected


@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}])
def test_what_a_config_file_leaves_out_is_what_its_class_takes(scaling: dict[str, Any]) -> None:
    """Of every causal language model's class that has a RoPE at the top level of its configuration."""
    tried = set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raw = {"model_type": family, "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, **scaling}
        raw |= {"max_position_embeddings": 4096, "num_hidden_layers": 2}
        try:
            described = AutoConfig.for_model(**copy.deepcopy(raw)).to_dict()
            expected = rope_config(described)
        except Exception:  # a class may ask for anything, and not all RoPE can be extended
            continue
        found = rope_config(raw)
        # Some classes have a whole RoPE of their own where nothing is said, which no base alone tells.
        if (
            "text_config" not in described
            and found.scaling == expected.scaling
            and family not in ("laguna", "lfm3", "mellum")
        ):
            assert (found.rope_theta, found.rotary_dim) == (expected.rope_theta, expected.rotary_dim), family
            tried.add(family)
    own = {"apertus", "apertus1p5_text", "cwm", "gpt_oss"} if not scaling else {"phimoe"}  # which knows longrope alone
    assert tried >= {*configs._THETAS, *configs._SHARES} - own - {"emu3_text_model", "mllama_text_model"}
    assert len(tried) > 80


def test_the_base_of_the_global_layers_has_a_name_of_its_own_in_modernbert() -> None:
    raw: dict[str, Any] = BASE | {"model_type": "modernbert-decoder", "global_rope_theta": 7e4, "local_rope_theta": 9e3}
    described = AutoConfig.for_model(**raw).to_dict()
    assert rope_config(raw).rope_theta == rope_config(described).rope_theta == 7e4


def test_the_original_length_of_a_class_that_scales_queries_by_it_stays() -> None:
    """Ministral 3's: with another one in config.json it would be another model."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "llama_4_scaling_beta": 0.1}
    config = {"head_dim": 16, "max_position_embeddings": 192, "rope_parameters": scaling | {"rope_theta": 500.0}}
    assert rope_config(config, original_length=48) == rope_config(config)
    told = r"^--original-length: got 192; its class scales queries by the original length .* says, 48; leave it out$"
    with pytest.raises(UserError, match=told):
        rope_config(config, original_length=192)


def test_the_argument_wins_as_original_length() -> None:
    assert rope_config(BASE | {"original_max_position_embeddings": 256}, original_length=1024).original_length == 1024


def test_of_a_config_per_layer_type_the_global_layers_are_taken() -> None:
    layers = {"full_attention": {**YARN, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
    assert rope_config(BASE | {"rope_parameters": layers}) == RopeConfig(1e6, 32, 4096, 4096, "yarn")
    # As in transformers, a flat legacy dict updates the global layers.
    both = BASE | {"rope_parameters": layers, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    table = table_from_config(both)
    assert (table.rope_theta, table.rows[0].rescale[0]) == (1e6, 8.0)
    gemma = make(Gemma3TextConfig, rope_scaling={"rope_type": "linear", "factor": 8.0}, max_position_embeddings=4096)
    assert_equals_transformers(gemma, "full_attention")


ONES, NUMBER = [1.0] * 16, "it is a finite, positive number; correct config.json"
LISTS: dict[str, Any] = {"rope_type": "longrope", "short_factor": ONES, "long_factor": ONES, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 5.0, "high_freq_factor": 4.0}
NEEDED = "this RoPE needs it; complete config.json"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "proportional"}},
            "rope_type: got 'proportional'; known are default, linear, dynamic, yarn, llama3, longrope; choose another",
        ),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type: got ['yarn']; known are"),
        (
            {"rope_scaling": {**LISTS, "short_factor": ONES[1:]}},
            "short_factor: got 15 numbers; rotary dimension 32 has 16",
        ),
        ({"rope_scaling": {**LISTS, "long_factor": [ONES, ONES]}}, "long_factor: got 2 numbers; rotary dimension 32"),
        ({"rope_scaling": {**LISTS, "long_factor": [ONES] * 16}}, "long_factor[0]: got [1.0, "),
        ({"rope_scaling": {**LISTS, "long_factor": "1" * 16}}, "long_factor: got '1111111111111111'; it is a list"),
        ({"rope_scaling": {**LISTS, "long_factor": None}}, f"config: got no long_factor; {NEEDED}"),
        ({"rope_scaling": {**LISTS, "long_factor": [*ONES[1:], float("nan")]}}, f"long_factor[15]: got nan; {NUMBER}"),
        ({"rope_scaling": {**LISTS, "factor": float("inf")}}, f"factor: got inf; {NUMBER}"),
        ({"rope_scaling": {**LISTS, "attention_factor": 0.0}}, f"attention_factor: got 0.0; {NUMBER}"),
        ({"rope_scaling": {"rope_type": "linear"}}, f"config: got no factor; {NEEDED}"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, f"config: got no factor; {NEEDED}"),
        ({"rope_scaling": {"rope_type": "yarn"}}, f"config: got no factor; {NEEDED}"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, f"config: got no low_freq_factor; {NEEDED}"),
        ({"rope_scaling": LLAMA3}, "low_freq_factor: got 5; it is at most high_freq_factor, 4"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, f"factor: got '8'; {NUMBER}"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, f"factor: got True; {NUMBER}"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "factor: got 1000"),
        ({"rope_scaling": "linear"}, "rope_scaling: got 'linear'; it is an object"),
        ({"rope_theta": float("nan")}, f"rope_theta: got nan; {NUMBER}"),
        ({"rope_theta": 1}, "rope_theta: got 1.0; a RoPE base is a finite number above 1"),
        ({"max_position_embeddings": None}, f"config: got no max_position_embeddings; {NEEDED}"),
        ({"max_position_embeddings": 4096.5}, "max_position_embeddings: got 4096.5; it is a whole number"),
        ({"original_max_position_embeddings": -1}, f"original_max_position_embeddings: got -1; {NUMBER}"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
            "config: got mrope_section [16, 24, 24]; multimodal RoPE is not supported; choose a model",
        ),
        ({"kv_lora_rank": 512}, "config: got kv_lora_rank 512; multi-head latent attention is not supported; choose"),
        ({"qk_rope_head_dim": 64}, "config: got qk_rope_head_dim 64; multi-head latent attention is not supported"),
        (
            {"hidden_size": None},
            "got no head_dim; the head dimension is head_dim, or hidden_size / num_attention_heads",
        ),
        ({"hidden_size": 1}, "hidden_size: got 1; it is at least num_attention_heads, 2"),
        ({"head_dim": 0}, f"head_dim: got 0; {NUMBER}"),
        (
            {"head_dim": 5},
            "partial_rotary_factor: got 1 of head_dim 5; an even number of dimensions of a head is rotated",
        ),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor: got 0.01 of head_dim 32; an even number"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: got 1.5 of head_dim 32; an even number"),
        (
            {"rope_parameters": {"local": {"rope_type": "default"}, "global": {"rope_type": "default"}}},
            "rope_parameters: got layer types local, global; the layers to extend are called full_attention",
        ),
        (  # as Beam's: its global layers do not rotate
            {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": None}},
            "got rope_parameters without any for full_attention; the layers that see the whole text rotate",
        ),
    ],
)
def test_a_config_that_cannot_be_extended_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        table_from_config(BASE | keys)
    assert message in str(error.value)


@QUICK
@given(two_row_tables())
def test_a_table_survives_the_config_file(table: FactorTable) -> None:
    written = json.loads(json.dumps({"head_dim": 32, **to_transformers_config(table)}))
    for dropped in ("rope_scaling", "rope_parameters"):  # each of the two is enough
        again = table_from_config({key: value for key, value in written.items() if key != dropped})
        assert again == FactorTable(
            table.rope_theta, 32, table.original_length, table.rows, provenance={"method": "longrope"}
        )


def test_the_config_keys_are_those_that_engines_read() -> None:
    table = long_table()
    keys = to_transformers_config(table)
    assert (keys["max_position_embeddings"], keys["rope_theta"]) == (2048, 10000.0)
    assert keys["rope_parameters"] == keys["rope_scaling"]
    assert keys["rope_parameters"] == {
        **{"rope_type": "longrope", "type": "longrope", "rope_theta": 10000.0, "factor": 8.0},
        **{"short_factor": list(table.rows[0].rescale), "long_factor": list(table.rows[1].rescale)},
        **{"original_max_position_embeddings": 256, "attention_factor": 1.125},
        **{"short_mscale": 1.125, "long_mscale": 1.125},
    }


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt-neox", "gemma3"])
def test_a_table_survives_the_config_class_of_transformers(name: str, tmp_path: Path) -> None:
    keys = to_transformers_config(long_table())
    partly = keys["rope_scaling"] | {"partial_rotary_factor": 0.5}
    half = {"hidden_size": 512, "num_attention_heads": 8, **keys, "rope_scaling": partly}
    gemma_layers = {"full_attention": keys["rope_parameters"], "sliding_attention": {"rope_type": "default"}}
    configs: dict[str, Callable[[], PreTrainedConfig]] = {
        "llama": lambda: make(LlamaConfig, hidden_size=64, num_attention_heads=2, **keys),
        "qwen3": lambda: make(Qwen3Config, head_dim=32, **keys),
        # The class has a top-level original length of its own, which wins.
        "phi3": lambda: make(Phi3Config, original_max_position_embeddings=256, **half),
        "gpt-neox": lambda: make(GPTNeoXConfig, **half),
        "gemma3": lambda: Gemma3TextConfig(head_dim=32, max_position_embeddings=2048, rope_parameters=gemma_layers),
    }
    config = configs[name]()
    config.save_pretrained(tmp_path)
    table = read_factors(tmp_path / "config.json")
    assert (table.rows, table.original_length, table.rotary_dim) == (long_table().rows, 256, 32)
    assert table_from_config(config.to_dict()) == table
    assert_equals_transformers(config, "full_attention" if name == "gemma3" else None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            (unscaled(2, 256), RopeFactors(512, (1.0, 2.0), start_tokens=4)),
            "factor table: got start tokens [0, 4]; no engine keeps start tokens unscaled; export with --force",
        ),
        (
            (unscaled(2, 256), unscaled(2, 512), unscaled(2, 1024)),
            "factor table: got 3 rows; the longrope format has two, short and long",
        ),
        (
            (unscaled(2, 256), RopeFactors(512, (1.0, 2.0), attention_factor=1.09)),
            "factor table: got attention factors 1.0 and 1.09; the longrope format has one for both rows",
        ),
        (
            (unscaled(2, 512), unscaled(2, 1024)),
            "factor table: got a first row up to 512; the longrope format switches at the original length, 256",
        ),
    ],
)
def test_what_the_longrope_format_cannot_express_is_refused(rows: tuple[RopeFactors, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        to_transformers_config(FactorTable(10000.0, 4, 256, rows))
    assert message in str(error.value)
