"""The study of non-uniformity: what it measures, and that its figures are those of the factors it names."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from commands import SHAPE, TARGET, table, write_checkpoint
from longrope.baselines import attention_factor, ntk
from longrope.checkpoint import LoadOptions
from longrope.documents import read_sources
from longrope.errors import UserError
from longrope.evaluate.nonuniformity import START_TOKENS, Entry, collect, rows, studies
from longrope.evaluate.perplexity import measure
from longrope.model import LoadedModel, load_model
from longrope.windows import Window, choose_windows
from models import ORIGINAL

RATIO = TARGET / ORIGINAL
ONES, STRETCHED = (1.0,) * 8, (RATIO,) * 8


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of 8 pairs."""
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("model"))), LoadOptions(dtype="float32"))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """A model of 32 pairs, trained."""
    return load_model("tiny", LoadOptions(dtype="float32"))


def of(lines: Sequence[Entry], study: str) -> list[Entry]:
    return [entry for entry in lines if entry.study == study]


def test_groups_are_a_partition_of_the_pairs(tiny: LoadedModel, small: LoadedModel) -> None:
    places = [entry.place for entry in of(studies(tiny, 1024), "groups")]
    assert places == [(first, first + 3) for first in range(0, 32, 4)]
    assert [entry.place for entry in of(studies(small, TARGET, groups=3), "groups")] == [(0, 2), (3, 5), (6, 7)]
    assert len(of(studies(small, TARGET), "groups")) == 8


def test_a_group_is_stretched_alone_or_left_alone(small: LoadedModel) -> None:
    entry = of(studies(small, TARGET, groups=4), "groups")[1]
    only, without = entry.factors.values()
    assert list(entry.factors) == ["only pairs 2-3", "all but pairs 2-3"]
    assert only.rescale == (1, 1, RATIO, RATIO, 1, 1, 1, 1)
    assert without.rescale == (RATIO, RATIO, 1, 1, RATIO, RATIO, RATIO, RATIO)
    assert {row.attention_factor for row in entry.factors.values()} == {1.0}


def test_start_tokens_and_attention_factors(small: LoadedModel) -> None:
    lines = studies(small, TARGET, table=table())
    kept = [count for count in START_TOKENS if count < TARGET]
    assert kept == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    starts = of(lines, "start_tokens")
    assert [entry.place for entry in starts] == [(n, name) for name in ("pi", "ntk", "factors") for n in kept]
    for entry in starts:
        ((_, row),) = entry.factors.items()
        expected = {"pi": STRETCHED, "ntk": tuple(ntk(SHAPE, RATIO)), "factors": table().rows[-1].rescale}
        assert row.start_tokens == entry.place[0]
        assert row.rescale == pytest.approx(expected[str(entry.place[1])])
    attention = of(lines, "attention")
    assert len(attention) == 9
    for entry in attention:
        ((_, row),) = entry.factors.items()
        assert row.attention_factor == attention_factor(str(entry.place[0]), RATIO, ORIGINAL)


def test_the_same_factors_are_measured_once(small: LoadedModel) -> None:
    lines = studies(small, TARGET)
    wanted = rows(lines)
    assert len({row.key for row in wanted.values()}) == len(wanted)
    assert {row.key for row in wanted.values()} == {row.key for entry in lines for row in entry.factors.values()}
    assert wanted["none"].rescale == ONES
    assert wanted["pi"].rescale == STRETCHED
    assert not {"pi, 0 start tokens", "pi, attention factor none"} & set(wanted)  # PI by another name
    assert list(wanted)[:3] == ["none", "pi", "only pairs 0-0"]
    # of one group, only it is PI and all but it is none
    assert len(rows(studies(small, TARGET, groups=1))) == len(wanted) - 16


