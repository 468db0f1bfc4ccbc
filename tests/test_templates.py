"""Templates of prompts: files of the user's, chat templates, and tokenizers that join digits, words and spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import byte_tokenizer
from commands import write_checkpoint
from longrope.checkpoint import LoadOptions
from longrope.documents import Document
from longrope.errors import UserError
from longrope.evaluate.needle import NeedleMeasure
from longrope.evaluate.passkey import PasskeyMeasure
from longrope.evaluate.prompts import inner_ids
from longrope.evaluate.templates import (
    PAPER,
    SHORT,
    NeedleTemplate,
    PasskeyTemplate,
    describe_template,
    read_needle_template,
    read_passkey_template,
)
from longrope.model import LoadedModel, load_model

SENTENCES = [f"What is it? The pass key is {7919 * index % 90000 + 10000}. It is." for index in range(400)]
CHAT = (
    "<s>{% for message in messages %}[{{ message.role }}]\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def bpe(before: Any, decoder: Any, *, size: int = 800) -> PreTrainedTokenizerFast:
    """A BPE trained on prompts, with what comes before it."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in repr(before) else list(map(chr, range(10, 127)))
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, PAPER.intro, PAPER.filler], trainer)
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)  # type: ignore[no-untyped-call]


def byte_level(*, prefix: bool, split: bool) -> PreTrainedTokenizerFast:
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split)
    return bpe(level, decoders.ByteLevel())


def metaspace() -> PreTrainedTokenizerFast:
    return bpe(pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace(prepend_scheme="always"))


TOKENIZERS = {
    "bytes": byte_tokenizer(256),
    "joins digits": byte_level(prefix=False, split=True),
    "joins question and answer": byte_level(prefix=False, split=False),
    "space before a text": byte_level(prefix=True, split=True),
    "space before every text": metaspace(),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_checkpoint(tmp_path_factory.mktemp("small") / "model")
    return load_model(str(folder), LoadOptions(device="cpu", dtype="float32"))


def with_tokenizer(small: LoadedModel, name: str, chat: str | None = None) -> LoadedModel:
    tokenizer = TOKENIZERS[name]
    tokenizer.chat_template = chat
    return replace(small, tokenizer=tokenizer)


def decoded(tokenizer: Any, ids: Any, *, special: bool = False) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# Tokenizers


def test_the_tokenizers_do_what_they_are_named_for() -> None:
    def tokens(name: str, text: str) -> list[str]:
        return list(TOKENIZERS[name].tokenize(text))

    assert any(len(token) > 1 and token.removeprefix("Ġ").isdecimal() for token in tokens("joins digits", "is 12345"))
    asked, answered = (tokens("joins question and answer", f"The pass key is{answer}") for answer in ("", " 12345"))
    assert answered[: len(asked)] != asked
    assert tokens("space before a text", "The")[0].startswith("Ġ")
    assert tokens("space before every text", "The")[0].startswith("▁")


def test_an_answer_is_written_as_the_text_has_it_that_tells() -> None:
    """A language without spaces puts none before a number, and a model that copies writes none."""
    chinese = PasskeyTemplate(filler="天空很蓝。", statement="密码是{key}。", question="密码是什么？", lead="密码是")
    assert chinese.answer == "{key}"
    prompt = chinese.prompt(TOKENIZERS["bytes"], "12345")
    assert TOKENIZERS["bytes"].decode(list(prompt.answer)) == "12345"
    assert (PAPER.answer, SHORT.answer) == (" {key}", " {key}")
    needle = NeedleTemplate(needle="{key}的号码是{number}。", question="{key}的号码？", lead="{key}的号码是")
    assert needle.answer == "{number}"
    said = PasskeyTemplate(filler="x", statement="密码是{key}。", question="?", lead="密码是", answer="「{key}")
    assert said.answer == "「{key}"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [300, 1200])
