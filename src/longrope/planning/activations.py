"""Bytes of activations: what a forward pass needs at once, what it keeps to be differentiated, what that needs."""

from __future__ import annotations

from longrope.planning.precision import Precision
from longrope.planning.shape import ModelShape

# Logits of one chunk, as longrope.model and longrope.training.loss cut them.
CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}
_LEAST_ROWS = {"forward": 128, "gradient": 128, "train": 256, "lora": 256}


def working(shape: ModelShape, p: Precision) -> float:
    """Bytes a token of a layer's forward pass at its fullest, what passes between layers included.

    Either in the MLP: the embeddings, the layer's input, that of the MLP and the normalised one, and three of its inner
    states; or in the rotation: embeddings, input, normalised input, queries, keys, values, and three more of the
    rotated queries.
    """
    mlp = 4 * p.stream * shape.hidden + 3 * p.compute * shape.inner
    turning = 3 * p.stream * shape.hidden + p.compute * (shape.queries + 2 * shape.keys) + 3 * p.stream * shape.queries
    return float(max(mlp, turning))


def kept(shape: ModelShape, p: Precision, kind: str, rank: int = 0) -> float:
    """Bytes a token that one layer keeps for its backward pass, which depend on what is differentiated."""
    hidden, inner, a = shape.hidden, shape.inner, p.compute
    norms = 2 * 4 * hidden  # what is normalised, in float32
    attention = 2 * a * (shape.queries + shape.keys) + 4 * shape.heads  # queries, keys, values, result
    gates = (3 if shape.inner_matrices == 3 else 2) * a * inner
    inputs = 0.0
    if kind == "gradient":  # the rotation is differentiated: what is turned, and it turned by half
        attention += 2 * a * (shape.queries + shape.keys)
    elif kind == "train":  # every product keeps its input, every norm what it multiplies
        norms += 2 * p.stream * hidden
        inputs = (3 + shape.inner_matrices - 1) * a * hidden if p.recasts else 2 * p.stream * hidden
        inputs += a * inner
    else:  # every adapter has an input of its own where it is cast
        own = (3 + shape.inner_matrices - 1) * hidden + shape.queries if p.compute < 4 else 2 * hidden
        inputs = a * (own + inner + rank * (4 + shape.inner_matrices))
    return float(8 + norms + attention + gates + inputs) + 8 * shape.attention_norms


def differentiating(shape: ModelShape, p: Precision) -> float:
    """Bytes a token that a layer's backward pass takes beside what is kept: gradients on their way."""
    mlp = 3 * p.compute * shape.inner + 2 * p.stream * shape.hidden
    turning = 3 * p.stream * shape.queries + 2 * p.stream * shape.hidden
    return float(max(mlp, turning))


def head_bytes(shape: ModelShape, p: Precision, kind: str, device: str, tokens: float) -> float:
    """Bytes of the logits of one chunk with what the loss makes of them."""
    rows = min(tokens, max(_LEAST_ROWS[kind], CHUNK_LOGITS[device] // shape.vocabulary))
    copies = (p.compute if p.compute != 4 else 0) + 4 + 4 + (0 if kind == "forward" else 4 + p.compute)
    return float(rows * shape.vocabulary * copies)


def masks(shape: ModelShape, tokens: int) -> float:
    """Bytes of the masks that torch's attention is given for local layers: one of all pairs of a pass."""
    return float(tokens) ** 2 if shape.local_layers(tokens) else 0.0


def tables(shape: ModelShape, p: Precision, tokens: int) -> float:
    """Bytes of cos and sin."""
    return 2.0 * p.stream * shape.head_dim * tokens
