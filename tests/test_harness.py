"""lm-eval on a model with its factors: its own results with factors of 1, and every row under its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from commands import TARGET, table, write_checkpoint
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.evaluate.harness import harness, task_names
from longrope.evaluate.harness_model import RegimeModel
from longrope.factors import FactorTable, unscaled
from longrope.model import LoadedModel, load_model
from models import ORIGINAL

pytestmark = pytest.mark.filterwarnings("default")  # other people's, of which lm-eval imports many

_CHOICE = """
task: choice_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/choice.jsonl}, cache_dir: DATA/cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 2.0}
"""
_WRITE = """
task: write_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/write.jsonl}, cache_dir: DATA/cache}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""
_ROLL = """
task: roll_local
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/roll.jsonl}, cache_dir: DATA/cache}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: word_perplexity}]
metadata: {version: 1.0}
"""
TASKS = ("choice_local", "write_local", "roll_local")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks, one of each kind, with prompts on both sides of ORIGINAL tokens."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    words = "the rope turns every pair of numbers by an angle that grows with the position".split()

    def text(characters: int) -> str:
        return " ".join(rng.choice(words, characters))[:characters]

    lengths = [10, 20, 30, 60, 90, 120, 150, 15, 35, 70]
    write(
        folder / "choice.jsonl",
        [{"question": text(n), "choices": [" a", " b", " numbers"], "answer": int(rng.integers(3))} for n in lengths],
    )
    write(folder / "write.jsonl", [{"question": text(n), "answer": "rope"} for n in lengths])
    write(folder / "roll.jsonl", [{"text": text(n)} for n in (20, 40, 100, 180, 500)])
    for name, yaml in zip(TASKS, (_CHOICE, _WRITE, _ROLL), strict=True):
        (folder / f"{name}.yaml").write_text(yaml.replace("DATA", str(folder)))
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("model"))), LoadOptions(dtype="float32"))


def ones(model: LoadedModel, *lengths: int) -> FactorTable:
    shape = model.rope.shape
    rows = tuple(unscaled(shape.pairs, length) for length in lengths)
    return FactorTable(shape.rope_theta, shape.rotary_dim, shape.original_length, rows)


def lm_evals_own(model: LoadedModel, tasks: Path, max_length: int, batch_size: int) -> dict[str, dict[str, Any]]:
    """What lm-eval gives by itself."""
    own = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=max_length, batch_size=batch_size)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(own, tasks=list(TASKS), task_manager=manager)
    return dict(results["results"])


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_factors_of_1_give_lm_evals_own_results_exactly(name: str, loaded: LoadedModel, tasks: Path) -> None:
    model = loaded if name == "small" else load_model("tiny", LoadOptions(dtype="float32"))
    ours = harness(model, ones(model, ORIGINAL, TARGET), TASKS, include_path=tasks, batch_size=4)
    own = lm_evals_own(model, tasks, TARGET, 4)
    assert ours["tasks"].keys() == own.keys()
    for task, metrics in ours["tasks"].items():
        for metric, value in metrics.items():
            theirs = own[task][metric if "," in metric else f"{metric},none"]
            assert value == (None if theirs == "N/A" else theirs), (task, metric)
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= ours["tasks"]["choice_local"].keys()


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def prompt(characters: int, seed: int = 0) -> str:
    """Random letters, one token each; BOS is not among them."""
    return "".join(np.random.default_rng((seed, characters)).choice(list("abcdefgh "), characters)).strip()


@torch.no_grad()
def log_likelihood(model: LoadedModel, text: str, continuation: str) -> float:
    """Of a continuation, by a plain forward pass of one row under the table's row for its tokens but the last."""
    context, whole = model.tokenizer(text)["input_ids"], model.tokenizer(text + continuation)["input_ids"]
    with model.patch() as patch:
        patch.install(table().row_for(len(whole) - 1))
        logs = model.model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
    return float(sum(logs[place - 1, whole[place]] for place in range(len(context), len(whole))))


@pytest.mark.parametrize("batch_size", [None, 5])
def test_every_row_is_scored_under_its_own_factors(loaded: LoadedModel, batch_size: int | None) -> None:
    # A Llama's prompt and the end of the first row: 48 tokens are given, or 49.
    pairs = [(prompt(n, i), f" {prompt(m, i)}x") for i, (n, m) in enumerate([(9, 3), (90, 3), (40, 5), (150, 9)] * 3)]
    pairs += [("a" * (ORIGINAL - 4 + more), "bcde") for more in (0, 1, 2)]
    with loaded.patch() as patch:
        asked = RegimeModel(loaded, table(), patch, batch_size)
        answers = asked.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        lengths = [asked.length("loglikelihood", pair) for pair in pairs]
    assert min(lengths) < ORIGINAL < max(lengths)
    assert {ORIGINAL, ORIGINAL + 1} <= set(lengths)
    expected = [log_likelihood(loaded, *pair) for pair in pairs]
    assert [value for value, _ in answers] == pytest.approx(expected, rel=1e-5)


