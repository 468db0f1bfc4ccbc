"""Files say whether they are as they were written: checksums of lines and objects, and the seal of a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope import seals
from longrope.errors import UserError
from longrope.files import append_line, read_json, read_lines, write_atomically
from longrope.runs import RunFolder

RECORD = {"key": "a", "value": 0.125, "name": "é, and more", "list": [1, {"crc": "x"}]}
CONFIG = {"command": "search", "settings": {"seed": 0}, "documents": {}}


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_with_a_checksum_is_json_and_comes_back(indent: int | None) -> None:
    text = seals.with_checksum(json.dumps(RECORD, indent=indent))
    assert list(json.loads(text)) == [*RECORD, "crc"]
    back = seals.without_checksum(text.encode())
    assert back is not None
    assert json.loads(back) == RECORD


@pytest.mark.parametrize("text", ["{}", '{"a": 1}', "no JSON", '{"crc": "0123"}', ""])
def test_text_without_a_checksum_is_as_it_is(text: str) -> None:
    assert seals.without_checksum(text.encode()) == text.encode()


def outcome(path: Path) -> list[dict[str, Any]] | str:
    """The lines, or what is told of them."""
    try:
        return read_lines(path)
    except UserError as error:
        return str(error)


def test_every_bit_that_is_turned_in_a_line_shows_or_leaves_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, RECORD)
    append_line(path, {"key": "last"})
    data = path.read_bytes()
    end = data.index(b"\n")
    told = 0
    for at in range(8 * end):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        found = outcome(path)
        if isinstance(found, str):
            assert "line 1 broken" in found or "line 2 broken" in found
            told += 1
        else:
            assert RECORD.items() <= found[0].items(), at
            assert found[1:] == [{"key": "last"}]
    assert told > 7.5 * (end - len(', "crc": "01234567"}'))


def test_an_object_that_has_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_atomically(path, seals.with_checksum(json.dumps(CONFIG, indent=1) + "\n"))
    assert read_json(path, "config") == CONFIG
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    told = f"config: got {path}, which has changed; it is as it was written; restore the file or make it again"
    with pytest.raises(UserError) as caught:
        read_json(path, "config")
    assert str(caught.value) == told


def finished(path: Path) -> Path:
    with RunFolder.open(path, CONFIG) as run:
        run.log_evaluation(RECORD)
        (path / "checkpoint").mkdir()
        (path / "checkpoint" / "model.safetensors").write_bytes(bytes(1000))
        run.save_metrics({"results": []})
        run.finish()
    return path


def test_a_finished_run_is_read_by_nobody_with_a_file_that_has_changed(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    RunFolder.open(run, CONFIG).close()
    weights = run / "checkpoint" / "model.safetensors"
    readers: list[tuple[Path, Callable[[], object]]] = [
        (weights, lambda: seals.check_folder(run / "checkpoint")),
        (weights, lambda: RunFolder.open(run, CONFIG)),
        (run / "metrics.json", lambda: read_json(run / "metrics.json", "measurements")),
        (run / "evaluations.jsonl", lambda: read_lines(run / "evaluations.jsonl")),
    ]
    for path, check in readers:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError) as caught:
            check()
        assert caught.value.got == f"{path}, which is not as it was when the run ended"
        path.write_bytes(data)
        check()


def test_a_file_of_a_finished_run_that_was_taken_away_is_missed_by_who_reads_it_only(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (run / "checkpoint" / "model.safetensors").unlink()
    with RunFolder.open(run, CONFIG) as opened:
        assert opened.finished


@pytest.mark.parametrize("data", ["{", "[]", '{"sha256": 3}', "\0"])
def test_a_broken_seal_is_told(tmp_path: Path, data: str) -> None:
    run = finished(tmp_path / "run")
    (run / "DONE").write_text(data)
    with pytest.raises(UserError, match=rf"^run: got {run / 'DONE'}, which is not as it was"):
        RunFolder.open(run, CONFIG)


def test_a_file_of_that_name_beside_other_files_is_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "DONE").write_text("the washing up")
    write_atomically(tmp_path / "own.json", "{}")
    assert read_json(tmp_path / "own.json", "own") == {}


def test_the_empty_mark_of_an_earlier_version_seals_nothing(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (run / "DONE").write_text("")
    (run / "metrics.json").write_text('{"results": [] }')
    with RunFolder.open(run, CONFIG) as opened:
        assert opened.finished


def test_of_large_files_the_size_the_beginning_and_the_end_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seals, "_WHOLE", 100)
    monkeypatch.setattr(seals, "_EDGE", 10)
    run = finished(tmp_path / "run")
    weights = run / "checkpoint" / "model.safetensors"
    for at, shows in ((0, True), (999, True), (500, False)):
        changed = bytearray(1000)
        changed[at] = 1
        weights.write_bytes(changed)
        if shows:
            with pytest.raises(UserError):
                seals.check(weights)
        else:
            seals.check(weights)
