"""Windows of a training: their ends, their documents, and that each depends on the seed and its index alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

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
    assert made.too_short == 1
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


def _as_llama2(*texts: str) -> Any:
    """A tokenizer of pieces and bytes that writes a space before a text, as Llama 2's and Mistral's do."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for each in sorted({*"".join(texts).replace(" ", "▁"), "▁"}):
        vocabulary.setdefault(each, len(vocabulary))
    own = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Q: key?\nA:", " 12345"), ("密码是", "12345。"), ("x\n", "```\ncode```")]
)
def test_a_completion_begins_as_it_does_in_the_text(prompt: str, completion: str) -> None:
    """Tokenized alone it has a space before it that is in no document."""
    tokenizer = _as_llama2(prompt, completion)
    [window] = [
        LongWindows([Document("a", prompt + completion, len(prompt))], tokenizer, length=64, count=1, seed=0)[0]
    ]
    learned = window["labels"] != NO_TARGET
    end = int(learned.nonzero()[-1]) + 1
    assert window["input_ids"][1 : end - 1].tolist() == tokenizer.encode(prompt + completion, add_special_tokens=False)
    written = tokenizer.convert_ids_to_tokens(window["input_ids"][learned].tolist())
    assert "".join(written) == completion.replace(" ", "▁") + "</s>"


def test_a_completion_without_a_prompt_is_a_window_of_its_own() -> None:
    made = asked(Document("alone", "all of it", prompt=0), Document("long", "x" * 1000, prompt=0))
    assert (made.an_epoch, made.left_out) == (1, 1)
    window = made[0]
    assert bytes(window["labels"][1:10].tolist()).decode() == "all of it"
    assert set(window["labels"][11:].tolist()) == {NO_TARGET}


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
    row = packed_of(packed(ASKED, short_length=60))[0]
    text = [*ASKED.text.encode(), EOS]
    assert torch.nonzero(row["position_ids"] == 0)[:, 0].tolist() == [0, 25, 50]
    for start in (0, 25):
        assert int(row["input_ids"][start]) == BOS
        assert row["labels"][start : start + 25].tolist() == [NO_TARGET] * 17 + text[16:]
    assert row["labels"][50:].tolist() == [NO_TARGET] * 10, "of a prompt that is cut nothing is learned"


def test_a_prompt_is_not_cut_from_what_follows_from_it() -> None:
    """In pieces of a short document the completion would be learned without what its prompt says."""
    made = packed(ASKED, SHORT[0], short_length=len(ASKED.text) + 1)
    assert made.left_out == 1
    for row in packed_of(made):
        assert set(row["input_ids"].tolist()) <= {BOS, EOS, *SHORT[0].text.encode()}
    message = r"got 1 prompt with completions, all of them longer; a prompt and its completion lie within 20 tokens"
    with pytest.raises(UserError, match=message):
        packed(ASKED, short_length=20)


SHORT = [document("s", 30), document("t", 17), document("u", 100)]


def mixed(share: float = 0.5, *, apart: bool = True) -> MixedWindows:
    long = LongWindows(BOOKS, TOKENIZER, length=TARGET, count=40, seed=0)
    return MixedWindows(long, SHORT, TOKENIZER, short_length=ORIGINAL, share=share, apart=apart)


def packed_windows(made: MixedWindows) -> list[dict[str, torch.Tensor]]:
    """Those of short documents, in rows."""
    return [window for window in (made[index] for index in range(40)) if window["input_ids"].ndim == 2]


def packed_of(made: MixedWindows) -> list[dict[str, torch.Tensor]]:
    """The rows of all of them."""
    return [
        {name: each[row] for name, each in window.items()}
        for window in packed_windows(made)
        for row in range(len(window["input_ids"]))
    ]


def pieces_of(row: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    starts = [*torch.nonzero(row["position_ids"] == 0)[:, 0].tolist(), len(row["input_ids"])]
    return list(pairwise(starts))


def test_packed_documents_begin_anew_and_are_not_predicted_from_the_one_before() -> None:
    windows = packed_windows(mixed())
    assert 10 < len(windows) < 30, "about half of them"
    assert {window["input_ids"].shape for window in windows} == {(TARGET // ORIGINAL, ORIGINAL)}, "as many tokens"
    for row in packed_of(mixed()):
        for start, end in pieces_of(row):
            assert int(row["input_ids"][start]) == BOS
            assert int(row["labels"][start]) == NO_TARGET
            assert torch.equal(row["labels"][start + 1 : end], row["input_ids"][start + 1 : end])
            if end < ORIGINAL:
                text = bytes(row["input_ids"][start + 1 : end - 1].tolist()).decode()
                assert int(row["input_ids"][end - 1]) == EOS
                assert any(text in short.text for short in SHORT)


def test_where_documents_are_not_apart_a_row_has_one() -> None:
    rows = packed_of(mixed(apart=False))
    assert len(rows) == len(packed_of(mixed())), "as many rows"
    for row in rows:
        assert torch.equal(row["position_ids"], torch.arange(ORIGINAL))
        end = int((row["labels"] != NO_TARGET).nonzero()[-1]) + 1
        text = bytes(row["input_ids"][1 : end - 1].tolist()).decode()
        assert any(text in short.text for short in SHORT)
        assert [int(row["input_ids"][0]), int(row["input_ids"][end - 1])] == [BOS, EOS]
        assert row["labels"].tolist() == [NO_TARGET, *row["input_ids"][1:end].tolist(), *[NO_TARGET] * (ORIGINAL - end)]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_window_of_short_documents_has_the_loss_of_each_alone_under_their_own_factors(name: str, apart: bool) -> None:
    model: Any = build(name)
    window = packed_windows(mixed(apart=apart))[0]
    long = table().rows[-1]
    short = long.with_values(up_to=ORIGINAL, rescale=tuple(1 + (each - 1) / 2 for each in long.rescale))
    with torch.no_grad(), Patch(model, SHAPE) as patch:
        patch.install(replace(table(), rows=(short, long)))
        with chunked_loss(model):
            found = float(model(**collate_to_learned([window], at_least=ORIGINAL + 1)).loss)
        total, count = 0.0, 0
        patch.install(short)
        for row in range(len(window["input_ids"])):
            one = {name: each[row] for name, each in window.items()}
            for start, end in pieces_of(one):
                ids, labels = one["input_ids"][None, start:end], one["labels"][None, start:end]
                if learned := int((labels[:, 1:] != NO_TARGET).sum()):
                    total += float(model(input_ids=ids, labels=labels).loss) * learned
                    count += learned
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