def test_every_prompt_is_continued_under_its_own_factors(loaded: LoadedModel) -> None:
    continued_as_alone(loaded)


def test_padding_is_a_token_that_the_model_has_weights_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    continued_as_alone(load_model(str(tmp_path), LoadOptions(dtype="float32")))


def continued_as_alone(loaded: LoadedModel) -> None:
    """Prompts of both regimes in one batch of 6 are continued as each is by itself under its own factors."""
    settings = {"until": ["\n"], "max_gen_toks": 12}
    prompts = [prompt(n) for n in (5, 30, 34, 40, 60, 100)]
    with loaded.patch() as patch:
        asked = RegimeModel(loaded, table(), patch, 6)
        together = asked.generate_until(requests("generate_until", [(each, settings) for each in prompts]), True)
        lengths = [asked.length("generate_until", (each, settings)) for each in prompts]
        apart = []
        for each, length in zip(prompts, lengths, strict=True):
            patch.install(table().row_for(length))
            ids = torch.tensor([loaded.tokenizer(each)["input_ids"]])
            written = cast(Any, loaded.model).generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
            apart.append(str(loaded.tokenizer.decode(written, skip_special_tokens=True)).split("\n")[0])
    assert together == apart
    assert [length <= ORIGINAL for length in lengths] == [True, True, True, False, False, False]


def test_a_whole_text_is_scored_in_windows_as_long_as_the_factors_reach(loaded: LoadedModel) -> None:
    texts = ["a rope", prompt(100), prompt(300)]
    with loaded.patch() as patch:
        asked = RegimeModel(loaded, table(), patch, None)
        answers = asked.loglikelihood_rolling(requests("loglikelihood_rolling", [(each,) for each in texts]), True)
    assert answers[:2] == pytest.approx([rolled(loaded, each) for each in texts[:2]], rel=1e-5)
    # two windows of TARGET tokens each, the second of which scores what the first left
    assert answers[2] == pytest.approx(rolled(loaded, texts[2]), rel=1e-5)


