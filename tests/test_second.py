"""Searches on an extended checkpoint: second interpolation, recovery, and a search at a shorter length."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import SHAPE, TARGET, longrope, refused, table, write_checkpoint, write_documents
from longrope.baselines import baseline, su_attention_factor
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.evaluate.perplexity import window_losses
from longrope.extension.costs import costs
from longrope.extension.plan import make_plan
from longrope.factors import FactorTable, RopeFactors, unscaled
from longrope.files import read_lines, read_object
from longrope.model import LoadedModel, load_model
from longrope.search.descent import DescentSettings
from longrope.search.driver import search
from longrope.search.methods import expected_evaluations
from longrope.search.objective import Evaluator
from longrope.search.shorter import carried_over
from longrope.search.space import LongRope
from longrope.search.tasks import Task
from longrope.windows import Window, choose_windows
from models import ORIGINAL, tokens

FLOAT32 = LoadOptions(device="cpu", dtype="float32", threads=1)
FARTHER = 3 * TARGET


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "plain")
    shutil.copytree(folder / "plain", folder / "model")
    table().save(folder / "model" / "factors.json")
    write_documents(folder / "texts", characters=4000)
    return folder


def found(to: int, stage: str | None, out: str = "run", **more: Any) -> FactorTable:
    given: dict[str, Any] = {"documents": ["texts"], "windows": 2, "evaluations": 9, "options": FLOAT32}
    return search("model", to=to, stage=stage, out=out, **(given | more))


def windows_of(loaded: LoadedModel, length: int, count: int = 2) -> list[Window]:
    from longrope.documents import read_sources

    return choose_windows(read_sources(["texts"]), loaded.tokenizer, length=length, count=count, seed=0)


def perplexity(loaded: LoadedModel, row: RopeFactors | None, windows: list[Window]) -> float:
    with loaded.patch() as patch:
        patch.install(row)
        return math.exp(window_losses(loaded, windows).sum() / sum(window.scored for window in windows))


def test_factors_on_top_of_others_multiply() -> None:
    below = RopeFactors(100, (1.0, 2.0, 8.0), start_tokens=4, attention_factor=1.25)
    above = RopeFactors(400, (1.0, 1.5, 4.0), start_tokens=2, attention_factor=1.1)
    assert above.over(below) == RopeFactors(400, (1.0, 3.0, 32.0), start_tokens=4, attention_factor=1.375)
    with pytest.raises(UserError, match=r"^factors: rescale: got 2 numbers; those below have 3; "):
        RopeFactors(400, (1.0, 2.0)).over(below)


@pytest.mark.usefixtures("here")
def test_baselines_of_a_second_interpolation_multiply_what_the_model_was_trained_with() -> None:
    loaded = load_model("model", FLOAT32).fine_tuned()
    trained = table().rows[-1]
    assert loaded.trained == trained
    assert loaded.baseline("pi", FARTHER).rescale == tuple(3 * each for each in trained.rescale)
    assert loaded.baseline("pi", FARTHER).attention_factor == trained.attention_factor
    expected = baseline("ntk", SHAPE, 3 * ORIGINAL).vector * trained.vector
    np.testing.assert_allclose(loaded.baseline("ntk", FARTHER).vector, expected)
    # Two steps of su are one: sqrt(ln(L s) / ln L) sqrt(ln(L s t) / ln(L s)) = sqrt(ln(L s t) / ln L).
    both = su_attention_factor(4, ORIGINAL) * su_attention_factor(3, TARGET)
    assert both == pytest.approx(su_attention_factor(12, ORIGINAL))
    su = loaded.baseline("yarn+su", FARTHER).attention_factor / trained.attention_factor
    assert su == pytest.approx(su_attention_factor(3, TARGET))


@pytest.mark.usefixtures("here")
def test_a_second_interpolation_keeps_the_rows_and_adds_a_product() -> None:
    made = found(FARTHER, "second", unseen=["texts/1.txt"], documents=["texts/0.txt", "texts/2.txt"])
    assert made.rows[:2] == table().rows
    assert made.lengths == [ORIGINAL, TARGET, FARTHER]
    mu = made.rows[-1].vector / table().rows[-1].vector
    assert mu.min() >= 1 - 1e-9
    assert mu.max() <= max(1.25 * 3, 1 + 3) + 1e-9
    assert (np.diff(mu) >= -1e-9).all()
    loaded = load_model("model", FLOAT32)
    lines = read_lines(Path("run/evaluations.jsonl"))
    first = lines[0]
    windows = windows_of_run(loaded, "run")
    tried = RopeFactors(FARTHER, tuple(first["rescale"]), attention_factor=first["attention_factor"])
    plain = perplexity(loaded, tried.over(table().rows[-1]), windows)
    assert first["value"] == pytest.approx(plain, rel=1e-6), "what is tried is mu on top of what was trained"
    best = perplexity(loaded, made.rows[-1], windows)
    assert best == pytest.approx(min(line["value"] for line in lines if line["value"] is not None), rel=1e-6)
    assert {"own", "pi", "ntk"} <= {line["origin"].partition("+")[0] for line in lines}


def windows_of_run(loaded: LoadedModel, run: str) -> list[Window]:
    """The search windows that a run's config.json lists."""
    import json

    from longrope.documents import read_sources
    from longrope.windows import tokenize

    config = json.loads(Path(run, "config.json").read_text())
    texts = {document.sha256: document for document in read_sources(["texts"])}
    made = []
    for each in config["documents"]["search"]:
        (ids,) = tokenize(loaded.tokenizer, [texts[each["sha256"]].text])
        span = [loaded.tokenizer.bos_token_id, *ids[each["start"] :]][: config["settings"]["to"]]
        made.append(Window(each["name"], each["sha256"], each["start"], np.array(span)))
    return made


