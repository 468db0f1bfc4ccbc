"""Documents are read from real files of every kind, and told apart by their texts."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import byte_tokenizer
from longrope import documents as module
from longrope.documents import (
    Document,
    hold_out,
    others,
    read_sources,
)
from longrope.errors import UserError
from longrope.search.driver import without

CHINESE = "长上下文窗口需要很长的文档。"
RUSSIAN = "Длинное окно требует длинных документов. "
TALK = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Behind the door."}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.tools is defined %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(256)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    chatty = byte_tokenizer(256)
    chatty.chat_template = TEMPLATE
    return chatty


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path: Path, *rows: object) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return write(path, gzip.compress(lines) if path.suffix == ".gz" else lines)


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def read(*sources: str | Path, **options: Any) -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in read_sources([str(each) for each in sources], **options)]


def refusal(*sources: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*sources, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is read


def test_a_text_file_is_one_document_named_after_the_file(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "some text\n")) == [("a.txt", "some text\n")]


def test_a_byte_order_mark_is_removed_and_line_ends_become_newlines(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree")) == [("a.txt", "one\ntwo\nthree")]


def test_text_of_any_language_is_read_and_hashed_as_utf8(tmp_path: Path) -> None:
    (document,) = read_sources([str(write(tmp_path / "文档.txt", CHINESE + RUSSIAN))])
    assert (document.name, document.text) == ("文档.txt", CHINESE + RUSSIAN)
    assert document.sha256 == hashlib.sha256((CHINESE + RUSSIAN).encode("utf-8")).hexdigest()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "ROWS.JSONL.GZ"])
def test_rows_of_jsonl_are_documents_numbered_by_line(tmp_path: Path, name: str) -> None:
    rows = write_rows(
        tmp_path / name.lower(), {"text": "first", "n": 1}, {"text": CHINESE, "n": "x"}, {"text": "third"}
    )
    rows = rows.rename(tmp_path / name)
    assert read(rows) == [(f"{name}#1", "first"), (f"{name}#2", CHINESE), (f"{name}#3", "third")]


def test_blank_lines_a_byte_order_mark_and_null_texts_in_jsonl_are_passed_over(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": null}\n{"text": "two"}')
    assert read(rows) == [("a.jsonl#1", "one"), ("a.jsonl#5", "two")]


def test_rows_far_down_may_have_other_fields(tmp_path: Path) -> None:
    many = [{"text": f"{number} " + "z" * 1000, "score": 1} for number in range(11_000)]
    rows = write_rows(tmp_path / "a.jsonl", *many, {"text": "last", "score": "high", "extra": [1]})
    assert read(rows)[-1] == ("a.jsonl#11001", "last")


def test_half_a_surrogate_pair_in_json_does_not_reach_the_text(tmp_path: Path) -> None:
    (document,) = read_sources([str(write(tmp_path / "a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}'))])
    assert document.text.startswith("a\ufffd")
    assert document.text.endswith("b \N{GRINNING FACE}")


def test_rows_of_parquet_are_documents_whatever_the_other_columns(tmp_path: Path) -> None:
    table = {"id": [1, 2], "text": [RUSSIAN, "second"], "vector": [[0.5], [1.5]]}
    assert read(write_table(tmp_path / "a.parquet", table)) == [("a.parquet#1", RUSSIAN), ("a.parquet#2", "second")]


def test_parquet_written_by_datasets_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    assert [text for _, text in read(tmp_path / "a.parquet")] == ["one", "two"]


def test_messages_become_text_through_the_chat_template_without_its_bos(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"messages": TALK}, {"text": "plain", "messages": TALK})
    said = "user: Where is it?\nassistant: Behind the door.\n"
    assert read(rows, tokenizer=chat_tokenizer) == [("a.jsonl#1", said), ("a.jsonl#2", "plain")]


def test_a_conversation_loses_the_ends_that_training_puts_around_it(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """As Qwen's template writes them, and Llama 2's; with what comes before BOS and after EOS."""
    rows = write_rows(tmp_path / "a.jsonl", {"messages": TALK})
    (plain,) = read_sources([str(rows)], tokenizer=chat_tokenizer)
    bos, eos = chat_tokenizer.bos_token, chat_tokenizer.eos_token
    assert bos
    assert eos
    own = str(chat_tokenizer.chat_template)
    chat_tokenizer.chat_template = " " + own + eos + "\n"
    (read,) = read_sources([str(rows)], tokenizer=chat_tokenizer)
    assert read.text == plain.text
    chat_tokenizer.chat_template = own + eos + "and more"
    (read,) = read_sources([str(rows)], tokenizer=chat_tokenizer)
    assert read.text == plain.text + eos + "and more"


def test_a_template_gets_a_rows_tools_and_parts_without_nulls(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Tables give every part of a content every field; `tools` may be JSON, as data sets have them."""
    chat_tokenizer.chat_template = (
        "{% for tool in tools or [] %}<{{ tool.name }}>{% endfor %}"
        "{% for part in messages[0].content %}{{ '[image]' if 'image' in part else part.text }}{% endfor %}"
    )
    said = [{"role": "user", "content": [{"type": "text", "text": "hi", "image": None}]}]
    tools = [{"name": "clock"}]
    rows: list[dict[str, Any]] = [
        {"messages": said},
        {"messages": said, "tools": tools},
        {"text": "", "messages": said},
    ]
    file = write_rows(tmp_path / "a.jsonl", *rows[:2], {"messages": said, "tools": json.dumps(tools) + " "}, rows[2])
    found = read_sources([str(file)], tokenizer=chat_tokenizer, share="train")
    assert [each.text for each in found] == ["hi", "<clock>hi", "<clock>hi", "hi"]
    wrong = write_rows(tmp_path / "b.jsonl", {"messages": said, "tools": "{"})
    rule = "they are a list of functions, or its JSON; correct the row, or take it out"
    assert f"line 1: got `tools` that are no JSON; {rule}" in refusal(wrong, tokenizer=chat_tokenizer)


