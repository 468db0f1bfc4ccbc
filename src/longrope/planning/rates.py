"""What this machine's CPU does in a second, measured on the parts that a model of a shape is made of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

from longrope.planning.activations import CHUNK_LOGITS
from longrope.planning.flops import ATTENTION_BACKWARD
from longrope.planning.precision import Precision
from longrope.planning.shape import ModelShape
from longrope.planning.speed import Rates

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_MOST_FLOPS = 4e10  # of one measured call
_MOST_TOKENS, _MOST_HEADS = 8192, 4
_LEAST_RUNS = 2


def measured_rates(shape: ModelShape, p: Precision, tokens: int, *, seed: int = 0, a_while: float = 0.3) -> Rates:
    """Rates in the dtypes of a precision on passes of so many tokens; a few seconds.

    Each part by itself, on random numbers in the sizes of the shape; nothing of a model is run. a_while: seconds of
    each at least.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = _DTYPES[p.compute]
    wide = min(shape.inner, 16384)
    few = max(256, int(min(tokens, _MOST_TOKENS, _MOST_FLOPS / (2 * shape.hidden * wide))))

    def draw(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    def timed(run: Callable[[], object]) -> float:
        run()
        begun, count = time.perf_counter(), 0
        # The mean of a while, not the best of some: what else the machine does slows a model down, too.
        while count < _LEAST_RUNS or time.perf_counter() - begun < a_while:
            run()
            count += 1
        return (time.perf_counter() - begun) / count

    states, weight, back = draw(few, shape.hidden), draw(wide, shape.hidden), draw(shape.hidden, wide)
    product = timed(lambda: linear(linear(states, weight), back))

    long, heads = min(tokens, _MOST_TOKENS), min(shape.heads, _MOST_HEADS)
    query, key, value = (draw(1, heads, long, shape.head_dim).requires_grad_() for _ in range(3))
    attended = heads * 2.0 * long**2 * shape.head_dim
    with torch.no_grad():
        ahead = timed(lambda: scaled_dot_product_attention(query, key, value, is_causal=True))
    out = scaled_dot_product_attention(query, key, value, is_causal=True)
    behind = timed(lambda: torch.autograd.grad(out, (query, key, value), out, retain_graph=True))

    stream, gate = draw(few, shape.hidden, dtype=_DTYPES[p.stream]), draw(few, wide)
    between = timed(lambda: ((stream * stream), stream.to(dtype) if p.recasts else stream + stream, silu(gate) * gate))
    wrote = few * (shape.hidden * (p.stream + (p.compute if p.recasts else p.stream)) + 2 * p.compute * wide)

    rows = min(tokens, max(128, CHUNK_LOGITS["cpu"] // shape.vocabulary))
    logits, targets = draw(rows, shape.vocabulary), torch.zeros(rows, dtype=torch.long)

    def loss(gradient: bool) -> None:
        leaf = logits.detach().requires_grad_(gradient)
        found = cross_entropy(leaf.float(), targets, reduction="sum")
        if gradient:
            torch.autograd.grad(found, leaf)

    last, projection = draw(rows, shape.hidden), draw(shape.vocabulary, shape.hidden)
    head = timed(lambda: linear(last, projection))
    with torch.no_grad():
        scored = timed(lambda: loss(False))
    differentiated = timed(lambda: loss(True))
    return Rates(
        matrices=4.0 * few * shape.hidden * wide / product,
        head=2.0 * rows * shape.hidden * shape.vocabulary / head,
        attention=attended / ahead,
        attention_back=ATTENTION_BACKWARD * attended / behind,
        written=wrote / between,
        logits=logits.numel() / scored,
        logits_back=logits.numel() / differentiated,
    )