@pytest.mark.usefixtures("here")
def test_gradients_of_a_second_interpolation_are_by_what_is_searched() -> None:
    loaded = load_model("model", FLOAT32).fine_tuned()
    windows = windows_of(loaded, FARTHER, 1)
    mu = RopeFactors(FARTHER, tuple(np.linspace(1.2, 2.5, SHAPE.pairs)), attention_factor=1.1)
    pair = SHAPE.pairs - 2

    def loss(rescale: float = 0.0, attention: float = 0.0) -> float:
        vector = mu.vector
        vector[pair] += rescale
        row = mu.with_values(rescale=tuple(vector), attention_factor=mu.attention_factor + attention)
        with Evaluator(loaded, windows) as evaluate:
            return sum(evaluate(Task(row, (0,))).losses)

    with Evaluator(loaded, windows) as evaluate:
        gradient = evaluate(Task(mu, (0,), gradient=True)).gradient
    assert gradient is not None
    by_pair = (loss(rescale=0.05) - loss(rescale=-0.05)) / 0.1
    by_attention = (loss(attention=0.01) - loss(attention=-0.01)) / 0.02
    assert abs(by_pair) > 0.01
    assert gradient.rescale[pair] == pytest.approx(by_pair, rel=0.05)
    assert gradient.attention_factor == pytest.approx(by_attention, rel=0.05)


