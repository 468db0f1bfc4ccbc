"""The needle objective: what its windows hold, what is scored, and that the search computes and differentiates it."""

from __future__ import annotations

import json
import math
import re
import string
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import byte_tokenizer
from commands import refused, write_checkpoint, write_documents
from longrope.checkpoint import LoadOptions
from longrope.documents import Document
from longrope.errors import UserError
from longrope.evaluate.perplexity import window_losses
from longrope.evaluate.templates import NEEDLE as WORDING
from longrope.evaluate.templates import NeedleTemplate
from longrope.factors import FactorTable, RopeFactors
from longrope.files import read_lines
from longrope.model import LoadedModel, load_model
from longrope.search.archive import Archive
from longrope.search.backward import loss_gradient
from longrope.search.driver import choose_search_windows, search
from longrope.search.needle import Depth, needle_windows
from longrope.search.objective import Evaluator
from longrope.search.settings import SearchSettings
from longrope.search.tasks import Task
from longrope.windows import Window, fingerprint
from models import build, save

WORDS = "the of and a to in that was he it his her with as had on at by which she not but from".split()


def prose(seed: int, words: int) -> str:
    return " ".join(WORDS[i] for i in np.random.default_rng(seed).integers(len(WORDS), size=words))


INTRO, NEEDLE, QUESTION = WORDING.intro, WORDING.needle, WORDING.question + WORDING.lead
DOCUMENTS = [Document(f"{seed}.txt", prose(seed, 4500 + 100 * seed)) for seed in range(10)]


def bpe(*, split: bool, bos: bool) -> PreTrainedTokenizerFast:
    """A BPE trained on prompts; without `split` its tokens reach across spaces, so also from question into answer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>"] if bos else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    sentences = [f"What number is {number}" for number in rng.integers(10**6, 10**7, size=300)]
    tokenizer.train_from_iterator([*sentences, QUESTION, prose(0, 2000)], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None
    )


TOKENIZERS = {
    "bytes": byte_tokenizer(256),
    "words": bpe(split=True, bos=True),
    "across spaces": bpe(split=False, bos=False),
}


def made(name: str = "bytes", length: int = 2048, count: int = 8, seed: int = 0, **more: Any) -> list[Window]:
    settings = {"documents": DOCUMENTS, "depth": "spread", **more}
    return needle_windows(tokenizer=TOKENIZERS[name], length=length, count=count, seed=seed, **settings)


def decoded(name: str, ids: np.ndarray) -> str:
    return str(TOKENIZERS[name].decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def taken_apart(name: str, window: Window) -> tuple[str, str, str, str]:
    """The document's text before and after the needle, the key and the number, by the wording of the prompt."""
    text = decoded(name, window.ids)
    number = text[-7:]
    key = text[:-8].rsplit(" the magic number is", 1)[0].rsplit("For ", 1)[1]
    intro = INTRO if len(window.ids) >= 1024 else ""
    end = f"{QUESTION.format(key=key)} {number}"
    assert text.startswith(intro)
    assert text.endswith(end)
    body = text[len(intro) : len(text) - len(end)]
    before, after = body.split(NEEDLE.format(key=key, number=number))
    return before, after, key, number


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [300, 1023, 1024, 2048])
@pytest.mark.parametrize("depth", ["start", "spread"])
def test_a_window_is_introduction_document_needle_and_question_and_exactly_as_long(
    name: str, length: int, depth: Depth
) -> None:
    windows = made(name, length, depth=depth)
    by_hash = {document.sha256: document for document in DOCUMENTS}
    tokenizer = TOKENIZERS[name]
    assert len(windows) == 8
    for index, window in enumerate(windows):
        assert (window.ids.shape, str(window.ids.dtype)) == ((length,), "int64")
        assert (window.ids == tokenizer.bos_token_id).sum() == (tokenizer.bos_token_id is not None)
        assert tokenizer.bos_token_id in (None, window.ids[0])
        before, after, key, number = taken_apart(name, window)
        assert decoded(name, window.ids).count(number) == 2
        assert decoded(name, window.ids).count(key) == 3
        document = by_hash[window.sha256]
        ids = np.array(tokenizer(document.text, add_special_tokens=False)["input_ids"])[window.start :]
        assert window.document == document.name
        first, second = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (before, after))
        # Cut out of its document, a text can be tokenized a little differently at its ends.
        assert decoded(name, ids).startswith(before + after)
        share = first / (first + second)
        assert share == pytest.approx(0 if depth == "start" else (index + 0.5) / 8, abs=4 / (first + second))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_the_number_is_scored(name: str) -> None:
    for window in made(name, count=30, length=400):
        *_, number = taken_apart(name, window)
        answer = decoded(name, window.ids[window.scored_from :])
        assert 1 <= window.scored == len(window.ids) - window.scored_from <= 8
        if name == "bytes":
            assert (answer, window.scored) == (number, 7)
        elif name == "words":
            assert answer == f" {number}"
        else:
            assert answer.endswith(number), "a token that holds the end of the question too"


