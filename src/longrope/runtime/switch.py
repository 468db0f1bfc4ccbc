"""The exact switch: when a sequence grows past a boundary of its table, its cache is made again, once.

Keys of deeper layers depend on the factors of the layers below, so that nothing but recomputing them is exact. This is
done around a model's own forward pass, so that it holds for `generate` in all its kinds and for a caller's own loop.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel

from longrope.errors import UserError
from longrope.factors import FactorTable
from longrope.patch import Patch
from longrope.runtime.caches import by_place, cache_of, empty, given_cache, put_rows
from longrope.runtime.chunks import CHUNK, by_chunks, whole_text
from longrope.runtime.columns import (
    attended_columns,
    columns_of,
    is_flat,
    lengths_of,
    next_positions,
    placed,
)
from longrope.runtime.generate import generate
from longrope.runtime.history import Flags, History, Whole, history_of, keep_history

logger = logging.getLogger(__name__)

POLICIES = ("exact", "ahead", "fixed")
"""What `policy` may be; `Switch` says what each does."""
# Classes that drop their cache in `generate` at the original length, for their own switch
_DROP_THEIR_CACHE = ("Phi3ForCausalLM", "Phi4MultimodalForCausalLM", "PhimoeForCausalLM")


@dataclass
class _Pass:
    """A forward pass that is going on: what it puts into the cache, and the logits of the pieces before it."""

    history: History | None
    inputs: Tensor
    positions: Whole
    attended: Flags
    rows: Whole
    before: list[Any]
    keep: int | Tensor
    as_tuple: bool


@dataclass
class _Prepared:
    """What `generate` is about to run."""

    inputs: Tensor
    mask: Tensor | None


@dataclass
class _Next:
    """A forward pass of the next token of each sequence, in the rows that the cache has."""

    history: History
    inputs: Tensor
    positions: list[int]


class Switch:
    """Rows of a table on a model by the length of each sequence, exact also where keys are cached.

    policy: `exact` makes a cache again when its sequence passes a boundary. `ahead` takes the row of the prompt and of
    all tokens that `generate` may add from the start, so that nothing is made again. `fixed` takes the last row at
    every length, as engines do that have one regime. chunk: tokens of a pass when a cache is made again or a prompt is
    long. While it is on, `generate` and `prepare_inputs_for_generation` of the model are ours; `undo` restores all.
    """

    def __init__(
        self, model: PreTrainedModel, patch: Patch, table: FactorTable, *, policy: str = "exact", chunk: int = CHUNK
    ) -> None:
        if policy not in POLICIES:
            raise UserError("policy", got=repr(policy), rule=f"it is one of {', '.join(POLICIES)}", do="choose one")
        if chunk < 1:
            raise UserError("chunk", got=chunk, rule="it is at least 1 token", do=f"leave it out, or give {CHUNK}")
        self.model: Any = model
        self.patch, self.table, self.policy, self.chunk = patch, table, policy, chunk
        check_class(model)
        patch.install(table.rows[-1] if policy == "fixed" else table)
        self.recomputed = 0
        """Tokens that were run again at switches so far."""
        self._ends = [row.up_to for row in table.rows]
        self._up_to = np.array(self._ends)
        told = f"{[row.key for row in table.rows]} {policy == 'fixed'}"
        self._key = hashlib.sha256(told.encode()).hexdigest()[:16]
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._least: Whole | None = None  # lengths that the rows of this generation are for at least
        self._prepared: _Prepared | None = None
        self.lock = threading.RLock()
        """Held while `generate` runs: two at a time would take each other's rows."""
        self._pass: _Pass | _Next | None = None
        self._tensor: tuple[list[int], Tensor | None] = ([], None)
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._own = {name: vars(model).get(name) for name in ("generate", "prepare_inputs_for_generation")}
        own: Any = cast(Any, model)
        # transformers reads the signatures of these
        prepare = own.prepare_inputs_for_generation
        if type(model).__name__ in _DROP_THEIR_CACHE:
            prepare = partial(GenerationMixin.prepare_inputs_for_generation, own)
        vars(model)["prepare_inputs_for_generation"] = wraps(own.prepare_inputs_for_generation)(
            partial(self._prepare, prepare)
        )
        vars(model)["generate"] = wraps(own.generate)(partial(generate, self, own.generate))

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        """The switch of a copied model (`copy.deepcopy`), with a lock of its own."""
        made = object.__new__(Switch)
        memo[id(self)] = made
        for name, each in vars(self).items():
            vars(made)[name] = threading.RLock() if name == "lock" else copy.deepcopy(each, memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise UserError: of a model that is pickled (`torch.save`) `generate` and what is around it would be lost."""
        do = "undo them first, or use save_pretrained, which keeps them"
        raise UserError("model", got="a model with factors on", rule="it is not pickled", do=do)

    def undo(self) -> None:
        """Restore the model, RoPE included."""
        for hook in self._hooks:
            hook.remove()
        for name, own in self._own.items():
            vars(self.model).pop(name, None)
            if own is not None:
                vars(self.model)[name] = own
        self._hooks, self._own = [], {}
        self.patch.undo()

    # Around a forward pass

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Put the rows of the new tokens in place, and before that make the cache again where they differ from its own.

        A token that comes after cached ones has the row of its own length, as if all had been run again for it alone.
        So a pass of several tokens across a boundary is run in pieces, of which the last is left to the caller.
        """
        given = dict(zip(self._names, args, strict=False)) | kwargs
        self._pass, (prepared, self._prepared) = None, (self._prepared, None)
        self.patch.use_rows(None)  # of a pass that was broken off
        inputs = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if inputs is None:
            return (), given  # transformers says what is missing
        cache: Any = given_cache(given)
        cached = 0 if cache is None else int(cache.get_seq_length())
        history = self._history(cache, cached)
        mask, position_ids = given.get("attention_mask"), given.get("position_ids")
        ours = prepared is not None and prepared.inputs.data_ptr() == inputs.data_ptr()
        flat = mask if is_flat(mask) else prepared.mask if ours and prepared is not None else None
        least = self._least if ours else None
        if history is not None and inputs.shape[1] == 1 and (flat is not None or (mask is None and not history.padded)):
            at = self._next(history, position_ids, flat, len(inputs), least)
            if at is not None:
                self._choose(history.regimes)
                # transformers' own step has a tensor of its own; a caller may write the next token into the same
                self._pass = _Next(history, inputs if ours else inputs.clone(), at)
                if position_ids is None:
                    given["position_ids"] = torch.tensor(at, device=inputs.device)[:, None]
                return (), given
        attended = attended_columns(inputs, flat, mask, cached)
        last = np.full(len(attended), -1) if history is None else history.last
        positions = placed(given, attended, cached, history, last, flat, inputs.device)
        lengths = lengths_of(last, positions, attended)
        self.table.row_for(int(lengths.max()))  # refuses a sequence that is longer than the table
        rows = self._rows(lengths, cache is not None, cached, least)
        return (), self._last_piece(given, inputs, positions, attended, rows, cached, history)

    def _last_piece(
        self,
        given: dict[str, Any],
        inputs: Tensor,
        positions: Whole,
        attended: Flags,
        rows: Whole,
        cached: int,
        history: History | None,
    ) -> dict[str, Any]:
        """Run a pass piece by piece, each of tokens in the same rows (B,), but the last, which is what is returned."""
        cuts = [0, *(np.flatnonzero((rows[:, 1:] != rows[:, :-1]).any(0)) + 1).tolist(), inputs.shape[1]]
        keep, before = given.get("logits_to_keep") or 0, list[Any]()
        as_tuple = given.get("return_dict") is False
        at_once = len(cuts) == 2
        if not at_once:
            _check_pieces(given)
        for start, end in pairwise(cuts):
            now = rows[:, start]
            if history is not None and (history.rows != now).any():
                self._remake(given_cache(given), history, now)
            self._use(now)
            piece = given if at_once else columns_of(given, inputs.shape[1], cached, start, end)
            part = slice(start, end)
            done = inputs[:, part], positions[:, part], attended[:, part], now
            if end == inputs.shape[1]:
                self._pass = _Pass(history, *done, before, keep, as_tuple)
                return piece
            history = history or History(self._key)
            before.append(self.model.forward(**piece))
            history.add(*done)
            keep_history(given_cache(given), history)
        raise AssertionError("the last piece is the caller's")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Note what went into the cache, and put the logits of the pieces together."""
        done, self._pass = self._pass, None
        if done is None:
            return None
        self.patch.use_rows(None)
        if output is None:  # it failed
            return None
        if isinstance(done, _Next):
            done.history.add_tokens(done.inputs, done.positions)
            return None
        cache = cache_of(output) or given_cache(kwargs)
        if isinstance(cache, Cache) and cache.get_seq_length():
            history = done.history or history_of(cache) or History(self._key)
            history.add(done.inputs, done.positions, done.attended, done.rows)
            keep_history(cache, history)
        if not done.before:
            return None
        output.logits = torch.cat([piece.logits for piece in (*done.before, output)], 1)
        if output.get("hidden_states") is not None:
            pieces = zip(*(piece.hidden_states for piece in (*done.before, output)), strict=True)
            output.hidden_states = tuple(torch.cat(layer, 1) for layer in pieces)
        keep = slice(-done.keep, None) if isinstance(done.keep, int) else done.keep
        output.logits = output.logits[:, keep]
        return output.to_tuple() if done.as_tuple else output

    def _history(self, cache: Cache | None, cached: int) -> History | None:
        """What is known of the tokens in a cache, None where it has none. Raises UserError for keys of others."""
        history = None if cache is None else history_of(cache)
        if history is not None and history.columns > cached:
            history.crop(cached, self.model.get_input_embeddings())
        if not cached:
            return None
        if history is None or history.key != self._key or history.columns < cached:
            raise UserError(
                "cache",
                got=f"{cached} tokens that were cached without these factors",
                rule="keys are right under the factors they were made with",
                do="start with an empty cache",
            )
        return history

    def _rows(self, lengths: Whole, goes_on: bool, cached: int, least: Whole | None) -> Whole:
        """Regimes (B, t) of new tokens: each of its length so far, those of a prompt of the prompt's."""
        if self.policy == "fixed":
            return np.full(lengths.shape, len(self._up_to) - 1)
        if not goes_on or (not cached and least is None):
            lengths = np.broadcast_to(lengths[:, -1:], lengths.shape)
        if least is not None:
            lengths = np.maximum(lengths, np.repeat(least, len(lengths) // len(least))[:, None])
        return np.searchsorted(self._up_to, np.maximum(lengths, 1))

    def _next(
        self, history: History, position_ids: Tensor | None, flat: Tensor | None, batch: int, least: Whole | None
    ) -> list[int] | None:
        """Positions (B,) of the next token of each sequence where its row stays; None where more is to be looked at."""
        positions = next_positions(history, position_ids, flat, batch)
        if positions is None or max(positions) >= self._ends[-1]:  # beyond the table, which the arrays refuse
            return None
        if self.policy != "fixed":
            lengths = [each + 1 for each in positions]
            if least is not None:
                floors = np.repeat(least, batch // len(least)).tolist()
                lengths = [max(pair) for pair in zip(lengths, floors, strict=True)]
            if [bisect_left(self._ends, length) for length in lengths] != history.regimes:
                return None
        return positions

    def _use(self, rows: Whole) -> None:
        self._choose(rows.tolist())

    def _choose(self, rows: list[int]) -> None:
        if self.policy == "fixed":
            return  # there is no other
        if rows != self._tensor[0]:
            alike = rows[:1] if len(set(rows)) == 1 else rows
            device = self.model.get_input_embeddings().weight.device  # meta where it is offloaded
            self._tensor = list(rows), torch.tensor(alike, device="cpu" if device.type == "meta" else device)
        self.patch.use_rows(self._tensor[1])

    # Making caches

    def _remake(self, cache: Any, history: History, rows: Whole) -> None:
        """Run all cached tokens again under other rows: of the sequences that change alone, where a cache allows it."""
        inputs, positions, attended = history.joined(self.model.get_input_embeddings())
        changed = np.flatnonzero(history.rows != rows)
        lengths = ", ".join(str(int(history.last[row]) + 1) for row in changed[:4])
        logger.debug("switching %d of %d sequences, after %s tokens", len(changed), len(rows), lengths)
        self.recomputed += len(changed) * history.columns
        with torch.no_grad():
            if len(changed) < len(rows) and by_place(cache):
                alone = DynamicCache(config=self.model.config.get_text_config())
                some = torch.from_numpy(changed).to(inputs.device)
                parts = inputs.index_select(0, some), positions[changed], attended[changed], rows[changed]
                _exhaust(self._chunks(alone, *parts))
                if put_rows(cache, alone, some):
                    history.rows = rows
                    return
            empty(cache)
            _exhaust(self._chunks(cache, inputs, positions, attended, rows))
        history.rows = rows
        keep_history(cache, history)  # emptied, it let go of it

    def _chunks(
        self, cache: Cache, inputs: Tensor, positions: Whole, attended: Flags, rows: Whole
    ) -> Iterator[tuple[int, Any]]:
        chunks = by_chunks(self.model, cache, inputs, positions, attended, self.chunk)
        while True:
            self._use(rows)  # between two chunks others may use the model, such as for their logits
            try:
                chunk = next(chunks, None)
            finally:
                self.patch.use_rows(None)
            if chunk is None:
                return
            yield chunk

    def fill(self, cache: Cache, inputs: Tensor, length: int) -> Iterator[tuple[int, Any]]:
        """Put a text (1, T) without padding into a cache, under the row of `length` tokens, chunk by chunk.

        A cache that has tokens goes on; it is made again first where it has another row. Yields (first column, outputs
        of the decoder) of each chunk. Raises UserError for a length beyond the table, and for a cache of others.
        """
        self.table.row_for(length)
        cached = int(cache.get_seq_length())
        history = self._history(cache, cached) or History(self._key)
        positions, attended = whole_text(inputs)
        positions = positions + cached
        last = len(self._up_to) - 1
        row = last if self.policy == "fixed" else int(np.searchsorted(self._up_to, length))
        rows = np.full(len(inputs), row)
        if cached and (history.rows != rows).any():
            self._remake(cache, history, rows)
        yield from self._chunks(cache, inputs, positions, attended, rows)
        history.add(inputs, positions, attended, rows)
        keep_history(cache, history)

    # Around generate

    def _prepare(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Remember a step of `generate`, with its mask before transformers makes a four-dimensional one of it."""
        mask, made = kwargs.get("attention_mask"), own(*args, **kwargs)
        inputs = made["input_ids"] if made.get("input_ids") is not None else made.get("inputs_embeds")
        self._prepared = None if inputs is None else _Prepared(inputs, mask if is_flat(mask) else None)
        return made

    @contextmanager
    def at_least(self, lengths: Sequence[int] | None) -> Iterator[None]:
        """While it lasts, cached sequences have the rows of these lengths (B,) at least: those of whole prompts."""
        own, self._least = self._least, None if lengths is None else np.asarray(lengths)
        try:
            yield
        finally:
            self._least = own


def _check_pieces(given: dict[str, Any]) -> None:
    """Raise UserError for what a pass was asked for that cannot be put together of pieces."""
    for name in ("labels", "output_attentions"):
        if given.get(name) is not None and given[name] is not False:
            rule = "of tokens under several rows there are none"
            raise UserError(name, got="tokens across a boundary", rule=rule, do="run them without a cache")


def _exhaust(chunks: Iterator[object]) -> None:
    for _ in chunks:
        pass


def check_class(model: Any) -> None:
    """Raise UserError unless a model generates by itself."""
    if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
        rule, do = "factors are for causal language models", "choose a model without an encoder"
        raise UserError("model", got=f"a {type(model).__name__}, an encoder and a decoder", rule=rule, do=do)
    if not isinstance(model, GenerationMixin) or not isinstance(model, PreTrainedModel):
        rule, do = "factors at run time are for causal language models of transformers", "give the model itself"
        wrapped = (
            "; with PEFT, apply before get_peft_model, or to the merged model" if hasattr(model, "peft_config") else ""
        )
        raise UserError("model", got=f"a {type(model).__name__}", rule=rule, do=do + wrapped)