@pytest.mark.usefixtures("here")
def test_a_recovery_is_a_row_for_a_length_that_is_reached_already() -> None:
    made = found(2 * ORIGINAL, "recovery", windows=4, evaluations=12)
    assert made.lengths == [ORIGINAL, 2 * ORIGINAL, TARGET]
    assert (made.rows[0], made.rows[2]) == table().rows
    row, loaded = made.rows[1], load_model("model", FLOAT32)
    assert 1 <= min(row.rescale) <= max(row.rescale) <= max(1.25 * 4, 1 + 4)
    windows = windows_of_run(loaded, "run")
    values = {line["origin"]: line["value"] for line in read_lines(Path("run/evaluations.jsonl")) if line["value"]}
    own, best = perplexity(loaded, table().rows[1], windows), perplexity(loaded, row, windows)
    assert best <= own * (1 + 1e-9), "the row that is there is one of the seeds"
    assert any(name.startswith("original") for name in values)
    lines = read_lines(Path("run/evaluations.jsonl"))
    trained = table().rows[1]
    tried = [line for line in lines if tuple(line["rescale"]) == trained.rescale]
    assert trained.attention_factor in {line["attention_factor"] for line in tried}, "as it was trained"
    again = found(ORIGINAL, "recovery", out="again", windows=4, evaluations=16)
    assert again.lengths == [ORIGINAL, TARGET], "the row of that length is replaced"
    factors = {line["attention_factor"] for line in read_lines(Path("again/evaluations.jsonl"))}
    assert {1.0, trained.attention_factor} <= factors, "at the original length too, where all rules say 1"


@pytest.mark.usefixtures("here")
def test_a_recovery_between_rows_begins_with_those_about_it_and_one_at_the_last_with_that(here: Path) -> None:
    rows = table().rows
    far = rows[-1].with_values(up_to=FARTHER, rescale=tuple((3 * rows[-1].vector).tolist()), attention_factor=1.4)
    replace(table(), rows=(*rows, far)).save(here / "model" / "factors.json")
    origins = {}
    for to in (TARGET, 2 * TARGET, FARTHER, 2 * ORIGINAL):
        made = found(to, "recovery", out=f"to-{to}", windows=1, gradient_windows=2, evaluations=12)
        assert made.lengths == sorted({ORIGINAL, TARGET, FARTHER, to})
        lines = read_lines(Path(f"to-{to}/evaluations.jsonl"))
        origins[to] = {line["origin"]: tuple(line["rescale"]) for line in lines}
        config = read_object(Path(f"to-{to}/config.json"), "config")
        assert ("rows" in config["settings"]) == (to != FARTHER)
    for to in (TARGET, 2 * TARGET):
        assert origins[to]["row-0"] == pytest.approx(rows[-1].rescale, abs=0.006)
        assert origins[to]["row-1"] == pytest.approx(far.rescale, abs=0.006)
    assert origins[2 * ORIGINAL]["row-1"] == pytest.approx(rows[-1].rescale, abs=0.006), "what is in use there"
    assert not any(name.startswith("row") for name in origins[FARTHER])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("ratio", [2, 4])
