from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.baselines import RopeShape
from longrope.configs import rope_config, table_from_config
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.patch import Patch, ScaledRotary, global_layers_turn, rotary_modules
from longrope.rope import RopeTensors
from longrope.runtime.caches import CACHE, cache_of
from models import ARCHITECTURES, ORIGINAL, SCALED, build, tokens

LONG = 4 * ORIGINAL
BEYOND = 80  # tokens: longer than the original length and every sliding window of the test models


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def shape_of(model: PreTrainedModel) -> RopeShape:
    return rope_config(model.config.get_text_config().to_dict()).shape


def even(shape: RopeShape, up_to: int = LONG, **values: Any) -> RopeFactors:
    return RopeFactors(up_to, tuple(1.0 + 0.4 * i for i in range(shape.pairs)), **values)


def table(shape: RopeShape, **values: Any) -> FactorTable:
    rows = (unscaled(shape.pairs, ORIGINAL), even(shape, **values))
    return FactorTable(shape.rope_theta, shape.rotary_dim, ORIGINAL, rows)


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    return cast(Tensor, model(input_ids=ids, **{"use_cache": False, **inputs}).logits)


def tree(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_factors_of_one_are_the_base_model_bit_for_bit_and_leaving_restores_it(name: str) -> None:
    model, ids = build(name), tokens(BEYOND)
    before, modules, shape = logits(model, ids), tree(model), shape_of(model)
    with Patch(model, shape) as patch:
        assert torch.equal(logits(model, ids), before)
        patch.install(unscaled(shape.pairs, LONG))
        # Llama 4 makes its complex numbers by torch.polar, whose last bit is not that of cos and sin.
        torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-5 if name == "llama4" else 0)
        patch.install(even(shape))
        assert (logits(model, ids) - before).abs().max() > 1e-3
        patch.install(None)
        assert torch.equal(logits(model, ids), before)
        patch.install(even(shape))
    assert torch.equal(logits(model, ids), before)
    assert tree(model) == modules


# The classes that take every scaling from their configuration (Phi3 only longrope).
SCALABLE = [(name, kind) for name in ARCHITECTURES for kind in SCALED if name != "phi3" or kind == "longrope"]


def rope_parameters(name: str, kind: str, pairs: int) -> dict[str, Any]:
    """Parameters of a scaling for a class, beside the ones it has."""
    parameters = dict(build(f"llama-{kind}").config.rope_parameters)
    if kind == "longrope":
        parameters |= {
            key: [start + 0.3 * i for i in range(pairs)] for key, start in [("short_factor", 1.0), ("long_factor", 2.0)]
        }
    mine = build(name).config.rope_parameters
    if "full_attention" not in mine:
        return {**mine, **parameters}
    return {**mine, "full_attention": {**mine["full_attention"], **parameters}}


@pytest.mark.parametrize(("name", "kind"), SCALABLE)
def test_installing_a_scaling_gives_the_logits_of_the_class_with_that_configuration(name: str, kind: str) -> None:
    base, ids = build(name), tokens(BEYOND)
    shape = shape_of(base)
    # transformers' dynamic scaling begins beyond max_position_embeddings and follows the length that it has seen.
    reach = 20 if kind == "dynamic" else LONG
    changes: dict[str, Any] = {"max_position_embeddings": reach}
    if name == "mixtral":
        changes["head_dim"] = 16  # its class computes no scaling without one
    stock = build(name, rope_parameters=rope_parameters(name, kind, shape.pairs), **changes)
    stock.load_state_dict(base.state_dict())
    rows = table_from_config(stock.config.get_text_config().to_dict())
    row = rows.row_for(BEYOND)
    before, expected = logits(base, ids), logits(stock, ids)
    with Patch(base, shape) as patch:
        patch.install(row)
        torch.testing.assert_close(logits(base, ids), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "olmo3"])