def test_messages_of_parquet_lose_the_fields_that_only_other_rows_have(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    silent = [{"role": "user", "content": "Hello.", "tools": None}]
    table = {"messages": [silent], "other": [[{"tools": ["x"]}]]}
    ((_, text),) = read(write_table(tmp_path / "a.parquet", table), tokenizer=chat_tokenizer)
    assert text == "user: Hello.\n"


def test_nested_fields_that_only_other_rows_of_a_table_have_are_not_written(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Arguments of tool calls and declared tools: a table's type has the fields of all of them."""
    chat_tokenizer.chat_template = "{{ tools | tojson }}{{ messages | tojson }}"

    def row(name: str) -> dict[str, Any]:
        called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {name: "X"}}]}
        tools = [{"name": "f", "parameters": {name: {"type": "string"}}}]
        return {"messages": [{"role": "user", "content": "?"}, called], "tools": tools}

    rows = [row("city"), row("date")]
    table = write_table(tmp_path / "a.parquet", {key: [each[key] for each in rows] for key in rows[0]})
    lines = write_rows(tmp_path / "b.jsonl", *rows)
    found = [json.loads(text.replace("][", ",")) for _, text in read(table, tokenizer=chat_tokenizer)]
    assert found == [json.loads(text.replace("][", ",")) for _, text in read(lines, tokenizer=chat_tokenizer)]


def test_a_text_is_on_one_side_wherever_its_prompt_ends(tmp_path: Path) -> None:
    texts = [(f"question {number}?", f" answer {number}.") for number in range(12)]
    whole = write_rows(tmp_path / "whole.jsonl", *({"text": prompt + answer} for prompt, answer in texts))
    parts = ({"prompt": prompt, "completion": answer} for prompt, answer in texts)
    parted = write_rows(tmp_path / "parted.jsonl", *parts)
    documents = read_sources([str(whole), str(parted)])
    assert len(documents) == 24, "a training reads them differently"
    searched, unseen = ({each.text for each in side} for side in hold_out(documents))
    assert searched
    assert unseen
    assert not searched & unseen
    with pytest.raises(UserError, match="all of them also in --documents"):
        without(read_sources([str(parted)]), read_sources([str(whole)]))
    [first], [last] = hold_out([Document("a", "x" * 8), Document("b", "x" * 8, 3)])
    assert (first.text, last.text) == ("x" * 6, "x" * 2), "one text is cut"


