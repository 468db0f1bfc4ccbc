"""compare and evaluate give the figures that plain transformers gives, and their statistics are what they say."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from byte_tokenizer import BOS
from commands import TARGET, table, write_checkpoint, write_documents
from longrope.checkpoint import LoadOptions
from longrope.compare import compare
from longrope.errors import UserError
from longrope.evaluate.execute import Step
from longrope.evaluate.methods import Result
from longrope.evaluate.perplexity import measure, measure_sliding, perplexity_interval, sliding_spans, summarize
from longrope.evaluate.run import evaluate
from longrope.model import LoadedModel, load_model
from longrope.windows import Window
from models import ORIGINAL

FLOAT32 = LoadOptions(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def small(ground: Path) -> LoadedModel:
    return load_model(str(ground / "model"), FLOAT32)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", FLOAT32)


def stock(ground: Path, out: Path, **rope: Any) -> Any:
    """The checkpoint with another RoPE in its config.json, as plain transformers loads it."""
    shutil.copytree(ground / "model", out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": 500.0, **rope}
    config["max_position_embeddings"] = TARGET if rope else ORIGINAL
    path.write_text(json.dumps(config))
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return model.eval()


def windows_of(run: Path, texts: Path, length: int) -> list[list[int]]:
    """The windows that a run's config.json names, cut from the files: a token of these models is a byte."""
    named = json.loads((run / "config.json").read_text())["documents"]["unseen"]
    return [[BOS, *(texts / each["name"]).read_bytes()[each["start"] :][: length - 1]] for each in named]


@torch.no_grad()
def plain_perplexity(model: Any, windows: list[list[int]]) -> float:
    """The textbook's loop: one window at a time, labels shifted by hand, summed in float64."""
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        losses = -model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
        total, count = total + float(losses.sum()), count + len(losses)
    return math.exp(total / count)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}


@pytest.mark.parametrize(
    ("method", "rope"),
    [("none", {}), ("pi", LINEAR), ("yarn", YARN), ("llama3", LLAMA3)],
    ids=lambda value: str(value)[:8],
)
def test_a_method_has_the_perplexity_of_stock_transformers(
    ground: Path, small: LoadedModel, tmp_path: Path, method: str, rope: dict[str, Any]
) -> None:
    documents = [str(ground / "texts")]
    made = compare(small, lengths=[TARGET], documents=documents, methods=[method], windows=5, out=tmp_path / "run")
    windows = windows_of(tmp_path / "run", ground / "texts", TARGET)
    assert [len(window) for window in windows] == [TARGET] * 5
    expected = plain_perplexity(stock(ground, tmp_path / "stock", **rope), windows)
    (result,) = made["results"]
    assert result["value"] == pytest.approx(expected, rel=1e-5)
    assert (result["method"], result["length"], result["tokens"]) == (method, TARGET, 5 * (TARGET - 1))


def test_factors_are_a_table_a_path_several_or_several_by_name_and_methods_a_text(
    ground: Path, small: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "q4").mkdir()
    table().save(tmp_path / "q4" / "factors.json")
    table().save(tmp_path / "other.json")
    file = tmp_path / "other.json"

    def names(factors: Any, number: int) -> list[str]:
        common: dict[str, Any] = {"lengths": TARGET, "documents": str(ground / "texts"), "windows": 1}
        made = compare(small, methods="none, pi", factors=factors, out=tmp_path / str(number), **common)
        value = {each["method"]: each["value"] for each in made["results"]}
        found = [name for name in value if name not in ("none", "pi")]
        assert len(value) == len(found) + 2
        assert len({value[name] for name in found}) <= 1
        return found

    cases: list[tuple[Any, list[str]]] = [
        (str(tmp_path / "q4"), ["q4"]),
        (tmp_path / "q4", ["q4"]),
        (table(), ["factors"]),
        ([tmp_path / "q4", str(tmp_path / "q4" / "factors.json"), file, table()], ["q4", "q4-2", "other", "factors"]),
        ({"mine": str(tmp_path / "q4"), "yours": table()}, ["mine", "yours"]),
        ("none", []),
        (["none"], []),
        ({}, []),
    ]
    for number, (factors, expected) in enumerate(cases):
        assert sorted(names(factors, number)) == sorted(expected)
    with pytest.raises(UserError, match=r"^factors file: got .*nothing, which does not exist"):
        names(tmp_path / "nothing", len(cases))
    with pytest.raises(UserError, match=r"^factors: got a table named pi; "):
        names({"pi": file}, len(cases))