def test_local_layers_keep_their_own_rotation(name: str) -> None:
    model = build(name)
    shape = shape_of(model)
    [(_, _, stock)] = rotary_modules(model)
    x, positions = torch.zeros(1, 1, 1), torch.arange(BEYOND)[None]
    own = {kind: stock(x, positions, kind) for kind in ("sliding_attention", "full_attention")}
    with Patch(model, shape) as patch:
        patch.install(even(shape))
        [(_, _, ours)] = rotary_modules(model)
        local, extended = (ours(x, positions, kind) for kind in ("sliding_attention", "full_attention"))
    assert all(torch.equal(a, b) for a, b in zip(local, own["sliding_attention"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(extended, own["full_attention"], strict=True))


@pytest.mark.parametrize(
    ("name", "turn"),
    [("cohere2", False), ("exaone4", False), ("llama4_nope", False)]
    + [(name, True) for name in ("llama4", "gemma2", "gemma3", "olmo3", "gpt_oss", "smollm3", "llama")],
)
def test_whether_global_layers_rotate_is_measured_and_leaves_the_model_as_it_is(name: str, turn: bool) -> None:
    model, ids = build(name), tokens(8)
    shape, before = shape_of(model), logits(model, ids)
    with Patch(model, shape) as patch:

        def run(row: RopeFactors | None) -> None:
            patch.install(row)
            logits(model, ids)

        assert global_layers_turn(model.config, model, lambda: run(None), lambda: run(even(shape))) is turn
    assert torch.equal(logits(model, ids), before)


def test_each_sequence_of_a_batch_uses_the_row_of_its_own_length() -> None:
    model = build("llama")
    shape = shape_of(model)
    ids = tokens(ORIGINAL, batch=3)
    positions = torch.stack([torch.arange(ORIGINAL), torch.arange(ORIGINAL), torch.arange(ORIGINAL)])
    positions[1, -1] = ORIGINAL  # a sequence one token longer than the original length
    positions[2] += torch.arange(ORIGINAL) * 3  # and one that reaches LONG - 3
    with Patch(model, shape) as patch:
        patch.install(table(shape))
        together = logits(model, ids, position_ids=positions)
        for sequence, row in enumerate([0, 1, 1]):
            patch.install(table(shape).rows[row])
            alone = logits(model, ids[sequence : sequence + 1], position_ids=positions[sequence : sequence + 1])
            torch.testing.assert_close(together[sequence], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("length", "row"), [(ORIGINAL, 0), (ORIGINAL + 1, 1), (LONG, 1)])
def test_a_table_is_switched_exactly_at_the_length_of_its_rows(length: int, row: int) -> None:
    model = build("llama")
    shape, ids = shape_of(model), tokens(length)
    with Patch(model, shape) as patch:
        patch.install(table(shape))
        by_length = logits(model, ids)
        patch.install(table(shape).rows[row])
        assert torch.equal(by_length, logits(model, ids))
        patch.install(table(shape).rows[1 - row])
        assert not torch.equal(by_length, logits(model, ids))


def test_a_sequence_beyond_the_last_row_is_refused() -> None:
    model = build("llama")
    shape = shape_of(model)
    with Patch(model, shape) as patch:
        patch.install(table(shape))
        with pytest.raises(UserError) as error:
            logits(model, tokens(LONG + 1))
    assert str(error.value) == (
        f"sequence: got {LONG + 1} tokens; the factor table ends at {LONG}; "
        "use a shorter sequence, or search factors for a longer target"
    )


def test_one_row_is_used_at_every_length() -> None:
    model = build("llama")
    shape = shape_of(model)
    with Patch(model, shape) as patch:
        patch.install(even(shape, up_to=8))
        assert torch.isfinite(logits(model, tokens(LONG + 1))).all()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox", "gemma3"])
@pytest.mark.parametrize(("cached", "length"), [(20, 40), (60, 80)])
def test_continuing_a_cache_inside_one_regime_is_the_full_pass(name: str, cached: int, length: int) -> None:
    model, ids = build(name), tokens(length)
    shape = shape_of(model)
    with Patch(model, shape) as patch:
        patch.install(table(shape))
        expected = logits(model, ids)
        cache = cache_of(model(input_ids=ids[:, :cached], use_cache=True))
        continued = logits(model, ids[:, cached:], **{CACHE: cache}, use_cache=True)
    torch.testing.assert_close(continued, expected[:, cached:], rtol=0, atol=1e-4)


def test_a_cache_that_crosses_a_boundary_is_refused() -> None:
    model, ids = build("llama"), tokens(ORIGINAL + 1)
    shape = shape_of(model)
    with Patch(model, shape) as patch:
        patch.install(table(shape))
        cache = cache_of(model(input_ids=ids[:, :ORIGINAL], use_cache=True))
        with pytest.raises(UserError) as error:
            model(input_ids=ids[:, ORIGINAL:], **{CACHE: cache}, use_cache=True)
    assert str(error.value) == (
        f"sequence: got {ORIGINAL} cached tokens and {ORIGINAL + 1} in all; "
        "keys cached under one row of the factor table are wrong under another; "
        "run the whole sequence again without its cache, or install the row of its final length"
    )


def test_start_tokens_are_not_rescaled() -> None:
    model = build("llama")
    shape, ids = shape_of(model), tokens(BEYOND)
    row = even(shape)
    base = logits(model, ids)
    with Patch(model, shape) as patch:
        patch.install(row)
        rescaled = logits(model, ids)
        patch.install(row.with_values(start_tokens=30))
        kept = logits(model, ids)
        patch.install(row.with_values(start_tokens=BEYOND))
        assert torch.equal(logits(model, ids), base)
    # A causal model cannot see beyond: up to 30 tokens it is the base model.
    torch.testing.assert_close(kept[:, :30], base[:, :30], rtol=0, atol=1e-5)
    assert (kept[:, 30:] - rescaled[:, 30:]).abs().max() > 1e-3
    assert (kept[:, 30:] - base[:, 30:]).abs().max() > 1e-3


def test_the_attention_factor_multiplies_cos_and_sin() -> None:
    model = build("llama")
    shape = shape_of(model)
    with Patch(model, shape) as patch:
        [(_, _, ours)] = rotary_modules(model)
        patch.install(even(shape))
        plain = ours(torch.zeros(1), torch.arange(4)[None])
        patch.install(even(shape, attention_factor=2.0))
        doubled = ours(torch.zeros(1), torch.arange(4)[None])
    assert all(torch.equal(2 * a, b) for a, b in zip(plain, doubled, strict=True))


@pytest.mark.parametrize("name", ["llama", "cohere", "gpt_oss"])
def test_angles_are_float32_under_a_bfloat16_model_and_under_autocast(name: str) -> None:
    model = build(name)
    shape = shape_of(model)
    positions = torch.tensor([[99_999, 100_000]])
    with Patch(model, shape) as patch:
        patch.install(even(shape))
        [(_, _, ours)] = rotary_modules(model)
        expected = ours(torch.zeros(1), positions)
        half = ours(torch.zeros(1, dtype=torch.bfloat16), positions)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = ours(torch.zeros(1), positions)
        model.to(torch.bfloat16)  # type: ignore[arg-type]
        of_cast_model = ours(torch.zeros(1, dtype=torch.bfloat16), positions)
    for part, half_part, autocast_part, cast_part in zip(expected, half, under_autocast, of_cast_model, strict=True):
        assert half_part.dtype == cast_part.dtype == torch.bfloat16
        assert torch.equal(half_part, part.bfloat16())
        assert torch.equal(cast_part, part.bfloat16())
        assert torch.equal(autocast_part, part)


def test_the_precision_of_angles_can_be_float64() -> None:
    model = build("llama")
    shape = shape_of(model)
    position = torch.tensor([[2_000_000]])
    periods = torch.tensor(even(shape).vector) * 500.0 ** (torch.arange(8).double() / 8)
    exact = (2_000_000 / periods).cos()
    errors = []
    for precision in (torch.float32, torch.float64):
        with Patch(model, shape, precision=precision) as patch:
            patch.install(even(shape))
            [(_, _, ours)] = rotary_modules(model)
            cos = ours(torch.zeros(1), position)[0][0, 0, :8]
            assert cos.dtype == torch.float32
            errors.append(float((cos.double() - exact).abs().max()))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-6


def test_changing_candidates_touches_no_module_and_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    shape = shape_of(model)
    made: list[int] = []
    of = RopeTensors.of.__func__  # type: ignore[attr-defined]

    def counted(cls: type[RopeTensors], rows: Any, *args: Any, **options: Any) -> Any:
        made.append(len(rows))
        return of(cls, rows, *args, **options)

    with Patch(model, shape) as patch:
        modules = tree(model)
        weights = {name: weight.data_ptr() for name, weight in model.named_parameters()}
        monkeypatch.setattr(RopeTensors, "of", classmethod(counted))
        patch.install(even(shape))
        patch.install(table(shape))
        assert made == [1, 2]  # tensors of the new rows alone, once for all layers
        assert tree(model) == modules
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == weights


def test_a_second_patch_on_the_same_model_is_refused() -> None:
    model = build("llama")
    shape = shape_of(model)
    with Patch(model, shape):
        with pytest.raises(UserError) as error:
            Patch(model, shape)
        assert str(error.value) == (
            "model: got a model that already carries factors; factors replace the model's own RoPE, once; "
            "undo the first patch, or install on it"
        )
    Patch(model, shape).undo()


@pytest.mark.parametrize("pairs", [4, 9])
def test_factors_with_another_number_of_pairs_are_refused_and_change_nothing(pairs: int) -> None:
    model, ids = build("llama"), tokens(8)
    shape = shape_of(model)
    with Patch(model, shape) as patch:
        patch.install(even(shape))
        before = logits(model, ids)
        with pytest.raises(UserError) as error:
            patch.install(unscaled(pairs, LONG))
        assert torch.equal(logits(model, ids), before)
    assert str(error.value) == (
        f"factors: got {pairs} rescale factors; the model rotates 8 pairs; "
        "give the factors that were searched for this model"
    )


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_a_model_without_a_rotary_embedding_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"model: got \w+ForCausalLM|GPT2LMHeadModel, which has no rotary embedding; "):
        Patch(build(name), RopeShape(500.0, 16, ORIGINAL))


def test_a_rotary_embedding_of_another_size_is_refused_and_the_model_left_as_it_is() -> None:
    model = build("llama")
    modules = tree(model)
    with pytest.raises(UserError) as error:
        Patch(model, RopeShape(500.0, 12, ORIGINAL))
    assert str(error.value).startswith(
        "model: got a rotary embedding LlamaRotaryEmbedding: it rotates 8 pairs where its configuration says 6; "
    )
    assert tree(model) == modules


class Backwards(nn.Module):
    """A rotary embedding that lays out cos and sin as no class known to us does."""

    inv_freq: Tensor

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.register_buffer("inv_freq", cast(Tensor, stock.inv_freq), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        turned = (position_ids[..., None].float() * self.inv_freq).flip(-1).repeat(1, 1, 2)
        return turned.cos().to(x.dtype), turned.sin().to(x.dtype)


def test_an_unknown_layout_is_refused() -> None:
    model = build("llama")
    [(parent, name, stock)] = rotary_modules(model)
    setattr(parent, name, Backwards(stock))
    with pytest.raises(UserError, match="rotary embedding Backwards: it lays out cos and sin in an unknown way; "):
        Patch(model, shape_of(model))


def test_a_dynamic_model_that_has_seen_a_long_sequence_can_be_patched_and_restored() -> None:
    model, ids = build("llama-dynamic"), tokens(2 * ORIGINAL)
    shape = shape_of(model)
    before = logits(model, ids)
    with Patch(model, shape) as patch:
        patch.install(even(shape))
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


def test_a_model_with_factors_saves_the_weights_of_the_stock_model() -> None:
    model = build("llama")
    keys = list(model.state_dict())
    with Patch(model, shape_of(model)) as patch:
        patch.install(even(shape_of(model)))
        assert list(model.state_dict()) == keys
        copied = copy.deepcopy(model)
    assert any(isinstance(module, ScaledRotary) for module in copied.modules())
    assert not any(isinstance(module, ScaledRotary) for module in model.modules())
