"""benchmarks/reproduce.py in pieces, each in a folder of its own, from packs: it ends as in one go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pretrain
import reproduce
from commands import write_documents
from longrope.errors import UserError
from longrope.extension.plan import read_plan
from longrope.files import read_lines
from reproduction import packing
from reproduction.packing import pack, unpack
from reproduction.setting import BRIEF, SETTINGS, _made_rows

PLANS = Path(__file__).parents[1] / "benchmarks" / "plans"
PLAN = """
[[stages]]
do = "search"
to = "4x"
[[stages]]
do = "finetune"
to = "4x"
steps = 2
save_dtype = "bfloat16"
[[stages]]
do = "second"
to = "8x"
search_length = "6x"
[[stages]]
do = "recovery"
to = ["1x"]
[measure]
lengths = ["1x"]
windows = 1
passkey = 0
"""
STAGES = ["01-search-512", "02-finetune-512", "03-second-1k", "04-recovery-128"]
# The stages, what follows the last one, eight perplexities and the passkeys.
PIECES = len(STAGES) + 1 + 8 + 1
NAME = "full-length-quick"


def command(folder: Path, *more: str) -> Any:
    """The command in a folder of its own; what its JSON holds."""
    if not (folder / "corpus").exists():
        folder.mkdir(exist_ok=True)
        (folder / "full-length.toml").write_text(PLAN)
        for number, name in enumerate(("train", "validation", "test")):
            write_documents(folder / "corpus" / name, count=2, characters=6000 + number)
    words = ["--stages", str(folder / "full-length.toml"), "--documents", str(folder / "corpus"), "--quick"]
    words += ["--state", str(folder / "state"), "--out", str(folder / "results"), "--device", "cpu", "--threads", "1"]
    assert reproduce.main([*words, *more]) in (0, 1)
    return json.loads((folder / "results" / f"{NAME}.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model: its first training by one call, the second one by another in another folder; and its pack."""
    folder = tmp_path_factory.mktemp("base")
    command(folder / "1", "--minutes", "0", "--pack", str(folder / "pack-1"))
    assert not (folder / "1" / "state" / NAME / "base").exists(), "one training a call"
    command(folder / "2", "--parts", "base", "--unpack", str(folder / "pack-1"), "--pack", str(folder / "pack"))
    settings = json.loads((folder / "2" / "state" / NAME / "base" / "settings.json").read_text())["settings"]
    assert settings["init"].endswith("base-first/model")
    return folder


@pytest.fixture(scope="module")
def whole(base: Path) -> Any:
    """What one call makes of that base model."""
    return command(base / "2")


def test_in_pieces_in_fresh_folders_it_ends_as_in_one_go(base: Path, whole: Any, tmp_path: Path) -> None:
    before, found = base / "pack", whole | {"parts": {}}
    for number in range(PIECES):
        assert "passkey" not in found["parts"], "a piece too few"
        here = tmp_path / str(number)
        found = command(here, "--minutes", "0", "--unpack", str(before), "--pack", str(here / "pack"))
        before = here / "pack"
        made = [line["stage"] for line in read_lines(here / "state" / NAME / "extend" / "stages.jsonl")]
        assert made == STAGES[: number + 1], "one stage a call, and none again"
        assert not list((here / "pack").glob("*checkpoint*"))
    assert set(found["parts"]) == {"base", "stages", "lengths", "passkey"}
    for name in ("documents", "model", "stages"):
        assert found[name] == whole[name], name
    for part, name in ((part, name) for part in found["parts"] for name in ("figures", "tables")):
        assert found["parts"][part][name] == whole["parts"][part][name], part
    assert found["parts"]["stages"]["losses"] == whole["parts"]["stages"]["losses"]
    last, first = here / "state" / NAME / "extend", base / "2" / "state" / NAME / "extend"
    for name in ("factors.json", "checkpoint/model.safetensors", "checkpoint/config.json"):
        assert (last / name).read_bytes() == (first / name).read_bytes(), name
    weights = load_file(last / "checkpoint" / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}


def test_a_pack_has_what_is_finished_and_what_is_equal_once(base: Path, whole: Any, tmp_path: Path) -> None:
    state = tmp_path / NAME
    shutil.copytree(base / "2" / "state" / NAME, state, symlinks=True)
    half = state / "extend" / STAGES[2]
    (half / "DONE").unlink()
    size = pack(state, tmp_path / "pack")
    unpack(tmp_path / "pack", tmp_path / "again" / NAME)
    found = {path.relative_to(tmp_path / "again" / NAME) for path in (tmp_path / "again").rglob("*") if path.is_file()}
    there = {path.relative_to(state) for path in state.rglob("*") if path.is_file()}
    left_out = {str(path) for path in there - found}
    assert found <= there
    assert f"extend/{STAGES[1]}/checkpoint/model.safetensors" in {str(path) for path in found}
    assert {"base-first/model/model.safetensors", "recall-512.jsonl", f"extend/{STAGES[2]}/config.json"} <= left_out
    assert any("/checkpoints/" in name for name in left_out), "no states of optimizers"
    assert not any("/checkpoints/" in str(path) for path in found)
    assert all((tmp_path / "again" / NAME / path).read_bytes() == (state / path).read_bytes() for path in found)
    assert size < sum((state / path).stat().st_size for path in found), "the last weights are in two checkpoints"