def test_methods_differ_and_are_measured_on_the_same_windows(ground: Path, small: LoadedModel, tmp_path: Path) -> None:
    methods = ["none", "pi", "ntk", "dynamic-ntk", "yarn", "yarn+su"]
    made = compare(
        small,
        lengths=[TARGET, ORIGINAL],
        documents=[str(ground / "texts")],
        methods=methods,
        factors={"found": table()},
        windows=3,
        out=tmp_path / "run",
    )
    order = [(result["method"], result["length"]) for result in made["results"]]
    assert order == [(method, length) for length in (ORIGINAL, TARGET) for method in [*methods, "found"]]
    values = {(result["method"], result["length"]): result["value"] for result in made["results"]}
    assert len({values[method, TARGET] for method in methods}) == len(methods)
    assert values["found", TARGET] == values["yarn", TARGET]
    assert values["found", ORIGINAL] == values["none", ORIGINAL], "its first row is all ones"
    assert values["dynamic-ntk", ORIGINAL] == values["none", ORIGINAL], "dynamic NTK leaves short sequences alone"
    for result in made["results"]:
        low, high = result["ci"]
        assert low <= result["value"] <= high


def test_every_method_is_told_apart_from_the_best_of_its_length_by_paired_differences(
    ground: Path, small: LoadedModel, tmp_path: Path
) -> None:
    methods = ["none", "pi", "yarn"]
    common: dict[str, Any] = {"documents": [str(ground / "texts")], "methods": methods, "factors": {"same": table()}}
    made = compare(small, lengths=[TARGET], windows=6, out=tmp_path / "run", **common)
    values = {result["method"]: result["value"] for result in made["results"]}
    best = min(values, key=lambda method: values[method])
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    losses = {method: [line["record"]["loss"] for line in lines if line["method"] == method] for method in values}
    for result in made["results"]:
        method, against = result["method"], result.get("against_best")
        if method == best:
            assert against is None
            continue
        assert against["method"] == best
        assert against["value"] == pytest.approx(values[method] / values[best] - 1)
        gaps = (np.array(losses[method]) - losses[best]) / (TARGET - 1)  # a window a document, six of them
        half = 2.5706 * gaps.std(ddof=1) / math.sqrt(6)
        assert against["ci"] == pytest.approx(np.expm1([gaps.mean() - half, gaps.mean() + half]).tolist(), rel=1e-4)
    assert values["same"] == values["yarn"], "one of the two is the other's equal, or both are behind the best"


def test_a_comparison_leaves_the_model_as_it_was(ground: Path, small: LoadedModel, tmp_path: Path) -> None:
    ids = torch.arange(TARGET)[None] % 256
    before = small.model(ids).logits
    compare(small, lengths=[96], documents=[str(ground / "texts")], methods=["pi"], windows=1, out=tmp_path / "run")
    assert torch.equal(small.model(ids).logits, before)


def test_evaluate_agrees_with_compare(ground: Path, small: LoadedModel, tmp_path: Path) -> None:
    common: dict[str, Any] = {"lengths": [TARGET], "documents": [str(ground / "texts")], "windows": 3}
    (compared,) = compare(small, methods=["none"], out=tmp_path / "run", **common)["results"]
    (evaluated,) = evaluate("perplexity", small, **common)["results"]
    assert evaluated == compared


def test_a_comparison_of_nothing_and_a_table_named_like_a_method_are_refused(
    ground: Path, small: LoadedModel, tmp_path: Path
) -> None:
    documents = [str(ground / "texts")]
    with pytest.raises(
        UserError, match=r"^compare: got 0 lengths, 1 methods and 0 tables; there is something to compare"
    ):
        compare(small, lengths=[], documents=documents, methods=["pi"], out=tmp_path / "run")
    with pytest.raises(
        UserError, match=r"^factors: got a table named pi; a table's name is none of the methods compared"
    ):
        compare(small, lengths=[96], documents=documents, methods=["pi"], factors={"pi": table()}, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"^lengths: got none; there is at least one; give lengths in tokens$"):
        evaluate("perplexity", small, lengths=[], documents=documents)
    known = "perplexity, passkey, needle, ruler, nonuniformity, harness"
    with pytest.raises(UserError, match=rf"^measure: got 'speed'; it is one of {known}; choose one of them$"):
        evaluate("speed", small, lengths=[96])
    assert not (tmp_path / "run").exists()


# Going on


def unfinished(run: Path, keep: int) -> None:
    """Make of a finished run one that was killed while it wrote its measurement number `keep`."""
    (run / "DONE").unlink()
    (run / "metrics.json").unlink()
    lines = (run / "results.jsonl").read_bytes().splitlines(keepends=True)
    (run / "results.jsonl").write_bytes(b"".join(lines[:keep]) + lines[keep][:-20])