def test_a_token_of_question_and_number_together_is_scored_and_stays_whole() -> None:
    tokenizer = TOKENIZERS["across spaces"]
    windows = made("across spaces", count=30, length=400)
    joined = 0
    for window in windows:
        *_, key, number = taken_apart("across spaces", window)
        asked = QUESTION.format(key=key)
        whole = tokenizer(f"{asked} {number}")["input_ids"]
        assert window.ids[-len(whole) :].tolist() == whole, "as the tokenizer writes question and answer"
        alone = tokenizer(asked)["input_ids"]
        joined += whole[: len(alone)] != alone
    assert joined > 0, "or nothing was tried"


def test_keys_and_numbers_vary_and_are_fixed_by_the_seed() -> None:
    same, other = made(seed=3), made(seed=4)
    told = [taken_apart("bytes", window)[2:] for window in same]
    assert len({key for key, _ in told}) > 4
    assert len({number for _, number in told}) == 8
    assert all(len(number) == 7 and number[0] != "0" and key.count("-") == 1 for key, number in told)
    assert fingerprint(same) == fingerprint(made(seed=3)) != fingerprint(other)
    assert not set(told) & {taken_apart("bytes", window)[2:] for window in other}
    renamed = [Document(f"renamed {document.name}", document.text) for document in reversed(DOCUMENTS)]
    assert fingerprint(made(seed=3, documents=renamed)) == fingerprint(same)


def test_documents_are_taken_in_turn_and_haystacks_never_overlap() -> None:
    assert len({window.sha256 for window in made(count=10)}) == 10
    for name in TOKENIZERS:
        windows = made(name, 700, documents=DOCUMENTS[-2:], count=9, depth="start")
        for document in DOCUMENTS[-2:]:
            mine = sorted((window.start, name) for window in windows if window.sha256 == document.sha256)
            prompt = min(_without_document(name, window) for window in windows)
            assert len(mine) in (4, 5)
            assert all(later[0] - earlier[0] >= 700 - prompt for earlier, later in pairwise(mine))


def _without_document(name: str, window: Window) -> int:
    """Tokens of a window's prompt, counted by its texts one by one."""
    tokenizer, (*_, key, number) = TOKENIZERS[name], taken_apart(name, window)
    texts = (NEEDLE.format(key=key, number=number), f"{QUESTION.format(key=key)} {number}")
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) + (
        tokenizer.bos_token_id is not None
    )


def test_a_prompt_that_does_not_fit_is_refused_with_the_length_that_would() -> None:
    with pytest.raises(UserError) as refused:
        made(length=100)
    message = str(refused.value)
    fixed = max(_without_document("bytes", window) for window in made(length=300))
    assert message == (
        f"--objective: got a window of 100 tokens; the needle's prompt without a document takes {fixed}; "
        f"search at {fixed + 2} tokens or more, or with the perplexity objective"
    )
    assert len(made(length=fixed + 2)) == 8
    for length in (fixed, fixed + 1):
        with pytest.raises(UserError, match=rf"^--objective: got a window of {length} tokens; .* takes {fixed};"):
            made(length=length)


