"""A search on real (small) models: its windows, its seeds, its two rows, and what the checkpoint was before."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest

from longrope.baselines import baseline
from longrope.checkpoint import LoadOptions
from longrope.documents import Document
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel, load_model
from longrope.search.driver import SearchWindows, make_problem, search, without
from longrope.search.settings import SearchSettings
from models import ORIGINAL, build, save

TARGET = 8 * ORIGINAL


def load(name: str, folder: Path) -> LoadedModel:
    return load_model(str(save(build(name), folder / name)), LoadOptions(dtype="float32"))


def write_documents(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    letters = np.random.default_rng(seed).choice(list(string.ascii_lowercase + " "), size=(count, 3 * TARGET))
    for index, text in enumerate(letters):
        (folder / f"{index}.txt").write_text("".join(text))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("documents")
    return [write_documents(folder / "searched", 8, 0), write_documents(folder / "unseen", 8, 1)]


def test_a_search_writes_the_base_model_and_what_it_found(tmp_path: Path, sources: list[Path]) -> None:
    loaded = load("llama", tmp_path)
    searched, unseen = sources
    table = search(
        loaded, to=TARGET, documents=[str(searched)], unseen=[str(unseen)], out=tmp_path / "run", evaluations=20
    )
    assert table.lengths == [ORIGINAL, TARGET]
    assert (set(table.rows[0].rescale), table.rows[0].attention_factor) == ({1.0}, 1.0)
    assert list(table.rows[1].rescale) == sorted(table.rows[1].rescale)
    assert FactorTable.load(tmp_path / "run" / "factors.json") == table

    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    complete = [line["value"] for line in lines if line["value"] is not None and "unrounded" not in line["origin"]]
    assert min(complete) == table.provenance["value"]
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    ours = {result["windows"]: result["value"] for result in results if result["method"] == "longrope"}
    assert ours["search"] == pytest.approx(table.provenance["value"], rel=1e-9)
    assert set(ours) == {"search", "unseen"}


def seeds(loaded: LoadedModel, target: int = TARGET) -> dict[str, RopeFactors]:
    return dict(make_problem(loaded, SearchSettings(to=target, method="evolution"), SearchWindows([])).seeds)


@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope"])
def test_the_scaling_of_a_checkpoint_is_one_more_seed_and_its_short_row(tmp_path: Path, kind: str) -> None:
    loaded = load(f"llama-{kind}", tmp_path)
    own = loaded.own.row_for(loaded.own.rows[-1].up_to)
    assert np.allclose(seeds(loaded)["own"].vector, own.vector, atol=0.005)
    assert seeds(loaded)["pi"].rescale == (8.0,) * loaded.rope.shape.pairs  # the length before is known


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_a_scaling_that_is_switched_on_without_a_longer_window_is_not_multiplied_into_an_extension(
    tmp_path: Path, kind: str
) -> None:
    """As Qwen2.5's card says to: the longer window is the factor times the original one, which the weights know."""
    model = build(f"llama-{kind}", max_position_embeddings=ORIGINAL)
    loaded = load_model(str(save(model, tmp_path / "model")), LoadOptions(dtype="float32"))
    assert (loaded.rope.original_length, loaded.rope.max_length) == (ORIGINAL, ORIGINAL)
    pairs = loaded.rope.shape.pairs
    assert loaded.trained.rescale == (1.0,) * pairs
    found = seeds(loaded)
    assert found["pi"].rescale == (8.0,) * pairs
    assert np.allclose(found["own"].vector, loaded.own.rows[-1].vector, atol=0.005)
    assert loaded.baseline("yarn", TARGET).rescale == baseline("yarn", loaded.rope.shape, TARGET).rescale


def test_a_linear_checkpoint_is_extended_from_what_it_was_trained_with(tmp_path: Path) -> None:
    model = build("llama-linear")
    factor = model.config.rope_parameters["factor"]
    loaded = load_model(str(save(model, tmp_path / "linear")), LoadOptions(dtype="float32"))
    length = loaded.rope.original_length
    assert length == model.config.max_position_embeddings  # the configuration names no length before scaling
    pairs = loaded.rope.shape.pairs
    found = seeds(loaded, 2 * length)
    assert found["own"].over(loaded.trained).rescale == (factor,) * pairs
    assert found["pi"].over(loaded.trained).rescale == (2 * factor,) * pairs
    assert loaded.baseline("pi", 2 * length).rescale == (2 * factor,) * pairs


def test_a_dynamic_scaling_outside_the_bounds_is_no_seed(tmp_path: Path) -> None:
    loaded = load("llama-dynamic", tmp_path)
    high = make_problem(loaded, SearchSettings(to=2 * ORIGINAL), SearchWindows([])).space.high
    own = loaded.own.rows[-1]
    assert ("own" in seeds(loaded, 2 * ORIGINAL)) == (max(own.rescale) <= high)


def test_a_checkpoint_of_ours_is_what_its_factors_say(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "ours")
    rows = (RopeFactors(ORIGINAL, (1.0,) * 8), RopeFactors(4 * ORIGINAL, tuple(1.0 + 0.25 * i for i in range(8))))
    FactorTable(500.0, 16, ORIGINAL, rows).save(folder / "factors.json")
    loaded = load_model(str(folder), LoadOptions(dtype="float32"))
    assert seeds(loaded)["own"].rescale == rows[1].rescale
    ignored = load_model(str(folder), LoadOptions(dtype="float32", own_factors=False))
    assert "own" not in seeds(ignored)
    assert ignored.fingerprint != loaded.fingerprint


def test_a_model_that_moved_is_the_same_model(tmp_path: Path) -> None:
    here = load("llama", tmp_path)
    moved = load_model(str((tmp_path / "llama").rename(tmp_path / "elsewhere")), LoadOptions(dtype="float32"))
    assert moved.fingerprint == here.fingerprint
    other = load_model(str(save(build("llama", rms_norm_eps=1e-3), tmp_path / "other")), LoadOptions(dtype="float32"))
    assert other.fingerprint != here.fingerprint


def test_documents_that_are_searched_on_are_not_judged_on() -> None:
    first, second, third = (Document(name, name * 9) for name in "abc")
    assert without([first, second], [second, third]) == [first]
    with pytest.raises(UserError, match=r"--unseen: got 1 document, all of them also in --documents; the search does"):
        without([Document("renamed", third.text)], [third])
