"""Windows depend on the documents' texts and a seed, on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import BOS, byte_tokenizer
from longrope.documents import Document, read_sources
from longrope.errors import UserError
from longrope.windows import (
    TokenCounts,
    Window,
    choose_windows,
    default_window_count,
    fingerprint,
    held_windows,
    summary,
    token_lengths,
)

CHINESE = "长上下文窗口需要很长的文档。"
RUSSIAN = "Длинное окно требует длинных документов. "


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(256)


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def prose(seed: int, size: int) -> str:
    return "".join(chr(code) for code in np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, size=size))


@pytest.fixture
def twelve() -> list[Document]:
    return [Document(f"{number}.txt", prose(number, 400 + 10 * number)) for number in range(12)]


def test_a_window_is_bos_and_a_span_of_its_document(twelve: list[Document], tokenizer: PreTrainedTokenizerFast) -> None:
    windows = choose_windows(twelve, tokenizer, length=100, count=8, seed=0)
    by_hash = {document.sha256: document for document in twelve}
    assert len({window.sha256 for window in windows}) == 8
    for window in windows:
        document = by_hash[window.sha256]
        assert window.document == document.name
        assert (window.ids.shape, str(window.ids.dtype), int(window.ids[0])) == ((100,), "int64", BOS)
        assert tokenizer.decode(window.ids[1:].tolist()) == document.text[window.start : window.start + 99]
    assert len({window.start for window in windows}) > 4


def test_windows_of_other_languages_are_spans_too(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("zh", CHINESE * 20), Document("ru", RUSSIAN * 20)]
    for window in choose_windows(documents, tokenizer, length=300, count=2, seed=1):
        text = next(document.text for document in documents if document.sha256 == window.sha256)
        assert bytes(window.ids[1:].tolist()) == text.encode()[window.start : window.start + 299]


def test_without_a_bos_token_a_window_is_all_document(
    twelve: list[Document], tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = byte_tokenizer(256)
    bare.bos_token = None
    (window,) = choose_windows(twelve[:1], bare, length=400, count=1, seed=0)
    assert tokenizer.decode(window.ids.tolist()) == twelve[0].text


def test_the_same_seed_gives_the_same_windows_wherever_the_files_are(
    tmp_path: Path, twelve: list[Document], tokenizer: PreTrainedTokenizerFast
) -> None:
    for number, document in enumerate(twelve):
        write(tmp_path / "before" / document.name, document.text)
        write(tmp_path / "after" / f"{number % 3}" / f"renamed {99 - number}.txt", document.text)

    def chosen(folder: str, seed: int) -> list[Window]:
        found = read_sources([str(tmp_path / folder)])
        return choose_windows(found, tokenizer, length=200, count=5, seed=seed)

    before, after, other = chosen("before", 3), chosen("after", 3), chosen("before", 4)
    assert [(w.sha256, w.start, w.ids.tolist()) for w in before] == [(w.sha256, w.start, w.ids.tolist()) for w in after]
    assert [window.document for window in before] != [window.document for window in after]
    assert fingerprint(before) == fingerprint(after) != fingerprint(other)


def test_repeated_texts_and_short_documents_give_no_window_of_their_own(
    twelve: list[Document], tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = choose_windows(twelve, tokenizer, length=300, count=12, seed=0)
    crowded = twelve + [Document("copy", document.text) for document in twelve]
    crowded += [Document("short", prose(100 + number, 298)) for number in range(12)]
    assert {window.sha256 for window in choose_windows(crowded, tokenizer, length=300, count=12, seed=0)} == {
        window.sha256 for window in plain
    }


@pytest.mark.parametrize("seed", range(5))
def test_with_too_few_documents_each_gives_several_windows_that_do_not_overlap(
    seed: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = [Document("a", prose(0, 1000)), Document("b", prose(1, 330)), Document("c", prose(2, 50))]
    windows = choose_windows(documents, tokenizer, length=101, count=13, seed=seed)
    for name, count in (("a", 10), ("b", 3)):
        starts = [window.start for window in windows if window.document == name]
        assert len(starts) == count
        assert all(later - earlier >= 100 for earlier, later in pairwise(starts))


def test_further_windows_are_shared_out_evenly(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("a", prose(0, 5000)), Document("b", prose(1, 500)), Document("c", prose(2, 100))]
    names = [window.document for window in choose_windows(documents, tokenizer, length=101, count=7, seed=0)]
    assert {name: names.count(name) for name in "abc"} == {"a": 3, "b": 3, "c": 1}


def test_too_few_or_too_short_documents_are_refused_with_what_was_found(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("a", prose(0, 250)), Document("b", prose(1, 60))]
    with pytest.raises(UserError) as few:
        choose_windows(documents, tokenizer, length=101, count=5, seed=0)
    found = (
        "documents: got 2 documents, the longest of 250 tokens, which hold 2 windows of 101 tokens; wanted: 5 windows"
    )
    assert str(few.value).startswith(found)
    with pytest.raises(UserError) as short:
        choose_windows(documents[1:], tokenizer, length=101, count=1, seed=0)
    found = "documents: got 1 document, the longest of 60 tokens, which hold 0 windows of 101 tokens; wanted: 1 window"
    assert str(short.value).startswith(found)


@pytest.mark.parametrize("bare", [False, True])
def test_windows_are_counted_as_they_are_chosen(bare: bool) -> None:
    tokenizer = byte_tokenizer(256)
    if bare:
        tokenizer.bos_token = None
    documents = [Document("a", prose(0, 1000)), Document("again", prose(0, 1000)), Document("b", prose(1, 330))]
    for length in (2, 51, 101, 331, 332, 1000, 1001, 1002):
        for count in (1, 3, 13, 14, 40):
            held = held_windows(documents, TokenCounts(tokenizer), length=length, count=count)
            span = length - (not bare)
            assert held == min(count, 1000 // span + 330 // span)
            if held == count:
                assert len(choose_windows(documents, tokenizer, length=length, count=count, seed=0)) == count
            else:
                with pytest.raises(UserError, match=f"which hold {held} window"):
                    choose_windows(documents, tokenizer, length=length, count=count, seed=0)
    with pytest.raises(
        UserError, match=r"^length: got 1 token; a window is of at least 2 tokens; ask for a longer one"
    ):
        held_windows(documents, TokenCounts(tokenizer), length=1, count=1)


@pytest.mark.parametrize(
    ("length", "count", "told"),
    [(1, 1, "length: got 1 token;"), (0, 1, "length: got 0 t"), (100, 0, "windows: got 0;")],
)
def test_a_window_of_nothing_is_refused(length: int, count: int, told: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        choose_windows([Document("a", "text")], tokenizer, length=length, count=count, seed=0)


@pytest.mark.parametrize("bare", [False, True])
def test_a_window_of_one_token_has_nothing_to_predict_and_is_refused(bare: bool) -> None:
    tokenizer = byte_tokenizer(256)
    if bare:
        tokenizer.bos_token = None
    with pytest.raises(
        UserError, match=r"^length: got 1 token; a window is of at least 2 tokens; ask for a longer one"
    ):
        choose_windows([Document("a", "text")], tokenizer, length=1, count=1, seed=0)


def test_only_as_many_documents_are_tokenized_as_it_takes(
    twelve: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = byte_tokenizer(256)
    calls: list[int] = []
    tokenize: Callable[..., Any] = type(counting).__call__

    def counted(self: PreTrainedTokenizerFast, given: list[str], **options: Any) -> Any:
        calls.append(len(given))
        return tokenize(self, given, **options)

    monkeypatch.setattr(type(counting), "__call__", counted)
    choose_windows([*twelve, Document("short", "x" * 90)], counting, length=100, count=3, seed=0)
    assert sum(calls) == 3


def test_a_tokenizer_that_makes_more_tokens_than_bytes_is_served() -> None:
    ligature = "\ufdfa"  # 3 bytes that NFKC turns into 18 characters, 33 bytes
    unfolding = Tokenizer(models.BPE(vocab=byte_tokenizer(256).get_vocab(), merges=[]))
    unfolding.normalizer = normalizers.NFKC()
    unfolding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=unfolding)  # type: ignore[no-untyped-call]
    assert token_lengths([Document("a", ligature)], fast) == [34]
    (window,) = choose_windows([Document("a", ligature)], fast, length=34, count=1, seed=0)
    assert window.start == 0


def test_texts_beyond_the_models_length_cause_no_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    fresh = byte_tokenizer(16)
    choose_windows([Document("a", prose(0, 500))], fresh, length=400, count=1, seed=0)
    token_lengths([Document("a", prose(0, 500))], fresh)
    assert (caplog.text, capfd.readouterr().err) == ("", "")


def test_token_lengths_are_those_of_whole_documents_in_order(
    twelve: list[Document], tokenizer: PreTrainedTokenizerFast
) -> None:
    many = [*twelve, Document("zh", CHINESE)] * 5
    assert token_lengths(many, tokenizer) == [len(document.text.encode()) for document in many]
    assert token_lengths([], tokenizer) == []


@pytest.mark.parametrize(
    ("length", "count"), [(256, 8), (32768, 8), (32769, 5), (524287, 5), (524288, 3), (2097152, 3)]
)
def test_the_default_number_of_windows_falls_with_their_length(length: int, count: int) -> None:
    assert default_window_count(length) == count


def test_the_fingerprint_tells_ids_order_and_borders_apart() -> None:
    def windows(*ids: list[int]) -> list[Window]:
        return [Window("any", "any", 0, np.array(each, dtype=np.int64)) for each in ids]

    prints = [fingerprint(windows(*each)) for each in ([[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2], [4]])]
    assert len(set(prints)) == 4
    assert all(len(each) == len("sha256:") + 64 and each.startswith("sha256:") for each in prints)
    assert fingerprint(windows([1, 2], [3])) == prints[0]


def test_a_summary_counts_documents_and_windows_by_length() -> None:
    found = summary([100, 300, 1000])
    assert (found["documents"], found["tokens"], found["longest"]) == (3, 1400, 1000)
    assert found["lengths"] == [
        {"length": 256, "documents": 2, "windows": 4},
        {"length": 512, "documents": 1, "windows": 1},
    ]
    with_bos = summary([254, 255, 510], [256], bos=True)["lengths"]
    assert with_bos == [{"length": 256, "documents": 2, "windows": 3}], "as choose_windows: BOS and 255 tokens"
    with pytest.raises(UserError, match=r"^--lengths: got 1; a window is of at least 2 tokens; ask for longer ones$"):
        summary([5], [1, 2])
    assert summary([5], [2])["lengths"] == [{"length": 2, "documents": 1, "windows": 2}]
    assert summary([])["lengths"] == [{"length": 256, "documents": 0, "windows": 0}]
