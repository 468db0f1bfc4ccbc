"""RULER: tasks against their definitions, lengths for two tokenizers, scores, and answers of a real model."""

from __future__ import annotations

import json
import logging
import pickle
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from commands import longrope
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.evaluate.generation import greedy
from longrope.evaluate.intervals import share_interval
from longrope.evaluate.measures import Item
from longrope.evaluate.ruler import Ruler
from longrope.evaluate.ruler_answers import clean, score
from longrope.evaluate.ruler_fit import encoder, longest, room
from longrope.evaluate.ruler_questions import Question
from longrope.evaluate.ruler_samples import Builder, Sample, Text
from longrope.evaluate.ruler_tasks import TASKS, builders, units
from longrope.evaluate.ruler_texts import ENGLISH, read_templates
from longrope.factors import RopeFactors
from longrope.model import LoadedModel, load_model
from models import build, save

NEEDLE = re.compile(r"One magic (number|UUID) for (\S+) is: (\S+)\.")
NIAH = {  # what hides the needles, kind of value, keys in the text, values of each, keys asked for
    "niah_single_1": ("noise", "number", 1, 1, 1),
    "niah_single_2": ("essay", "number", 1, 1, 1),
    "niah_single_3": ("essay", "UUID", 1, 1, 1),
    "niah_multikey_1": ("essay", "number", 4, 1, 1),
    "niah_multikey_2": ("needle", "number", None, 1, 1),
    "niah_multikey_3": ("needle", "UUID", None, 1, 1),
    "niah_multivalue": ("essay", "number", 1, 4, 1),
    "niah_multiquery": ("essay", "number", 4, 1, 4),
}
WITHOUT_QUESTIONS = TASKS[:11]
FILES = [
    Question(f"What is the name of boat {n}?", (f"Name{n}", f"N{n}"), (f"Boat {n} is Name{n}.",)) for n in range(9)
]
FILES += [
    Question(f"Who owns house {n}?", (f"Owner{n}",), (f"House {n} is red.", f"Owner{n} is in.")) for n in range(5)
]
ESSAY = "The sea was calm. Nobody spoke; the oars went in and out. A gull cried! Was it late? They rowed on.\n" * 3


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", LoadOptions(dtype="float32"))


