"""Perplexity: weighted by tokens, on whole windows or with a sliding window, without a window's logits in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longrope.errors import UserError
from longrope.evaluate.intervals import mean_interval
from longrope.lengths import format_length
from longrope.model import NO_TARGET, LoadedModel
from longrope.runtime.caches import RoomyCache, makes_its_own
from longrope.runtime.chunks import CHUNK, by_chunks, whole_text
from longrope.windows import Window

logger = logging.getLogger(__name__)

_Returned = TypeVar("_Returned")


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over `tokens` scored tokens.

    ci: 95% interval over documents, None with fewer than two. losses: summed negative log-likelihood in
    nats of each window; counts: its scored tokens. Paired differences between methods are made of these.
    """

    value: float
    tokens: int
    ci: tuple[float, float] | None
    losses: NDArray[np.float64]
    counts: NDArray[np.int64]


def token_losses(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Negative log-likelihood (B, T - 1), float32 nats, of every token of ids (B, T) but the first."""
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=NO_TARGET)
    # Made before the first chunk: a result kept between two chunks would keep the allocator from using a place again.
    losses = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    with torch.inference_mode(), loaded.autocast():
        for start, logits in loaded.logits(ids):
            part = slice(start, start + logits.shape[1])
            losses[:, part] = _chunk_losses(logits, targets[:, part])
    return losses[:, :-1]


def token_losses_by_chunks(loaded: LoadedModel, ids: Tensor, chunk: int = CHUNK) -> Tensor:
    """`token_losses` with the activations of a chunk and a cache of the window, where it does not fit otherwise."""
    losses = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=NO_TARGET)
    with torch.inference_mode(), loaded.autocast():
        cache = RoomyCache(loaded.model.config.get_text_config(), ids.shape[1])
        for start, outputs in by_chunks(loaded.model, cache, ids, *whole_text(ids), chunk):
            piece = ids[:, start : start + outputs.last_hidden_state.shape[1]]
            for first, _, logits in loaded.tail(outputs, piece):
                part = slice(start + first, start + first + logits.shape[1])
                losses[:, part] = _chunk_losses(logits, targets[:, part])
    return losses[:, :-1]


def _chunk_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (B, t) of targets (B, t) under logits (B, t, V), 0 where there is no target."""
    wanted = targets.to(logits.device)
    # Flattened whole, without the last token cut off, logits are not copied.
    chunk = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=NO_TARGET, reduction="none"
    )
    return chunk.view_as(wanted)


def window_losses(loaded: LoadedModel, windows: Sequence[Window]) -> NDArray[np.float64]:
    """Summed loss in nats of each of some windows of one length, by batches that halve when memory runs out."""
    return scored_sums(losses_by_token(loaded, windows), windows)


def losses_by_token(loaded: LoadedModel, windows: Sequence[Window]) -> Tensor:
    """Losses (N, T - 1), float64 nats, of all tokens but the first of windows of one length T, on the CPU."""
    ids = torch.from_numpy(np.stack([window.ids for window in windows]))

    def run(batch: Tensor) -> Tensor:
        batch = batch.to(loaded.device)
        return (token_losses_by_chunks if loaded.by_chunks else token_losses)(loaded, batch).cpu()

    def smaller() -> bool:
        if loaded.by_chunks or ids.shape[1] <= CHUNK or makes_its_own(loaded.model):
            return False
        logger.info("out of memory: going on by chunks of %d tokens", CHUNK)
        loaded.by_chunks = True
        return True

    return in_batches(loaded, run, ids, smaller).double()


def scored_sums(losses: Tensor, windows: Sequence[Window]) -> NDArray[np.float64]:
    """Sums (N,) of the losses (N, T - 1) of what each window scores."""
    scored = [row[window.scored_from - 1 :].sum() for row, window in zip(losses, windows, strict=True)]
    return torch.stack(scored).numpy()


