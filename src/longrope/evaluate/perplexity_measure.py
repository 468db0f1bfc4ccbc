"""Perplexity as a measure: on whole windows, also by position inside them, or sliding over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

import numpy as np
from torch import Tensor

from longrope.evaluate.measures import Item, Record, Summary
from longrope.evaluate.perplexity import check_stride, losses_by_token, scored_sums, sliding_loss, summarize
from longrope.files import finite_or_none
from longrope.model import LoadedModel
from longrope.windows import Window, fingerprint

_FIRST_EDGE, _PARTS = 16, 4


@dataclass(frozen=True)
class PerplexityMeasure:
    """Perplexity on the windows of each length; with a stride, they are whole documents that a window slides over."""

    windows: Mapping[int, Sequence[Window]]
    stride: int | None = None

    @property
    def name(self) -> str:
        """As in `Measure`."""
        return "perplexity"

    @property
    def settings(self) -> Mapping[str, Any]:
        """As in `Measure`; the windows of each length by their fingerprint."""
        prints = {str(length): fingerprint(windows) for length, windows in sorted(self.windows.items())}
        return {"stride": self.stride, "windows": prints}

    @property
    def record_keys(self) -> Mapping[str, type | UnionType]:
        """As in `Measure`."""
        by_position = {} if self.stride is not None else {"by_position": list}
        return {"loss": int | float | None, "count": int, "document": str, **by_position}

    @property
    def batched(self) -> bool:
        """As in `Measure`."""
        return self.stride is None

    def items(self, loaded: LoadedModel, length: int) -> Sequence[Item]:
        """One a window, or document. Raises UserError for a stride that the length does not allow."""
        if self.stride is not None:
            check_stride(length, self.stride)
        items = [
            Item(
                f"{window.sha256[:16]}@{window.start}",
                window.ids,
                {"document": window.sha256, "scored_from": window.scored_from, "length": length},
            )
            for window in self.windows[length]
        ]
        assert len({item.key for item in items}) == len(items), "windows are distinct"
        return items

    def run(self, loaded: LoadedModel, items: Sequence[Item]) -> Sequence[Record]:
        """{"loss": summed nats, "count": scored tokens, "document": its hash} of each; of windows, also `by_position`.

        by_position: [[upper, loss, count], ...] of the scored tokens that have fewer than `upper` tokens before them
        and are in no bucket before. A loss that is not finite is None.
        """
        windows = [Window("", item.data["document"], 0, item.ids, item.data["scored_from"]) for item in items]
        if self.stride is not None:
            found = [
                sliding_loss(loaded, window, length=item.data["length"], stride=self.stride)
                for window, item in zip(windows, items, strict=True)
            ]
            return [
                {"loss": finite_or_none(loss), "count": count, "document": window.sha256}
                for (loss, count), window in zip(found, windows, strict=True)
            ]
        losses = losses_by_token(loaded, windows)
        return [
            {
                "loss": finite_or_none(float(loss)),
                "count": window.scored,
                "document": window.sha256,
                "by_position": _by_position(row, window.scored_from),
            }
            for loss, row, window in zip(scored_sums(losses, windows), losses, windows, strict=True)
        ]

    def summarize(self, length: int, records: Sequence[Record]) -> Summary:
        """Token-weighted perplexity with its interval over documents; that of every bucket of positions in `details`.

        details: `by_position` [[upper, perplexity or None], ...], not with a stride.
        """
        losses = np.array([math.nan if record["loss"] is None else record["loss"] for record in records])
        counts = np.array([record["count"] for record in records])
        whole = summarize(losses, counts, [record["document"] for record in records])
        details = {} if self.stride is not None else {"by_position": _together(records)}
        return Summary(whole.value, whole.tokens, whole.ci, details)


def position_edges(length: int) -> list[int]:
    """Upper ends, exclusive, of the buckets of positions below `length`: 16, 20, 24, 28, 32, 40, 48, ..."""
    edges, power = [_FIRST_EDGE], _FIRST_EDGE
    while edges[-1] < length:
        edges += [power + power * part // _PARTS for part in range(1, _PARTS + 1)]
        power *= 2
    return edges[: next(index for index, edge in enumerate(edges, 1) if edge >= length)]


def _by_position(losses: Tensor, scored_from: int) -> list[list[float | int | None]]:
    """[upper, loss, count] of losses (T - 1,) of the tokens from 1 on, as far as they are scored."""
    buckets: list[list[float | int | None]] = []
    low, length = scored_from, len(losses) + 1
    for upper in position_edges(length):
        high = min(upper, length)
        if high > low:
            buckets.append([upper, finite_or_none(float(losses[low - 1 : high - 1].sum())), high - low])
            low = high
    return buckets


def _together(records: Sequence[Record]) -> list[list[float | int | None]]:
    """[upper, perplexity] of each bucket over all records."""
    parts: dict[int, list[tuple[float | None, int]]] = {}
    for record in records:
        for upper, loss, count in record["by_position"]:
            parts.setdefault(upper, []).append((loss, count))
    return [[upper, _perplexity(parts[upper])] for upper in sorted(parts)]


def _perplexity(parts: Sequence[tuple[float | None, int]]) -> float | None:
    losses = [loss for loss, _ in parts if loss is not None]
    if len(losses) < len(parts):
        return None
    return math.exp(min(math.fsum(losses) / sum(count for _, count in parts), 700.0))
