"""The bytes of a number in each place of a model: weights, what passes between layers, what is multiplied."""

from __future__ import annotations

from dataclasses import dataclass

from longrope.errors import UserError

QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes of a weight: 4 bits have a float32 scale for every 64."""


@dataclass(frozen=True)
class Precision:
    """Bytes of a number. weights: as stored. stream: between layers. compute: in products and in attention."""

    weights: float
    stream: int
    compute: int

    @property
    def casts(self) -> bool:
        """Whether products take copies of weights (autocast)."""
        return self.weights > self.compute

    @property
    def recasts(self) -> bool:
        """Whether every product takes a copy of its input of its own (autocast on float32 states)."""
        return self.stream != self.compute


HALF, MIXED, SINGLE = Precision(2, 2, 2), Precision(4, 4, 2), Precision(4, 4, 4)
"""Half precision alone; float32 weights under autocast; float32 alone."""


def precision_of(dtype: str, *, cuda: bool, trained: bool = False) -> Precision:
    """That of `--dtype`, as `search` (or, of all weights, `finetune`) has it. Raises UserError for a word that is none.

    auto on CUDA is bfloat16, and for all weights float32 under bf16 autocast; on a CPU it is autocast, unless whoever
    asks knows that processor (`LoadOptions.resolved`).
    """
    known = ("auto", "autocast", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise UserError("--dtype", got=repr(dtype), rule=f"it is one of {', '.join(known)}", do="choose one of them")
    if dtype == "auto":
        return MIXED if trained or not cuda else HALF
    if dtype == "autocast":
        return MIXED
    if dtype == "float32":
        return MIXED if trained and cuda else SINGLE
    return HALF
