from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longrope.configs import rope_config, table_from_config
from longrope.factors import RopeFactors
from longrope.rope import RopeTensors, angles, cos_sin, inverse_frequencies, regime
from models import ORIGINAL, SCALED, build

THETA, PAIRS = 500.0, 8
FAR = torch.tensor([[0, 1, 2, 7, 100, 4095, 65_537, 131_071, 999_999, 2**20]])
EVEN = tuple(1.0 + 0.25 * i for i in range(PAIRS))


def stock_and_ours(kind: str, length: int) -> tuple[LlamaRotaryEmbedding, RopeTensors]:
    """transformers' own rotary embedding after a sequence of `length`, and our tensors of the row it should use."""
    model = build("llama" if kind == "default" else f"llama-{kind}")
    stock = LlamaRotaryEmbedding(cast(LlamaConfig, model.config))
    stock(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]))
    described = model.config.to_dict()
    row = table_from_config(described).row_for(length)
    return stock, RopeTensors.of([row], rope_config(described).rope_theta)


@pytest.mark.parametrize("length", [1, ORIGINAL, 4 * ORIGINAL])
@pytest.mark.parametrize("kind", ["default", *SCALED])
def test_frequencies_and_attention_factor_are_those_of_transformers(kind: str, length: int) -> None:
    stock, ours = stock_and_ours(kind, min(length, ORIGINAL) if kind == "default" else length)
    torch.testing.assert_close(ours.rotations[0], stock.inv_freq, rtol=1e-6, atol=0)
    assert float(ours.attention_factor[0]) == pytest.approx(stock.attention_scaling, rel=1e-6)


def test_the_scalings_differ_from_each_other() -> None:
    far = [stock_and_ours(kind, 4 * ORIGINAL)[1].rotations[0] for kind in SCALED]
    assert all(not torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(far) for b in far[:i])