def turned(folder: Path) -> None:
    data = (folder / "pack" / "state.1.bin").read_bytes()
    (folder / "pack" / "state.1.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def led_out(folder: Path) -> None:
    index = folder / "pack" / "index.json"
    index.write_text(index.read_text().replace('"a.txt"', '"../a.txt"'))


def emptied(folder: Path) -> None:
    (folder / "pack" / "index.json").write_text(f'{{"format": "{packing.FORMAT}", "name": "state"}}')


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (turned, "state", "state.1.bin, which has changed; a pack is read as it was written; pack the state again"),
        (lambda folder: (folder / "pack" / "state.1.bin").unlink(), "state", "state.1.bin, which is not there"),
        (led_out, "state", "index.json, which names ../a.txt; its files lie in the state"),
        (emptied, "state", "index.json, which has changed"),
        (lambda folder: None, "other", "pack, of 'state'; it is a pack of other"),
        (lambda folder: (folder / "new" / "state").mkdir(parents=True) or (folder / "new/state/b").touch(), "state",
         "state, which is there; a pack is unpacked where there is no state yet; leave out --unpack, or remove it"),
        (lambda folder: shutil.rmtree(folder / "pack"), "state", "index.json, which does not exist"),
    ],
)  # fmt: skip
def test_a_pack_that_is_not_as_it_was_is_refused(
    spoil: Callable[[Path], object], name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "a.txt").write_text("some")
    assert pack(tmp_path / "state", tmp_path / "pack") == 4
    spoil(tmp_path)
    with pytest.raises(UserError) as told:
        unpack(tmp_path / "pack", tmp_path / "new" / name)
    assert str(told.value).startswith("--unpack: got ")
    assert message in str(told.value)
    assert not (tmp_path / "new" / name / "a.txt").exists()


def test_a_pack_keeps_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").mkdir()
    for number in range(15):
        (tmp_path / "state" / f"{number}.txt").write_text(f"{number:02} bytes")  # 8 each
    monkeypatch.setattr(packing, "LARGEST", 20)
    pack(tmp_path / "state", tmp_path / "pack")
    assert sorted(path.name for path in (tmp_path / "pack").iterdir()) == ["index.json"] + [
        f"state.{number}.bin" for number in range(1, 7)
    ]
    unpack(tmp_path / "pack", tmp_path / "new" / "state")
    assert (tmp_path / "new" / "state" / "14.txt").read_text() == "14 bytes"
    monkeypatch.setattr(packing, "LARGEST", 17)
    with pytest.raises(UserError, match=r"--pack: got .*state with 0.0 MB; a pack is an index and at most 7 files of"):
        pack(tmp_path / "state", tmp_path / "pack")
    assert len(list((tmp_path / "pack").iterdir())) == 7, "the one before is still there"
    (tmp_path / "pack" / "mine.txt").touch()
    with pytest.raises(UserError, match="pack, which has other files; a pack has a folder of its own"):
        pack(tmp_path / "state", tmp_path / "pack")


def test_the_plan_is_that_of_the_issue_and_fits_into_a_pack() -> None:
    size = SETTINGS["full-length"]
    plan = read_plan(PLANS / "full-length.toml", size.length)
    trained = [stage for stage in plan.stages if stage.do == "finetune"]
    assert [size.length, *(stage.to for stage in trained), plan.target] == [2**12, 2**17, 2**18, 2**21]
    assert {stage.settings["save_dtype"] for stage in trained} == {"bfloat16"}
    model = pretrain.build_model(
        pretrain.Settings(
            ("text",), size.length, int(size.tokens), size.batch, size.recall, size.learning_rate, size.hidden,
            size.intermediate, size.layers, size.heads, size.heads, size.head_dim, size.theta, 0,
        )
    )  # fmt: skip
    assert model.num_parameters() < 15e6
    assert 2 * model.num_parameters() * (1 + len(trained) + 1) < 60e6, "bytes of all checkpoints in bf16"
    assert plan.target * max(size.hidden, size.intermediate) < 2**31


def test_what_the_miniature_is_made_of_stays() -> None:
    told = SETTINGS["miniature"].told()
    assert set(told) == {
        *("length", "tokens", "batch", "hidden", "intermediate", "layers", "heads", "head_dim", "theta", "recall"),
        *("learning_rate", "init", "recall_share", "answers_share", "excerpts_share", "brief_share"),
        *("windows", "tries"),
    }


def test_windows_of_a_fine_tuning_are_in_the_shares_that_its_size_says() -> None:
    size, length = SETTINGS["miniature"], 8190
    prose = np.random.default_rng(0).integers(97, 122, size=100 * length, dtype=np.uint8).tobytes()
    spans, before = 100, list(_made_rows(size, [prose], length, 0.0, (0, 7, 8192)))
    windows = spans / (1 - size.recall_share - size.excerpts_share)
    assert spans + len(before) == pytest.approx(windows, abs=2)
    alone = [row for row in before if "prompt" in row]
    assert len(alone) / windows == pytest.approx(size.recall_share * size.answers_share, abs=0.04)
    assert all(len(row["text"]) == length for row in before if "text" in row)
    last = list(_made_rows(size, [prose], length, 0.25, (0, 7, 8192)))
    assert last[: len(before)] == before, "the others stay as they are"
    brief = last[len(before) :]
    assert len(brief) / (spans + len(last)) == pytest.approx(0.25, abs=0.01)
    assert {(len(row["prompt"]), len(row["completion"])) for row in brief} == {(1, BRIEF - 1)}
