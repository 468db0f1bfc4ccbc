"""The numbers of a model that its costs follow from. Formulas, with nothing loaded: docs/cost-model.md has them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A decoder as its costs see it.

    inner: width between the two halves of an MLP that one token passes, of a mixture that of its chosen experts
    together. inner_matrices: 3 where the MLP is gated, else 2. windows: of each layer the tokens it sees, None for all,
    0 where it is no attention (Mamba, linear attention) and has no keys. parameters: all of them, tied ones once.
    layer_parameters: those inside the layers. active: of these the weights of matrices that one token is multiplied
    with. linear: all weights of matrices inside the layers. adapters: inputs and outputs of the linear layers together,
    which LoRA's weights are its rank times. attention_norms: values that are normalised between projection and rotation
    (Qwen3, Gemma 3), a token and layer.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    inner_matrices: int
    vocabulary: int
    windows: tuple[int | None, ...]
    parameters: int
    layer_parameters: int
    active: int
    linear: int
    adapters: int
    attention_norms: int = 0

    @property
    def queries(self) -> int:
        """Numbers of a token's queries in one layer."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Numbers of a token's keys in one layer; as many are its values."""
        return self.kv_heads * self.head_dim

    @property
    def head(self) -> int:
        """Weights of the output projection."""
        return self.hidden * self.vocabulary

    @property
    def first_projections(self) -> int:
        """Weights that turn the first layer's input into queries, keys and values."""
        return self.hidden * (self.queries + 2 * self.keys)

    @property
    def last_matrix(self) -> int:
        """Weights of a layer's last product, which activation checkpointing does not repeat."""
        return self.hidden * self.inner

    @property
    def largest_matrix(self) -> int:
        """Weights of a layer's largest product."""
        return self.hidden * max(self.inner, self.queries)

    @property
    def attending(self) -> int:
        """How many layers are attention, and have keys."""
        return sum(window != 0 for window in self.windows)

    def local_layers(self, tokens: int) -> int:
        """How many layers of attention see less than all of a text of so many tokens."""
        return sum(window is not None and 0 < window < tokens for window in self.windows)

    def cached_tokens(self, tokens: int) -> int:
        """Tokens that the caches of all layers hold after a text, summed over layers."""
        return sum(tokens if window is None else min(window, tokens) for window in self.windows)

    def cache_bytes(self, tokens: int, number: float = 2) -> float:
        """Bytes of keys and values of a text, each number of so many bytes."""
        return 2 * self.keys * number * self.cached_tokens(tokens)


def pairs(tokens: int, window: int | None = None, past: int = 0) -> int:
    """(query, key) pairs of causal attention: of `tokens` after `past` others, each of which sees `window` at most."""

    def from_start(count: int) -> int:
        if window is None or count <= window:
            return count * (count + 1) // 2
        return window * (window + 1) // 2 + (count - window) * window

    return from_start(past + tokens) - from_start(past)


def all_pairs(tokens: int, windows: Sequence[int | None]) -> int:
    """`pairs` of a whole text, summed over layers."""
    kinds: dict[int | None, int] = {}
    for window in windows:
        kinds[window] = kinds.get(window, 0) + 1
    return sum(count * pairs(tokens, window) for window, count in kinds.items())