def test_a_folder_is_read_recursively_by_relative_path_and_other_files_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "b" / "deep" / "two.txt", "two")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b" / "notes.md", "not a document")
    write(tmp_path / "b" / "empty.txt", "")
    write_rows(tmp_path / "c.jsonl", {"text": "three"})
    assert read(tmp_path) == [("a.txt", "one"), ("b/deep/two.txt", "two"), ("c.jsonl#1", "three")]


def test_links_are_followed_and_a_cycle_of_links_ends(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "far.txt", "far")
    write(tmp_path / "here" / "near.txt", "near")
    (tmp_path / "here" / "away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "self").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "gone.txt").symlink_to(tmp_path / "nothing")
    assert read(tmp_path / "here") == [("away/far.txt", "far"), ("near.txt", "near")]


def test_a_run_in_a_folder_is_no_document_but_one_that_is_asked_for_is_read(tmp_path: Path) -> None:
    """Without --out runs are written below the folder one works in, which may be that of the documents."""
    write(tmp_path / "a.txt", "text")
    run = tmp_path / "runs" / "search-tiny-1k"
    write(run / "config.json", json.dumps({"command": "search", "settings": {}}))
    write_rows(run / "evaluations.jsonl", {"key": "x", "value": 1.0})
    write(run / "notes.txt", "not of this one")
    write(tmp_path / "book" / "config.json", "{")
    write(tmp_path / "book" / "b.txt", "of another program")
    assert [name for name, _ in read(tmp_path)] == ["a.txt", "book/b.txt"]
    write(run / "evaluations.jsonl", "")
    assert [name for name, _ in read(run)] == ["notes.txt"]


def test_what_is_hidden_in_a_folder_is_no_document(tmp_path: Path) -> None:
    """Such as what macOS puts beside a file of another system, and what version control keeps."""
    folder = tmp_path / ".own"
    for name, content in (("a.txt", b"text"), ("._a.txt", b"\0\0"), (".git/b.txt", b"kept")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert [each.name for each in read_sources([str(folder)])] == ["a.txt"]
    assert [each.text for each in read_sources([str(folder / ".git" / "b.txt")])] == ["kept"], "by its name"


def test_a_folder_named_like_a_document_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "x.txt" / "y.txt", "inside")
    assert read(tmp_path / "x.txt") == [("y.txt", "inside")]
    assert read(tmp_path) == read(tmp_path / "*.txt") == [("x.txt/y.txt", "inside")]


def test_a_glob_takes_files_and_the_folders_it_matches(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a1.txt", "one")
    write(tmp_path / "data" / "b1.txt", "two")
    write(tmp_path / "data" / "a2" / "c.txt", "three")
    write(tmp_path / "data" / "a3.md", "not a document")
    assert read(tmp_path / "data" / "a*") == [("a1.txt", "one"), ("a2/c.txt", "three")]
    assert [text for _, text in read(tmp_path / "**" / "*.txt")] == ["one", "three", "two"]


@pytest.mark.parametrize("name", ["a:b.txt", "a b.txt", "a[1]*.txt", "hf:name.txt", "a::b.txt", "a#1.txt", "~.txt"])
def test_a_path_that_exists_is_a_path_whatever_its_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, "text")
    write(tmp_path / "a1.txt", "another")
    assert read(name) == [(name, "text")]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_are_read_from_folders_with_odd_names(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "a [b] *: c" / f"x::y{ending}"
    path.parent.mkdir()
    write_table(path, {"text": ["t"]}) if ending == ".parquet" else write_rows(path, {"text": "t"})
    assert read(path) == [(f"x::y{ending}#1", "t")]


def test_a_file_name_that_is_not_unicode_gets_a_printable_name(tmp_path: Path) -> None:
    try:
        write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")), "text")
    except OSError:
        pytest.skip("this file system only takes names in Unicode")
    assert read(tmp_path) == [("\ufffd.txt", "text")]


def test_equal_texts_are_kept_once_over_all_sources(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.txt", "same")
    write(tmp_path / "one" / "b.txt", "same")
    rows = write_rows(tmp_path / "c.jsonl", {"text": "same"}, {"text": "other"})
    assert read(tmp_path / "one", rows) == [("a.txt", "same"), ("c.jsonl#2", "other")]


def test_nothing_heavy_is_imported_for_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    heavy = "{'torch', 'datasets', 'pyarrow', 'transformers'} & set(sys.modules)"
    program = f"import sys; from longrope.documents import read_sources; read_sources([{str(path)!r}]); print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Python's own library


def test_stdlib_is_shared_out_by_the_hash_of_the_path() -> None:
    shares: dict[str, set[str]] = {}
    for share in ("search", "unseen", "train"):
        shares[share] = {name for name, _ in read("stdlib", share=share)}
        digits = {int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 for name in shares[share]}
        assert digits == {"unseen": {0}, "search": {1}, "train": set(range(2, 10))}[share]
    assert {name for name, _ in read("stdlib")} <= shares["search"] | shares["unseen"] | shares["train"]
    assert min(len(names) for names in shares.values()) > 20


def test_the_train_share_is_every_readable_module_as_it_stands_in_order_of_path() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(root).parts for path in root.rglob("*.py"))
    expected = []
    for parts in paths:
        name = "/".join(parts)
        if parts[0] not in ("site-packages", "dist-packages"):
            if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 < 2:
                continue
            try:
                expected.append((name, (root / name).read_text("utf-8")))
            except UnicodeDecodeError:
                continue
    assert read("stdlib", share="train") == expected


def test_share_does_not_concern_other_sources(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    assert read(path, share="unseen") == read(path, share="search") == read(path) == [("a.txt", "text")]


def test_stdlib_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "stdlib" / "mine.txt", "mine")
    assert "mine" not in dict(read("stdlib", share="unseen")).values()
    assert read("./stdlib") == [("mine.txt", "mine")]


# The Hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


def test_a_data_set_is_streamed_by_split_and_writes_no_cache(tmp_path: Path, hub_cache: Path) -> None:
    folder = tmp_path / "set"
    write_rows(folder / "train.jsonl", {"text": "one"}, {"text": "two"})
    write_rows(folder / "test.jsonl", {"text": "three"})
    assert read(f"hf:{folder}") == [(f"{folder}#1", "one"), (f"{folder}#2", "two")]
    assert read(f"hf:{folder}:test") == [(f"{folder}#1", "three")]
    assert [path for path in hub_cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_of_a_data_set_no_more_than_the_limit_is_read_and_that_is_logged(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "set" / "train.jsonl", *({"text": f"row {number}"} for number in range(20)))
    monkeypatch.setattr(module, "HUB_DOCUMENTS", 7)
    with caplog.at_level("INFO", logger="longrope"):
        assert len(read(f"hf:{tmp_path / 'set'}")) == 7
    assert f"reading at most 7 documents of hf:{tmp_path / 'set'}" in caplog.text


def test_a_data_set_that_cannot_be_reached_is_one_line(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("hf:nobody-at-all/nothing")
    assert message.startswith("documents: got 'hf:nobody-at-all/nothing', which cannot be reached; ")
    assert message.endswith("; check the name, the split and the network")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:not a name", "hf:a/b/c/d"])
def test_what_is_no_name_of_a_data_set_is_refused(source: str, hub_cache: Path) -> None:
    assert f"got {source!r}, which cannot be reached" in refusal(source)


def test_a_missing_split_and_missing_fields_of_a_data_set_are_named(tmp_path: Path, hub_cache: Path) -> None:
    folder = tmp_path / "set"
    write_rows(folder / "train.jsonl", {"body": "one", "title": "x"})
    assert "Available splits: ['train']" in refusal(f"hf:{folder}:test")
    expected = f"hf:{folder} row 1: got the fields body, title; a row has a field `text` or `messages`"
    assert refusal(f"hf:{folder}").startswith(expected)


# What is refused


def test_a_missing_path_and_a_glob_without_match_are_refused(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing.txt", tmp_path / "*.txt", tmp_path / "no" / "**" / "x", "", "a\0b", "a\0[b]"):
        assert refusal(source).startswith("documents: got ")
    missing = tmp_path / "nothing.txt"
    assert f"got {str(missing)!r}, which does not exist; documents are a file, a folder" in refusal(missing)
    assert "*.txt', which does not exist" in refusal(tmp_path / "*.txt")


def test_a_folder_without_a_readable_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "text")
    rule = "where no file is of a kind that can be read; a document is .txt, .jsonl, .jsonl.gz or .parquet"
    assert rule in refusal(tmp_path)
    assert rule in refusal(tmp_path / "*")


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.txt.gz", "a.json"])
def test_an_unknown_ending_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path / name, "text"))
    assert f"{name}'; a document is .txt, .jsonl, .jsonl.gz or .parquet; convert it" in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    assert f"got {str(path)!r}, which is empty; a document holds at least some text" in refusal(path)


def test_a_source_without_text_is_refused_beside_one_with_text(tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", "text")
    write(tmp_path / "folder" / "a.txt", " ")
    write_rows(tmp_path / "folder" / "b.jsonl", {"text": ""}, {"text": None})
    write_table(tmp_path / "folder" / "c.parquet", {"text": pa.array([], pa.string())})
    write(tmp_path / "folder" / "d.jsonl.gz", gzip.compress(b""))
    write(tmp_path / "folder" / "e.jsonl.gz", b"")
    assert f"got {str(tmp_path / 'folder')!r}, which is empty" in refusal(good, tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"text\0text", "binary (it holds a zero byte)"),
        ("Gr\u00fc\u00dfe".encode("latin-1"), "not UTF-8"),
        ("text".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_binary_file_is_refused_alone_or_in_a_folder(tmp_path: Path, content: bytes, why: str) -> None:
    path = write(tmp_path / "a.txt", content)
    write(tmp_path / "b.txt", "good")
    for source in (path, tmp_path, tmp_path / "*.txt"):
        assert f"got {str(path)!r}, which is {why}; a document is text in UTF-8" in refusal(source)


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('{"text": broken}', "Expecting value: column 10; every line is a JSON object"),
        ('{"text": "cut', "Unterminated string starting at: column 10; "),
        (b'{"text": "\xff"}', "bytes that are not UTF-8; JSON is UTF-8"),
        (b"\0\1\2", "Expecting value"),
        ("[" * 100_000, "thousands of brackets; every line is a JSON object"),
        ("5" * 5000, "a number of thousands of digits; every line is a JSON object"),
    ],
)
def test_broken_json_is_refused_with_its_line(tmp_path: Path, line: str | bytes, got: str) -> None:
    broken = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + broken + b"\n")
    assert refusal(path).startswith(f"{str(path)!r} line 2: got {got}")


@pytest.mark.parametrize(
    ("row", "got"),
    [
        ({"body": "x", "id": 1}, "the fields body, id"),
        ({}, "no fields"),
        (["text"], "a list"),
        (5, "a number"),
        (None, "null"),
    ],
)
def test_a_row_without_text_or_messages_is_refused(tmp_path: Path, row: object, got: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "good"}, row)
    message = refusal(path)
    rule = "a row has a field `text` or `messages`, or `prompt`"
    rule = rule if isinstance(row, dict) else "every line is a JSON object; correct the line"
    assert message.startswith(f"{str(path)!r} line 2: got {got}; {rule}")


