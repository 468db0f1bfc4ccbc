"""What a model is trained on: windows of one length, each a function of the seed and its index alone.

That makes a resumed training see the very windows it would have seen, whatever was in flight when it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from longrope.documents import Document, distinct
from longrope.errors import UserError, plural
from longrope.model import NO_TARGET
from longrope.windows import Ids, shared_start, span_starts, token_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ends:
    """Tokens that a window or a packed document begins and ends with, as far as the tokenizer has them."""

    bos: tuple[int, ...]
    eos: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Ends:
        """BOS and EOS of a tokenizer."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        return cls(() if bos is None else (int(bos),), () if eos is None else (int(eos),))

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.bos) + len(self.eos)

    def around(self, ids: NDArray[np.int32]) -> Ids:
        """BOS, the tokens, EOS."""
        return np.array([*self.bos, *ids, *self.eos], dtype=np.int64)


@dataclass(frozen=True)
class _Text:
    """Tokens of a document, and how many at its beginning are a prompt, which is read and not learned.

    prompt: None of a document without one.
    """

    ids: NDArray[np.int32]
    prompt: int | None = None

    @classmethod
    def all_of(cls, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[_Text]:
        """Of each document its tokens as one text; a completion begins with the first token that its prompt lacks.

        Tokenized alone, it would begin with a space that many tokenizers put before a text.
        """
        texts = (
            text
            for each in documents
            for text in ([each.text[: each.prompt], each.text] if each.prompt else [each.text])
        )
        tokens = token_arrays(tokenizer, texts)
        made = []
        for each in documents:
            prompt = next(tokens) if each.prompt else None
            ids = next(tokens)
            known = each.prompt if prompt is None else shared_start(prompt, ids)
            made.append(cls(ids, known))
        return made

    def part(self, start: int, size: int) -> _Text:
        """Tokens from `start` on, at most `size`."""
        return _Text(self.ids[start : start + size], self.prompt)

    def between(self, ends: Ends) -> tuple[Ids, Ids]:
        """Its tokens between BOS and EOS, and their labels."""
        ids = ends.around(self.ids)
        labels = ids.copy()
        if self.prompt:
            labels[: len(ends.bos) + self.prompt] = NO_TARGET
        return ids, labels


class LongWindows(Dataset[dict[str, Tensor]]):
    """`count` windows of `length` tokens: BOS, a span of one document, EOS (LongRoPE, section 4.1).

    An epoch takes as many spans as fit of every document that holds one, at places drawn anew, which never overlap, in
    an order drawn anew. A document with a prompt is one window, of which only what follows the prompt is learned; what
    is left of the window is filled up with tokens that nothing looks at, and one that does not fit is left out. Raises
    UserError when no document can be used.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int
    ) -> None:
        self.length, self.count, self.seed = length, count, seed
        self._ends = Ends.of(tokenizer)
        self._span = length - self._ends.size
        if self._span < 1:
            rule = f"a window holds {self._ends.size} tokens at its ends and text between"
            raise UserError("--length", got=length, rule=rule, do="give a longer one")
        ordered = sorted(distinct(documents), key=lambda document: document.sha256)
        texts = _Text.all_of(ordered, tokenizer)
        self._texts = [text for text in texts if self._windows_of(text)]
        self.left_out = sum(text.prompt is not None and len(text.ids) > self._span for text in texts)
        """Prompts with completions that are longer than a window."""
        self.too_short = sum(text.prompt is None and not self._windows_of(text) for text in texts)
        """Documents that fill no window."""
        if not self._texts:
            raise self._unusable(texts)
        self._epoch: tuple[int, list[tuple[int, int]]] = (-1, [])

    def _windows_of(self, text: _Text) -> int:
        """How many windows of an epoch a document gives; a prompt without a completion has nothing to learn."""
        if text.prompt is not None:
            return int(text.prompt < len(text.ids) <= self._span)
        return len(text.ids) // self._span

    def _unusable(self, texts: Sequence[_Text]) -> UserError:
        got, do = plural(len(texts), "document"), "give longer documents, or a shorter --length"
        rule = f"a window of {self.length} tokens holds {self._span} of one document"
        longest = max((len(text.ids) for text in texts if text.prompt is None), default=0)
        got = f"{got}, the longest of {longest} tokens"
        if self.left_out:
            shortest = min(len(text.ids) for text in texts if text.prompt is not None)
            got = f"{plural(self.left_out, 'prompt')} with completions, the shortest of {shortest} tokens"
            do = "give shorter ones, or a longer --length"
        elif all(text.prompt is not None for text in texts):
            got, rule = f"{plural(len(texts), 'prompt')} with nothing after it", "what follows a prompt is learned"
            do = "give completions"
        return UserError("--documents", got=got, rule=rule, do=do)

    def __len__(self) -> int:
        return self.count

    @property
    def an_epoch(self) -> int:
        """Windows that the documents hold."""
        return sum(map(self._windows_of, self._texts))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, self.an_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._spans(epoch))
        document, start = self._epoch[1][place]
        ids, labels = self._texts[document].part(start, self._span).between(self._ends)
        free = (0, self.length - len(ids))  # after the text, where causal attention does not look
        made = {"input_ids": np.pad(ids, free), "labels": np.pad(labels, free, constant_values=NO_TARGET)}
        return {name: torch.from_numpy(each) for name, each in made.items()} | {
            "position_ids": torch.arange(self.length)
        }

    def _spans(self, epoch: int) -> list[tuple[int, int]]:
        """(document, start) of all spans of an epoch, in its order."""
        rng = np.random.default_rng((self.seed, 0, epoch))
        spans = [
            (document, start)
            for document, text in enumerate(self._texts)
            for start in (self._starts(rng, len(text.ids)) if text.prompt is None else [0])
        ]
        return [spans[index] for index in rng.permutation(len(spans))]

    def _starts(self, rng: np.random.Generator, size: int) -> Sequence[int]:
        return list(span_starts(rng, size, self._span, size // self._span))


class MixedWindows(Dataset[dict[str, Tensor]]):
    """Long windows and, with a chance of `share`, as many tokens of short documents (LongRoPE2, section 3.3).

    These are rows of `short_length` tokens, which a factor table gives the row of that length: attention costs what it
    costs there, and not the square of a long window. A row is packed of documents, longer ones in pieces, each between
    BOS and EOS, whose positions begin anew; what is left at its end is filled with the beginning of one more. A prompt
    stays with its completion: cut off, that would be learned without what it follows from, so one that is longer is
    left out. apart: whether attention keeps to positions that begin anew; else a row has one document. Raises UserError
    when there is no short document.
    """

    def __init__(
        self,
        long: LongWindows,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        short_length: int,
        share: float,
        apart: bool = True,
    ) -> None:
        if not 0 < share < 1:
            raise UserError("--mixed", got=share, rule="it is a share between 0 and 1", do="give one such as 0.3")
        self.long, self.share = long, share
        self._short_length, self._apart, self._ends = short_length, apart, Ends.of(tokenizer)
        piece = short_length - self._ends.size
        if piece < 1:
            rule = f"a short document lies within {short_length} tokens with its ends"
            raise UserError("--mixed", got=f"{piece} tokens for the text", rule=rule, do="leave --mixed out")
        ordered = sorted(distinct(documents), key=lambda document: document.sha256)
        texts = _Text.all_of(ordered, tokenizer)
        whole = [text for text in texts if text.prompt is None or len(text.ids) <= piece]
        self.left_out = len(texts) - len(whole)
        """Prompts with completions that are longer than a short document."""
        parts = (text.part(at, piece) for text in whole for at in range(0, len(text.ids), piece))
        self._pieces = [part for part in parts if len(part.ids) > max(1, part.prompt or 0)]
        if not self._pieces:
            rule, got = "mixed windows hold short documents, too", "no text to pack"
            if self.left_out:
                rule = f"a prompt and its completion lie within {short_length} tokens together"
                got = f"{plural(self.left_out, 'prompt')} with completions, all of them longer"
            raise UserError("--mixed", got=got, rule=rule, do="give --short-documents with short texts")

    def __len__(self) -> int:
        return len(self.long)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.long.seed, 1, index))
        return self._packed(rng) if rng.random() < self.share else self.long[index]

    def _packed(self, rng: np.random.Generator) -> dict[str, Tensor]:
        rows = [self._row(rng) for _ in range(self.long.length // self._short_length)]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _row(self, rng: np.random.Generator) -> dict[str, Ids]:
        """Documents of `short_length` tokens."""
        size, filled = self._short_length, 0
        ids, labels = np.zeros(size, dtype=np.int64), np.full(size, NO_TARGET, dtype=np.int64)
        positions = np.arange(size)
        while filled < size:
            part, learned = self._pieces[int(rng.integers(len(self._pieces)))].between(self._ends)
            end = min(size, filled + len(part))
            ids[filled:end], labels[filled:end] = part[: end - filled], learned[: end - filled]
            labels[filled] = NO_TARGET  # what comes before is another document
            if not self._apart:
                break
            positions[filled:end] = np.arange(end - filled)
            filled = end
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def collate(windows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """A batch of windows; all have the same length. One that is rows of short documents is a batch by itself."""
    rows = {name: [window[name] for window in windows] for name in windows[0]}
    return {name: torch.cat([row if row.ndim == 2 else row[None] for row in each]) for name, each in rows.items()}


def collate_shared(windows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """The same for processes that share a window: with a mask that hides nothing.

    A process has two pieces of a window, whose positions leap in the middle. Without a mask transformers takes that for
    packed documents, and makes one of all pairs of its tokens, which context parallelism then throws away.
    """
    batch = collate(windows)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def collate_to_learned(windows: Sequence[dict[str, Tensor]], at_least: int = 1) -> dict[str, Any]:
    """The same without what lies behind the last token that is learned: no token sees what follows it.

    at_least: tokens that stay, where a window's length says which row of a factor table it has.
    """
    batch = collate(windows)
    end = max(at_least, int((batch["labels"] != NO_TARGET).any(dim=0).nonzero()[-1]) + 1)
    return {name: each[:, :end] for name, each in batch.items()}
