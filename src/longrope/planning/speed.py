"""Seconds of a window: FLOPs and bytes over a machine's rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longrope.planning.flops import window_flops
from longrope.planning.precision import Precision
from longrope.planning.shape import ModelShape

_OPTIMIZER_WRITES = 40  # bytes that Adam writes for a weight, in some ten passes over four numbers of four bytes


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    matrices, head, attention, attention_back: FLOPs of products with weights of layers, with the output projection by
    chunks of few tokens, of attention, of its backward pass. written:
    bytes of results of what is done number by number (norms, rotation, gates, sums, casts). logits, logits_back:
    numbers of logits that the loss takes in, and that it differentiates, too.
    """

    matrices: float
    head: float
    attention: float
    attention_back: float
    written: float = math.inf
    logits: float = math.inf
    logits_back: float = math.inf

    @classmethod
    def of_peak(cls, flops: float, utilisation: float) -> Rates:
        """Of a device with a peak in FLOP/s of which a share is used: everything but FLOPs is in that share."""
        return cls(*(4 * (flops * utilisation,)))


def written(shape: ModelShape, p: Precision, kind: str = "forward", *, rank: int = 0, again: bool = False) -> float:
    """Bytes a token that the operations between products write in all layers."""
    r, a, hidden, inner = p.stream, p.compute, shape.hidden, shape.inner
    turned = shape.queries + shape.keys
    recasts = (2 + shape.inner_matrices) * hidden if p.recasts else 0
    norms = 2 * (12 if r == 4 else 16) * hidden + 12 * shape.attention_norms
    turning = (3 * r + 1.5 * a + (a if r != a else 0)) * turned
    ahead = norms + a * recasts + turning + 2 * a * inner + 2 * r * hidden
    if kind == "lora":
        out = shape.queries + 2 * shape.keys + 2 * hidden + 2 * inner
        ahead += a * ((2 + shape.inner_matrices) * hidden + shape.queries + inner + 2 * out)
    if kind == "forward":
        return shape.layers * ahead
    back = 2 * 28 * hidden + 28 * shape.attention_norms + 2 * r * hidden
    back += (4 + r) * recasts + 3 * a * inner
    back += (2 * r + 6 * a + (2 * r if kind == "gradient" else 0)) * turned
    if kind == "lora":
        back += (4 + a) * ((2 + shape.inner_matrices) * hidden + shape.queries + inner)
    return shape.layers * (ahead * (2 if again else 1) + back)


def copied(shape: ModelShape, p: Precision, kind: str, *, again: bool) -> float:
    """Bytes of weights and of their gradients that a pass writes, however long it is."""
    if not p.casts:
        return 0.0
    passes = 2 if again and kind != "forward" else 1
    return passes * p.compute * shape.active + (4.0 * shape.active if kind == "train" else 0.0)


def seconds(
    shape: ModelShape, p: Precision, tokens: int, rates: Rates, kind: str = "forward", *, windows: int = 1,
    rank: int = 0, again: bool = False, scored: bool = True,
) -> float:  # fmt: skip
    """Seconds of some windows of so many tokens each in one pass; a training step includes the optimizer's."""
    flops = window_flops(shape, tokens, kind, rank=rank, again=again, scored=scored).times(windows)
    through = tokens * windows
    bytes_written = written(shape, p, kind, rank=rank, again=again) * through + copied(shape, p, kind, again=again)
    trained = {"train": shape.parameters, "lora": rank * shape.adapters}.get(kind, 0)
    logits = through * shape.vocabulary if scored else 0
    return (
        flops.matrices / rates.matrices
        + flops.head / rates.head
        + flops.attention / rates.attention
        + flops.attention_back / rates.attention_back
        + (bytes_written + _OPTIMIZER_WRITES * trained) / rates.written
        + logits / (rates.logits if kind == "forward" else rates.logits_back)
    )