def test_documents_that_are_too_few_or_too_short_and_unknown_depths_are_refused() -> None:
    found = r"^documents: got 1 document, the longest of \d+ tokens, which hold 9 windows of 17\d\d tokens; "
    wanted = r"wanted: 50 windows \(a needle's prompt takes the rest of 2048\); give longer"
    with pytest.raises(UserError, match=found + wanted):
        made(documents=DOCUMENTS[:1], count=50)
    with pytest.raises(UserError, match=r"^documents: got 1 document, the longest of 5 tokens, which hold 0 windows"):
        made(documents=[Document("short", "short")], count=1)
    with pytest.raises(UserError, match=r"^windows: got 0; there is at least one"):
        made(count=0)
    message = r"^--needle-depth: got 'middle'; it is one of start, spread; choose one of them$"
    with pytest.raises(UserError, match=message):
        made(depth="middle")


GERMAN = NeedleTemplate(
    needle="\nDie Zahl von {key} lautet {number}, {key}!\n",
    question="\nWie lautet die Zahl von {key}?",
    lead=" Sie lautet",
    answer=" {number}.",
    intro="Merke dir die Zahl.\n",
    names=("Linde", "Eiche"),
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_template_words_the_needle_the_question_and_the_answer(name: str) -> None:
    for window in made(name, 500, template=GERMAN, digits=3):
        text, told = decoded(name, window.ids), decoded(name, window.ids[window.scored_from :])
        number = text[-4:-1]
        key = text.rsplit("von ", 1)[1].split("?")[0]
        assert key in GERMAN.names
        assert text.startswith("Merke dir die Zahl.\n")
        assert text.endswith(f"\nWie lautet die Zahl von {key}? Sie lautet {number}.")
        assert text.count(f"\nDie Zahl von {key} lautet {number}, {key}!\n") == 1
        assert told.endswith(f"{number}.")
        assert len(window.ids) == 500


def without_numbers(kind: str) -> PreTrainedTokenizerFast:
    """One that knows letters and words but no number: what becomes of a number depends on the kind."""
    letters = sorted(set(string.printable) - set(string.digits) - set(string.whitespace))
    if kind == "unigram":
        tokenizer = Tokenizer(Unigram([("<unk>", 0.0), *((each, -3.0) for each in ["▁", *letters])], unk_id=0))
    elif kind == "words":
        words = ["<unk>", *letters, *WORDS, *re.findall(r"\w+", INTRO + NEEDLE + QUESTION)]
        tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    else:
        tokenizer = Tokenizer(BPE(vocab={each: at for at, each in enumerate(["▁", *letters])}, merges=[]))
    words_alone = kind == "words"
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace() if words_alone else pre_tokenizers.Metaspace()
    if not words_alone:
        tokenizer.decoder = decoders.Metaspace()
    unknown = None if kind == "drops" else "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (
            "words",
            r"got one that writes '\d{7}' as no tokens of its own after '.* the magic number is'; the answer's tok",
        ),
        (
            "unigram",
            r"got one that writes '\d{7}' as no tokens of its own after '.* the magic number is'; the answer's",
        ),
        (
            "drops",
            r"got one that loses (\d{7}): it writes '\1' as ''; each digit is in the prompt, where it is told and",
        ),
    ],
)
def test_a_tokenizer_that_cannot_write_the_number_is_refused_in_the_line_of_evaluate_needle(
    kind: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("model"))
    without_numbers(kind).save_pretrained("model")
    write_documents(Path("texts"), characters=6000)
    shared: list[object] = ["model", "-d", "texts", "--out", "run"]
    assert re.match(f"tokenizer: {line}", refused("evaluate", "needle", *shared, "--lengths", 384))
    for objective in ("needle", "both"):
        assert re.match(f"tokenizer: {line}", refused("search", *shared, "--to", 384, "--objective", objective))
    Path("plan.toml").write_text('[[stages]]\ndo = "search"\nto = "8x"\nobjective = "needle"\n[measure]\npasskey = 0\n')
    told = refused("extend", *shared, "--to", 384, "--stages", "plan.toml")
    assert re.match(f"01-search-384: tokenizer: {line}", told)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp("small")
    return load_model(
        str(save(build("llama", initializer_range=0.3), folder)), LoadOptions(device="cpu", dtype="float32")
    )