def test_a_table_without_text_or_messages_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    message = refusal(path)
    assert message.startswith(f"{str(path)!r}: got the fields body, id; a row has a field `text` or `messages`")


def test_a_prompt_and_its_completion_are_one_text_that_knows_where_the_completion_begins(tmp_path: Path) -> None:
    rows = [{"prompt": "What is 1 + 1?", "completion": " 2"}, {"text": "plain", "prompt": "p", "completion": "c"}]
    rows.append({"text": "", "prompt": "read", "completion": "said"})  # as a table has it where others have texts
    table = {"prompt": ["a", None], "completion": ["b", "whole"]}
    files = [write_rows(tmp_path / "a.jsonl", *rows, {"prompt": "p", "completion": None}, {"text": "What is 1 + 1? 2"})]
    files.append(write_table(tmp_path / "b.parquet", table))
    found = read_sources([str(file) for file in files])
    told = [
        ("What is 1 + 1? 2", 14),
        ("plain", None),
        ("readsaid", 4),
        ("What is 1 + 1? 2", None),
        ("ab", 1),
        ("whole", 0),
    ]
    assert [(each.text, each.prompt) for each in found] == told


def test_a_prompt_that_is_no_string_and_one_without_a_completion_are_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"prompt": TALK, "completion": "x"})
    rule = "`prompt` and `completion` are both strings, or both lists of messages; convert one of them"
    assert f"line 1: got one of each; {rule}" in refusal(rows)
    rows = write_rows(tmp_path / "a.jsonl", {"prompt": 5, "completion": "x"})
    assert "line 1: got a field `prompt` of type int; `prompt` is a string" in refusal(rows)
    table = write_table(tmp_path / "a.parquet", {"prompt": ["x"]})
    rule = "a row has a field `text` or `messages`, or `prompt` and `completion`; rename"
    assert f"row 1: got the fields prompt; {rule}" in refusal(table)