def test_the_answers_tokens_end_the_tokens_of_the_whole_text(small: LoadedModel, name: str, length: int) -> None:
    loaded = with_tokenizer(small, name)
    tokenizer = loaded.tokenizer
    template = PAPER if length >= 1024 else SHORT
    for item in PasskeyMeasure(tries=20).items(loaded, length):
        assert item.ids.shape == (length,)
        text, size = decoded(tokenizer, item.ids), item.data["answer"]
        key = text[-5:]
        assert key.isdecimal()
        answer = decoded(tokenizer, item.ids[-size:])
        assert answer.endswith(key)
        assert plain_ids(tokenizer, text)[-size:] == item.ids[-size:].tolist()
        asked = f"{template.question}{template.lead}"
        assert text.endswith(f"{asked} {key}")
        assert template.statement.format(key=key) in text
        assert text.lstrip().startswith(template.intro)
        assert (item.ids == tokenizer.bos_token_id).sum() == 1
        # What the prompt lacks of the question is what the tokenizer joins with the answer, and no more than that.
        known = plain_ids(tokenizer, template.intro + asked)[-3:]
        if name != "joins question and answer":
            assert item.ids[-size - 3 : -size].tolist() == known


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_needle_is_whole_text_too(small: LoadedModel, name: str) -> None:
    loaded = with_tokenizer(small, name)
    rng = np.random.default_rng(0)
    words = "".join(sorted(set(PAPER.filler))).strip()
    documents = [Document(f"{index}", "".join(rng.choice(list(words), 2000))) for index in range(3)]
    for item in NeedleMeasure(documents, depths=3, tries=3).items(loaded, 400):
        text, size = decoded(loaded.tokenizer, item.ids), item.data["answer"]
        assert text[-7:].isdecimal()
        assert text.count(text[-7:]) == 2
        assert plain_ids(loaded.tokenizer, text)[-size:] == item.ids[-size:].tolist()


def test_a_piece_inside_a_text_has_no_space_before_it() -> None:
    for tokenizer in TOKENIZERS.values():
        for text in ("The grass is green.", "\nWhat is it?", "12345"):
            assert str(tokenizer.decode(plain_ids(tokenizer, "x.") + inner_ids(tokenizer, text))).strip() == f"x.{text}"


def test_the_least_length_is_that_of_the_longest_key(small: LoadedModel) -> None:
    loaded = with_tokenizer(small, "joins digits")
    measure = PasskeyMeasure(tries=50)
    with pytest.raises(UserError) as caught:
        measure.items(loaded, 20)
    least = int(caught.value.do.split()[2])
    assert {len(item.ids) for item in measure.items(loaded, least)} == {least}
    with pytest.raises(UserError, match=rf"^passkey: got a window of {least - 1} tokens; .* takes {least}; measure at"):
        measure.items(loaded, least - 1)


def test_a_tokenizer_that_cannot_write_the_key_is_refused(small: LoadedModel) -> None:
    words = [*SHORT.filler.split(), *SHORT.question.split(), "pass", "key"]
    vocabulary = {word: index for index, word in enumerate(["<unk>", *dict.fromkeys(words)])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match=r"^tokenizer: got one that writes '\d{5}' as no tokens of its own after 'What"):
        PasskeyMeasure().items(replace(small, tokenizer=tokenizer), 300)


LETTERS = [chr(code) for code in range(33, 127) if not chr(code).isdecimal()]


def dropping(digits: str) -> PreTrainedTokenizerFast:
    """A BPE of single letters that drops what it does not know: all digits but these."""
    vocabulary = {letter: index for index, letter in enumerate(["▁", *LETTERS, *digits])}
    model = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=model)  # type: ignore[no-untyped-call]