def factors_of(small: LoadedModel, length: int) -> RopeFactors:
    return small.baseline("yarn", length, length)


def test_the_value_is_the_cross_entropy_of_the_answer_alone(small: LoadedModel) -> None:
    windows = made(length=400, count=3)
    factors = factors_of(small, 400)
    with Evaluator(small, windows) as evaluate:
        outcome = evaluate(Task(factors, (0, 1, 2)))
        plain = []
        for window in windows:
            ids = torch.from_numpy(window.ids)[None]
            with torch.no_grad():
                logits = small.model(input_ids=ids, use_cache=False).logits[0]
            answer = range(393, 400)
            plain.append(-sum(float(logits[i - 1].double().log_softmax(-1)[ids[0, i]]) for i in answer))
        np.testing.assert_allclose(window_losses(small, windows), plain, rtol=1e-5)
    np.testing.assert_allclose(outcome.losses, plain, rtol=1e-5)
    assert outcome.tokens == 3 * 400


def test_its_gradient_is_that_of_finite_differences(small: LoadedModel) -> None:
    windows = made(length=400, count=2)
    factors = factors_of(small, 400)
    pair = len(factors.rescale) - 2  # its period is longer than the window

    def value(by: float = 0.0, attention_factor: float = 0.0) -> float:
        rescale = list(factors.rescale)
        rescale[pair] += by
        changed = factors.with_values(
            rescale=tuple(rescale), attention_factor=factors.attention_factor + attention_factor
        )
        with small.patch() as patch:
            patch.install(changed)
            return float(window_losses(small, windows).sum())

    with small.patch() as patch:
        losses, by_rescale, by_attention, _ = loss_gradient(small, patch, factors, windows)
    assert losses.sum() == pytest.approx(value(), rel=1e-5)
    differences = (value(by=0.1) - value(by=-0.1)) / 0.2
    assert abs(differences) > 0.1, "far above float32's last digits"
    assert by_rescale[pair] == pytest.approx(differences, rel=0.01)
    differences = (value(attention_factor=0.01) - value(attention_factor=-0.01)) / 0.02
    assert by_attention == pytest.approx(differences, rel=0.02)


def test_both_is_the_geometric_mean_of_the_perplexities_of_windows_and_of_answers(small: LoadedModel) -> None:
    settings = SearchSettings(to=400, objective="both", windows=3, seed=1, needle_digits=5, gradient_windows=2)
    windows = choose_search_windows(small, settings, DOCUMENTS)
    assert [window.scored for window in windows.search] == [399, 5] * 3, "in turn, so that a race sees both early"
    assert [window.scored for window in windows.gradient] == [399, 5] * 2
    assert not {(each.sha256, each.start) for each in windows.search} & {
        (each.sha256, each.start) for each in windows.gradient
    }
    assert list(windows.measured) == list(windows.search[::2])
    factors, archive = factors_of(small, 400), Archive.of(windows.search)
    with Evaluator(small, windows.search) as evaluate:
        task = Task(factors, archive.everything)
        outcome = evaluate(task)
    prose, answers = (sum(outcome.losses[kind::2]) / sum(w.scored for w in windows.search[kind::2]) for kind in (0, 1))
    assert archive.add(task, outcome) == pytest.approx(math.exp((prose + answers) / 2))


def test_its_gradient_weighs_them_as_its_value_does(small: LoadedModel) -> None:
    settings = SearchSettings(to=400, objective="both", windows=1, gradient_windows=0)
    windows = choose_search_windows(small, settings, DOCUMENTS).search
    factors = factors_of(small, 400)

    def gradient(*chosen: int) -> tuple[np.ndarray, float]:
        with Evaluator(small, windows) as evaluate:
            found = evaluate(Task(factors, chosen, gradient=True)).gradient
        assert found is not None
        return np.array(found.rescale), found.attention_factor

    with small.patch() as patch:
        alone = [loss_gradient(small, patch, factors, [replace(window, weight=1.0)]) for window in windows]
    weight = 399 / 7
    assert weight == pytest.approx(windows[1].weight)
    together = gradient(0, 1)
    np.testing.assert_allclose(together[0], alone[0][1] + weight * alone[1][1], rtol=1e-4)
    assert together[1] == pytest.approx(alone[0][2] + weight * alone[1][2], rel=1e-4)


