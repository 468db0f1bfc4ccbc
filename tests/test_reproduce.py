"""benchmarks/reproduce.py on a model of one layer: all parts, resumed, and its figures computed again another way."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import common
import reproduce
from commands import write_documents
from longrope.checkpoint import LoadOptions
from longrope.evaluate.passkey import passkey
from longrope.factors import FactorTable
from longrope.files import read_lines
from longrope.model import load_model
from longrope.windows import Window
from reproduction import core, setting
from reproduction.setting import cut

PLAN = """
[[stages]]
do = "search"
to = "4x"
[[stages]]
do = "finetune"
to = "4x"
steps = 2
[[stages]]
do = "second"
to = "8x"
search_length = "6x"
[[stages]]
do = "recovery"
to = ["1x"]
[[stages]]
do = "recovery"
to = "4x"
objective = "both"
attention_factor = 1.5  # so that it is another row than the trained one
[measure]
lengths = ["1x"]
windows = 1
passkey = 0
"""
LENGTH = 128


def command(folder: Path, *more: str) -> int:
    words = ["--stages", str(folder / "miniature.toml"), "--documents", str(folder / "corpus"), "--quick"]
    words += ["--state", str(folder / "state"), "--out", str(folder / "results"), "--device", "cpu", "--threads", "1"]
    return reproduce.main([*words, *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduction")
    (folder / "miniature.toml").write_text(PLAN)
    for number, name in enumerate(("train", "validation", "test")):
        write_documents(folder / "corpus" / name, count=2, characters=6000 + number)
    command(folder, "--parts", "all")
    return folder


def test_every_figure_has_its_limit_and_what_came_of_it(made: Path) -> None:
    results = json.loads((made / "results" / "miniature-quick.json").read_text())
    assert list(results["parts"]) == list(reproduce.PARTS)
    figures = [figure for part in results["parts"].values() for figure in part["figures"]]
    for figure in figures:
        assert figure["ok"] == (figure["value"] <= figure["limit"])
    names = [figure["figure"] for figure in figures]
    assert "perplexity at 4x after fine-tuning / of the base at its own length" in names
    assert "perplexity at 8x / at the fine-tuned length" in names
    assert {"perplexity, ours / pi", "perplexity, ours / ntk", "perplexity, ours / yarn"} <= set(names)
    assert len(results["parts"]["stages"]["losses"]["02-finetune-512"]) == 2
    names = [each["stage"] for each in results["stages"]]
    assert list(results["parts"]["stages"]["seconds"]) == names, "over all calls"
    assert "/" not in json.dumps(results["documents"]), "no paths"


def test_figures_are_what_the_checkpoints_give(made: Path) -> None:
    state = made / "state" / "miniature-quick"
    results = json.loads((made / "results" / "miniature-quick.json").read_text())
    values = {figure["figure"]: figure["value"] for part in results["parts"].values() for figure in part["figures"]}
    options = LoadOptions(device="cpu", threads=1)
    final = load_model(str(state / "extend" / "checkpoint"), options)
    base = load_model(str(state / "base" / "model"), options)
    table = FactorTable.load(state / "extend" / "factors.json")
    windows = _window(made, final)

    def perplexity(loaded: Any, row: Any, length: int) -> float:
        total, count = 0.0, 0
        with torch.no_grad(), loaded.autocast(), loaded.patch() as patch:
            patch.install(row)
            text = windows.ids[1:]
            for start in range(0, len(text) - length + 2, length - 1):
                ids = torch.tensor([windows.ids[0], *text[start : start + length - 1]])[None]
                logits = loaded.model(ids).logits[0].double()
                total += float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
                count += ids.shape[1] - 1
        return math.exp(total / count)

    at_original = perplexity(base, None, LENGTH)
    trained_with = FactorTable.load(state / "extend" / "02-finetune-512" / "factors.json").row_for(4 * LENGTH)
    trained, anew = (perplexity(final, row, 4 * LENGTH) for row in (trained_with, table.row_for(4 * LENGTH)))
    name = "perplexity at 4x by the final table / of the base at its own length"
    assert values[name] == pytest.approx(anew / at_original, rel=2e-3)
    assert values["perplexity at 4x after fine-tuning / of the base at its own length"] == pytest.approx(
        trained / at_original, rel=2e-3
    )
    far = perplexity(final, table.row_for(8 * LENGTH), 8 * LENGTH)
    assert values["perplexity at 8x / at the fine-tuned length"] == pytest.approx(far / trained, rel=2e-3)
    recovered = perplexity(final, table.row_for(LENGTH), LENGTH)
    assert values["short window after recovery / base"] == pytest.approx(recovered / at_original, rel=2e-3)
    tables = {part: each["tables"] for part, each in results["parts"].items()}
    by_row = tables["trained-length"]["the fine-tuned length by row"]
    assert by_row["trained with"]["perplexity"] == pytest.approx(trained, rel=2e-3)
    assert by_row["searched anew"]["perplexity"] == pytest.approx(anew, rel=2e-3)
    assert by_row["next longer"]["tries"] == 4
    unrecovered = tables["by-length"]["perplexity by length"]["not recovered"][str(LENGTH)]
    assert unrecovered == pytest.approx(perplexity(final, trained_with, LENGTH), rel=2e-3)
    second_pi = trained_with.with_values(rescale=tuple(2 * each for each in trained_with.rescale))
    assert tables["by-length"]["perplexity by length"]["second pi"][str(8 * LENGTH)] == pytest.approx(
        perplexity(final, second_pi, 8 * LENGTH), rel=2e-3
    )
    # Of a model that has learned nothing all rows are worth the same: what was measured under which is told by its key.
    keys = [line["key"] for line in read_lines(state / "values.jsonl")]
    rows = {"fine-tuned": trained_with, "ours": table.row_for(4 * LENGTH)}
    for name, row in (rows | {"trained with": rows["fine-tuned"], "searched anew": rows["ours"]}).items():
        assert any(f" {name} {4 * LENGTH} {row.key} " in key for key in keys), name
    assert rows["fine-tuned"].key != rows["ours"].key
    mixed = load_model(str(state / "mixed-512" / "checkpoint"), options)
    short = perplexity(mixed, mixed.meaning.row_for(LENGTH), LENGTH)
    assert values["short window after mixed windows to 4x / base"] == pytest.approx(short / at_original, rel=2e-3)


def _window(made: Path, loaded: Any) -> Window:
    """The window of the test documents that figures are on, drawn as the reproduction draws it."""
    from longrope.documents import read_sources
    from longrope.windows import choose_windows

    (window,) = choose_windows(
        read_sources([str(made / "corpus" / "test")]), loaded.tokenizer, length=8 * LENGTH, count=1, seed=0
    )
    return window


def test_what_is_done_is_not_done_again_and_another_plan_is_something_else(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((made / "results" / "miniature-quick.json").read_text())
    for part in reproduce.PARTS:
        monkeypatch.setitem(reproduce.PARTS, part, lambda *_: pytest.fail("it is done"))
    command(made, "--parts", "all")
    after = json.loads((made / "results" / "miniature-quick.json").read_text())
    assert after == before
    assert reproduce.main(["--stages", "x.toml", "--documents", str(made / "corpus")]) == 2
    assert "--stages: got x.toml; it is named miniature.toml" in capsys.readouterr().err
    assert command(made, "--parts", "dance") == 2
    assert "--parts: got 'dance'; it is one of core" in capsys.readouterr().err
    assert reproduce.main(["--stages", str(made / "miniature.toml"), "--documents", str(made)]) == 2
    assert "without train; the documents are in train, validation and test" in capsys.readouterr().err


def test_tables_of_the_base_model_need_its_searches_alone_and_go_beside_parts_that_others_made(
    made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    shutil.copy(made / "miniature.toml", tmp_path)
    shutil.copytree(made / "state" / "miniature-quick" / "base", tmp_path / "state" / "miniature-quick" / "base")
    shutil.copytree(made / "results", tmp_path / "results")
    file = tmp_path / "results" / "miniature-quick.json"
    before = json.loads(file.read_text())
    command(tmp_path, "--parts", "without")
    stages = tmp_path / "state" / "miniature-quick" / "extend"
    assert [path.name for path in sorted(stages.glob("0*"))] == ["01-search-512"]
    after = json.loads(file.read_text())
    for name in ("figures", "tables"):
        assert after["parts"]["without"][name] == before["parts"]["without"][name], "the same searches again"
    assert {name: part for name, part in after["parts"].items() if name != "without"} == {
        name: part for name, part in before["parts"].items() if name != "without"
    }
    plan = (tmp_path / "miniature.toml").read_text().replace("attention_factor = 1.5", "attention_factor = 1.4")
    (tmp_path / "miniature.toml").write_text(plan)
    command(tmp_path, "--parts", "base", "--state", str(tmp_path / "other"))
    kept = ["base", "without", "nonuniform", "direct", "mixed", "mixed-longest"]
    assert list(json.loads(file.read_text())["parts"]) == kept, "of other recoveries what is made of the stages before"
    (tmp_path / "corpus" / "test" / "more.txt").write_text("another document")
    command(tmp_path, "--parts", "without", "--state", str(tmp_path / "new"))
    assert list(json.loads(file.read_text())["parts"]) == ["without"], "of other documents nothing is kept"


def test_a_committed_final_model_is_measured_where_it_is_of_the_same_stages(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    shutil.copy(made / "miniature.toml", tmp_path)
    state = tmp_path / "state" / "miniature-quick"
    shutil.copytree(made / "state" / "miniature-quick" / "base", state / "base")
    shutil.copytree(made / "results", tmp_path / "results")
    monkeypatch.setattr(setting, "MODELS", tmp_path / "models")
    assert command(tmp_path, "--parts", "by-length") == 2
    assert "this part measures the model at the end of all stages; make the core first: --parts core" in (
        capsys.readouterr().err
    )
    final = tmp_path / "models" / "miniature-quick-final"
    shutil.copytree(made / "state" / "miniature-quick" / "extend" / "checkpoint", final)
    trained = made / "state" / "miniature-quick" / "extend" / "02-finetune-512" / "factors.json"
    shutil.copy(trained, final / "trained.json")
    (final / "made_of.json").write_text(json.dumps({"made_of": "something else"}))
    assert command(tmp_path, "--parts", "by-length") == 2
    assert "miniature-quick-final is of another plan, other documents or another seed" in capsys.readouterr().err
    parts = read_lines(made / "state" / "miniature-quick" / "parts.jsonl")
    (final / "made_of.json").write_text(json.dumps({"made_of": parts[-1]["made_of"]}))
    file = tmp_path / "results" / "miniature-quick.json"
    recorded = json.loads(file.read_text())
    before = recorded["parts"].pop("by-length")["tables"]
    file.write_text(json.dumps(recorded))
    command(tmp_path, "--parts", "by-length")
    assert json.loads(file.read_text())["parts"]["by-length"]["tables"] == before
    made_at_8x = recorded["parts"]["nearer"]["tables"]["twice the fine-tuned length"]
    assert made_at_8x["searched"] == made_at_8x["of the target"], "of this plan the target is twice the trained length"
    table = FactorTable.load(final / "factors.json")
    *rows, last = table.rows
    replace(table, rows=(*rows, last.with_values(up_to=16 * LENGTH))).save(final / "factors.json")
    command(tmp_path, "--parts", "nearer")
    told = json.loads(file.read_text())["parts"]["nearer"]["tables"]["twice the fine-tuned length"]
    own = FactorTable.load(state / "nearer" / "factors.json").row_for(8 * LENGTH)
    assert own.vector == pytest.approx(np.maximum(own.vector, FactorTable.load(trained).rows[-1].vector))
    loaded = load_model(str(final), LoadOptions(device="cpu", threads=1))
    assert told["searched"] == pytest.approx(core.perplexity(loaded, own, [_window(made, loaded)]), rel=1e-6)
    for name in ("of the target", "pi", "ntk", "yarn"):
        assert told[name] == pytest.approx(made_at_8x[name], rel=1e-6)
    assert not (state / "extend").exists(), "no stage was made"


def test_the_committed_final_model_has_the_plans_rows_and_finds_the_passkeys_that_are_recorded() -> None:
    folder = setting.MODELS / "miniature-final"
    loaded = load_model(str(folder), LoadOptions(device="cpu", threads=1))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert [row.up_to for row in loaded.meaning.rows] == [256, 512, 16384, 131072]
    assert FactorTable.load(folder / "trained.json").row_for(16384) != loaded.meaning.row_for(16384)
    recorded = json.loads((common.RESULTS / "miniature.json").read_text())["parts"]["retrieval"]["tables"]
    shares = {length: share for length, share, _ in recorded["passkeys of other prompts found"]}
    for length in (512, 1024):  # rows of recoveries, the second of which serves up to 16k
        with loaded.patch() as patch:
            patch.install(loaded.meaning.row_for(length))
            found = passkey(loaded, length, tries=40, seed=1)
        assert found.value == pytest.approx(shares[length], abs=0.1), "the same prompts; a processor's roundings differ"


def test_a_window_in_pieces_has_the_same_tokens() -> None:
    window = Window("text", "hash", 100, np.array([7, *range(1000, 1020)]))
    pieces = cut([window], 6)
    assert [list(piece.ids) for piece in pieces] == [
        [7, *range(1000 + 5 * number, 1005 + 5 * number)] for number in range(4)
    ]
    assert [piece.start for piece in pieces] == [100, 105, 110, 115]
    assert cut([window], 21)[0].ids.tolist() == window.ids.tolist()
