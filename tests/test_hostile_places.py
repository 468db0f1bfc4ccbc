"""No path leads out: weights come from the checkpoint's folder, copies hold what lies in it, documents fit."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import TARGET, contents, longrope, refused, table, write_checkpoint, write_documents
from hostility import sparse, tried
from longrope.documents import read_sources
from longrope.errors import UserError
from longrope.guard import check_files
from longrope.room import Room, free_host_memory


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts", count=2)
    table().save(folder / "good.json")
    return folder


@pytest.fixture
def here(here: Path) -> Path:
    (here.parent / "secret.txt").write_text("a secret")
    return here


SEARCH = ("search", "model", "--to", TARGET, "-d", "texts", "--out", "run", "-q")
EXPORT = ("export", "model", "--factors", "good.json", "--out", "out")


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "model.bin", "sub/x.safetensors", "", 7])
def test_an_index_that_names_weights_elsewhere_is_refused(here: Path, file: object) -> None:
    shutil.copytree(here / "model", here / "other")
    (here / "model" / "model.safetensors").rename(here / "model" / "x-1.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": file, "model.norm.weight": "x-1.safetensors"}}
    (here / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    for command in (SEARCH, EXPORT):
        assert "weights are safetensors in the checkpoint's folder" in refused(*command)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 7}', "{}", '{"weight_map": {"a": "gone.safetensors"}}'])
def test_an_index_that_is_none_is_refused(here: Path, text: str) -> None:
    (here / "model" / "model.safetensors.index.json").write_text(text)
    refused(*SEARCH)


HEADERS: dict[str, bytes] = {
    "length 2^63": struct.pack("<Q", 2**63) + b"{}",
    "length beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b"notjson!",
    "overlapping": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "a shape of 2^62": b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}',
    "names that lead out": b'{"../../x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_of_weights_is_refused(here: Path, case: str) -> None:
    data = HEADERS[case]
    if data.startswith(b"{"):
        data = struct.pack("<Q", len(data)) + data + bytes(12)
    if case == "names that lead out":
        data = data[:-4]
    (here / "model" / "model.safetensors").write_bytes(data)
    refused(*SEARCH)
    assert sorted(os.listdir(here.parent)) == ["here", "secret.txt"]


def test_a_link_out_of_a_checkpoint_is_not_copied(here: Path) -> None:
    (here / "model" / "notes.txt").symlink_to(here.parent / "secret.txt")
    for command in (EXPORT, ("doctor", "model", "--fix", "mended")):
        assert "what is copied lies in the checkpoint's folder" in refused(*command)
    (here / "model" / "notes.txt").unlink()
    (here / "model" / "own.txt").symlink_to("tokenizer.json")
    assert longrope(*EXPORT).code == 0
    assert (here / "out" / "own.txt").read_bytes() == (here / "model" / "tokenizer.json").read_bytes()
    assert not (here / "out" / "own.txt").is_symlink()


def test_linked_weights_are_read_and_told_of(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "weights").mkdir()
    (here / "model" / "model.safetensors").rename(here / "weights" / "w.safetensors")
    (here / "model" / "model.safetensors").symlink_to(here / "weights" / "w.safetensors")
    with caplog.at_level("INFO", logger="longrope"):
        check_files("model", "model")
    assert "weights are read from" in caplog.text
    assert longrope(*EXPORT).code == 0
    assert not (here / "out" / "model.safetensors").is_symlink()


def test_the_cache_of_the_hub_is_a_folder_of_links_and_is_copied(here: Path) -> None:
    cache = here / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in sorted((here / "model").iterdir()):
        shutil.copyfile(path, cache / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert longrope("doctor", str(snapshot), "--fix", "mended").code == 0
    assert contents(here / "mended").keys() == {str(here / "mended" / name) for name in os.listdir(here / "model")}


DOCUMENTS: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: path.write_bytes(os.urandom(1000) + b"\xff"),
    "b.jsonl": lambda path: path.write_bytes(b'{"text": "\xff"}'),
    "c.jsonl": lambda path: path.write_text('{"text": ["<script>"]}'),
    "d.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"x" * 1000)[:-9]),
    "e.jsonl.gz": lambda path: path.write_bytes(b"\x1f\x8b\x08garbage"),
    "f.parquet": lambda path: path.write_bytes(b"PAR1" + bytes(100) + b"PAR1"),
    "g.parquet": lambda path: pq.write_table(pa.table({"text": pa.array([2**62], pa.timestamp("ms"))}), path),
    "h.parquet": lambda path: pq.write_table(
        pa.table(
            {"text": pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe"))}
        ),
        path,
    ),
    "i.jsonl": lambda path: path.write_text("[" * 100_000),
    "j.txt": sparse,
    "k\x1b[31m\n$(touch x).txt": lambda path: path.write_bytes(b"\0"),
    "l<script>.jsonl": lambda path: path.write_text('{"' + "\\u001b[2J" + '": 1}'),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_hostile_document_is_refused_in_one_line(here: Path, name: str) -> None:
    (here / "docs").mkdir()
    DOCUMENTS[name](here / "docs" / name)
    for source in ("docs", f"docs/{name}"):
        ran, wrong = tried("documents", source, folder=here / "texts")
        assert wrong == ""
        assert ran is not None
        assert ran.code == 2


def test_a_document_may_have_any_name(here: Path) -> None:
    for name in (b"\xff\xfe.txt", b"a\n\x1b[2Jb.txt", b"$(touch x);`touch y`.txt", b"<img src=x onerror=z()>.txt"):
        (here / "texts" / os.fsdecode(name)).write_text("some text of a document, " * 40)
    (here / "texts" / "loop").symlink_to(here / "texts")
    os.mkfifo(here / "texts" / "pipe.txt")
    ran = longrope(
        "compare", "model", "--lengths", 48, "-d", "texts", "--methods", "none", "--windows", 1, "--out", "run"
    )
    assert ran.code == 0, ran.err
    assert "\x1b" not in ran.err
    assert longrope("report", "run").code == 0
    assert not {"x", "y"} & set(os.listdir(here))


def test_what_unfolds_to_more_than_there_is_room_for_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrope.documents.Room", lambda: Room(400_000_000))
    bomb = here / "bomb.jsonl.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n')
    assert bomb.stat().st_size < 1_000_000
    rows = pa.table({"text": pa.array(["y" * 1_000_000] * 2).dictionary_encode().take(pa.array([0] * 150))})
    pq.write_table(rows, here / "bomb.parquet", use_dictionary=True)
    with (here / "sparse.txt").open("wb") as file:
        file.truncate(200_000_000)
    for name in ("bomb.jsonl.gz", "bomb.parquet", "sparse.txt"):
        with pytest.raises(UserError, match="documents are read whole, into a quarter of the free memory"):
            read_sources([name])


def test_room_is_for_all_documents_together() -> None:
    room = Room(4000)
    room.take(600, "a")
    with pytest.raises(UserError, match=r"got b, with which there are more than 0 MiB of text"):
        room.take(600, "b")
    assert 0 < Room().all <= free_host_memory()
