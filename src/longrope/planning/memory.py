"""Peak memory of one device, by its parts: a stage goes through phases, and the fullest one is its peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longrope.planning.activations import differentiating, head_bytes, kept, masks, tables, working
from longrope.planning.precision import QUANTIZED, Precision
from longrope.planning.shape import ModelShape

Parts = Mapping[str, float]
"""Bytes by what they are for."""
CHUNK = 2048
"""Tokens of a pass where a text is run by chunks, as longrope.runtime.chunks has it."""
_MOMENTS, _GRADIENT = 8, 4  # bytes of a trained weight: two of Adam's, and its gradient, all float32
_PREFETCHED = 2  # layers whose weights FSDP has gathered at once


@dataclass(frozen=True)
class Spread:
    """Over how many devices. weights: each has such a share of weights and what belongs to them. window: of a window.

    sharded: whether a layer's weights come together for its own computation (FSDP); otherwise whole layers are dealt
    out (`--device balanced`).
    """

    weights: int = 1
    window: int = 1
    sharded: bool = False


_ALONE = Spread()


def fullest(*phases: Parts) -> dict[str, float]:
    """The phase that takes most."""
    totals = [sum(parts.values()) for parts in phases]
    return dict(phases[totals.index(max(totals))])


def weight_bytes(shape: ModelShape, p: Precision, quantize: str | None = None) -> float:
    """Bytes of the weights as loaded; quantized ones are those of linear layers, beside them the rest is float32."""
    if quantize is None:
        return p.weights * shape.parameters
    return QUANTIZED[quantize] * shape.linear + 4.0 * (shape.parameters - shape.linear)


def forward(
    shape: ModelShape, p: Precision, tokens: int, device: str, spread: Spread = _ALONE, *, quantize: str | None = None
) -> dict[str, float]:
    """A loss without a gradient, of so many tokens in one pass."""
    base = {"weights": weight_bytes(shape, p, quantize) / spread.weights}
    states = working(shape, p) * tokens + tables(shape, p, tokens)
    inside = {"activations": states, "masks": masks(shape, tokens), "casts": _cast(p, shape.largest_matrix)}
    last = {"activations": 2.0 * p.stream * shape.hidden * tokens, "casts": _cast(p, shape.head)}
    return fullest(base | inside, base | last | {"logits": head_bytes(shape, p, "forward", device, tokens)})


def by_chunks(
    shape: ModelShape, p: Precision, tokens: int, device: str, spread: Spread = _ALONE, *, scored: bool = True,
    cached: float = 1.0, quantize: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """A text run by chunks into a cache, of which a share `cached` is on the device."""
    chunk = min(CHUNK, tokens)
    cache = shape.cache_bytes(tokens, p.compute) * cached / spread.weights
    base = {"weights": weight_bytes(shape, p, quantize) / spread.weights, "cache": cache}
    # Attention to what is before and to the chunk itself are put together in float32.
    states = (working(shape, p) + 16 * shape.queries) * chunk + tables(shape, p, chunk)
    widest = max((window or 0) for window in shape.windows) if shape.local_layers(tokens) else 0
    inside = {"activations": states, "masks": float(chunk * (widest + chunk)) if widest else 0.0}
    last = {"activations": 2.0 * p.stream * shape.hidden * chunk, "casts": _cast(p, shape.head)}
    logits = {"logits": head_bytes(shape, p, "forward", device, chunk)} if scored else {}
    return fullest(base | inside | {"casts": _cast(p, shape.largest_matrix)}, base | last | logits)


def gradient(
    shape: ModelShape, p: Precision, tokens: int, device: str, spread: Spread = _ALONE, *, again: bool,
    quantize: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """The gradient of a window in the factors. again: every layer keeps its input only, and is computed twice."""
    base = {"weights": weight_bytes(shape, p, quantize) / spread.weights}
    base |= {"kept": _between(shape, p, "gradient", tokens, again) / spread.weights, "masks": masks(shape, tokens)}
    ends = 2.0 * p.stream * shape.hidden * tokens + 2 * tables(shape, p, tokens)
    norm = 4.0 * shape.hidden * tokens  # the last one's input, until it is differentiated
    copies = _cast(p, shape.active) / spread.weights
    layer = _layer(shape, p, "gradient", tokens) if again else differentiating(shape, p) * tokens
    one = _cast(p, shape.active) / shape.layers if again else copies
    last = {"activations": ends + norm, "casts": _cast(p, shape.head) + (0.0 if again else copies)}
    return fullest(
        base | {"activations": ends + layer, "casts": one},
        base | last | {"logits": head_bytes(shape, p, "gradient", device, tokens)},
        base | {"activations": working(shape, p) * tokens, "casts": one},
    )


def train(
    shape: ModelShape, p: Precision, tokens: int, device: str, spread: Spread = _ALONE, *, again: bool,
    rank: int = 0, quantize: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """A training step of so many tokens at once on every group of devices that share a window; rank 0: all weights."""
    kind = "lora" if rank else "train"
    trained = rank * shape.adapters if rank else shape.parameters
    own = tokens / spread.window
    weights = weight_bytes(shape, p, quantize) + (4.0 * trained if rank else 0.0)
    base = {"weights": weights / spread.weights, "optimizer": _MOMENTS * trained / spread.weights}
    if spread.sharded:
        each = shape.layer_parameters / shape.layers
        base["gathered"] = p.compute * (_PREFETCHED * each + shape.parameters - shape.layer_parameters)
    gradients = _GRADIENT * trained / spread.weights
    head_gradient = 0.0 if rank else 4.0 * shape.head
    casts = 0.0 if spread.sharded else _cast(p, shape.active)
    # With adapters nothing of a frozen weight is cached by autocast, but its copy is kept for the backward pass.
    through, one = (casts if not again or not rank else 0.0), casts / shape.layers if again else casts
    between = {"kept": _between(shape, p, kind, own, again, rank), "masks": masks(shape, int(own))}
    ends = 2.0 * p.stream * shape.hidden * own + tables(shape, p, int(own))
    norm = (4.0 + (0 if rank else p.stream)) * shape.hidden * own  # of the last one
    layer = _layer(shape, p, kind, own, rank) if again else differentiating(shape, p) * own
    # When gradients are at the MLP, the last states and the input of the layer's last product are done with. Adapters
    # are at their fullest before, where they take that input in float32.
    done = 0.0 if rank else p.compute * shape.inner * own
    behind = layer - done + (ends if rank else tables(shape, p, int(own)))
    logits = {"logits": head_bytes(shape, p, kind, device, own)}
    last = {"activations": ends + norm, "gradients": head_gradient, "casts": through + _cast(p, shape.head)}
    # At the first layer: all gradients but its own.
    own_gradient = 0.0 if rank else _GRADIENT * shape.layer_parameters / shape.layers / spread.weights
    one_left = kept(shape, p, kind, rank) * own + differentiating(shape, p) * own - done
    return fullest(
        base | between | logits | last,
        base | between | {"activations": behind, "gradients": 2 * head_gradient, "casts": one},
        base | {"activations": one_left, "gradients": gradients - own_gradient, "casts": one},
        base | {"gradients": gradients + (0.0 if rank else 2 * 4.0 * shape.head / spread.weights)},
    )  # fmt: skip


def whole_kept(shape: ModelShape, p: Precision, kind: str, tokens: float, rank: int = 0) -> float:
    """Bytes that all layers keep of so many tokens where nothing is computed twice."""
    return _between(shape, p, kind, tokens, False, rank)


def _between(shape: ModelShape, p: Precision, kind: str, tokens: float, again: bool, rank: int = 0) -> float:
    """Bytes that wait for the backward pass: of all layers, or only what each was given."""
    each = p.stream * shape.hidden if again else kept(shape, p, kind, rank)
    return shape.layers * each * tokens


def _layer(shape: ModelShape, p: Precision, kind: str, tokens: float, rank: int = 0) -> float:
    """Bytes of one layer that is computed again and differentiated; in float32 its input is counted already."""
    counted = p.stream * shape.hidden if p.stream == 4 else 0
    return (kept(shape, p, kind, rank) - counted + differentiating(shape, p)) * tokens


def _cast(p: Precision, weights: float) -> float:
    """Bytes of copies of weights in the dtype that is computed in."""
    return p.compute * weights if p.casts else 0.0
