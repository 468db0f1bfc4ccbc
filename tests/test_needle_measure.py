"""Needle as a measure: what its prompts hold at every depth, how they are scored, and their heat map."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from byte_tokenizer import BOS
from commands import write_checkpoint
from longrope.checkpoint import LoadOptions, model_source
from longrope.documents import Document
from longrope.errors import UserError
from longrope.evaluate.intervals import share_interval
from longrope.evaluate.measures import Measure
from longrope.evaluate.needle import NeedleMeasure
from longrope.evaluate.templates import NEEDLE, SHORT_NEEDLE, NeedleTemplate
from longrope.model import LoadedModel, load_model

FLOAT32 = LoadOptions(device="cpu", dtype="float32")
WORDS = "the of and a to in that was he it his her with as had on at by which she not but from".split()


def prose(seed: int, words: int = 900) -> str:
    return " ".join(WORDS[i] for i in np.random.default_rng(seed).integers(len(WORDS), size=words))


DOCUMENTS = tuple(Document(f"{seed}.txt", prose(seed)) for seed in range(5))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("small") / "model")), FLOAT32)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", FLOAT32)


def text_of(ids: Any) -> str:
    return bytes(ids[1:].tolist()).decode()


@pytest.mark.parametrize(("length", "template"), [(300, SHORT_NEEDLE), (1023, SHORT_NEEDLE), (1024, NEEDLE)])
def test_a_prompt_is_the_documents_text_with_the_needle_at_its_depth(
    small: LoadedModel, length: int, template: NeedleTemplate
) -> None:
    measure: Measure = NeedleMeasure(DOCUMENTS, depths=5, tries=2, seed=3)
    items = measure.items(small, length)
    assert [item.data["depth"] for item in items] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    assert [item.key for item in items] == [f"{depth}/{attempt}" for depth in range(5) for attempt in range(2)]
    by_hash = {document.sha256: document.text for document in DOCUMENTS}
    spans: dict[str, set[str]] = {}
    for item in items:
        assert (len(item.ids), item.ids[0]) == (length, BOS)
        text = text_of(item.ids)
        number = text[-7:]
        key = text.rsplit("For ", 1)[1].split(" the magic")[0]
        end = (template.question + template.lead).format(key=key) + f" {number}"
        assert text.startswith(template.intro)
        assert text.endswith(end)
        body = text[len(template.intro) : -len(end)]
        before, after = body.split(template.needle.format(key=key, number=number))
        assert before + after in by_hash[item.data["document"]]
        assert len(before) == int(item.data["depth"] * len(before + after))
        assert item.data["answer"] == 8, "a space and seven digits"
        assert key in template.names
        spans.setdefault(item.key.split("/")[1], set()).add((before + after)[:100])
    assert [len(starts) for starts in spans.values()] == [1, 1], "a try has one text at all depths"
    assert len({text_of(item.ids)[-7:] for item in items}) == 10


KNOWN_TO_TINY = NeedleTemplate(
    intro="",
    needle="\n{key}! The pass key is {number}. Remember it. {number} is the pass key.\n",
    question="\n{key}! What is the pass key?",
    lead=" The pass key is",
)


@pytest.mark.parametrize(("template", "finds"), [(None, False), (KNOWN_TO_TINY, True)])
def test_it_is_scored_as_greedy_decoding_writes_and_as_plain_transformers_finds_likely(
    tiny: LoadedModel, template: NeedleTemplate | None, finds: bool
) -> None:
    measure = NeedleMeasure(DOCUMENTS, depths=3, tries=2, digits=5, template=template)
    items = measure.items(tiny, 256)
    records = measure.run(tiny, items)
    model: Any = AutoModelForCausalLM.from_pretrained(model_source("tiny"), dtype=torch.float32)
    model.eval()
    for item, record in zip(items, records, strict=True):
        ids, size = torch.from_numpy(item.ids[None]), item.data["answer"]
        written = model.generate(
            ids[:, :-size],
            attention_mask=torch.ones_like(ids[:, :-size]),
            max_new_tokens=size,
            do_sample=False,
            pad_token_id=258,
        )
        assert record["found"] == bool((written[0, -size:] == ids[0, -size:]).all())
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].double().log_softmax(-1)
        expected = -float(scores[torch.arange(255), ids[0, 1:]][-size:].sum())
        assert record["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert record["depth"] == item.data["depth"]
    assert any(record["found"] for record in records) == finds


def test_how_many_prompts_come_together_changes_no_record(tiny: LoadedModel) -> None:
    measure = NeedleMeasure(DOCUMENTS, depths=3, tries=2)
    items = measure.items(tiny, 300)
    whole = measure.run(tiny, items)
    assert [measure.run(tiny, [item])[0] for item in items] == whole
    assert [*measure.run(tiny, items[:2]), *measure.run(tiny, items[2:])] == whole


def test_the_heat_map_has_a_row_a_depth() -> None:
    records = [
        {"depth": 0.0, "found": True, "loss": 0.5},
        {"depth": 0.0, "found": False, "loss": 2.5},
        {"depth": 1.0, "found": True, "loss": 0.25},
        {"depth": 1.0, "found": True, "loss": None},
    ]
    measure = NeedleMeasure(DOCUMENTS, depths=2, tries=2)
    summary = measure.summarize(500, json.loads(json.dumps(records)))
    assert summary.details == {"by_depth": [[0.0, 0.5, 2, 1.5], [1.0, 1.0, 2, None]]}
    assert (summary.value, summary.tokens, summary.ci) == (0.75, 2000, share_interval(0.75, 4))
    assert measure.name == "needle"


def test_a_single_depth_is_the_middle(small: LoadedModel) -> None:
    assert [item.data["depth"] for item in NeedleMeasure(DOCUMENTS, depths=1).items(small, 300)] == [0.5] * 3


def test_the_seed_fixes_prompts_and_names_and_order_of_documents_do_not(small: LoadedModel) -> None:
    renamed = tuple(Document(f"other {each.name}", each.text) for each in reversed(DOCUMENTS))
    sets = [NeedleMeasure(DOCUMENTS), NeedleMeasure(renamed), NeedleMeasure(DOCUMENTS, seed=1)]
    first, same, other = ([item.ids.tolist() for item in measure.items(small, 400)] for measure in sets)
    assert first == same
    assert len(first) == 30
    assert all(ids not in first for ids in other)


def test_items_and_the_measure_go_through_pickle(small: LoadedModel) -> None:
    measure = NeedleMeasure(DOCUMENTS, depths=2, tries=1, template=NEEDLE)
    again = pickle.loads(pickle.dumps(measure))
    assert again == measure
    for item, other in zip(measure.items(small, 600), pickle.loads(pickle.dumps(again.items(small, 600))), strict=True):
        assert (item.key, item.data, item.ids.tolist()) == (other.key, other.data, other.ids.tolist())


def test_settings_say_what_the_results_depend_on() -> None:
    plain = NeedleMeasure(DOCUMENTS).settings
    assert plain["documents"] == NeedleMeasure(DOCUMENTS[::-1]).settings["documents"]
    assert plain["documents"] != NeedleMeasure(DOCUMENTS[1:]).settings["documents"]
    counts = {"depths": 10, "tries": 3, "digits": 7, "seed": 0}
    assert plain == {**counts, "chat": False, "template": None, "documents": plain["documents"]}
    changes: list[dict[str, Any]] = [{"depths": 3}, {"tries": 1}, {"digits": 5}, {"seed": 2}, {"template": NEEDLE}]
    for change in changes:
        settings = NeedleMeasure(DOCUMENTS, **change).settings
        assert json.loads(json.dumps(settings)) == settings != plain


def test_a_window_that_the_prompt_does_not_fit_is_told_the_least_that_does(small: LoadedModel) -> None:
    measure = NeedleMeasure(DOCUMENTS)
    with pytest.raises(UserError, match=r"^needle: got a window of 100 tokens; the prompt without") as caught:
        measure.items(small, 100)
    least = int(caught.value.do.split()[2])
    assert caught.value.do == f"measure at {least} tokens or more"
    assert f"takes {least - 2};" in str(caught.value)
    assert len(measure.items(small, least)) == 30
    with pytest.raises(UserError, match=r"^needle: "):
        measure.items(small, least - 1)


def test_documents_that_are_too_short_are_told_what_the_prompt_takes(small: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"^documents: got 5 documents.* wanted: 3 windows \(a needle's prompt t"):
        NeedleMeasure(DOCUMENTS).items(small, 20_000)


def test_a_loss_that_is_not_finite_is_none(small: LoadedModel) -> None:
    measure = NeedleMeasure(DOCUMENTS, depths=1, tries=1)
    items = measure.items(small, 300)
    model: Any = small.model
    weight = model.get_output_embeddings().weight
    before = weight.detach().clone()
    try:
        weight.data.fill_(math.nan)
        (record,) = measure.run(small, items)
    finally:
        weight.data.copy_(before)
    assert record == {"depth": 0.5, "found": False, "loss": None}