ASKING = "{% if add_generation_prompt %}assistant: <think>{% endif %}"


def test_a_prompt_and_a_completion_of_messages_are_parted_where_the_template_asks_for_an_answer(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The shape that TRL calls conversational. What only a prompt ends with, here <think>, is no part of an answer."""
    chat_tokenizer.chat_template = TEMPLATE + ASKING
    cut = {"prompt": [{"role": "user", "content": "\ud800?"}], "completion": TALK[1:]}
    table = {"prompt": [TALK[:1]], "completion": [[TALK[1] | {"tools": None}]]}
    files = [write_rows(tmp_path / "a.jsonl", cut), write_table(tmp_path / "b.parquet", table)]
    found = read_sources([str(file) for file in files], tokenizer=chat_tokenizer)
    parts = [(each.text[: each.prompt], each.text[each.prompt :]) for each in found]
    answer = "Behind the door.\n"
    assert parts == [("user: \ufffd\ufffd\ufffd?\nassistant: ", answer), ("user: Where is it?\nassistant: ", answer)]


def test_a_prompt_of_messages_that_an_answer_changes_is_refused(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    chat_tokenizer.chat_template = "{{ messages | length }} " + TEMPLATE + ASKING
    rows = write_rows(tmp_path / "a.jsonl", {"prompt": TALK[:1], "completion": TALK[1:]})
    rule = "line 1: got `prompt`; the chat template writes it the same before an answer as alone; give the whole"
    assert rule in refusal(rows, tokenizer=chat_tokenizer)
    for field in ("prompt", "completion"):
        wrong = write_rows(tmp_path / "b.jsonl", {"prompt": TALK[:1], "completion": TALK[1:], field: ["x"]})
        assert f"line 1: got `{field}` of another shape" in refusal(wrong, tokenizer=chat_tokenizer)
    assert "line 1: got `prompt`, and no chat template" in refusal(rows)


def test_a_text_that_is_no_string_is_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"text": ["x"]})
    assert "line 1: got a field `text` of type list; `text` is a string" in refusal(rows)
    table = write_table(tmp_path / "a.parquet", {"text": [b"x"]})
    assert "row 1: got a field `text` of type bytes; `text` is a string" in refusal(table)


def test_a_template_that_writes_todays_date_writes_the_same_text_tomorrow(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    chat_tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ strftime_now(format='%Y') }} " + TEMPLATE
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [document] = read_sources([str(tmp_path / "a.jsonl")], tokenizer=chat_tokenizer)
    assert document.text.startswith("01 Jan 2025: 2025 ")
    whole = chat_tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert str(whole).startswith(f"{datetime.now():%d %b %Y}: "), "as everywhere else"


def test_messages_without_a_chat_template_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": TALK})
    for given in (None, tokenizer):
        assert "line 1: got `messages`, and no chat template; " in refusal(path, tokenizer=given)


def test_messages_that_the_template_refuses_or_of_another_shape_are_refused(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    refused = write_rows(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x", "tools": []}]})
    message = refusal(refused, tokenizer=chat_tokenizer)
    assert "line 1: got `messages`; the model's chat template refuses it (no tools here)" in message
    for shape in ("hello", ["hello"], {"role": "user"}, [{"content": "hi"}], [{"from": "human", "value": "hi"}]):
        path = write_rows(tmp_path / "b.jsonl", {"messages": shape})
        assert "line 1: got `messages` of another shape" in refusal(path, tokenizer=chat_tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"not gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20]),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:12] + b"\xff" * 20),
        ("a.parquet", b"not parquet"),
        ("a.parquet", b""),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    assert f"documents: got {str(path)!r}, which cannot be read; " in refusal(path)


def test_a_damaged_page_inside_parquet_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": [f"row {number}" for number in range(5000)]})
    content = bytearray(path.read_bytes())
    content[20:2000] = b"\xff" * 1980
    path.write_bytes(content)
    assert "a.parquet', which cannot be read; " in refusal(path)


def test_a_pipe_is_refused_and_passed_over_in_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt', which is neither a file nor a folder" in refusal(tmp_path / "pipe.txt")
    write(tmp_path / "a.txt", "text")
    assert read(tmp_path) == [("a.txt", "text")]


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything, so for a while it is nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_permission_denied_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "locked" / "deep" / "a.txt", "text")
    path.parent.parent.chmod(0)
    try:
        with without_privileges():
            for source in (path, path.parent.parent, path.parent / "*.txt", tmp_path):
                assert refusal(source).startswith("documents: got "), source
            assert "a.txt', which cannot be read; Permission denied; " in refusal(path)
    finally:
        path.parent.parent.chmod(0o700)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert "which cannot be read; File name too long" in refusal(tmp_path / ("x" * 300 + ".txt"))


# Held-out documents


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def test_documents_are_held_out_by_the_hash_of_their_text() -> None:
    search, unseen = hold_out([Document(f"{number}.txt", f"text {number}") for number in range(100)])
    assert len(search) + len(unseen) == 100
    assert {int(document.sha256, 16) % 4 for document in unseen} == {0}
    assert {int(document.sha256, 16) % 4 for document in search} == {1, 2, 3}
    renamed = hold_out([Document("x", f"text {number}") for number in reversed(range(100))])
    assert (set(texts(renamed[0])), set(texts(renamed[1]))) == (set(texts(search)), set(texts(unseen)))


@pytest.mark.parametrize("remainder", [0, 1])
def test_both_sides_get_a_document_even_when_the_hashes_say_otherwise(remainder: Literal[0, 1]) -> None:
    numbered = (Document("x", str(number)) for number in range(1000))
    alike = [document for document in numbered if int(document.sha256, 16) % 4 == remainder][:5]
    search, unseen = hold_out(alike)
    assert sorted((len(search), len(unseen))) == [1, 4]
    assert (len(unseen) == 4) == (remainder == 0)
    again = hold_out(alike[::-1])
    assert (set(texts(again[0])), set(texts(again[1]))) == (set(texts(search)), set(texts(unseen)))


def test_of_a_single_document_the_last_quarter_is_held_out() -> None:
    whole = Document("a.txt", CHINESE * 10)
    ((search,), (unseen,)) = hold_out([whole, Document("copy.txt", whole.text)])
    assert search.text + unseen.text == whole.text
    assert len(unseen.text) == len(whole.text) // 4
    assert (search.name, unseen.name) == ("a.txt (first 3/4)", "a.txt (last 1/4)")


def test_what_is_held_out_is_left_out_of_other_documents() -> None:
    numbered = [Document(f"{number}.txt", f"text {number}") for number in range(20)]
    _, held = hold_out(numbered)
    left = others([*numbered, Document("other.txt", "other", 2)], held)
    assert set(texts(left)) == {"other", *texts(numbered)} - set(texts(held))


@pytest.mark.parametrize(("prompt", "first", "last"), [(None, None, None), (50, 50, 0), (75, 75, 0), (90, 75, 15)])
def test_a_single_document_that_is_cut_keeps_its_prompt(
    prompt: int | None, first: int | None, last: int | None
) -> None:
    ((search,), (unseen,)) = hold_out([Document("a.jsonl#1", "x" * 100, prompt)])
    assert (search.prompt, unseen.prompt) == (first, last)
    assert search.text + unseen.text == "x" * 100