def in_batches(
    loaded: LoadedModel, run: Callable[[Tensor], Tensor], ids: Tensor, smaller: Callable[[], bool] | None = None
) -> Tensor:
    """run over batches of rows of ids (N, T), of loaded.batch_tokens at most; a batch too large for memory halves that.

    smaller: lets `run` take less memory from then on, where it can. Raises UserError, with a length that would fit,
    when a single window does not fit.
    """
    length, results, done = ids.shape[1], [], 0
    while done < len(ids):
        size = min(max(1, loaded.batch_tokens // length), len(ids) - done)
        part = run_if_it_fits(run, ids[done : done + size])
        if part is not None:
            results.append(part)
            done += size
        elif size == 1 and smaller is not None and smaller():
            continue
        elif size == 1:
            raise window_too_long(run, ids[done : done + 1])
        else:
            loaded.batch_tokens = size // 2 * length
            logger.info("out of memory: going on with %d tokens at a time", loaded.batch_tokens)
    return torch.cat(results)


def run_if_it_fits(run: Callable[[Tensor], _Returned], batch: Tensor) -> _Returned | None:
    """run(batch), None when memory runs out."""
    try:
        return run(batch)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    # Not in the block above, where the exception's frames still hold the tensors that filled the memory.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def window_too_long(run: Callable[[Tensor], object], window: Tensor) -> UserError:
    """The error of a window (1, T) that `run` has no memory for, with a length that it has."""
    length = window.shape[1] // 2
    while length > 1 and run_if_it_fits(run, window[:, :length]) is None:
        length //= 2
    return UserError(
        "memory",
        got=f"a window of {window.shape[1]} tokens",
        rule="one window must fit into the device's memory",
        do=f"use at most {format_length(length)} tokens here, a larger device, or --device balanced over several",
    )


def measure(loaded: LoadedModel, windows: Sequence[Window]) -> Perplexity:
    """Perplexity on whole windows of one length, under the factors the model carries now."""
    losses = window_losses(loaded, windows)
    counts = np.array([window.scored for window in windows])
    return summarize(losses, counts, [window.sha256 for window in windows])


def measure_sliding(loaded: LoadedModel, documents: Sequence[Window], *, length: int, stride: int) -> Perplexity:
    """Perplexity of whole documents under a window of `length` tokens that slides by `stride`.

    Every token but the first of a document is scored once, with at least length - stride tokens before it (fewer at
    the document's start). Every window begins with BOS where the tokenizer has one.
    """
    found = [sliding_loss(loaded, document, length=length, stride=stride) for document in documents]
    losses, counts = zip(*found, strict=True)
    return summarize(np.array(losses), np.array(counts), [document.sha256 for document in documents])


def sliding_loss(loaded: LoadedModel, document: Window, *, length: int, stride: int) -> tuple[float, int]:
    """(summed loss in nats, scored tokens) of a whole document, as in `measure_sliding`."""
    together: dict[tuple[int, int], list[int]] = {}  # starts of windows of one size that score the same tokens
    for start, end, first_scored in sliding_spans(len(document.ids), length, stride):
        together.setdefault((end - start, first_scored - start - 1), []).append(start)
    bos = loaded.tokenizer.bos_token_id  # every window begins with it, in the place of its oldest token
    total, count = 0.0, 0
    for (size, unscored), starts in together.items():

        def run(batch: Tensor, unscored: int = unscored) -> Tensor:
            return token_losses(loaded, batch.to(loaded.device))[:, unscored:].double().sum(1).cpu()

        # A view: windows overlap, and all of them at once could be many times the document.
        windows = np.lib.stride_tricks.sliding_window_view(document.ids, size)
        rows = max(1, loaded.batch_tokens // size)
        for first in range(0, len(starts), rows):
            ids = windows[starts[first : first + rows]]  # a copy
            if bos is not None:
                ids[:, 0] = bos
            total += float(in_batches(loaded, run, torch.from_numpy(ids)).sum())
        count += len(starts) * (size - 1 - unscored)
    return total, count


def sliding_spans(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored token) of each window over a document, so that each token but 0 is scored once.

    Raises UserError when the stride is not between 1 and length - 1.
    """
    check_stride(length, stride)
    scored = 1
    for end in [*range(min(length, tokens), tokens, stride), tokens]:
        yield max(0, end - length), end, scored
        scored = end


def check_stride(length: int, stride: int) -> None:
    """Raise UserError when the stride is not between 1 and length - 1."""
    if not 1 <= stride < length:
        rule = f"a stride is between 1 and the window of {length} tokens less one"
        raise UserError("--stride", got=stride, rule=rule, do="use 256 as in the papers, or a smaller one")


def summarize(losses: NDArray[np.float64], counts: NDArray[np.int64], documents: Sequence[str]) -> Perplexity:
    """Token-weighted perplexity of window losses (N,) and their interval over documents."""
    value = math.exp(min(float(losses.sum() / counts.sum()), 700.0))
    interval = perplexity_interval(losses, counts, documents)
    return Perplexity(value=value, tokens=int(counts.sum()), ci=interval, losses=losses, counts=counts)


def perplexity_interval(
    losses: NDArray[np.float64], counts: NDArray[np.int64], documents: Sequence[str]
) -> tuple[float, float] | None:
    """95% interval of a perplexity over documents, whose windows are not independent; None with fewer than two."""
    interval = mean_interval(losses, counts.astype(np.float64), documents)
    if interval is None:
        return None
    low, high = (math.exp(min(end, 700.0)) for end in interval)
    return low, high