def stock_cos_sin(stock: LlamaRotaryEmbedding, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = stock(torch.zeros(1, 1, 1), positions)
    return cos[..., :PAIRS], sin[..., :PAIRS]


@pytest.mark.parametrize("kind", ["default", "longrope"])
def test_cos_and_sin_are_bit_for_bit_those_of_transformers(kind: str) -> None:
    stock, ours = stock_and_ours(kind, ORIGINAL if kind == "default" else 4 * ORIGINAL)
    for mine, theirs in zip(cos_sin(FAR, ours), stock_cos_sin(stock, FAR), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_cos_and_sin_of_other_orders_of_operations_are_equal_to_rounding(kind: str) -> None:
    stock, ours = stock_and_ours(kind, 4 * ORIGINAL)
    near = torch.arange(4 * ORIGINAL)[None]
    for mine, theirs in zip(cos_sin(near, ours), stock_cos_sin(stock, near), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=4 * ORIGINAL * 2**-23)


def test_cos_and_sin_follow_the_closed_form() -> None:
    row = RopeFactors(8, EVEN, attention_factor=1.25)
    positions = torch.tensor([[0, 3, 50]])
    cos, sin = cos_sin(positions, RopeTensors.of([row], THETA, precision=torch.float64))
    for at, position in enumerate([0, 3, 50]):
        for pair in range(PAIRS):
            angle = position / (EVEN[pair] * THETA ** (2 * pair / (2 * PAIRS)))
            assert float(cos[0, at, pair]) == pytest.approx(1.25 * math.cos(angle), abs=1e-12)
            assert float(sin[0, at, pair]) == pytest.approx(1.25 * math.sin(angle), abs=1e-12)


def exact_angles(position: int, rescale: tuple[float, ...]) -> Tensor:
    exponents = np.arange(PAIRS) / PAIRS
    return torch.tensor(position / (np.array(rescale) * THETA**exponents))


@pytest.mark.parametrize("rescale", [(1.0,) * PAIRS, EVEN])
def test_float32_angles_at_100k_stay_near_the_closed_form(rescale: tuple[float, ...]) -> None:
    rope = RopeTensors.of([RopeFactors(8, rescale)], THETA)
    turned = angles(torch.tensor([[100_000]]), rope.rotations[0], rope.base)
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned[0, 0].double(), exact_angles(100_000, rescale), rtol=3e-7, atol=0)


def test_float64_angles_are_exact_where_float32_ones_are_not() -> None:
    expected = exact_angles(2_000_000, EVEN)
    errors = []
    for precision in (torch.float32, torch.float64):
        rope = RopeTensors.of([RopeFactors(8, EVEN)], THETA, precision=precision)
        turned = angles(torch.tensor([[2_000_000]]), rope.rotations[0], rope.base)[0, 0]
        errors.append(float((turned.double() - expected).abs().max()))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-8


def test_start_tokens_keep_the_unscaled_angle_and_the_next_position_does_not() -> None:
    rope = RopeTensors.of([RopeFactors(8, EVEN, start_tokens=4)], THETA, precision=torch.float64)
    turned = angles(torch.arange(8)[None], rope.rotations[0], rope.base, rope.start_tokens[0])[0]
    for position in range(8):
        rescale = (1.0,) * PAIRS if position < 4 else EVEN
        torch.testing.assert_close(turned[position], exact_angles(position, rescale), rtol=1e-12, atol=0)
    assert not torch.allclose(exact_angles(4, EVEN), exact_angles(4, (1.0,) * PAIRS))


def test_start_tokens_of_each_sequence_are_those_of_its_row() -> None:
    rows = [RopeFactors(8, EVEN, start_tokens=2), RopeFactors(16, EVEN), RopeFactors(32, EVEN, start_tokens=6)]
    together = RopeTensors.of(rows, THETA)
    positions = torch.arange(10).expand(3, -1)
    cos, sin = cos_sin(positions, together, torch.tensor([2, 0, 1]))
    for sequence, row in enumerate([2, 0, 1]):
        alone = cos_sin(positions[:1], RopeTensors.of([rows[row]], THETA))
        assert torch.equal(cos[sequence], alone[0][0])
        assert torch.equal(sin[sequence], alone[1][0])


def test_the_attention_factor_of_each_sequence_is_that_of_its_row() -> None:
    rows = [RopeFactors(8, EVEN, attention_factor=1.0), RopeFactors(16, EVEN, attention_factor=2.0)]
    cos, _ = cos_sin(torch.zeros(2, 1, dtype=torch.long), RopeTensors.of(rows, THETA), torch.tensor([1, 0]))
    assert cos[:, 0, 0].tolist() == [2.0, 1.0]


def test_a_regime_ends_with_its_length() -> None:
    lengths = torch.tensor([1, 47, 48, 49, 191, 192, 193, 10**9])
    assert regime(lengths, torch.tensor([48, 192])).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_angles_are_differentiable_in_the_rescale_factors() -> None:
    positions = torch.tensor([[0, 1, 5, 40]])
    base = inverse_frequencies(THETA, torch.ones(PAIRS, dtype=torch.float64))

    def turned(rescale: Tensor) -> Tensor:
        return angles(positions, inverse_frequencies(THETA, rescale), base, torch.tensor(2))

    rescale = torch.tensor(EVEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(turned, (rescale,))
    (gradient,) = torch.autograd.grad(turned(rescale).sum(), rescale)
    assert (gradient < 0).all()  # a larger factor turns more slowly


def test_tensors_keep_their_values_on_the_way_to_a_device() -> None:
    rope = RopeTensors.of([RopeFactors(8, EVEN, start_tokens=3, attention_factor=1.5)], THETA)
    moved = rope.to("meta")
    assert {moved.up_to.device.type, moved.rotations.device.type, moved.base.device.type} == {"meta"}
    assert {moved.start_tokens.device.type, moved.attention_factor.device.type} == {"meta"}
    assert moved.any_start_tokens
    assert moved.rotations.shape == rope.rotations.shape
