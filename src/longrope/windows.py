"""Windows of tokens, drawn from documents and fixed by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longrope.documents import Document, distinct
from longrope.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrope.model import LoadedModel

Ids = NDArray[np.int64]
"""Token ids."""

LEAST = 2
"""Tokens of a window: one that is read, and one to be foretold."""
# Characters a call: a fast tokenizer spreads the texts of a call over all cores, and what it makes of each character
# takes some hundred bytes until it has made tokens of all.
_TOKENIZED_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Window:
    """A span of one document: `ids` (length,), BOS first when the tokenizer has one, then the tokens from `start` on.

    `document` and `sha256` are the document's name and hash; `start` counts its tokens, BOS not among them. Tokens from
    `scored_from` on are scored: all but the first, or only an answer at the window's end. `weight`: of each of them
    among those of other windows, where a search minimises them together.
    """

    document: str
    sha256: str
    start: int
    ids: Ids
    scored_from: int = 1
    weight: float = 1.0

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.scored_from


def default_window_count(length: int) -> int:
    """Search windows of a length in tokens: 8 up to 32k, 5 below 512k, 3 from there (the paper's choices)."""
    return 8 if length <= 32 * 1024 else 5 if length < 512 * 1024 else 3


def choose_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int
) -> list[Window]:
    """`count` windows of `length` tokens, fixed by the seed and the texts, not by names or order.

    One window a document, at a random place, as far as there are documents long enough; then further ones of the same
    documents, which never overlap. Documents are tokenized only until there are enough. Raises UserError, saying what
    was found, when the documents cannot hold that many.
    """
    bos, span = bos_of(tokenizer), _span(tokenizer, length, count)
    rng = np.random.default_rng(seed)
    ordered = sorted(distinct(documents, text_alone=True), key=lambda document: document.text_sha256)
    long: list[tuple[Document, list[int]]] = []
    for index in rng.permutation(len(ordered)):
        document = ordered[index]
        if len(long) < count and _most_tokens(document.text) >= span:
            ids = token_ids(tokenizer, document.text)
            if len(ids) >= span:
                long.append((document, ids))
    shares = _deal([_spans_in(len(ids), span) for _, ids in long], count)
    if sum(shares) < count:
        # Where none is long enough, all have to be tokenized to tell how long they are.
        longest = max([len(ids) for _, ids in long] or token_lengths(ordered, tokenizer), default=0)
        found = f"{_number(len(ordered), 'document')}, the longest of {_number(longest, 'token')}"
        got = f"{found}, which hold {_number(sum(shares), 'window')} of {length} tokens"
        do = "give longer or more documents, or ask for shorter or fewer windows"
        raise UserError("documents", got=got, rule=f"wanted: {_number(count, 'window')}", do=do)
    return [
        Window(document.name, document.text_sha256, start, np.array(bos + ids[start : start + span], dtype=np.int64))
        for (document, ids), share in zip(long, shares, strict=True)
        for start in span_starts(rng, len(ids), span, share)
    ]