def test_both_takes_as_many_windows_of_either_kind_and_the_search_measures_whole_ones(
    small: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    for document in DOCUMENTS:
        (tmp_path / "texts" / document.name).write_text(document.text)
    given: dict[str, Any] = {"documents": [str(tmp_path / "texts")], "objective": "both", "windows": 2}
    search(small, to=400, **given, evaluations=6, out=tmp_path / "run", needle_template=GERMAN)
    lines = read_lines(tmp_path / "run" / "evaluations.jsonl")
    assert {window for line in lines for window in line["windows"]} >= {0, 1, 2, 3}
    assert sum(line["tokens"] for line in lines) <= 6 * 4 * 400
    best = FactorTable.load(tmp_path / "run" / "factors.json")
    assert best.provenance["objective"] == "both"
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    assert {(each["method"], each["windows"]) for each in measured} >= {("longrope", "search"), ("yarn", "search")}
    with pytest.raises(UserError, match=r"^--out: got .* a run where settings.needle_template"):
        search(small, to=400, **given, evaluations=6, out=tmp_path / "run")


def test_a_template_of_no_use_or_without_a_needle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.toml").write_text('[passkey]\nfiller = "a"\nstatement = "{key}"\nquestion = "?"\n')
    words: list[object] = ["search", "tiny", "--to", "1k", "-d", "stdlib", "--out", "run"]
    told = refused(*words, "--objective", "both", "--needle-template", "words.toml")
    assert "words.toml: got no table [needle]; prompts of needle are in the table [needle]; " in told
    Path("words.toml").write_text('[needle]\nneedle = "{key} {number}"\nquestion = "{key}"\n')
    told = refused(*words, "--needle-template", "words.toml")
    assert told.startswith("--needle-template: got --objective perplexity; it is the wording of the needle objective; ")
    for option, value, what in (("--needle-digits", 5, "number"), ("--needle-depth", "start", "place")):
        told = refused(*words, option, value)
        assert told.startswith(f"{option}: got --objective perplexity; it is the {what} of the needle objective; ")
    assert not Path("run").exists()


def test_both_takes_no_more_gradient_windows_of_one_kind_than_the_documents_have_of_the_other(
    small: LoadedModel,
) -> None:
    long, short = len(DOCUMENTS[0].text), [Document("short", DOCUMENTS[0].text), Document("other", DOCUMENTS[1].text)]
    for length in (900, 1023, long // 9, long // 5):
        settings = SearchSettings(to=length, objective="both", windows=2, gradient_windows=64)
        windows = choose_search_windows(small, settings, short)
        assert len(windows.search) == 4
        kinds = [window.weight == 1.0 for window in windows.gradient]
        assert kinds == [True, False] * (len(kinds) // 2)
        assert len(kinds) > 0


def test_a_step_of_the_descent_has_a_window_of_either_kind(small: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for document in DOCUMENTS:
        (tmp_path / "texts" / document.name).write_text(document.text)
    given: dict[str, Any] = {"documents": [str(tmp_path / "texts")], "objective": "both", "windows": 3}
    whole = search(small, to=400, **given, method="gradient", evaluations=30, out=tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "evaluations.jsonl")
    steps: dict[tuple[str, int], list[int]] = {}
    for line in lines:
        if "gradient" in line:
            steps.setdefault((line["origin"], line["iteration"]), []).extend(line["windows"])
    assert steps
    for windows in steps.values():
        first, second = sorted(windows)
        assert (first % 2, second) == (0, first + 1)
    assert search(small, to=400, **given, method="gradient", evaluations=12, out=tmp_path / "half") is not None
    more = search(small, to=400, **given, method="gradient", evaluations=30, out=tmp_path / "half")
    assert more.rows == whole.rows, "gone on with"
    raced = search(small, to=400, **given, method="evolution", race=True, evaluations=70, out=tmp_path / "raced")
    assert raced.rows[-1].up_to == 400
    for line in read_lines(tmp_path / "raced" / "evaluations.jsonl"):
        assert len(line["windows"]) % 2 == 0, "a child is judged by both"