def wordpiece(decoder: Any = None) -> PreTrainedTokenizerFast:
    """A WordPiece of single letters: a word of over 100 of them, or with one that it lacks, is the unknown token."""
    letters = [*LETTERS, *"0123456789"]
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", *letters, *(f"##{each}" for each in letters)])}
    model = Tokenizer(WordPiece(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        model.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("digits", "left"), [("", ""), ("13579", "[13579]*"), ("123456", "[1-6]*")])
def test_a_tokenizer_that_drops_digits_is_refused(small: LoadedModel, digits: str, left: str) -> None:
    loaded = replace(small, tokenizer=dropping(digits))
    line = r"^tokenizer: got one that loses (\d{%d}): it writes '\1' as '%s'; each digit is in the prompt, where it is "
    with pytest.raises(UserError, match=line % (5, left)):
        PasskeyMeasure(tries=20).items(loaded, 300)
    documents = [Document("0", "abc " * 200)]
    with pytest.raises(UserError, match=line % (7, left)):
        NeedleMeasure(documents, depths=4, tries=1).items(loaded, 300)
    known = replace(small, tokenizer=dropping("0123456789"))
    assert len(PasskeyMeasure(tries=20).items(known, 300)) == 20


@pytest.mark.parametrize("before", ["x" * 100, "ż"])
def test_a_tokenizer_that_makes_one_unknown_token_of_the_statement_is_refused(small: LoadedModel, before: str) -> None:
    loaded = replace(small, tokenizer=wordpiece(decoders.WordPiece()))
    template = PasskeyTemplate(filler="a b ", statement=before + "{key} ", question="key? ", answer="{key}")
    line = rf"^tokenizer: got one that loses (\d{{5}}): it writes '{before[:50]}.* as '<unk>.*; each digit is in the p"
    with pytest.raises(UserError, match=line):
        PasskeyMeasure(template=template).items(loaded, 100)
    needle = NeedleTemplate(needle=before + "{number} {key} ", question="{key}? ", answer="{number}")
    with pytest.raises(UserError, match=line.replace("5", "7", 1)):
        NeedleMeasure([Document("0", "abc " * 200)], depths=1, template=needle).items(loaded, 200)
    apart = replace(template, statement=before + " {key} ")
    assert len(PasskeyMeasure(template=apart).items(loaded, 200)) == 10


def full_width() -> PreTrainedTokenizerFast:
    """One that writes every digit in its full-width form, and every letter small."""
    digits = "０１２３４５６７８９"
    vocabulary = {letter: index for index, letter in enumerate(["▁", *LETTERS, *digits])}
    model = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    wide = [normalizers.Replace(str(index), digit) for index, digit in enumerate(digits)]
    model.normalizer = normalizers.Sequence([normalizers.Lowercase(), *wide])
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=model)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("made", [wordpiece, partial(wordpiece, decoders.WordPiece(cleanup=True)), full_width])
def test_a_number_that_is_only_written_otherwise_is_none_that_is_lost(
    small: LoadedModel, made: Callable[[], PreTrainedTokenizerFast]
) -> None:
    tokenizer = made()
    for item in PasskeyMeasure(tries=5).items(replace(small, tokenizer=tokenizer), 300):
        tokens = tokenizer.convert_ids_to_tokens(item.ids[-item.data["answer"] :].tolist())
        answer = unicodedata.normalize("NFKC", "".join(tokens)).replace("#", "").removeprefix("▁")
        assert (len(answer), answer.isdecimal()) == (5, True)


# Chat


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_chat_prompt_is_the_users_turn_and_the_answer_begins_the_assistants(small: LoadedModel, name: str) -> None:
    chat = CHAT.replace("</s>", "<eos>").replace("<s>", "<bos>") if name == "bytes" else CHAT
    loaded = with_tokenizer(small, name, chat)
    tokenizer: Any = loaded.tokenizer
    for item in PasskeyMeasure(tries=3, chat=True).items(loaded, 400):
        assert item.ids.shape == (400,)
        # Two of the tokenizers put a space before what follows a special token; the template has none there.
        text = re.sub(r"(</?s>) ", r"\1", decoded(tokenizer, item.ids, special=True))
        key = text[-5:]
        before, content = text.split("[user]\n")
        content, after = content.split(f"{tokenizer.eos_token}\n[assistant]\n")
        assert after == f"The pass key is {key}"
        assert content.endswith(SHORT.question)
        assert SHORT.statement.format(key=key) in content
        assert before == tokenizer.bos_token
        turn = [{"role": "user", "content": content}]
        assert text == tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + after
        assert (item.ids == tokenizer.bos_token_id).sum() == 1
        assert decoded(tokenizer, item.ids[-item.data["answer"] :]).endswith(key)


