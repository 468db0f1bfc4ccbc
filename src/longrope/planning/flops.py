"""FLOPs of a window: a forward pass, a gradient in the factors, a training step; a multiply-add counts two."""

from __future__ import annotations

from dataclasses import dataclass

from longrope.planning.shape import ModelShape, all_pairs

# The backward pass of flash attention makes the scores again: five products where the forward pass makes two.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Flops:
    """FLOPs by what they are done with: matrices of the layers, the output projection, attention forward and back."""

    matrices: float
    head: float
    attention: float
    attention_back: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.matrices + self.head + self.attention + self.attention_back

    def times(self, count: float) -> Flops:
        """Of so many windows."""
        parts = (self.matrices, self.head, self.attention, self.attention_back)
        return Flops(*(count * part for part in parts))


def window_flops(
    shape: ModelShape, tokens: int, kind: str = "forward", *, rank: int = 0, again: bool = False, scored: bool = True
) -> Flops:
    """FLOPs of one window of so many tokens.

    kind: what is done with it. forward: its loss. gradient: that and its gradient in the factors. train: a training
    step. lora: one of adapters. rank: of these. again: layers are computed twice (activation checkpointing). scored:
    False leaves out the output projection, as in a prefill.
    """
    attention = 4.0 * shape.queries * all_pairs(tokens, shape.windows)
    once = 2.0 * tokens * shape.active
    head = 2.0 * tokens * shape.head if scored else 0.0
    if kind == "forward":
        return Flops(once, head, attention)
    # Without weights of its own to train nothing before the first rotation has a gradient; adapters whose layers are
    # computed twice ask for one from the embeddings on.
    first = 0.0 if kind == "lora" and again else 2.0 * tokens * shape.first_projections
    lora = 2.0 * tokens * rank * shape.adapters
    matrices = {"gradient": 2 * once - first, "train": 3 * once, "lora": 2 * once - first + 3 * lora}[kind]
    heads = {"gradient": 2, "train": 3, "lora": 2}[kind]
    if again:  # but for the last product, which nothing waits for; an adapter beside it does
        matrices += once + lora if kind == "lora" else once - 2.0 * tokens * shape.layers * shape.last_matrix
    return Flops(matrices, heads * head, attention * (2 if again else 1), attention * ATTENTION_BACKWARD)