def test_a_recovery_costs_no_more_than_a_dry_run_says(here: Path, ratio: int) -> None:
    rows = table().rows
    far = rows[-1].with_values(up_to=FARTHER, rescale=tuple((3 * rows[-1].vector).tolist()), attention_factor=1.4)
    given: dict[str, Any] = {"windows": 2, "gradient_windows": 0}
    stages: list[dict[str, Any]] = [{"do": "search", "to": "4x"}, {"do": "finetune", "to": "4x", "steps": 1}]
    if ratio == 4:
        replace(table(), rows=(*rows, far)).save(here / "model" / "factors.json")
        stages.append({"do": "second", "to": FARTHER})
    plan = make_plan({"stages": [*stages, {"do": "recovery", "to": f"{ratio}x", **given}]}, ORIGINAL)
    (told,) = [each for each in costs(load_model("plain", FLOAT32), plan) if "recovery" in each.stage]
    found(ratio * ORIGINAL, "recovery", **given, evaluations=None)
    spent = sum(line["tokens"] for line in read_lines(Path("run/evaluations.jsonl")))
    measured = {line["method"] for line in read_lines(Path("run/results.jsonl"))}
    assert measured == {"longrope", "checkpoint", "none"}
    spent += len(measured) * 2 * ratio * ORIGINAL
    assert 0.4 * told.token_passes < spent <= told.token_passes


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("base", "do", "on"),
    [
        ("llama", "search", "base"),
        ("llama-yarn", "search", "base"),
        ("llama-llama3", "search", "base"),
        ("llama-longrope", "search", "base"),
        ("llama", "search", "last"),
        ("llama", "second", "last"),
    ],
)
@pytest.mark.parametrize("space", ["longrope", "longrope2"])
def test_a_search_begins_with_no_more_seeds_than_a_dry_run_says(
    here: Path, base: str, do: str, on: str, space: str
) -> None:
    write_checkpoint(here / "base", base)
    ratio = FARTHER // ORIGINAL
    given: dict[str, Any] = {"windows": 1, "gradient_windows": 0, "method": "gradient", "space": space}
    stages: list[dict[str, Any]] = [{"do": do, "to": FARTHER, **given, **({"on": on} if do == "search" else {})}]
    model = "base"
    if on == "last":
        stages = [{"do": "search", "to": "4x"}, {"do": "finetune", "to": "4x", "steps": 1}, *stages]
        model = "model"
    if do == "search":
        stages.append({"do": "finetune", "to": f"{ratio}x", "steps": 1})
    plan = make_plan({"stages": stages}, ORIGINAL)
    (told,) = [each for each in costs(load_model("base", FLOAT32), plan) if f"{do}-{FARTHER}" in each.stage]
    after = expected_evaluations("gradient", 0, 1, 1, DescentSettings())
    said = int(told.made_of.split()[2]) - after
    stage = "second" if do == "second" else None
    search(model, to=FARTHER, stage=stage, documents=["texts"], evaluations=40, out="run", options=FLOAT32, **given)
    lines = read_lines(Path("run/evaluations.jsonl"))
    tried = {line["key"] for line in lines if not line["origin"].startswith("descent")}
    assert len(lines) > len(tried), "all seeds were tried"
    assert len(tried) <= said <= len(tried) + 4


def test_factors_of_a_shorter_search_are_carried_over_as_the_baselines_are() -> None:
    space = LongRope(SHAPE.pairs, 8.0, (0,))
    for name in ("pi", "ntk"):
        short, long = (baseline(name, SHAPE, ratio * ORIGINAL) for ratio in (2, 8))
        assert carried_over(short, 2, 8, space).vector == pytest.approx(long.vector, abs=0.005), name
    row = RopeFactors(96, (1.0,) * SHAPE.pairs, attention_factor=1.1)
    assert carried_over(row, 2, 8, space) == row, "the attention factor stays"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("stage", [None, "second"])
