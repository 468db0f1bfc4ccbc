"""Windows of a training: their ends, their documents, and that each depends on the seed and its index alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byte_tokenizer import BOS, EOS, byte_tokenizer
from commands import SHAPE, TARGET, table
from longrope.documents import Document
from longrope.errors import UserError
from longrope.model import NO_TARGET
from longrope.patch import Patch
from longrope.training.loss import chunked_loss
from longrope.training.windows import LongWindows, MixedWindows, collate, collate_to_learned
from models import ORIGINAL, build

TOKENIZER: Any = byte_tokenizer(ORIGINAL)


def document(name: str, size: int) -> Document:
    rng = np.random.default_rng(len(name) + size)
    return Document(name, bytes(rng.integers(97, 122, size).tolist()).decode())


BOOKS = [document("a", 1000), document("b", 450), document("c", 90)]


def windows(count: int = 20, length: int = 100, seed: int = 0) -> LongWindows:
    return LongWindows(BOOKS, TOKENIZER, length=length, count=count, seed=seed)


def text_of(window: dict[str, torch.Tensor]) -> str:
    return bytes(window["input_ids"][1:-1].tolist()).decode()


def test_a_window_is_a_span_of_one_document_between_bos_and_eos() -> None:
    for window in (windows()[index] for index in range(20)):
        ids = window["input_ids"]
        assert (int(ids[0]), int(ids[-1]), len(ids)) == (BOS, EOS, 100)
        assert any(text_of(window) in book.text for book in BOOKS)
        assert torch.equal(window["labels"], ids)
        assert torch.equal(window["position_ids"], torch.arange(100))


def test_an_epoch_reads_as_much_of_every_document_as_fits_and_nothing_twice() -> None:
    made = windows()
    assert made.an_epoch == 1000 // 98 + 450 // 98, "the third is too short"
    for epoch in (range(14), range(14, 28)):
        found = [text_of(made[index]) for index in epoch]
        places = [(book.name, book.text.index(text)) for text in found for book in BOOKS if text in book.text]
        assert len(places) == 14
        for name in "ab":
            starts = sorted(start for of, start in places if of == name)
            assert min(np.diff(starts), default=98) >= 98
    assert {text_of(made[index]) for index in range(14)} != {text_of(made[index]) for index in range(14, 28)}


def test_a_window_depends_on_the_seed_and_its_index_alone() -> None:
    backwards = windows()
    found = {index: text_of(backwards[index]) for index in range(19, -1, -1)}
    assert [found[index] for index in range(20)] == [text_of(windows()[index]) for index in range(20)]
    other = LongWindows(BOOKS[::-1], TOKENIZER, length=100, count=20, seed=0)
    assert [text_of(other[index]) for index in range(20)] == [found[index] for index in range(20)]
    assert text_of(windows(seed=1)[0]) != found[0]


def test_documents_that_are_too_short_are_refused_with_the_longest() -> None:
    message = (
        r"^--documents: got 3 documents, the longest of 1000 tokens; a window of 2048 tokens holds 2046 of one "
        r"document; give longer documents, or a shorter --length$"
    )
    with pytest.raises(UserError, match=message):
        windows(length=2048)


ASKED = Document("asked", "What is the key? 12345.", prompt=16)


def asked(*documents: Document, length: int = TARGET) -> LongWindows:
    return LongWindows(documents, TOKENIZER, length=length, count=4, seed=0)


def test_of_a_prompt_with_a_completion_only_the_completion_is_learned() -> None:
    window = asked(ASKED)[0]
    text = [BOS, *ASKED.text.encode(), EOS]
    assert window["input_ids"].tolist() == text + [0] * (TARGET - len(text))
    assert window["labels"].tolist() == [NO_TARGET] * 17 + text[17:] + [NO_TARGET] * (TARGET - len(text))
    assert torch.equal(window["position_ids"], torch.arange(TARGET))


def test_the_loss_of_a_filled_window_is_that_of_the_completion_alone() -> None:
    model: Any = build("llama")
    with torch.no_grad():
        with chunked_loss(model):
            found = float(model(**collate([asked(ASKED)[0]])).loss)
            cut = collate_to_learned([asked(ASKED)[0]])
            assert float(model(**cut).loss) == pytest.approx(found, rel=1e-6)
        ids = torch.tensor([[BOS, *ASKED.text.encode(), EOS]])
        assert torch.equal(cut["input_ids"], ids), "nothing is computed for what fills the window"
        learned = torch.cat([torch.full((1, 17), NO_TARGET), ids[:, 17:]], dim=1)
        assert found == pytest.approx(float(model(input_ids=ids, labels=learned).loss), rel=1e-5)


def test_a_batch_is_as_long_as_its_longest() -> None:
    batch = collate_to_learned([asked(ASKED)[0], asked(document("e", TARGET - 2))[0]])
    assert {each.shape for each in batch.values()} == {(2, TARGET)}


def test_a_cut_window_among_packed_ones_is_still_longer_than_they_are() -> None:
    """Its length says which row of the table it has."""
    cut = collate_to_learned([asked(ASKED)[0]], at_least=ORIGINAL + 1)
    assert cut["input_ids"].shape == (1, ORIGINAL + 1)
    model: Any = build("llama")
    with torch.no_grad(), Patch(model, SHAPE) as patch, chunked_loss(model):
        patch.install(table())
        found = float(model(**cut).loss)
        patch.install(table().rows[1])
        assert found == pytest.approx(float(model(**collate([asked(ASKED)[0]])).loss), rel=1e-6)


def test_a_prompt_without_a_completion_is_not_trained_on() -> None:
    assert asked(Document("empty", "What?", prompt=5), ASKED).an_epoch == 1
    with pytest.raises(UserError, match=r"^--documents: got 1 prompt with nothing after it; what follows"):
        asked(Document("empty", "What?", prompt=5))


def test_an_epoch_has_a_prompt_once_and_none_that_is_longer_than_a_window() -> None:
    long = Document("long", "x" * 100 + "y", prompt=100)
    made = asked(ASKED, long, BOOKS[1], length=100)
    assert (made.an_epoch, made.left_out) == (1 + 450 // 98, 1)
    assert sum(int(made[index]["labels"][1]) == NO_TARGET for index in range(made.an_epoch)) == 1
    message = r"got 1 prompt with completions, the shortest of 101 tokens; a window of 100 tokens holds 98 of one"
    with pytest.raises(UserError, match=message):
        asked(long, length=100)


def packed(*documents: Document, short_length: int) -> MixedWindows:
    return MixedWindows(windows(length=TARGET), documents, TOKENIZER, short_length=short_length, share=0.999)


def test_packed_prompts_are_not_learned_either() -> None:
    window = packed_of(packed(ASKED, short_length=len(ASKED.text) + 2))[0]
    text = np.frombuffer(ASKED.text.encode(), dtype=np.uint8)
    starts = [0, len(text) + 2]
    assert torch.nonzero(window["position_ids"] == 0)[:2, 0].tolist() == starts
    for start in starts:
        assert int(window["input_ids"][start]) == BOS
        assert (window["labels"][start : start + 17] == NO_TARGET).all()
        learned = window["labels"][start + 17 : start + len(text) + 2]
        assert learned.tolist() == [*text[16:].tolist(), EOS]


def test_a_prompt_is_not_cut_from_what_follows_from_it() -> None:
    """In pieces of a short document the completion would be learned without what its prompt says."""
    made = packed(ASKED, SHORT[0], short_length=len(ASKED.text) + 1)
    assert made.left_out == 1
    for window in packed_of(made):
        assert set(window["input_ids"].tolist()) <= {BOS, EOS, *SHORT[0].text.encode()}
    message = r"got 1 prompt with completions, all of them longer; a prompt and its completion lie within 20 tokens"
    with pytest.raises(UserError, match=message):
        packed(ASKED, short_length=20)


SHORT = [document("s", 30), document("t", 17), document("u", 100)]


def mixed(share: float = 0.5) -> MixedWindows:
    long = LongWindows(BOOKS, TOKENIZER, length=TARGET, count=40, seed=0)
    return MixedWindows(long, SHORT, TOKENIZER, short_length=ORIGINAL, share=share)


def packed_of(made: MixedWindows) -> list[dict[str, torch.Tensor]]:
    return [window for window in (made[index] for index in range(40)) if int((window["position_ids"] == 0).sum()) > 1]


def pieces_of(window: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    starts = [*torch.nonzero(window["position_ids"] == 0)[:, 0].tolist(), TARGET]
    return list(pairwise(starts))


def test_packed_documents_begin_anew_and_are_not_predicted_from_the_one_before() -> None:
    made = packed_of(mixed())
    assert 10 < len(made) < 30, "about half of them"
    for window in made:
        assert len(window["input_ids"]) == TARGET
        for start, end in pieces_of(window):
            assert end - start <= ORIGINAL
            assert int(window["input_ids"][start]) == BOS
            assert int(window["labels"][start]) == NO_TARGET
            assert torch.equal(window["labels"][start + 1 : end], window["input_ids"][start + 1 : end])
            if end < TARGET:
                text = bytes(window["input_ids"][start + 1 : end - 1].tolist()).decode()
                assert int(window["input_ids"][end - 1]) == EOS
                assert any(text in short.text for short in SHORT)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_packed_window_has_the_loss_of_its_documents_alone_under_their_own_factors(name: str) -> None:
    """Beside a long window in the same batch, which has the long factors."""
    model: Any = build(name)
    long = next(window for window in (mixed()[index] for index in range(40)) if len(pieces_of(window)) == 1)
    batch = [packed_of(mixed())[0], long]
    with torch.no_grad(), Patch(model, SHAPE) as patch:
        patch.install(table())
        with chunked_loss(model):
            found = float(model(**collate(batch)).loss)
        total, count = 0.0, 0
        for start, end in pieces_of(batch[0]):
            patch.install(table().rows[0])
            ids = batch[0]["input_ids"][None, start:end]
            if end - start > 1:
                total += float(model(input_ids=ids, labels=ids).loss) * (end - start - 1)
                count += end - start - 1
        patch.install(table().rows[1])
        ids = batch[1]["input_ids"][None]
        total, count = total + float(model(input_ids=ids, labels=ids).loss) * (TARGET - 1), count + TARGET - 1
    assert found == pytest.approx(total / count, rel=1e-5)


def test_a_share_that_is_none_and_nothing_to_pack_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--mixed: got 1\.5; it is a share between 0 and 1"):
        mixed(1.5)
    with pytest.raises(UserError, match=r"^--mixed: got no text to pack"):
        MixedWindows(windows(), [Document("e", "")], TOKENIZER, short_length=ORIGINAL, share=0.5)


def test_a_tokenizer_without_ends_has_none(tmp_path: Path) -> None:
    tokenizer: Any = byte_tokenizer(ORIGINAL)
    tokenizer.bos_token = tokenizer.eos_token = None
    made = LongWindows(BOOKS, tokenizer, length=100, count=3, seed=0)[0]
    assert bytes(made["input_ids"].tolist()).decode() in BOOKS[0].text + BOOKS[1].text