@pytest.fixture(scope="module")
def merging(tiny: LoadedModel) -> LoadedModel:
    """The same with a tokenizer that merges bytes, and has no BOS but a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<e>"], show_progress=False
    )
    texts = [ENGLISH[table][key] for table in ENGLISH for key in ENGLISH[table] if table != "words"]
    tokenizer.train_from_iterator([*texts, *(" ".join(words) for words in ENGLISH["words"].values())], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")  # type: ignore[no-untyped-call]
    fast.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}[assistant]"
    return replace(tiny, tokenizer=fast)


@pytest.fixture(params=["bytes", "merging"])
def loaded(request: pytest.FixtureRequest, tiny: LoadedModel, merging: LoadedModel) -> LoadedModel:
    return tiny if request.param == "bytes" else merging


def prompt(loaded: LoadedModel, item: Item) -> str:
    return str(loaded.tokenizer.decode(item.ids, skip_special_tokens=True))


def prompts(loaded: LoadedModel, task: str, length: int, **options: Any) -> list[tuple[str, list[str]]]:
    """(prompt, references) of three samples of a task."""
    made = Ruler((task,), samples=3, **options).items(loaded, length)
    assert [item.key for item in made] == [f"{task}/000{index}" for index in range(3)]
    return [(prompt(loaded, item), item.data["references"]) for item in made]


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_those_of_the_definition(loaded: LoadedModel, task: str) -> None:
    hay, kind, keys, values, asked = NIAH[task]
    for text, references in prompts(loaded, task, 1024, haystack=(ESSAY,)):
        found = NEEDLE.findall(text)
        by_key: dict[str, list[str]] = {}
        for of_kind, key, value in found:
            assert of_kind == kind
            assert re.fullmatch(r"\d{7}" if kind == "number" else r"[0-9a-f-]{36}", value)
            by_key.setdefault(key, []).append(value)
        assert len({value for *_, value in found}) == len(found)  # no value twice
        assert {len(each) for each in by_key.values()} == {values}
        assert len(by_key) > 5 if keys is None else len(by_key) == keys
        ((question,),) = [re.findall(r"does the text give for (.*)\?", text)]
        assert len(question.split(", ")) == asked
        assert sorted(references) == sorted(value for key in question.split(", ") for value in by_key[key])
        assert len(references) == asked * values
        rest = NEEDLE.sub("", text.split("\n", 1)[1])
        assert ("kettle" in rest) == (hay == "noise")
        assert ("oars went" in rest) == (hay == "essay")
        assert text.endswith("is:" if len(references) == 1 else "are:")


def test_a_needle_is_at_any_depth_and_never_inside_a_sentence(merging: LoadedModel) -> None:
    depths = []
    for item in Ruler(("niah_single_2",), samples=40, haystack=(ESSAY,)).items(merging, 2048):
        text = prompt(merging, item)
        (place,) = (match.start() for match in NEEDLE.finditer(text))
        assert text[:place].rstrip()[-1] in ".!?;"
        depths.append(place / len(text))
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert np.histogram(depths, 4, (0, 1))[0].min() >= 3


@pytest.mark.parametrize(("length", "chains"), [(400, 1), (2048, 2)])
def test_variables_are_tracked_by_an_interpreter(tiny: LoadedModel, length: int, chains: int) -> None:
    for text, references in prompts(tiny, "vt", length):
        values: dict[str, str] = {}
        for name, copied, right in re.findall(r"VAR (\w+) = (VAR )?(\w+)\.", text):
            values[name] = values[right] if copied else right  # a copy of what is not yet there is a KeyError
        asked = re.findall(r"Which variables hold the value (\d+)\?", text)
        assert len(asked) == chains == len(set(asked))  # the solved example, where there is room, and the task
        assert [name for name, value in values.items() if value == asked[-1]] == references
        assert len(references) == 5
        assert all(len(name) == 5 for name in references)
        if chains == 2:
            example = [name for name, value in values.items() if value == asked[0]]
            assert f"{asked[0]}, and they are: {', '.join(example)}\n" in text


@pytest.mark.parametrize(
    ("length", "times", "others", "lists"), [(700, 3, 1, 1), (1024, 6, 1, 1), (2048, 6, 1, 2), (8192, 30, 3, 2)]
)
def test_common_words_are_counted(tiny: LoadedModel, length: int, times: int, others: int, lists: int) -> None:
    for text, references in prompts(tiny, "cwe", length):
        found = re.findall(r"Remember those.\n(.*)\nWhich ten", text)
        assert len(found) == lists
        words = re.findall(r"\d+\. (\w+)", found[-1])
        assert [int(number) for number in re.findall(r"(\d+)\. ", found[-1])] == list(range(1, len(words) + 1))
        counts = Counter(words)
        assert {word for word, count in counts.items() if count == times} == set(references)
        assert len(set(references)) == 10
        assert {count for word, count in counts.items() if word not in references} == {others}
        assert not any(word in other for word in counts for other in counts if word != other)
        if lists == 2:
            example = Counter(re.findall(r"\d+\. (\w+)", found[0]))
            answer = re.findall(r"most often in the list are: (.*)\n", text)[0]
            shown = [word for word, _ in example.most_common(10)]
            assert sorted(re.findall(r"\d+\. (\w+)", answer)) == sorted(shown)
            assert not set(example) & set(counts)


@pytest.mark.parametrize("length", [400, 450, 500, 4096])
def test_frequent_words_are_counted_and_clear(loaded: LoadedModel, length: int) -> None:
    for text, references in prompts(loaded, "fwe", length):
        (listed,) = re.findall(r"text below.\n(.*)\nLeave", text)
        ranked = Counter(listed.split()).most_common()
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(references)
        assert len(ranked) == 4 or ranked[3][1] > ranked[4][1]
        if length == 4096:  # a zeta distribution: counts as 1 / rank squared
            counts = np.array([count for _, count in ranked[:5]])
            np.testing.assert_allclose(counts / counts[0], 1 / np.arange(1, 6) ** 2, atol=1 / counts[0])


def test_questions_come_with_their_passages_among_others(loaded: LoadedModel) -> None:
    for task, passages_of in (("qa_1", 1), ("qa_2", 2)):
        seen = []
        for item in Ruler((task,), samples=50, questions=tuple(FILES)).items(loaded, 700):
            text = prompt(loaded, item)
            (asked,) = [each for each in FILES if f"Question: {each.question}\nAnswer:" in text]
            documents = re.findall(r"Document (\d+):\n(.*)\n\n", text)
            assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
            listed = [document for _, document in documents]
            assert all(listed.count(passage) == 1 for passage in asked.context)
            assert len(asked.context) == passages_of
            assert len(documents) > 2 * passages_of
            assert item.data["references"] == list(asked.answers)
            seen.append(asked.question)
        assert sorted(seen) == sorted(each.question for each in FILES if each.task == task)  # each once


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_the_longest_that_fits(loaded: LoadedModel, task: str) -> None:
    length = 700
    asked = tuple(each for each in FILES if each.task == task)
    hay = units([ESSAY], 16 * length)
    (item,) = Ruler((task,), samples=1, haystack=(ESSAY,), questions=tuple(FILES)).items(loaded, length)
    encode = encoder(loaded.tokenizer, chat=False)
    sample = Sample(task, length, 0, 0, ENGLISH, hay, asked)
    tokens = item.data["tokens"]
    assert len(item.ids) + tokens <= length
    for builder in builders(sample):
        fitting, beyond, count = None, 0, builder.least
        while beyond < 3:  # one unit more can join tokens of the last one, and be shorter
            size = len(encode(builder.build(count))) + tokens
            fitting, beyond = (size, 0) if size <= length else (fitting, beyond + 1)
            count += 1
        if fitting:
            assert len(item.ids) + tokens == fitting
            break
    bos = loaded.tokenizer.bos_token_id
    assert bos is None or list(item.ids).count(bos) == 1 == list(item.ids).index(bos) + 1


def test_the_search_for_the_longest_builds_few(merging: LoadedModel) -> None:
    built: list[int] = []
    sample = Sample("niah_single_2", 20_000, 0, 0, ENGLISH, units([ESSAY], 400_000))
    (whole,) = builders(sample)

    def counted(count: int) -> Text:
        built.append(count)
        return whole.build(count)

    found = longest(replace(whole, build=counted), encoder(merging.tokenizer, chat=False), 20_000)
    assert found
    assert 19_990 < len(found[1]) <= 20_000
    assert len(built) < 14


def test_a_haystack_that_a_tokenizer_makes_no_tokens_of_is_refused() -> None:
    """It drops what it does not know: no number of units would fill the window."""
    model = Tokenizer(models.BPE(vocab={each: index for index, each in enumerate("0123456789")}, merges=[]))
    fast: Any = PreTrainedTokenizerFast
    builder = Builder(lambda units: Text("5 " + "word " * units, "", (), ""), 1)
    with pytest.raises(UserError, match=r"^tokenizer: got one that makes 1 tokens of a prompt of \d+ char"):
        longest(builder, encoder(fast(tokenizer_object=model), chat=False), 100)


def test_room_for_the_answer(merging: LoadedModel) -> None:
    encode = encoder(merging.tokenizer, chat=False)

    def of(task: str, length: int, questions: Sequence[Question] = ()) -> int:
        sample = Sample(task, length, 0, 0, ENGLISH, (), questions)
        return room(sample, builders(sample)[0].build(27), encode)

    published = {"niah_single_1": 128, "niah_multiquery": 128, "cwe": 120, "fwe": 50}
    assert {task: of(task, 1024) for task in published} == published
    assert of("qa_1", 1024, FILES[:9]) == 32
    assert of("niah_single_1", 512) == 64
    assert of("vt", 1024) >= 30
    ruler = Ruler(("niah_multivalue",), samples=4)
    for item in ruler.items(merging, 128 + 64):  # always room for what is to be written
        answer = merging.tokenizer(" " + ", ".join(item.data["references"]), add_special_tokens=False)["input_ids"]
        assert len(answer) * 1.25 <= item.data["tokens"] < 128


def test_a_task_that_does_not_fit_says_what_would(loaded: LoadedModel) -> None:
    ruler = Ruler(("niah_single_1", "vt", "cwe"), samples=3)
    with pytest.raises(UserError, match=r"a window of 128 tokens; .* vt \d+, cwe \d+; measure at \d+") as caught:
        ruler.items(loaded, 128)
    shortest = {task: int(tokens) for task, tokens in re.findall(r"(\w+) (\d+)[,;]", str(caught.value))}
    assert int(str(caught.value).split("measure at ")[1].split()[0]) == max(shortest.values())
    for task in ("vt", "cwe"):
        assert len(replace(ruler, tasks=(task,)).items(loaded, shortest[task])) == 3
    ruler.items(loaded, max(shortest.values()))
    with pytest.raises(UserError, match=r"measure at \d+ tokens or more, or only niah_single_1$"):
        ruler.items(loaded, min(shortest["vt"], shortest["cwe"]) - 1)


def test_a_sample_does_not_depend_on_how_many_are_asked_for(tiny: LoadedModel) -> None:
    def made(length: int = 800, **options: Any) -> dict[str, bytes]:
        ruler = Ruler(**{"tasks": WITHOUT_QUESTIONS, "samples": 2, **options})
        return {item.key: item.ids.tobytes() for item in pickle.loads(pickle.dumps(ruler)).items(tiny, length)}

    few, many = made(), made(samples=4)
    assert few == made() == {key: many[key] for key in few}
    assert made(tasks=("vt",)) == {key: few[key] for key in few if key.startswith("vt/")}
    other, longer = made(seed=1), made(length=808)
    assert not [key for key in few if few[key] in (other[key], longer[key])]
    assert len(set(many.values())) == len(many)
    asked = [item.key for item in Ruler(("qa_1",), samples=9, questions=tuple(FILES)).items(tiny, 700)]
    assert asked == [f"qa_1/000{n}" for n in range(9)]


def test_scores_are_those_published() -> None:
    assert score("niah_multivalue", "They are 111, 222 and 444.", ["111", "222", "333", "444"]) == 0.75
    assert score("vt", "abcde FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"]) == 0.4
    assert score("fwe", "", ["a", "b", "c"]) == 0.0
    assert score("qa_1", "In PARIS, I think", ["Lyon", "Paris"]) == 1.0
    assert score("qa_2", "Rome", ["Lyon", "Paris"]) == 0.0
    assert clean(" a\tb\x00c\n") == "a\nb\nc"


def records(scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"task": task, "score": each, "output": "", "references": ["x"]} for task in scores for each in scores[task]
    ]


def test_a_summary_is_the_mean_over_tasks() -> None:
    ruler = Ruler(("vt", "fwe"), samples=100)
    mixed = ruler.summarize(512, records({"vt": [0.8, 0.0] * 50, "fwe": [1.0] * 100}))
    assert mixed.value == pytest.approx(0.7)
    assert mixed.tokens == 200 * 512
    assert mixed.details["tasks"] == {
        "vt": {"score": pytest.approx(0.4), "samples": 100},
        "fwe": {"score": 1.0, "samples": 100},
    }
    assert mixed.details["left_out"] == [task for task in TASKS if task not in ("vt", "fwe")]
    half = 1.96 * 0.4 / np.sqrt(100) / 2  # of half the mean of a hundred draws
    assert mixed.ci is not None
    assert mixed.ci == pytest.approx(share_interval(0.7, 200))
    assert mixed.ci[0] < 0.7 - half < 0.7 + half < mixed.ci[1], "no narrower than what the draws themselves say"
    reduced = [{**each, "reduced": True} for each in records({"vt": [1.0, 0.0]})]
    assert ruler.summarize(512, reduced).details["tasks"]["vt"]["reduced"] == 2


def test_perfect_answers_score_one_and_empty_ones_nothing(tiny: LoadedModel) -> None:
    ruler = Ruler(TASKS, samples=2, questions=tuple(FILES))
    items = ruler.items(tiny, 1100)
    for answer, value in ((lambda item: " and ".join(item.data["references"]).upper(), 1.0), (lambda item: "", 0.0)):
        told = [
            {"task": task, "score": score(task, answer(item), item.data["references"])}  # type: ignore[no-untyped-call]
            for item in items
            for task in [item.data["task"]]
        ]
        summary = ruler.summarize(1100, told)
        expected: tuple[Any, ...] = (value, share_interval(value, len(items)), [])
        assert (summary.value, summary.ci, summary.details["left_out"]) == expected


def continued(loaded: LoadedModel, ids: Sequence[int], tokens: int, ends: Sequence[int]) -> list[int]:
    """Greedy by hand, without a cache."""
    found = list(ids)
    for _ in range(tokens):
        with torch.no_grad():
            found.append(int(loaded.model(input_ids=torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
        if found[-1] in ends:
            break
    return found[len(ids) :]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_neox", "phi3"])
def test_generation_is_greedy_under_the_factors(tmp_path: Path, name: str) -> None:
    model = build(name)
    sampling = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "eos_token_id": [257]}
    model.generation_config = GenerationConfig.from_dict(sampling)
    loaded = load_model(str(save(model, tmp_path / name)), LoadOptions(dtype="float32"))
    loaded.widen_window(96)
    own = loaded.model.generation_config
    ids = np.random.default_rng(0).integers(0, 256, 80)
    pairs = loaded.rope.shape.pairs
    made = {}
    with loaded.patch() as patch:
        for row in (None, RopeFactors(96, tuple(np.linspace(1, 4, pairs)), start_tokens=4, attention_factor=1.3)):
            patch.install(row)
            made[row] = greedy(loaded, ids, 12)
            assert made[row] == continued(loaded, list(ids), 12, [257])
        assert len({tuple(each) for each in made.values()}) == 2  # the factors matter
        loaded.model.generation_config.eos_token_id = end = [257, made[row][3]]
        assert greedy(loaded, ids, 12) == continued(loaded, list(ids), 12, end)
        assert greedy(loaded, ids, 12)[-1] == made[row][3]
    assert loaded.model.generation_config is own


def test_tiny_answers_two_tasks(tiny: LoadedModel) -> None:
    ruler = Ruler(("niah_single_1", "niah_multikey_2"), samples=1)
    items = ruler.items(tiny, 256)
    row = RopeFactors(256, (1.0,) * tiny.rope.shape.pairs, attention_factor=1.05)
    with tiny.patch() as patch:
        patch.install(row)
        found = ruler.run(tiny, items)
        assert found == [record for item in items for record in ruler.run(tiny, [item])]
        written = continued(tiny, list(items[0].ids), items[0].data["tokens"], [257])
    for item, record in zip(items, found, strict=True):
        assert record["task"] == item.data["task"]
        assert record["references"] == item.data["references"]
        assert record["score"] == score(record["task"], record["output"], record["references"])
    assert found[0]["output"] == clean(str(tiny.tokenizer.decode(written, skip_special_tokens=True)))
    summary = ruler.summarize(256, json.loads(json.dumps(found)))
    assert list(summary.details["tasks"]) == ["niah_single_1", "niah_multikey_2"]
    assert summary.value == np.mean([record["score"] for record in found])


ANSWERS = (
    unicodedata.normalize("NFD", "Café Noël"),
    unicodedata.normalize("NFD", "한국어"),
    "\u0958लम",  # NFC writes its first letter as two
    "ＡＢＣ－１２３",
    "two  spaces",
    "x\ty",
    "İSTANBUL",
    "Jon's U.S.A.",
)
PRINTABLE = [chr(n) for n in range(32, 127)]


def fast(tokenizer: Tokenizer, **named: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)  # type: ignore[no-untyped-call]


def bytes_of(normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """As GPT-NeoX's and, with NFC, Qwen's, without merges."""
    tokenizer = Tokenizer(
        models.BPE({each: n for n, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return fast(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's and XGLM's: NFKC, one space for many, and a token for whatever is unknown."""
    known = {*PRINTABLE, "▁", "\t", *unicodedata.normalize("NFKC", "".join(ANSWERS))}
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((each, -1.0) for each in sorted(known))], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return fast(tokenizer, unk_token="<unk>")