@pytest.mark.parametrize("keep", [0, 3, 4])
def test_a_comparison_goes_on_after_its_last_whole_measurement(
    ground: Path, small: LoadedModel, tmp_path: Path, keep: int
) -> None:
    run = tmp_path / "run"
    steps: list[Step] = []
    common: dict[str, Any] = {"documents": [str(ground / "texts")], "windows": 2, "out": run, "on_step": steps.append}
    common |= {"lengths": [96, TARGET], "methods": ["none", "pi"], "factors": {"found": table()}}
    whole = compare(small, **common)
    files = {name: (run / name).read_bytes() for name in ("metrics.json", "results.jsonl")}
    order = [(method, length) for length in (96, TARGET) for method in ("none", "pi", "found")]
    left = [step.seconds_left for step in steps]
    assert left[0] is None
    assert all(seconds is not None and seconds >= 0 for seconds in left[1:])
    told = [(step.done, step.total, step.method, step.length) for step in steps]
    assert told == [(2 * index, 12, *each) for index, each in enumerate(order)]
    steps.clear()
    unfinished(run, keep)
    assert compare(small, **common) == whole
    assert {name: (run / name).read_bytes() for name in files} == files
    told = [(step.done, step.total, step.method, step.length) for step in steps]
    assert told == [(2 * index, 12, *order[index]) for index in range(keep // 2, 6)]


@pytest.mark.parametrize(
    ("kind", "options"), [("perplexity", {}), ("perplexity", {"stride": 64}), ("passkey", {"tries": 2})]
)
def test_an_evaluation_goes_on_after_its_last_whole_measurement(
    ground: Path, small: LoadedModel, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    steps: list[Step] = []
    common: dict[str, Any] = {"lengths": [128, TARGET], "out": run, "on_step": steps.append, **options}
    if kind == "perplexity":
        common |= {"documents": [str(ground / "texts")], "windows": 2}
    whole = evaluate(kind, small, **common)
    metrics = (run / "metrics.json").read_bytes()
    unfinished(run, 1)
    assert evaluate(kind, small, **common) == whole
    assert (run / "metrics.json").read_bytes() == metrics
    told = [(step.done, step.total, step.length) for step in steps]
    if "stride" in options:  # documents are done one by one
        assert told == [(0, 4, 128), (1, 4, 128), (2, 4, TARGET), (3, 4, TARGET), *told[1:4]]
    else:
        assert told == [(0, 4, 128), (2, 4, TARGET)] * 2, "the group that was cut is done again"


def test_a_value_that_is_not_finite_is_null() -> None:
    told = Result("pi", 96, math.nan, 95, None).to_dict()
    assert json.loads(json.dumps(told, allow_nan=False))["value"] is None


def test_documents_are_read_once_whatever_the_number_of_lengths(
    ground: Path, small: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read_text = Path.read_text

    def counted(path: Path, *args: Any, **options: Any) -> str:
        opened.append(path.name)
        return read_text(path, *args, **options)

    common: dict[str, Any] = {"lengths": [96, 128, TARGET], "documents": [str(ground / "texts")], "windows": 1}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", counted)
        compare(small, methods=["none"], out=tmp_path / "run", **common)
        evaluate("perplexity", small, **common)
        evaluate("perplexity", small, stride=64, **common)
    texts = [name for name in opened if name.endswith(".txt")]
    assert sorted(texts) == sorted([f"{index}.txt" for index in range(6)] * 3)


# Memory


@contextmanager
def memory_for(loaded: LoadedModel, tokens: int) -> Iterator[list[int]]:
    """A device on which a forward pass of more tokens runs out of memory; the passes tried, by tokens."""
    tried: list[int] = []

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "forward" in vars(module):  # the model's tail asks it again for outputs that are there
            return
        tried.append(kwargs["input_ids"].numel())
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("out of memory")

    model: Any = loaded.model
    hook = model.get_decoder().register_forward_pre_hook(refuse, with_kwargs=True)
    before = loaded.batch_tokens
    try:
        yield tried
    finally:
        hook.remove()
        loaded.batch_tokens = before


def some_windows(count: int, length: int) -> list[Window]:
    rng = np.random.default_rng(0)
    return [Window(str(index), str(index), 0, rng.integers(0, 256, length)) for index in range(count)]


def test_a_batch_that_fills_the_memory_is_halved_once_for_all_later_calls(small: LoadedModel) -> None:
    windows = some_windows(12, 50)
    expected = measure(small, windows).value
    with memory_for(small, 200) as tried:
        assert measure(small, windows).value == pytest.approx(expected, rel=1e-6)
        assert tried == [600, 300, 150, 150, 150, 150]
        assert small.batch_tokens == 150
        tried.clear()
        assert measure(small, windows).value == pytest.approx(expected, rel=1e-6)
        assert tried == [150] * 4


def test_a_window_that_never_fits_is_told_with_a_length_that_does(small: LoadedModel) -> None:
    rule = "one window must fit into the device's memory; use at most 48 tokens here"
    (document,) = some_windows(1, 500)
    with memory_for(small, 60):
        with pytest.raises(UserError, match=rf"^memory: got a window of 192 tokens; {rule}"):
            measure_sliding(small, [document], length=192, stride=64)
        with pytest.raises(UserError, match=rf"^memory: got a window of 192 tokens; {rule}"):
            measure(small, some_windows(2, 192))


# The sliding window

spans_of = st.integers(2, 60).flatmap(
    lambda length: st.tuples(st.integers(1, 300), st.just(length), st.integers(1, length - 1))
)


@given(spans_of)
@settings(deadline=None)
def test_every_token_but_the_first_is_scored_once_with_enough_context(drawn: tuple[int, int, int]) -> None:
    tokens, length, stride = drawn
    scored: list[int] = []
    for start, end, first in sliding_spans(tokens, length, stride):
        assert 0 <= start < end <= tokens
        assert end - start <= length
        for token in range(first, end):
            scored.append(token)
            assert token - start >= min(token, length - stride), "at least so many tokens before it"
    assert scored == list(range(1, tokens))


@given(spans_of)
@settings(deadline=None)
def test_a_document_takes_as_few_windows_as_the_stride_allows(drawn: tuple[int, int, int]) -> None:
    tokens, length, stride = drawn
    assert len(list(sliding_spans(tokens, length, stride))) == 1 + math.ceil(max(0, tokens - length) / stride)


@pytest.mark.parametrize("stride", [0, -1, 96, 200])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(UserError, match=rf"^--stride: got {stride}; a stride is between 1 and the window of 96 tokens"):
        list(sliding_spans(500, 96, stride))


@torch.no_grad()
def test_sliding_perplexity_is_that_of_every_token_with_its_own_context(ground: Path, small: LoadedModel) -> None:
    """With stride 1 each token is the last of its own window; measured here one token at a time."""
    length, ids = 40, np.array([BOS, *(ground / "texts" / "0.txt").read_bytes()[:99]])
    total = 0.0
    for token in range(1, len(ids)):
        context = torch.from_numpy(ids[None, max(0, token + 1 - length) : token].copy())
        context[0, 0] = BOS
        total -= float(small.model(context).logits[0, -1].double().log_softmax(-1)[ids[token]])
    measured = measure_sliding(small, [Window("0.txt", "0", 0, ids)], length=length, stride=1)
    assert measured.tokens == 99
    assert measured.value == pytest.approx(math.exp(total / 99), rel=1e-5)


def test_sliding_over_a_document_of_one_window_is_measuring_that_window(ground: Path, small: LoadedModel) -> None:
    ids = np.array([BOS, *(ground / "texts" / "0.txt").read_bytes()[:90]])
    measured = measure_sliding(small, [Window("0.txt", "0", 0, ids)], length=91, stride=10)
    assert measured.value == pytest.approx(plain_perplexity(small.model, [ids.tolist()]), rel=1e-5)


# Means and intervals


def test_perplexity_is_weighted_by_tokens() -> None:
    figure = summarize(np.array([10.0, 90.0]), np.array([10, 30]), ["a", "b"])
    assert figure.value == pytest.approx(math.exp(100 / 40))
    assert figure.tokens == 40


def test_windows_of_one_document_are_no_independent_evidence() -> None:
    losses, counts = np.array([100.0, 200.0, 100.0, 200.0]), np.full(4, 100)
    assert perplexity_interval(losses, counts, ["a"] * 4) is None
    assert perplexity_interval(losses, counts, ["a", "a", "b", "b"]) == pytest.approx((math.exp(1.5), math.exp(1.5)))


def test_an_interval_of_many_documents_is_that_of_the_central_limit() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(2.0, 0.3, 400)
    interval = perplexity_interval(means * 100, np.full(400, 100), [str(index) for index in range(400)])
    assert interval is not None
    half = 1.96 * means.std() / 20
    assert np.log(interval) == pytest.approx([means.mean() - half, means.mean() + half], abs=0.15 * half)


def test_a_loss_that_is_not_finite_has_no_interval() -> None:
    assert perplexity_interval(np.array([1.0, math.nan]), np.array([1, 1]), ["a", "b"]) is None
