"""Perplexity as a measure: equal to what there was and to plain transformers, item by item, and by position."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from longrope.checkpoint import LoadOptions, model_source
from longrope.documents import read_sources
from longrope.errors import UserError
from longrope.evaluate.measures import Measure
from longrope.evaluate.perplexity import measure, measure_sliding
from longrope.evaluate.perplexity_measure import PerplexityMeasure, position_edges
from longrope.model import LoadedModel, load_model
from longrope.windows import Window, choose_windows, fingerprint

LENGTHS = (100, 256)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", LoadOptions(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def windows(tiny: LoadedModel) -> dict[int, list[Window]]:
    documents = read_sources(["stdlib"], share="unseen")
    return {length: choose_windows(documents, tiny.tokenizer, length=length, count=9, seed=0) for length in LENGTHS}


@pytest.fixture(scope="module")
def plain(windows: dict[int, list[Window]]) -> list[np.ndarray]:
    """Loss of every token but the first of each window of 256, by plain transformers, one window at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_source("tiny"), dtype=torch.float32)
    model.eval()
    losses = []
    with torch.no_grad():
        for window in windows[256]:
            scores = model(torch.from_numpy(window.ids[None])).logits[0, :-1].double().log_softmax(-1)
            losses.append(-scores[torch.arange(255), torch.from_numpy(window.ids[1:])].numpy())
    return losses


def one_by_one(found: Measure, loaded: LoadedModel, length: int) -> list[Any]:
    return [found.run(loaded, [item])[0] for item in found.items(loaded, length)]


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_exactly_what_measure_gives(tiny: LoadedModel, windows: dict[int, list[Window]], length: int) -> None:
    found: Measure = PerplexityMeasure(windows)
    records = found.run(tiny, found.items(tiny, length))
    summary = found.summarize(length, json.loads(json.dumps(records)))
    whole = measure(tiny, windows[length])
    assert (summary.value, summary.tokens, summary.ci) == (whole.value, whole.tokens, whole.ci)
    assert [record["loss"] for record in records] == whole.losses.tolist()
    assert found.name == "perplexity"


def test_it_is_that_of_a_plain_loop(
    tiny: LoadedModel, windows: dict[int, list[Window]], plain: list[np.ndarray]
) -> None:
    found = PerplexityMeasure(windows)
    summary = found.summarize(256, one_by_one(found, tiny, 256))
    assert summary.value == pytest.approx(math.exp(np.mean(plain)), rel=1e-5)


def test_how_many_windows_come_together_changes_no_record(tiny: LoadedModel, windows: dict[int, list[Window]]) -> None:
    found = PerplexityMeasure(windows)
    for length in LENGTHS:
        items = found.items(tiny, length)
        whole = found.run(tiny, items)
        assert [*found.run(tiny, items[:2]), *found.run(tiny, items[2:])] == whole
        assert one_by_one(found, tiny, length) == whole