def test_each_figure_stands_where_its_factors_do(small: LoadedModel) -> None:
    lines = studies(small, TARGET, groups=4)
    wanted = rows(lines)
    made_up = {label: float(number) for number, label in enumerate(wanted, 1)}
    details = collect(lines, made_up)
    assert list(details) == ["whole", "groups", "start_tokens", "attention"]
    assert details["whole"] == [["none", 1.0], ["pi", 2.0]]
    assert details["groups"] == [[0, 1, 3.0, 4.0], [2, 3, 5.0, 6.0], [4, 5, 7.0, 8.0], [6, 7, 9.0, 10.0]]
    assert details["start_tokens"][:2] == [[0, "pi", 2.0], [1, "pi", 11.0]]
    assert details["attention"][0] == ["none", "pi", 2.0]
    assert ["none", "ntk", made_up["ntk, 0 start tokens"]] in details["attention"]
    assert collect(lines, made_up | {"none": math.inf})["whole"][0] == ["none", None]
    assert json.loads(json.dumps(details)) == details


def test_its_figures_on_tiny_are_those_of_the_factors(tiny: LoadedModel, tmp_path: Path) -> None:
    target, windows = 1024, _windows(tiny, tmp_path, 1024)
    lines = studies(tiny, target, groups=2)
    chosen = {label: row for label, row in rows(lines).items() if "start" not in label and "attention" not in label}
    assert list(chosen) == ["none", "pi", "only pairs 0-15", "all but pairs 0-15"]
    values = dict.fromkeys(rows(lines), math.nan)
    with tiny.patch() as patch:
        for label, row in chosen.items():
            patch.install(row)
            values[label] = measure(tiny, windows).value
        patch.install(tiny.baseline("pi", target))
        of_pi = measure(tiny, windows).value
        patch.install(None)
        as_it_is = measure(tiny, windows).value
    details = collect(lines, values)
    assert details["whole"] == [["none", as_it_is], ["pi", of_pi]]
    (_, _, only_fast, all_but_fast), (_, _, only_slow, all_but_slow) = details["groups"]
    assert (only_fast, all_but_fast) == (all_but_slow, only_slow)  # of two groups
    # What the paper found: fast pairs are better left alone, slow ones have to be interpolated.
    assert isinstance(only_fast, float)
    assert isinstance(only_slow, float)
    assert only_slow < min(as_it_is, of_pi) < only_fast


def _windows(loaded: LoadedModel, folder: Path, length: int) -> list[Window]:
    rng = np.random.default_rng(0)
    for index in range(2):
        words = rng.choice(["import", "def", "return", "self", "rope", "(", ")", ":", "\n    ", "value"], 900)
        (folder / f"{index}.txt").write_text(" ".join(words))
    documents = read_sources([str(folder)], tokenizer=loaded.tokenizer)
    return choose_windows(documents, loaded.tokenizer, length=length, count=2, seed=0)


def test_a_checkpoint_trained_with_a_scaling_keeps_it(tmp_path: Path) -> None:
    linear = load_model(str(write_checkpoint(tmp_path, "llama-linear")), LoadOptions(dtype="float32"))
    assert set(linear.trained.rescale) == {4.0}
    lines = studies(linear, 2 * linear.rope.original_length, groups=8)
    only, without = of(lines, "groups")[7].factors.values()
    assert only.rescale == (4.0,) * 7 + (8.0,)
    assert without.rescale == (8.0,) * 7 + (4.0,)


@pytest.mark.parametrize(
    ("target", "groups", "expected"),
    [
        (ORIGINAL, None, f"--lengths: got {ORIGINAL}; what stretches nothing shows nothing"),
        (TARGET, 9, "--groups: got 9; the model has 8 pairs"),
        (TARGET, 0, "--groups: got 0;"),
    ],
)
def test_refused(small: LoadedModel, target: int, groups: int | None, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        studies(small, target, groups=groups)


def test_a_table_that_ends_before_the_target_is_refused(small: LoadedModel) -> None:
    with pytest.raises(UserError, match=f"got {2 * TARGET} tokens; the factor table ends at {TARGET}"):
        studies(small, 2 * TARGET, table=table())