def test_a_search_at_a_shorter_length_ends_with_the_best_of_a_few_at_the_target(stage: str | None) -> None:
    model = "model" if stage else "plain"
    start = TARGET if stage else ORIGINAL
    given: dict[str, Any] = {"documents": ["texts"], "windows": 1, "evaluations": 5, "options": FLOAT32}
    made = search(model, to=8 * start, stage=stage, search_length=2 * start, out="run", **given)
    inner = FactorTable.load(f"run/search-{2 * start}/factors.json")
    assert inner.rows[-1].up_to == 2 * start
    kept = load_model(model, FLOAT32).meaning.rows if stage else inner.rows[:1]
    assert made.rows == (*kept, inner.rows[-1], made.row_for(8 * start)), "what was found there serves that length"
    lines = read_lines(Path("run/evaluations.jsonl"))
    assert {len(line["windows"]) for line in lines} == {1}
    assert 3 <= len(lines) <= 5
    loaded = load_model(model, FLOAT32)
    values = [perplexity(loaded, made.rows[-1], windows_of_run(loaded, "run"))]
    assert values[0] == pytest.approx(min(line["value"] for line in lines), rel=1e-6)
    again = search(model, to=8 * start, stage=stage, search_length=2 * start, out="run", **given)
    assert again == made
    stages: list[dict[str, Any]] = [{"do": "search", "to": "4x"}, {"do": "finetune", "to": "4x", "steps": 1}]
    stages = stages if stage else []
    stages.append({"do": stage or "search", "to": 8 * start, "search_length": 2 * start})
    stages[-1] |= {"windows": 1, "evaluations": 5}
    told = costs(load_model("plain", FLOAT32), make_plan({"stages": stages}, ORIGINAL))[len(stages) - 1]
    spent = 0
    for run, length in ((Path("run"), 8 * start), (Path(f"run/search-{2 * start}"), 2 * start)):
        spent += sum(line["tokens"] for line in read_lines(run / "evaluations.jsonl"))
        spent += length * len(read_lines(run / "results.jsonl"))
    assert 0.8 * told.token_passes < spent <= told.token_passes


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plain", "--to", FARTHER, "--stage", "second"], "model: got plain, which is not extended; a second"),
        (["model", "--to", TARGET, "--stage", "second"], f"--to: got {TARGET} tokens; a second interpolation goes"),
        (["model", "--to", FARTHER, "--stage", "recovery"], f"--to: got {FARTHER} tokens; a recovery is for lengths"),
        (["plain", "--to", ORIGINAL, "--stage", "recovery"], "--stage: got a checkpoint that is not extended; a rec"),
        (["model", "--to", ORIGINAL - 1, "--stage", "recovery"], "--to: got 47 tokens; a recovery is for lengths"),
        (["model", "--to", FARTHER, "--stage", "third"], "--stage: got 'third'; it is one of second, recovery"),
        (["plain", "--to", TARGET, "--search-length", TARGET], "--search-length: got 192 tokens; it is an extension"),
        (["plain", "--to", TARGET, "--search-length", ORIGINAL], "--search-length: got 48 tokens; it is an extension"),
        (
            ["model", "--to", 2 * ORIGINAL, "--stage", "recovery", "--search-length", 50],
            "--search-length: got 50 tokens in a recovery; ",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(words: list[object], message: str) -> None:
    assert message in refused("search", *words, "-d", "texts", "--windows", 1)


@pytest.mark.usefixtures("here")
def test_a_second_interpolation_from_the_command_line_serves_all_lengths() -> None:
    words = ["--to", FARTHER, "--stage", "second", "-d", "texts", "--windows", 1, "--evaluations", 4]
    ran = longrope("search", "model", *words, "--out", "run", "--dtype", "float32", "--json")
    assert ran.code == 0, ran.err
    loaded = load_model("model", FLOAT32)
    made = FactorTable.load("run/factors.json")
    with loaded.patch() as patch:
        patch.install(made)
        by_table = loaded.model(tokens(ORIGINAL)).logits
        patch.install(unscaled(SHAPE.pairs, ORIGINAL))
        assert (by_table - loaded.model(tokens(ORIGINAL)).logits).abs().max() < 1e-5


@pytest.mark.usefixtures("here")
def test_compare_sets_methods_up_on_top_of_the_checkpoints_factors() -> None:
    words = ["--lengths", FARTHER, "-d", "texts", "--windows", 2, "--methods", "pi,ntk", "--dtype", "float32", "--json"]
    ran = longrope("compare", "model", *words, "--stage", "second", "--factors", "none", "--out", "second")
    assert ran.code == 2, "without the factors beside the weights it is not extended"
    ran = longrope("compare", "model", *words, "--stage", "second", "--out", "second")
    assert ran.code == 0, ran.err
    loaded = load_model("model", FLOAT32).fine_tuned()
    windows = windows_of(loaded, FARTHER)
    values = {each["method"]: each["value"] for each in ran.document["results"]}
    for method in ("pi", "ntk"):
        assert values[method] == pytest.approx(perplexity(loaded, loaded.baseline(method, FARTHER), windows), rel=1e-6)
    short = ["--lengths", TARGET, "-d", "texts", "--stage", "second"]
    assert "--lengths: got at most 192 tokens; the checkpoint's factors reach 192" in refused(
        "compare", "model", *short
    )
    assert "--stage: got 'third'; it is second: " in refused("compare", "model", *words, "--stage", "third")