def test_edges_are_powers_of_two_from_16_split_in_four() -> None:
    edges = [16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert position_edges(256) == edges
    assert position_edges(200) == edges[:-1]
    assert position_edges(192) == edges[:-2]
    assert position_edges(2) == position_edges(16) == [16]
    assert position_edges(2**21)[-5:] == [2**20, *(2**20 + 2**18 * part for part in (1, 2, 3, 4))]


def test_every_position_is_in_its_bucket(
    tiny: LoadedModel, windows: dict[int, list[Window]], plain: list[np.ndarray]
) -> None:
    found = PerplexityMeasure(windows)
    records = found.run(tiny, found.items(tiny, 256))
    edges = position_edges(256)
    for record, losses in zip(records, plain, strict=True):
        assert [upper for upper, _, _ in record["by_position"]] == edges
        for low, (upper, loss, count) in zip([1, *edges], record["by_position"], strict=False):
            assert count == upper - low
            assert loss == pytest.approx(losses[low - 1 : upper - 1].sum(), rel=1e-4)
        assert sum(count for _, _, count in record["by_position"]) == record["count"] == 255
        assert sum(loss for _, loss, _ in record["by_position"]) == pytest.approx(record["loss"], rel=1e-12)
    details = found.summarize(256, records).details["by_position"]
    means = [np.mean([losses[low - 1 : high - 1] for losses in plain]) for low, high in zip([1, *edges], edges)]  # noqa: B905
    assert [upper for upper, _ in details] == edges
    assert [value for _, value in details] == pytest.approx(np.exp(means), rel=1e-4)


def test_a_window_that_ends_inside_a_bucket_has_the_beginning_of_it(
    tiny: LoadedModel, windows: dict[int, list[Window]]
) -> None:
    found = PerplexityMeasure(windows)
    (record,) = found.run(tiny, found.items(tiny, 100)[:1])
    assert record["by_position"][-1][0::2] == [112, 4], "of 96 to 111 only 96 to 99"


def test_what_is_not_scored_is_in_no_bucket(tiny: LoadedModel, windows: dict[int, list[Window]]) -> None:
    [window, *_] = windows[100]
    answer = Window(window.document, window.sha256, 0, window.ids, scored_from=90)
    found = PerplexityMeasure({100: [answer]})
    (record,) = found.run(tiny, found.items(tiny, 100))
    assert [row[0::2] for row in record["by_position"]] == [[96, 6], [112, 4]]
    assert record["count"] == 10
    assert record["loss"] == measure(tiny, [answer]).losses[0]


@pytest.mark.parametrize(("length", "stride"), [(64, 16), (100, 99)])
def test_sliding_is_exactly_what_measure_sliding_gives(
    tiny: LoadedModel, windows: dict[int, list[Window]], length: int, stride: int
) -> None:
    documents = [
        Window(each.document, each.sha256, 0, each.ids[: 256 - index]) for index, each in enumerate(windows[256][:4])
    ]
    found = PerplexityMeasure({length: documents}, stride=stride)
    records = one_by_one(found, tiny, length)
    assert list(found.run(tiny, found.items(tiny, length))) == records
    summary = found.summarize(length, records)
    whole = measure_sliding(tiny, documents, length=length, stride=stride)
    assert (summary.value, summary.tokens, summary.ci) == (whole.value, whole.tokens, whole.ci)
    assert summary.details == {}
    assert set(records[0]) == {"loss", "count", "document"}


def test_a_stride_that_would_leave_tokens_out_is_refused(tiny: LoadedModel, windows: dict[int, list[Window]]) -> None:
    with pytest.raises(UserError, match=r"^--stride: got 100; a stride is between 1 and the window of 100 tokens"):
        PerplexityMeasure(windows, stride=100).items(tiny, 100)


def test_a_loss_that_is_not_finite_is_none_in_the_record_and_no_number_in_the_summary() -> None:
    found = PerplexityMeasure({})
    records: list[dict[str, Any]] = [
        {"loss": None, "count": 20, "document": "a", "by_position": [[16, 15.0, 15], [20, None, 5]]},
        {"loss": 40.0, "count": 20, "document": "b", "by_position": [[16, 15.0, 15], [20, 25.0, 5]]},
    ]
    summary = found.summarize(21, records)
    assert math.isnan(summary.value)
    assert summary.ci is None
    assert summary.details == {"by_position": [[16, math.e], [20, None]]}


def test_keys_are_those_of_the_texts_and_everything_goes_through_pickle(
    tiny: LoadedModel, windows: dict[int, list[Window]]
) -> None:
    found = PerplexityMeasure(windows, stride=None)
    again = pickle.loads(pickle.dumps(found))
    items = found.items(tiny, 256)
    assert [item.key for item in items] == [f"{window.sha256[:16]}@{window.start}" for window in windows[256]]
    assert [item.key for item in pickle.loads(pickle.dumps(items))] == [item.key for item in again.items(tiny, 256)]
    prints = {str(length): fingerprint(windows[length]) for length in LENGTHS}
    assert again.settings == found.settings == {"stride": None, "windows": prints}
    assert json.loads(json.dumps(found.settings)) == found.settings
