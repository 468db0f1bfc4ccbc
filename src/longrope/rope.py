"""The RoPE mathematics in torch: angles, cos and sin, and the choice of factors by position and length.

Shapes: B sequences, T tokens, P = d/2 pairs, R rows of a factor table. Everything here is float32 (or float64 on
request), whatever the model's dtype, and in transformers' order of operations, so that what is measured here is what
engines compute: theta_i = 1 / (lambda_i * b^(2i/d)), angle = position * theta_i, cos(angle) * m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrope.factors import RopeFactors


def inverse_frequencies(rope_theta: float, rescale: Tensor) -> Tensor:
    """theta_i / lambda_i for rescale factors (..., P), in their dtype (LongRoPE, arXiv 2402.13753, eq. 3).

    Bit for bit transformers' default frequencies where the factors are 1. Differentiable in `rescale`.
    """
    pairs = rescale.shape[-1]
    exponents = torch.arange(0, 2 * pairs, 2, dtype=rescale.dtype, device=rescale.device) / (2 * pairs)
    return 1.0 / (rescale * rope_theta**exponents)


@dataclass(frozen=True)
class RopeTensors:
    """The rows of a factor table on a device, ready for cos_sin.

    up_to (R,), rotations (R, P) inverse frequencies, base (P,) those of the unscaled model, start_tokens (R,) and
    attention_factor (R,). `any_start_tokens` spares their arithmetic where no row has any.
    """

    up_to: Tensor
    rotations: Tensor
    base: Tensor
    start_tokens: Tensor
    attention_factor: Tensor
    any_start_tokens: bool

    @classmethod
    def of(
        cls,
        rows: Sequence[RopeFactors],
        rope_theta: float,
        *,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> RopeTensors:
        """The rows as tensors; `precision` is the dtype of angles, float32 as in every engine."""
        rescale = torch.tensor([row.rescale for row in rows], dtype=precision)
        starts = [row.start_tokens for row in rows]
        return cls(
            up_to=torch.tensor([row.up_to for row in rows]),
            rotations=inverse_frequencies(rope_theta, rescale),
            base=inverse_frequencies(rope_theta, torch.ones_like(rescale[0])),
            start_tokens=torch.tensor(starts),
            attention_factor=torch.tensor([row.attention_factor for row in rows], dtype=precision),
            any_start_tokens=any(starts),
        ).to(device)

    def row(self, index: int) -> RopeTensors:
        """One row alone."""
        part = slice(index, index + 1)
        return RopeTensors(
            up_to=self.up_to[part],
            rotations=self.rotations[part],
            base=self.base,
            start_tokens=self.start_tokens[part],
            attention_factor=self.attention_factor[part],
            any_start_tokens=bool(self.start_tokens[index] > 0),
        )

    def to(self, device: torch.device | str) -> RopeTensors:
        """The same on another device."""
        return RopeTensors(
            up_to=self.up_to.to(device),
            rotations=self.rotations.to(device),
            base=self.base.to(device),
            start_tokens=self.start_tokens.to(device),
            attention_factor=self.attention_factor.to(device),
            any_start_tokens=self.any_start_tokens,
        )


def regime(lengths: Tensor, up_to: Tensor) -> Tensor:
    """Row of the table for sequences of `lengths` (B,): the first whose `up_to` (R,) reaches it; R beyond the last."""
    return torch.searchsorted(up_to, lengths)


def angles(positions: Tensor, rotations: Tensor, base: Tensor, start_tokens: Tensor | None = None) -> Tensor:
    """Rotation angles (B, T, P) of positions (B, T) under inverse frequencies (P,) or (B, 1, P).

    Positions below start_tokens, () or (B, 1), keep the angle of the unscaled `base` (eq. 3's n-hat).
    """
    exact = positions[..., None].to(rotations.dtype)
    turned = exact * rotations
    if start_tokens is None:
        return turned
    return torch.where((positions < start_tokens)[..., None], exact * base, turned)


def cos_sin(positions: Tensor, rope: RopeTensors, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, P) times the attention factor, for positions (B, T).

    `rows` (B,) is the regime of each sequence; without it all use the first row.
    """
    if rows is None:
        rotations, starts, scale = rope.rotations[0], rope.start_tokens[0], rope.attention_factor[0]
    else:
        rotations = rope.rotations[rows][:, None, :]  # (B, 1, P)
        starts = rope.start_tokens[rows][:, None]  # (B, 1)
        scale = rope.attention_factor[rows][:, None, None]  # (B, 1, 1)
    turned = angles(positions, rotations, rope.base, starts if rope.any_start_tokens else None)
    return turned.cos() * scale, turned.sin() * scale
