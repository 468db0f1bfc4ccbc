"""Passkey: what its prompts hold, that found is what greedy decoding writes, and the measure built on both."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byte_tokenizer import BOS
from commands import longrope, write_checkpoint
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.evaluate.intervals import share_interval
from longrope.evaluate.measures import Measure
from longrope.evaluate.passkey import PasskeyMeasure, passkey
from longrope.evaluate.templates import PAPER, SHORT, PasskeyTemplate
from longrope.model import LoadedModel, load_model

FLOAT32 = LoadOptions(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def small(ground: Path) -> LoadedModel:
    return load_model(str(ground / "model"), FLOAT32)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", FLOAT32)


# Prompts


def prompts_of(loaded: LoadedModel, length: int, tries: int, **options: Any) -> tuple[list[list[int]], Any]:
    """The token ids that `passkey` runs through the model, and what it returns."""
    seen: list[list[int]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.extend(kwargs["input_ids"].tolist())

    hook = loaded.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        return seen, passkey(loaded, length, tries=tries, **options)
    finally:
        hook.remove()


@pytest.mark.parametrize(("length", "template"), [(112, SHORT), (256, SHORT), (1023, SHORT), (1024, PAPER)])
def test_a_prompt_has_the_length_asked_for_and_holds_its_key_at_its_depth(
    small: LoadedModel, length: int, template: Any
) -> None:
    tries = 4
    prompts, retrieval = prompts_of(small, length, tries, seed=3)
    assert len(prompts) == retrieval.tries == tries
    keys = set()
    for index, (prompt, depth) in enumerate(zip(prompts, retrieval.depths, strict=True)):
        assert len(prompt) == length
        assert prompt[0] == BOS
        text = bytes(prompt[1:]).decode()
        key = text[-5:]
        assert key.isdecimal()
        keys.add(key)
        statement = template.statement.format(key=key)
        before, found, after = text.partition(statement)
        assert found
        assert before.startswith(template.intro)
        assert after.endswith(f"{template.question}{template.lead} {key}")
        assert text.count(key) == 3, "twice in its statement, and in the answer"
        filler = before.removeprefix(template.intro) + after.removesuffix(f"{template.question}{template.lead} {key}")
        assert filler == (template.filler * 20)[: len(filler)]
        assert len(before.removeprefix(template.intro)) == int(depth * len(filler))
        assert index / tries <= depth < (index + 1) / tries
    assert len(keys) == tries


def test_the_seed_fixes_keys_and_depths(small: LoadedModel) -> None:
    first, again, other = (prompts_of(small, 256, 3, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("length", [200, 256, 1024])
def test_a_key_counts_as_found_exactly_when_greedy_decoding_writes_it(tiny: LoadedModel, length: int) -> None:
    prompts, retrieval = prompts_of(tiny, length, 6)
    written = []
    for prompt in prompts:
        ids = torch.tensor([prompt[:-6]])  # the answer is a space and five digits
        out = tiny.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=258
        )
        written.append(out[0, -6:].tolist() == prompt[-6:])
    assert retrieval.found.tolist() == written
    assert retrieval.value == sum(written) / 6
    assert retrieval.ci == share_interval(sum(written) / 6, 6)


def test_random_weights_find_no_key(small: LoadedModel) -> None:
    retrieval = passkey(small, 150, tries=5)
    assert (retrieval.value, retrieval.found.tolist()) == (0.0, [False] * 5)


def test_passkey_on_the_command_line_is_that_of_the_library(ground: Path, small: LoadedModel) -> None:
    command = ["evaluate", "passkey", ground / "model", "--lengths", "128,192", "--tries", 3, "--dtype", "float32"]
    document = longrope(*command, "--json").document
    expected = [passkey(small, length, tries=3) for length in (128, 192)]
    assert [result["value"] for result in document["results"]] == [each.value for each in expected]
    assert [result["tokens"] for result in document["results"]] == [3 * 128, 3 * 192]
    assert [tuple(result["ci"]) for result in document["results"]] == [each.ci for each in expected]


# The measure


def test_the_measure_is_the_function_item_by_item(tiny: LoadedModel) -> None:
    measure: Measure = PasskeyMeasure(tries=12, seed=5)
    items = measure.items(tiny, 400)
    records = [measure.run(tiny, [item])[0] for item in items]
    retrieval = passkey(tiny, 400, tries=12, seed=5)
    assert [record["found"] for record in records] == retrieval.found.tolist()
    assert [record["depth"] for record in records] == retrieval.depths.tolist()
    summary = measure.summarize(400, json.loads(json.dumps(records)))
    assert (summary.value, summary.tokens, summary.ci) == (retrieval.value, 12 * 400, retrieval.ci)
    assert measure.name == "passkey"


def test_how_many_prompts_come_together_changes_no_record(tiny: LoadedModel) -> None:
    measure = PasskeyMeasure(tries=20)
    items = measure.items(tiny, 280)
    whole = measure.run(tiny, items)
    assert [*measure.run(tiny, items[:3]), *measure.run(tiny, items[3:])] == whole
    assert any(record["found"] for record in whole)


def test_deciles_count_the_tries_between_their_ends() -> None:
    depths = [0.0, 0.05, 0.1, 0.55, 0.599, 0.99]
    records = [{"depth": depth, "found": index % 2 == 0} for index, depth in enumerate(depths)]
    summary = PasskeyMeasure(tries=6).summarize(100, records)
    share = {0: (0.5, 2), 1: (1.0, 1), 5: (0.5, 2), 9: (0.0, 1)}
    rows = [[decile / 10, (decile + 1) / 10, *share.get(decile, (None, 0))] for decile in range(10)]
    assert summary.details == {"by_depth": rows}
    assert summary.value == 0.5
    assert summary.ci == share_interval(0.5, 6)


def test_ten_tries_have_one_in_each_decile(small: LoadedModel) -> None:
    items = PasskeyMeasure().items(small, 200)
    assert [int(item.data["depth"] * 10) for item in items] == list(range(10))
    assert [item.key for item in items] == [str(index) for index in range(10)]


def test_items_and_the_measure_go_through_pickle(small: LoadedModel) -> None:
    measure = PasskeyMeasure(tries=2, template=PAPER)
    again = pickle.loads(pickle.dumps(measure))
    assert again == measure
    for item, other in zip(measure.items(small, 512), pickle.loads(pickle.dumps(again.items(small, 512))), strict=True):
        assert (item.key, item.data) == (other.key, other.data)
        assert np.array_equal(item.ids, other.ids)


def test_settings_say_what_the_results_depend_on() -> None:
    plain = PasskeyMeasure().settings
    assert plain == {"tries": 10, "seed": 0, "chat": False, "template": None}
    other = [PasskeyMeasure(tries=3), PasskeyMeasure(seed=1), PasskeyMeasure(chat=True), PasskeyMeasure(template=SHORT)]
    for measure in other:
        assert json.loads(json.dumps(measure.settings)) == measure.settings != plain


def test_a_window_that_the_prompt_does_not_fit_is_told_the_least_that_does(small: LoadedModel) -> None:
    question = f"{SHORT.question}{SHORT.lead} 12345"
    least = 1 + len(SHORT.statement.format(key=12345)) + len(question)
    message = (
        rf"^passkey: got a window of {least - 1} tokens; the prompt without filler takes {least}; "
        rf"measure at {least} tokens or more$"
    )
    with pytest.raises(UserError, match=message):
        PasskeyMeasure().items(small, least - 1)
    assert {len(item.ids) for item in PasskeyMeasure().items(small, least)} == {least}


GERMAN = PasskeyTemplate(
    intro="",
    filler="Das Gras ist grün. ",
    statement="Der Code ist {key}. ",
    question="\nWie ist der Code? ",
    answer="{key}!",
)


def test_a_template_of_another_language_words_the_prompt(small: LoadedModel) -> None:
    for item in PasskeyMeasure(tries=3, template=GERMAN).items(small, 300):
        text = bytes(item.ids[1:].tolist()).decode(errors="replace")
        key = text[-6:-1]
        assert key.isdecimal()
        assert text.count(f"Der Code ist {key}. ") == 1
        assert text.endswith(f"\nWie ist der Code? {key}!")
        assert text.count("Das Gras ist grün. ") > 5
        assert item.data["answer"] == 6