def bert() -> PreTrainedTokenizerFast:
    """As BERT's: lower case without accents, and spaces around each mark."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    known = sorted({*PRINTABLE, *normalizer.normalize_str("".join(ANSWERS))})
    pieces = ["[UNK]", *known, *(f"##{each}" for each in known)]
    tokenizer = Tokenizer(models.WordPiece({each: n for n, each in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return fast(tokenizer, unk_token="[UNK]")


def lacking(characters: str, unknown: str | None = "<unk>", *, named: bool = True) -> PreTrainedTokenizerFast:
    """A token a character, but none for some: an unknown one, or nothing at all."""
    known = {each: n for n, each in enumerate(["<unk>", "▁", *(c for c in PRINTABLE if c not in characters)])}
    if unknown is None:
        tokenizer = Tokenizer(models.BPE(known, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer = Tokenizer(models.WordLevel(known, unk_token=unknown))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return fast(tokenizer, unk_token="<unk>") if named and unknown else fast(tokenizer)


def asking(answers: Sequence[str | tuple[str, ...]]) -> tuple[Question, ...]:
    """Questions with these answers."""
    each_of = [(each,) if isinstance(each, str) else each for each in answers]
    return tuple(Question(f"Who is {n}?", each, (f"Number {n} is {each[0]}.",)) for n, each in enumerate(each_of))


def answer_with(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, text: str) -> None:
    """Have the model itself write the tokens of a text, whatever it is asked."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(loaded.model, "generate", lambda batch, **_: torch.cat([batch, torch.tensor([ids])], dim=1))