@torch.no_grad()
def rolled(model: LoadedModel, text: str) -> float:
    """The log-likelihood of every token of a text, of those beyond TARGET in a window that ends with the last."""
    end = model.tokenizer.bos_token_id
    ids = [end, *model.tokenizer.encode(text)]
    total, scored = 0.0, 1
    for stop in [*range(TARGET + 1, len(ids), TARGET), len(ids)]:
        window = ids[max(0, stop - TARGET - 1) : stop]
        with model.patch() as patch:
            patch.install(table().row_for(len(window) - 1))
            logs = model.model(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
        total += float(
            sum(logs[place - 1, window[place]] for place in range(len(window) - (stop - scored), len(window)))
        )
        scored = stop
    return total


def test_the_result_says_what_was_asked_and_how(loaded: LoadedModel, tasks: Path) -> None:
    result = harness(loaded, table(100), ["choice_local", "write_local"], include_path=tasks, limit=7, num_fewshot=0)
    assert json.loads(json.dumps(result)) == result
    assert result["limit"] == 7
    assert result["examples"] == {"choice_local": 7, "write_local": 7}
    assert result["num_fewshot"] == {"choice_local": 0, "write_local": 0}
    assert result["max_length"] == 100
    assert result["versions"]["lm_eval"] == lm_eval.__version__
    assert result["versions"]["tasks"] == {"choice_local": 2.0, "write_local": 1.0}
    # 10, 20, 30 characters fit into 48 tokens with their answers, 120 and 150 not into 100
    assert result["requests"]["choice_local"] == {"cut": 6, "rows": {"48": 9, "100": 12}}
    assert result["requests"]["write_local"] == {"cut": 2, "rows": {"48": 3, "100": 4}}


def test_its_value_is_the_mean_over_tasks_of_shares(loaded: LoadedModel, tasks: Path) -> None:
    found = harness(loaded, table(), list(TASKS), include_path=tasks)
    shares = [found["tasks"]["choice_local"]["acc"], found["tasks"]["write_local"]["exact_match"]]
    assert found["value"] == pytest.approx(sum(shares) / 2), "perplexity of roll_local is no share"
    assert harness(loaded, table(), ["roll_local"], include_path=tasks)["value"] is None
    (tasks / "both.yaml").write_text(
        "group: both\ntask: [choice_local, write_local]\naggregate_metric_list: [{metric: acc}]\n"
    )
    grouped = harness(loaded, table(), ["both"], include_path=tasks)
    assert grouped["groups"] == ["both"]
    assert grouped["value"] == pytest.approx(sum(shares) / 2)


def test_prompts_are_cut_where_it_is_said(loaded: LoadedModel, tasks: Path) -> None:
    longer, shorter = (
        harness(loaded, None, ["choice_local"], include_path=tasks, max_length=length) for length in (TARGET, ORIGINAL)
    )
    assert (longer["max_length"], longer["requests"]["choice_local"]["cut"]) == (TARGET, 0)
    assert shorter["requests"]["choice_local"]["cut"] > 0


def test_the_checkpoint_as_it_is(loaded: LoadedModel, tasks: Path) -> None:
    as_it_is = harness(loaded, None, ["roll_local"], include_path=tasks, batch_size=2)
    scaled = harness(loaded, ones(loaded, ORIGINAL), ["roll_local"], include_path=tasks, batch_size=2)
    assert as_it_is["tasks"] == scaled["tasks"]
    assert as_it_is["requests"]["roll_local"] == {"cut": 0, "rows": {"none": 5}}


def test_answers_that_are_kept_are_not_computed_again(loaded: LoadedModel, tasks: Path, tmp_path: Path) -> None:
    def run(names: tuple[str, ...]) -> tuple[dict[str, Any], int]:
        passes = []
        hook = loaded.model.register_forward_hook(lambda *_: passes.append(1))
        try:
            return harness(loaded, table(), names, include_path=tasks, answers=tmp_path / "answers"), len(passes)
        finally:
            hook.remove()

    _, of_one = run(TASKS[:1])
    first, of_others = run(TASKS)
    again, of_none = run(TASKS)
    assert of_one > 0
    assert of_others > 0
    assert of_none == 0
    assert again == first


def test_nothing_is_left_behind_and_nothing_printed(
    loaded: LoadedModel, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.arange(60)[None]
    before, padding = loaded.model(ids).logits, loaded.tokenizer.padding_side
    harness(loaded, table(), ["write_local", "roll_local"], include_path=tasks, limit=2)
    assert torch.equal(loaded.model(ids).logits, before)
    assert loaded.tokenizer.padding_side == padding
    assert capsys.readouterr().out == ""  # standard output is for --json


def test_names_of_tasks() -> None:
    known = ["arc_easy", "arc_challenge", "hellaswag", "mmlu", "mmlu_anatomy", "mmlu_law"]
    assert task_names(["mmlu_*", "hellaswag", "mmlu_law"], known) == ["mmlu_anatomy", "mmlu_law", "hellaswag"]
    assert said(lambda: task_names(["hellasswag"], known)) == (
        "--tasks: got 'hellasswag'; lm-eval and --include-path have no such task; did you mean hellaswag?"
    )
    assert "did you mean arc_easy" in said(lambda: task_names(["mmlu", "arc_esay"], known))
    assert said(lambda: task_names(["zzz"], known)).endswith("choose one that `lm-eval ls tasks` lists")
    assert said(lambda: task_names([], known)).startswith("--tasks: got none;")


def said(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit": 0}, "--limit: got 0;"),
        ({"limit": 2.5}, "--limit: got 2.5;"),
        ({"num_fewshot": -1}, "--num-fewshot: got -1;"),
        ({"batch_size": 0}, "--batch-size: got 0;"),
        ({"chat": True}, "which has none; its tokenizer has a chat template"),
        ({"include_path": "nowhere"}, "--include-path: got nowhere; it is a folder of tasks"),
    ],
)
def test_refused_options(loaded: LoadedModel, tasks: Path, options: dict[str, Any], expected: str) -> None:
    assert expected in said(lambda: harness(loaded, table(), ["roll_local"], **{"include_path": tasks} | options))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("choice.jsonl", "missing.jsonl"), "--tasks: got odd: "),
        (
            ("dataset_path: json", "dataset_path: nobody/nothing-of-this-name"),
            "a task needs its files and its data set",
        ),
        (("task: odd", "task: odd\nunsafe_code: true"), "odd, which runs code that the model writes"),
    ],
)
def test_refused_tasks(
    loaded: LoadedModel, tasks: Path, tmp_path: Path, changes: tuple[str, str], expected: str
) -> None:
    text = _CHOICE.replace("DATA", str(tasks)).replace("choice_local", "odd").replace(*changes)
    (tmp_path / "odd.yaml").write_text(text)
    assert expected in said(lambda: harness(loaded, table(), ["odd"], include_path=tmp_path))


def test_refused_lengths(loaded: LoadedModel) -> None:
    with loaded.patch() as patch:
        asked = RegimeModel(loaded, table(), patch, None)
        writing = requests("generate_until", [("a", {"max_gen_toks": TARGET})])
        assert f"writes up to {TARGET} tokens; prompt and answer fit into {TARGET}" in said(
            lambda: asked.generate_until(writing)
        )
        continuing = requests("loglikelihood", [("a", "b" * (TARGET + 1))])
        assert f"a continuation of {TARGET + 1} tokens; the factors end at {TARGET}" in said(
            lambda: asked.loglikelihood(continuing, disable_tqdm=True)
        )


def test_without_lm_eval(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert said(lambda: harness(loaded, table(), ["mmlu"])).endswith('pip install "longrope[harness]"')