def _span(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> int:
    """Tokens of a document in a window. Raises UserError for windows of nothing, and for none."""
    if length < LEAST:
        rule = f"a window is of at least {LEAST} tokens"
        raise UserError("length", got=f"{_number(length, 'token')}", rule=rule, do="ask for a longer one")
    if count < 1:
        raise UserError("windows", got=count, rule="there is at least one", do="ask for more")
    return length - len(bos_of(tokenizer))


def _spans_in(tokens: int, span: int) -> int:
    """How many windows a document of so many tokens gives at most: they never overlap."""
    return tokens // span


class TokenCounts:
    """Tokens of whole documents, BOS not counted: each is tokenized when it is first asked for, and never again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def __call__(self, document: Document) -> int:
        """Tokens of one document."""
        if document.text_sha256 not in self._known:
            self._known[document.text_sha256] = len(token_ids(self.tokenizer, document.text))
        return self._known[document.text_sha256]


def held_windows(documents: Sequence[Document], counts: TokenCounts, *, length: int, count: int) -> int:
    """How many of `count` windows of `length` tokens documents hold: with fewer of them `choose_windows` raises.

    The documents with most text come first, and no more of them are tokenized than it takes. Raises UserError for
    windows of nothing.
    """
    span, held = _span(counts.tokenizer, length, count), 0
    for document in sorted(distinct(documents, text_alone=True), key=lambda each: len(each.text), reverse=True):
        if held < count and _most_tokens(document.text) >= span:
            held += _spans_in(counts(document), span)
    return min(held, count)


def _most_tokens(text: str) -> int:
    """A bound on the tokens of a text: a token is a byte at least.

    Twice as many for the space that some tokenizers put in front of each piece of it, and 11 times as many bytes where
    they may normalise: the worst that NFKC does to a character's UTF-8.
    """
    size = len(text.encode())
    return 1 + 2 * (size if text.isascii() else 11 * size)


def _deal(capacities: Sequence[int], count: int) -> list[int]:
    """How many windows each document gives: in turn, one each, until `count` are dealt or none has room."""
    shares = [0] * len(capacities)
    while sum(shares) < min(count, sum(capacities)):
        for index, capacity in enumerate(capacities):
            if shares[index] < capacity and sum(shares) < count:
                shares[index] += 1
    return shares


def span_starts(rng: np.random.Generator, tokens: int, span: int, count: int) -> list[int]:
    """Random ascending starts of `count` spans that do not overlap, for one span uniform.

    The tokens left over are drawn as gaps, so no draw is ever refused.
    """
    gaps = np.sort(rng.integers(0, tokens - count * span, size=count, endpoint=True))
    return [int(start) for start in gaps + span * np.arange(count)]


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def token_lengths(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each whole document, BOS not counted."""
    return [len(ids) for ids in token_arrays(tokenizer, (document.text for document in documents))]


def token_arrays(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[NDArray[np.int32]]:
    """Tokens of each of many texts, in order, as `tokenize` gives them: several texts a call."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _TOKENIZED_AT_ONCE:
            yield from (np.array(ids, dtype=np.int32) for ids in tokenize(tokenizer, batch))
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield from (np.array(ids, dtype=np.int32) for ids in tokenize(tokenizer, batch))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of each text, without any that the tokenizer puts around."""
    # verbose=False: no warning about texts beyond the model's length, which are the point here.
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return ids


def shared_start(first: Sequence[int] | NDArray[np.int32], second: Sequence[int] | NDArray[np.int32]) -> int:
    """How many tokens two texts have in common at their start."""
    size = min(len(first), len(second))
    other = np.flatnonzero(np.asarray(first[:size]) != np.asarray(second[:size]))
    return int(other[0]) if other.size else size


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of one text, as `tokenize` gives them."""
    (ids,) = tokenize(tokenizer, [text])
    return ids


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a window begins with, where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def fingerprint(windows: Sequence[Window]) -> str:
    """`sha256:...` over the ids of all windows, in order."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{len(window.ids)}:".encode())
        digest.update(window.ids.astype("<i8").tobytes())
        if window.scored_from != 1:
            digest.update(f"{window.scored_from}".encode())
    return f"sha256:{digest.hexdigest()}"


def windows_of(
    loaded: LoadedModel, documents: Sequence[Document], length: int, count: int | None, seed: int
) -> list[Window]:
    """Windows of a length from documents; `count` is by default that of a search."""
    wanted = count or default_window_count(length)
    return choose_windows(documents, loaded.tokenizer, length=length, count=wanted, seed=seed)


def spare_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    taken: Sequence[Window],
) -> list[Window]:
    """Up to `count` further windows that share no token with those `taken`, as many as the documents hold.

    Fixed by the seed and the texts. Documents of which nothing is taken come first, in random order.
    """
    bos = bos_of(tokenizer)
    span = length - len(bos)
    rng = np.random.default_rng((seed, 1))
    ordered = sorted(distinct(documents, text_alone=True), key=lambda document: document.text_sha256)
    used: dict[str, list[int]] = {}
    for window in taken:
        used.setdefault(window.sha256, []).append(window.start)
    shuffled = [ordered[index] for index in rng.permutation(len(ordered))]
    roomy: list[tuple[Document, list[int], list[tuple[int, int]]]] = []
    for document in sorted(shuffled, key=lambda document: document.text_sha256 in used):
        if len(roomy) < count and _most_tokens(document.text) >= span:
            ids = token_ids(tokenizer, document.text)
            if gaps := _gaps(len(ids), span, used.get(document.text_sha256, [])):
                roomy.append((document, ids, gaps))
    shares = _deal([sum((high - low) // span for low, high in gaps) for _, _, gaps in roomy], count)
    return [
        Window(document.name, document.text_sha256, start, np.array(bos + ids[start : start + span], dtype=np.int64))
        for (document, ids, gaps), share in zip(roomy, shares, strict=True)
        for (low, high), part in zip(gaps, _deal([(high - low) // span for low, high in gaps], share), strict=True)
        for start in (low + each for each in span_starts(rng, high - low, span, part))
    ]


def _gaps(tokens: int, span: int, starts: Sequence[int]) -> list[tuple[int, int]]:
    """What spans at `starts` leave free of a document of so many tokens, as far as a span fits in."""
    edges = [0, *(edge for start in sorted(starts) for edge in (start, start + span)), tokens]
    return [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if high - low >= span]


def whole_documents(loaded: LoadedModel, documents: Sequence[Document], length: int, count: int | None) -> list[Window]:
    """Whole documents of at least `length` tokens as one window each, BOS first; the first `count` by hash, or all.

    Raises UserError when none is that long.
    """
    bos = bos_of(loaded.tokenizer)
    found: list[Window] = []
    for document in sorted(distinct(documents, text_alone=True), key=lambda each: each.text_sha256):
        if count is not None and len(found) == count:
            break
        if _most_tokens(document.text) + len(bos) >= length:
            ids = token_ids(loaded.tokenizer, document.text)
            if len(bos) + len(ids) >= length:
                found.append(Window(document.name, document.text_sha256, 0, np.array(bos + ids, dtype=np.int64)))
    if not found:
        got = f"{_number(len(documents), 'document')}, none of {length} tokens"
        do = "give longer documents, or ask for a shorter length"
        raise UserError("documents", got=got, rule="a window fits into at least one", do=do)
    return found


def summary(lengths: Sequence[int], wanted: Sequence[int] | None = None, *, bos: bool = False) -> Mapping[str, Any]:
    """What documents of these lengths in tokens hold: how many reach each wanted length, and how many windows that is.

    The wanted lengths are by default the powers of two from 256 to the longest document. bos: a window begins with
    BOS, which no document holds. Raises UserError for a wanted length below 2.
    """
    longest = max(lengths, default=0)
    wanted = wanted or [2**power for power in range(8, max(9, longest.bit_length()))]
    if min(wanted) < LEAST:
        rule = f"a window is of at least {LEAST} tokens"
        raise UserError("--lengths", got=min(wanted), rule=rule, do="ask for longer ones")
    return {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "longest": longest,
        "lengths": [
            {
                "length": length,
                "documents": sum(each >= length - bos for each in lengths),
                "windows": sum(each // (length - bos) for each in lengths),
            }
            for length in wanted
        ],
    }
