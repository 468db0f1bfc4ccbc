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
from longrope.windows import Ids, span_starts, tokenize

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


class LongWindows(Dataset[dict[str, Tensor]]):
    """`count` windows of `length` tokens: BOS, a span of one document, EOS (LongRoPE, section 4.1).

    An epoch takes as many spans as fit of every document that holds one, at places drawn anew, which never overlap, in
    an order drawn anew. Raises UserError when no document is long enough.
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
        tokens = [np.array(tokenize(tokenizer, [document.text])[0], dtype=np.int32) for document in ordered]
        self._texts = [ids for ids in tokens if len(ids) >= self._span]
        if not self._texts:
            longest = max(map(len, tokens), default=0)
            got = f"{plural(len(ordered), 'document')}, the longest of {longest} tokens"
            rule = f"a window of {length} tokens holds {self._span} of one document"
            raise UserError("--documents", got=got, rule=rule, do="give longer documents, or a shorter --length")
        self._epoch: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    @property
    def an_epoch(self) -> int:
        """Windows that the documents hold."""
        return sum(len(text) // self._span for text in self._texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, self.an_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._spans(epoch))
        document, start = self._epoch[1][place]
        ids = torch.from_numpy(self._ends.around(self._texts[document][start : start + self._span]))
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(self.length)}

    def _spans(self, epoch: int) -> list[tuple[int, int]]:
        """(document, start) of all spans of an epoch, in its order."""
        rng = np.random.default_rng((self.seed, 0, epoch))
        spans = [
            (document, start)
            for document, text in enumerate(self._texts)
            for start in span_starts(rng, len(text), self._span, len(text) // self._span)
        ]
        return [spans[index] for index in rng.permutation(len(spans))]


class MixedWindows(Dataset[dict[str, Tensor]]):
    """Long windows and, with a chance of `share`, windows packed of short documents (LongRoPE2, section 3.3).

    A packed window holds documents of at most `short_length` tokens, longer ones in pieces, each between BOS and EOS.
    Positions begin anew with each: attention stays inside a document, and a factor table gives it the row of its own
    length. What is left at the end is filled with the beginning of one more. Raises UserError when there is no short
    document.
    """

    def __init__(
        self,
        long: LongWindows,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        short_length: int,
        share: float,
    ) -> None:
        if not 0 < share < 1:
            raise UserError("--mixed", got=share, rule="it is a share between 0 and 1", do="give one such as 0.3")
        self.long, self.share = long, share
        self._ends = Ends.of(tokenizer)
        piece = short_length - self._ends.size
        if piece < 1:
            rule = f"a short document lies within {short_length} tokens with its ends"
            raise UserError("--mixed", got=f"{piece} tokens for the text", rule=rule, do="leave --mixed out")
        ordered = sorted(distinct(documents), key=lambda document: document.sha256)
        tokens = (np.array(tokenize(tokenizer, [document.text])[0], dtype=np.int32) for document in ordered)
        parts = (ids[at : at + piece] for ids in tokens for at in range(0, len(ids), piece))
        self._pieces = [part for part in parts if len(part) > 1]
        if not self._pieces:
            rule = "mixed windows hold short documents, too"
            raise UserError("--mixed", got="no text to pack", rule=rule, do="give documents with text")

    def __len__(self) -> int:
        return len(self.long)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.long.seed, 1, index))
        return self._packed(rng) if rng.random() < self.share else self.long[index]

    def _packed(self, rng: np.random.Generator) -> dict[str, Tensor]:
        length = self.long.length
        ids, labels = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
        positions, filled = np.empty(length, dtype=np.int64), 0
        while filled < length:
            part = self._ends.around(self._pieces[int(rng.integers(len(self._pieces)))])[: length - filled]
            here = slice(filled, filled + len(part))
            ids[here], labels[here], positions[here] = part, part, np.arange(len(part))
            labels[filled] = NO_TARGET  # what comes before is another document
            filled += len(part)
        made = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(each) for name, each in made.items()}


def collate(windows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """A batch of windows; all have the same length."""
    return {name: torch.stack([window[name] for window in windows]) for name in windows[0]}