def test_without_a_lead_the_key_alone_begins_the_assistants_turn(small: LoadedModel) -> None:
    loaded = with_tokenizer(small, "joins digits", CHAT)
    (item,) = PasskeyMeasure(tries=1, chat=True, template=replace(SHORT, lead="")).items(loaded, 300)
    text = decoded(loaded.tokenizer, item.ids, special=True)
    assert text.endswith(f"[assistant]\n{text[-5:]}")
    assert decoded(loaded.tokenizer, item.ids[-item.data["answer"] :]) == text[-5:]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (None, r"--chat: got a tokenizer without a chat template; --chat puts prompts through it; leave --chat out"),
        ("{{ raise_exception('no users') }}", r"--chat: got a chat template that cannot be used \(no users\)"),
        ("hello", r"--chat: got a chat template that cannot be used \(it writes something else\)"),
        ("{{ messages[0].content }} {{ messages[0].content }}", r"--chat: .*; it writes a user's turn once, as it is"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(small: LoadedModel, chat: str | None, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        PasskeyMeasure(chat=True).items(with_tokenizer(small, "bytes", chat), 300)


# Files

FILE = """
[passkey]
intro = ""
filler = "Das Gras ist grün. "
statement = "Der {{Code}} ist {key}. "
question = "\\nWie ist der Code?"
lead = " Er ist"

[needle]
intro = "Lies. "
needle = "Für {key} gilt {number}. "
question = "Was gilt für {key}?"
names = ["Anna", "Bernd"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "t.toml"
    path.write_text(text, "utf-8")
    return path


def test_a_file_words_both_kinds_of_prompt(tmp_path: Path, small: LoadedModel) -> None:
    path = written(tmp_path, FILE)
    passkey, needle = read_passkey_template(path), read_needle_template(path)
    assert passkey == PasskeyTemplate(
        "Das Gras ist grün. ", "Der {{Code}} ist {key}. ", "\nWie ist der Code?", lead=" Er ist", answer=" {key}"
    )
    assert needle == NeedleTemplate(
        "Für {key} gilt {number}. ", "Was gilt für {key}?", intro="Lies. ", names=("Anna", "Bernd")
    )
    assert describe_template(needle) == {
        "intro": "Lies. ",
        "needle": "Für {key} gilt {number}. ",
        "question": "Was gilt für {key}?",
        "lead": "",
        "answer": " {number}",
        "names": ["Anna", "Bernd"],
    }
    loaded = with_tokenizer(small, "bytes")
    (item, *_) = PasskeyMeasure(template=passkey).items(loaded, 200)
    text = bytes(item.ids[1:].tolist()).decode(errors="replace")
    assert f"Der {{Code}} ist {text[-5:]}. " in text
    assert text.endswith(f"\nWie ist der Code? Er ist {text[-5:]}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "filler",
            "fuller",
            r"\[passkey\] fuller: got an unknown field; the fields are filler, statement, question",
        ),
        (
            'filler = "Das Gras ist grün. "',
            "",
            r"\[passkey\] filler: got no such field; a passkey template has it; add it",
        ),
        ("ist {key}. ", "ist geheim. ", r"\[passkey\] statement: got no \{key\}; it holds \{key\}; put it in"),
        ("{key}. ", "{kay}. ", r"\[passkey\] statement: got \{kay\}; the placeholders here are \{key\}, and a brace"),
        ("{key}. ", "{key!r}. ", r"\[passkey\] statement: got \{key!r\}; the placeholders here are \{key\}"),
        ("{key}. ", "{key}{. ", r"\[passkey\] statement: got '.*'; .*; write a brace of the text twice"),
        ("der Code?", "{key}?", r"\[passkey\] question: got \{key\}; the placeholders here are none"),
        ('"Das Gras ist grün. "', '" "', r"\[passkey\] filler: got no text; it fills the window; write a few"),
        ('"Das Gras ist grün. "', "3", r"\[passkey\] filler: got a int; it is text; put it in quotes"),
        ("[passkey]", "[passkeys]", r"got 'passkeys'; a template file has the tables \[passkey\] and \[needle\]"),
    ],
)
def test_a_wrong_file_is_told_with_its_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, FILE.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"^{path}[,:] {message}"):
        read_passkey_template(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gilt {number}", "gilt nichts", r", \[needle\] needle: got no \{number\}"),
        ("für {key}?", "für wen?", r", \[needle\] question: got no \{key\}"),
        (
            "für {key}?",
            "für {key}, {number}?",
            r", \[needle\] question: got \{number\}; the placeholders here are \{key\}",
        ),
        ('["Anna", "Bernd"]', "[]", r", \[needle\] names: got \(\); it is a list of one name or more"),
        ('["Anna", "Bernd"]', '"Anna"', r", \[needle\] names: got 'Anna'; it is a list of one name or more"),
        ("[needle]", "[passkey.needle]", r": got no table \[needle\]; prompts of needle are in the table \[needle\]"),
    ],
)
def test_a_wrong_needle_is_told_with_its_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, FILE.replace(old, new, 1))
    with pytest.raises(UserError, match=f"^{path}{message}"):
        read_needle_template(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^template: got .*/none, which cannot be read; No such file or directory; give"
    ):
        read_passkey_template(tmp_path / "none")
    with pytest.raises(UserError, match=r"^template: got .*t.toml, which is not TOML; .*; give a TOML file"):
        read_passkey_template(written(tmp_path, "intro = "))
    (tmp_path / "t.toml").write_bytes(b"intro = '\xff'")
    with pytest.raises(UserError, match=r"^template: got .*t.toml, which is not TOML; .*utf-8"):
        read_passkey_template(tmp_path / "t.toml")