@pytest.mark.parametrize("name", ["bytes", "nfc", "nfkc", "bert"])
def test_the_tokens_of_the_references_score_one(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tokenizer = {"bytes": bytes_of, "nfc": lambda: bytes_of(normalizers.NFC()), "nfkc": unigram, "bert": bert}[name]()
    loaded = replace(tiny, tokenizer=tokenizer)
    rulers = [
        Ruler(("niah_single_3", "niah_multikey_3", "niah_multiquery", "vt", "cwe", "fwe"), samples=2),
        Ruler(("qa_1",), questions=asking(ANSWERS)),
    ]
    for ruler in rulers:
        for item in ruler.items(loaded, 1400):
            references = item.data["references"]
            answer_with(monkeypatch, loaded, f" They are {', '.join(references)}; I think")
            (record,) = ruler.run(loaded, [item])
            assert record["score"] == 1, record
            assert record["references"] == references
            if name == "bytes":  # a tab is a line's end in every output
                assert record.get("written", references) == [each.replace("\t", "\n") for each in references]
            if name in ("bytes", "nfc") and record["task"] != "qa_1":
                assert set(record) <= {"task", "score", "output", "references", "reduced"}, "as ever"
            for wrong in ("", " nothing 000", f" They are {references[0][:2]}"):
                answer_with(monkeypatch, loaded, wrong or " ")
                assert ruler.run(loaded, [item])[0]["score"] == 0


def test_a_reference_as_it_stands_counts_as_ever(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = replace(tiny, tokenizer=bytes_of(normalizers.NFC()))
    (item, *_) = Ruler(("qa_1",), questions=asking([ANSWERS[0], ANSWERS[0]])).items(loaded, 600)
    ids = bytes_of()(ANSWERS[0])["input_ids"]  # bytes that the model's own tokenizer would not choose
    monkeypatch.setattr(loaded.model, "generate", lambda batch, **_: torch.cat([batch, torch.tensor([ids])], dim=1))
    (record,) = Ruler(("vt",)).run(loaded, [item])
    assert record["output"] == ANSWERS[0] != record["written"][0]
    assert record["score"] == 1


@pytest.mark.parametrize("unknown", ["token", "text", "nothing"])
def test_a_tokenizer_that_cannot_write_the_answers_is_refused(tiny: LoadedModel, unknown: str) -> None:
    def told(characters: str, tasks: Sequence[str] = WITHOUT_QUESTIONS, **options: Any) -> str:
        kind = {"token": "<unk>", "text": "<unk>", "nothing": None}[unknown]
        loaded = replace(tiny, tokenizer=lacking(characters, kind, named=unknown == "token"))
        with pytest.raises(UserError) as caught:
            Ruler(tuple(tasks), samples=2, **options).items(loaded, 2048)
        return str(caught.value)

    assert re.fullmatch(
        r"tokenizer: got one that cannot write answers of niah_single_1, .*, niah_multiquery, such as '\d{7}'; "
        r"what cannot be written is never found; measure only vt,cwe,fwe",
        told(string.digits),
    )
    assert "answers of vt, such as" in told(string.ascii_uppercase)
    assert told(string.ascii_lowercase, ("cwe", "fwe")).endswith("; measure a model whose tokenizer can")
    assert "answers of niah_single_3, niah_multikey_3, such as '" in told("-")
    questions = asking([("Ida 7", "Ida"), ("7", "77")])
    refused = told(string.digits, ("qa_1", "vt"), questions=questions)
    assert "of qa_1, such as '7'; " in refused
    assert refused.endswith("; measure only vt, or take such questions out")


def test_one_answer_of_a_question_is_enough(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = replace(tiny, tokenizer=lacking(string.digits))
    ruler = Ruler(("qa_1",), questions=asking([("Ida 7", "Brandt"), ("Brandt 7", "Ida")]))
    for item in ruler.items(loaded, 600):
        can, lost = item.data["references"][1], item.data["references"][0].removesuffix(" 7")
        for text, value in ((can, 1), (lost, 0)):  # what is left of an answer that cannot be written is not that answer
            answer_with(monkeypatch, loaded, f" {text}.")
            (record,) = ruler.run(loaded, [item])
            assert record["score"] == value
            assert record["written"] == [None, can]


def test_the_command_refuses_such_a_tokenizer_before_it_writes_anything(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    lacking(string.digits).save_pretrained(folder)
    command = ("evaluate", "ruler", folder, "--lengths", "1k", "--samples", 1, "--out", tmp_path / "run")
    done = longrope(*command, "--tasks", "niah_single_1,fwe")
    assert done.code == 2
    line = r"longrope: tokenizer: got one that cannot write answers of niah_single_1, such as .*; measure only fwe\n"
    assert re.fullmatch(line, done.err)
    assert not (tmp_path / "run").exists()


def test_chat_prompts_are_a_turn(tiny: LoadedModel, merging: LoadedModel) -> None:
    ruler = Ruler(("vt", "niah_single_2"), samples=2, chat=True)
    for item in ruler.items(merging, 1024):
        assert re.fullmatch(r"(?s)\[user\]The text below .*\?\[end\]\[assistant\]\w.*:", prompt(merging, item))
        assert len(item.ids) + item.data["tokens"] <= 1024
    with pytest.raises(UserError, match="a tokenizer without a chat template"):
        ruler.items(tiny, 1024)


def test_units_keep_a_text_of_any_language() -> None:
    chinese = "海很平静。没有人说话！" + "桨" * 100 + "。\n新的一行"
    for text in (ESSAY, chinese, "one\n\n\ttwo   three"):
        assert "".join(units([text], 10**6)).strip() == text.strip()
        assert all(len(each.strip()) <= 42 for each in units([text], 10**6))
    assert "".join(units([ESSAY] * 5, 350)).strip() == ESSAY + ESSAY[:50].strip()


def test_what_is_wrong_with_a_ruler() -> None:
    with pytest.raises(UserError, match=r"--tasks: got 'niah_singel_1'; .* did you mean niah_single_1 or"):
        Ruler(("niah_singel_1",))
    with pytest.raises(UserError, match=r"'zzz'; the tasks are niah_single_1, .*; choose some of them"):
        Ruler(("vt", "zzz"))
    with pytest.raises(UserError, match="--tasks: got none"):
        Ruler(())
    with pytest.raises(UserError, match="--samples: got 0"):
        Ruler(("vt",), samples=0)
    with pytest.raises(UserError, match=r"qa_2 without questions for it; .* a list of passages"):
        Ruler(("qa_2",), questions=tuple(FILES[:9]))
    with pytest.raises(UserError, match="no other passages for qa_2"):
        Ruler(("qa_2",), questions=tuple(FILES[:10]))


def test_questions_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [
        {"question": "Who?", "answers": ["Ann", "Anna"], "context": "Ann did."},
        {"question": "Where?", "answers": "Here", "context": ["It was here."], "id": 3},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    with caplog.at_level(logging.INFO, "longrope"):
        made = Ruler.of(questions=path)
    assert made.questions == (
        Question("Who?", ("Ann", "Anna"), ("Ann did.",)),
        Question("Where?", ("Here",), ("It was here.",)),
    )
    assert made.tasks == TASKS[:12]
    assert "qa_2 left out: no questions for it were given" in caplog.text
    with caplog.at_level(logging.INFO, "longrope"):
        assert Ruler.of().tasks == WITHOUT_QUESTIONS
    assert "qa_1 and qa_2 left out" in caplog.text
    assert made.settings["questions"].startswith("sha256:")
    assert json.loads(json.dumps(Ruler.of().settings)) == {
        "tasks": list(WITHOUT_QUESTIONS),
        "samples": 20,
        "seed": 0,
        "chat": False,
        "questions": None,
        "haystack": None,
        "templates": None,
    }


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_questions_end_where_json_lines_do(tmp_path: Path, end: str) -> None:
    path = tmp_path / "questions.jsonl"
    answer = "a\u2028b\u2029c\x85d"
    lines = [{"question": f"What is {n}?", "answers": answer, "context": f"{n}: {answer}"} for n in range(2)]
    path.write_bytes("".join(json.dumps(line, ensure_ascii=False) + end for line in lines).encode("utf-8-sig"))
    made = Ruler.of(["qa_1"], questions=path)
    assert made.questions == tuple(Question(f"What is {n}?", (answer,), (f"{n}: {answer}",)) for n in range(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "which is empty; a set of questions has at least one"),
        ("{", "line 1: got something else; every line is a JSON object"),
        ("\n[1]", "line 2: got something else"),
        ('{"answers": ["a"], "context": "b"}', "no text in `question`"),
        ('{"question": "q", "answers": [], "context": "b"}', "no texts in `answers`"),
        ('{"question": "q", "answers": ["a"], "context": ["b", ""]}', "no texts in `context`"),
    ],
)
def test_questions_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        Ruler.of(questions=path)
    with pytest.raises(UserError, match="No such file"):
        Ruler.of(questions=tmp_path / "none.jsonl")


def test_templates_replace_texts(tmp_path: Path, tiny: LoadedModel) -> None:
    path = tmp_path / "german.toml"
    path.write_text(
        "[niah]\n"
        'prompt_one = """Merke dir: {type_needle_v}.\\n{context}\\nWelche für {query}?"""\n'
        'answer_prefix_one = "Sie lautet {{so}}:"\nneedle = "Die {type_needle_v} für {key} ist {value}!"\n'
        'number = "Zahl"\n[words]\nadjectives = ["rot", "blau"]\nnouns = ["Haus", "Baum"]\n'
        'sentences = ["Es regnet.", "Der Wind weht."]\n'
    )
    made = Ruler.of(["niah_single_1", "vt"], samples=2, templates=path)
    german, _, english, _ = (prompt(tiny, item) for item in made.items(tiny, 400))
    assert german.startswith("Merke dir: Zahl.\n")
    assert re.search(r"Die Zahl für (rot|blau)-(Haus|Baum) ist \d{7}!", german)
    assert german.endswith("Sie lautet {so}:")
    assert "Der Wind weht." in german
    assert english.startswith("The text below")
    assert made.settings["templates"].startswith("sha256:")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[nia]\n", r"the table 'nia'; the tables are niah, vt, cwe, fwe, qa, words"),
        ("vt = 3", "the table 'vt'"),
        ('[vt]\npromt = "x"', r"the key 'promt' in \[vt\]; its keys are prompt, answer_prefix, assign, copy"),
        ('[vt]\nprompt = "{context} {query} {key}"', r"the placeholder \{key\} in vt.prompt; .*\{context\}, \{num_v\}"),
        ('[vt]\nprompt = "{context.x} {query}"', r"the placeholder \{context.x\}"),
        ('[cwe]\nprompt = "{context!r}"', r"the placeholder \{context!r\}"),
        ('[fwe]\nanswer_prefix = "{}"', r"the placeholder \{\} in fwe.answer_prefix; its placeholders are none"),
        ('[fwe]\nprompt = "{context"', "a lone brace in fwe.prompt"),
        ('[qa]\nprompt = "{query}"', r"qa.prompt without \{context\}"),
        ("[qa]\nprompt = 3", "qa.prompt of another kind; it is a text"),
        ('[words]\nnouns = ["a", 3]', "words.nouns of another kind; it is a list"),
        ("[vt", "which is not TOML"),
    ],
)
def test_templates_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "texts.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_templates(path)
