"""What a cache was made of: needed to make it again under other factors, and to see that it is ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache

Whole = NDArray[np.int64]
"""Positions or rows, whole numbers (B,) or (B, t)."""
Flags = NDArray[np.bool_]
"""Whether each of some tokens (B, t) is attended."""


@dataclass
class History:
    """Everything that went into a cache, of B sequences and T columns.

    key: of the factors that the keys were made under. inputs: token ids (B, t) or embeddings (B, t, D), pass by pass.
    positions, attended: (B, t) of each pass; columns that are not attended are padding. rows: (B,) regimes of the keys.
    """

    key: str
    inputs: list[Tensor] = field(default_factory=list)
    positions: list[Whole] = field(default_factory=list)
    attended: list[Flags] = field(default_factory=list)
    columns: int = 0
    padded: bool = False
    """Whether any column is padding in any sequence."""
    at: list[int] = field(default_factory=list)
    """(B,) the highest position that is attended so far, -1 where there is none."""
    regimes: list[int] = field(default_factory=list)
    """`rows` as plain numbers."""
    waiting: list[list[int]] = field(default_factory=list)
    """Positions of single tokens that are not among `positions` yet: what comes at every token is kept cheap."""

    @property
    def rows(self) -> Whole:
        """Regimes (B,) of the keys."""
        return np.array(self.regimes, dtype=np.int64)

    @rows.setter
    def rows(self, rows: Whole) -> None:
        self.regimes = rows.tolist()

    @property
    def last(self) -> Whole:
        """`at` as an array (B,)."""
        return np.array(self.at, dtype=np.int64)

    def add(self, inputs: Tensor, positions: Whole, attended: Flags, rows: Whole) -> None:
        """Take in what a forward pass put into the cache."""
        self._settle()
        self.inputs.append(inputs.detach().clone())  # a caller may write the next token into the same tensor
        self.positions.append(positions)
        self.attended.append(attended)
        highest = np.where(attended, positions, -1).max(1)
        self.at = (highest if not self.columns else np.maximum(self.last, highest)).tolist()
        self.columns += positions.shape[1]
        self.rows = rows
        self.padded = self.padded or not bool(attended.all())

    def add_tokens(self, inputs: Tensor, positions: list[int]) -> None:
        """Take in one token of each sequence, all attended, in the rows of the cache: what `add` does, cheaply.

        inputs: (B, 1), which nobody writes to from then on.
        """
        self.inputs.append(inputs)
        self.at = positions
        self.waiting.append(positions)
        self.columns += 1

    def seen(self) -> Flags:
        """What is attended (B, T) of all columns."""
        self._settle()
        return np.concatenate(self.attended, 1)

    def seen_last(self) -> Flags:
        """Whether the last column (B,) is attended."""
        self._settle()
        return np.asarray(self.attended[-1][:, -1])

    def _settle(self) -> None:
        if self.waiting:
            positions = np.array(self.waiting, dtype=np.int64).T
            self.positions.append(positions)
            self.attended.append(np.ones(positions.shape, dtype=bool))
            self.waiting = []

    def joined(self, embed: nn.Module) -> tuple[Tensor, Whole, Flags]:
        """Ids (B, T), or embeddings (B, T, D) where any were given, with positions and what is attended (B, T)."""
        self._settle()
        if len(self.inputs) > 1:
            parts = self.inputs
            if any(part.is_floating_point() for part in parts):
                parts = [part if part.is_floating_point() else embed(part) for part in parts]
            self._join(parts)
        return self.inputs[0], self.positions[0], self.attended[0]

    def _join(self, parts: list[Tensor]) -> None:
        self.inputs = [torch.cat(parts, 1)]
        self.positions = [np.concatenate(self.positions, 1)]
        self.attended = [np.concatenate(self.attended, 1)]

    def crop(self, columns: int, embed: nn.Module) -> None:
        """Forget what stands beyond so many columns, as an assisted generation does with tokens that it rejects."""
        inputs, positions, attended = self.joined(embed)
        self.inputs, self.positions, self.attended = [], [], []
        self.columns, rows, self.padded = 0, self.rows, False
        if columns:
            self.add(inputs[:, :columns], positions[:, :columns], attended[:, :columns], rows)

    def select(self, indices: Tensor) -> None:
        """Sequences in another order, some perhaps more than once, as a beam search asks for."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        chosen = indices.cpu().numpy()
        self._settle()
        if len(self.inputs) > 1 and not any(part.is_floating_point() for part in self.inputs):
            self._join(self.inputs)  # else every step of a beam search would go through all before it
        self.inputs = [part.index_select(0, indices.to(part.device)) for part in self.inputs]
        self.positions = [part[chosen] for part in self.positions]
        self.attended = [part[chosen] for part in self.attended]
        self.rows, self.at = self.rows[chosen], self.last[chosen].tolist()


class _Followed:
    """What a cache of transformers does to its sequences is done to their history too.

    Mixed into the class of the cache itself: a copy of the cache then has a history of its own.
    """

    longrope_history: History | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.longrope_history is not None:
            self._select(torch.arange(len(self.longrope_history.rows)).repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.longrope_history = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).__mro__[2], vars(self))  # the class of this very cache has no name to be found by

    def _select(self, indices: Tensor) -> None:
        if self.longrope_history is not None:
            self.longrope_history.select(indices)


@lru_cache
def _followed(kind: Any) -> Any:
    return type(kind.__name__, (_Followed, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _restored(kind: Any, state: dict[str, Any]) -> Any:
    made = object.__new__(_followed(kind))
    vars(made).update(state)
    return made


def history_of(cache: Cache) -> History | None:
    """The history that is kept with a cache, if any."""
    found: History | None = getattr(cache, "longrope_history", None)
    return found


def keep_history(cache: Cache, history: History) -> None:
    """Keep a history with a cache from now on, through all that transformers does to the cache."""
    if not isinstance(cache, _Followed):
        kind: Any = type(cache)
        cache.__class__ = _followed(kind)
    held: Any = cache
    held.longrope_history = history
