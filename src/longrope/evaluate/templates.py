"""The wording of passkey and needle prompts: ours, or that of a TOML file, for instance in another language.

[passkey]
intro = ""                                    # before everything; may be empty
filler = "Grass is green. "                   # repeated until the window is full
statement = "The pass key is {key}. "         # put somewhere into the filler
question = "\\nWhat is the pass key?"          # at the end
lead = " The pass key is"                     # the answer's first words, given; optional
answer = " {key}"                             # what the model has to write; this is the default

[needle]
intro = ""
needle = "\\nFor {key} the number is {number}.\\n"   # put somewhere into a real document
question = "\\nWhat is the number for {key}?"
lead = " For {key} the number is"             # optional
answer = " {number}"                          # this is the default
names = ["amber-anchor", "bold-bridge"]       # what {key} is drawn from; optional
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longrope.errors import UserError, shown
from longrope.evaluate.prompts import Prompt, Wording, tokenize_prompt
from longrope.evaluate.wording import placeholders, read_toml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTRO_FROM = 1024
"""Tokens of a window from which on our own prompts have an introduction; a shorter one has better use for its space."""
FIRST = "amber bold calm distant early gentle hollow idle jolly keen lonely mellow narrow patient quiet rusty".split()
"""First halves of the names that needles are told for."""
SECOND = "anchor bridge candle dolphin engine forest garden hammer island jacket kettle ladder mirror needle".split()
"""Their second halves."""
_NAMES = tuple(f"{first}-{second}" for first in FIRST for second in SECOND)
_KINDS = ("passkey", "needle")

_Kind = TypeVar("_Kind", "PasskeyTemplate", "NeedleTemplate")


def _check(
    table: str, texts: Mapping[str, object], needed: Mapping[str, Sequence[str]], allowed: Mapping[str, Sequence[str]]
) -> None:
    """Raise UserError unless every text is one, with the placeholders that it needs and no others."""
    for name, text in texts.items():
        where = f"{table} {name}"
        if not isinstance(text, str):
            raise UserError(where, got=f"a {type(text).__name__}", rule="it is text", do="put it in quotes")
        wanted, possible = needed.get(name, ()), {*needed.get(name, ()), *allowed.get(name, ())}
        try:
            placed = placeholders(text)
        except ValueError as error:
            do = "write a brace of the text twice: {{ or }}"
            raise UserError(where, got=repr(text), rule=str(error).lower(), do=do) from None
        wrong = [each for each in placed if each not in possible]
        told = " and ".join(f"{{{each}}}" for each in sorted(possible)) or "none"
        if wrong:
            rule = f"the placeholders here are {told}, and a brace in the text is written twice"
            raise UserError(where, got=f"{{{wrong[0]}}}", rule=rule, do="take it out")
        for each in wanted:
            if each not in placed:
                raise UserError(where, got=f"no {{{each}}}", rule=f"it holds {{{each}}}", do="put it in")


def _answered(template: PasskeyTemplate | NeedleTemplate, value: str, told: str) -> None:
    """Where a template does not say how its answer is written: as the text has it that tells, else after a space."""
    if template.answer == "":
        follows = isinstance(told, str) and isinstance(template.lead, str) and f"{template.lead}{value}" in told
        object.__setattr__(template, "answer", value if template.lead and follows else f" {value}")


@dataclass(frozen=True)
class PasskeyTemplate:
    """The wording of passkey prompts; {key} stands for the key. Raises UserError for a misplaced placeholder.

    answer: by default the key after a space, or without one where `statement` has it right behind the words of `lead`.
    """

    filler: str
    statement: str
    question: str
    intro: str = ""
    lead: str = ""
    answer: str = ""

    def __post_init__(self) -> None:
        _answered(self, "{key}", self.statement)
        needed = {"statement": ("key",), "answer": ("key",)}
        _check("[passkey]", {field.name: getattr(self, field.name) for field in fields(self)}, needed, {})
        if not self.filler.strip():
            raise UserError("[passkey] filler", got="no text", rule="it fills the window", do="write a few sentences")

    def prompt(self, tokenizer: PreTrainedTokenizerBase, key: str, *, chat: bool = False) -> Prompt:
        """The prompt of a key, without filler."""
        told, answer = self.statement.format(key=key), self.answer.format(key=key)
        intro, question, lead = (text.format() for text in (self.intro, self.question, self.lead))
        return tokenize_prompt(tokenizer, Wording(intro, told, question, lead, answer, key), chat=chat)


@dataclass(frozen=True)
class NeedleTemplate:
    """The wording of needle prompts; {key} stands for one of `names`, {number} for its number.

    Raises UserError for a misplaced placeholder.
    """

    needle: str
    question: str
    intro: str = ""
    lead: str = ""
    answer: str = ""
    names: Sequence[str] = _NAMES

    def __post_init__(self) -> None:
        _answered(self, "{number}", self.needle)
        texts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "names"}
        needed = {"needle": ("key", "number"), "question": ("key",), "answer": ("number",)}
        _check("[needle]", texts, needed, {"lead": ("key",), "answer": ("key",)})
        listed = isinstance(self.names, list | tuple) and bool(self.names)
        if not listed or not all(isinstance(name, str) and name.strip() for name in self.names):
            rule = "it is a list of one name or more"
            raise UserError("[needle] names", got=repr(self.names), rule=rule, do="list names, or leave it out")

    def prompt(self, tokenizer: PreTrainedTokenizerBase, key: str, number: str, *, chat: bool = False) -> Prompt:
        """The prompt of a name and its number, without its document."""
        return tokenize_prompt(tokenizer, self.wording(key, number), chat=chat)

    def wording(self, key: str, number: str) -> Wording:
        """The texts of that prompt."""
        intro, told, question, lead, answer = (
            text.format(key=key, number=number)
            for text in (self.intro, self.needle, self.question, self.lead, self.answer)
        )
        return Wording(intro, told, question, lead, answer, number)


PAPER = PasskeyTemplate(
    intro="There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n",
    filler="The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",
    statement="The pass key is {key}. Remember it. {key} is the pass key.\n",
    question="\nWhat is the pass key?",
    lead=" The pass key is",
)
"""The wording of the LongRoPE paper."""
SHORT = replace(PAPER, intro="")
"""The same without its introduction, for short windows."""
NEEDLE = NeedleTemplate(
    intro="In the text below a magic number is given for a name. Remember both: you will be asked for it at the end.\n",
    needle="\nFor {key} the magic number is {number}. Remember it.\n",
    question="\nWhat is the magic number for {key}?",
    lead=" For {key} the magic number is",
)
"""Our own wording of a needle."""
SHORT_NEEDLE = replace(NEEDLE, intro="")
"""The same without its introduction, for short windows."""


def read_passkey_template(path: str | Path) -> PasskeyTemplate:
    """The table [passkey] of a TOML file. Raises UserError, naming the file and the field."""
    return _read(Path(path), "passkey", PasskeyTemplate)


def read_needle_template(path: str | Path) -> NeedleTemplate:
    """The table [needle] of a TOML file. Raises UserError, naming the file and the field."""
    return _read(Path(path), "needle", NeedleTemplate)


def describe_template(template: PasskeyTemplate | NeedleTemplate | None) -> dict[str, Any] | None:
    """A template as the settings of a run hold it; None is our own."""
    return None if template is None else {key: _plain(value) for key, value in asdict(template).items()}


def _plain(value: str | Sequence[str]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _read(path: Path, kind: str, cls: type[_Kind]) -> _Kind:
    tables = read_toml(path)
    unknown = [name for name in tables if name not in _KINDS]
    if unknown:
        rule = f"a template file has the tables {' and '.join(f'[{name}]' for name in _KINDS)}"
        raise UserError(f"{path}", got=f"{unknown[0]!r}", rule=rule, do="rename it, or take it out")
    given = tables.get(kind)
    if not isinstance(given, dict):
        rule, do = f"prompts of {kind} are in the table [{kind}]", f"add [{kind}], or measure without a template"
        raise UserError(f"{path}", got=f"no table [{kind}]", rule=rule, do=do)
    try:
        return _made(cls, given, f"[{kind}]")
    except UserError as error:
        raise error.changed(what=f"{path}, {error.what}") from None


def needle_template_of(given: object, where: str) -> NeedleTemplate:
    """A needle's template of parsed fields. Raises UserError, naming where they stand and the field."""
    if not isinstance(given, Mapping):
        rule = f"it is a table of {', '.join(field.name for field in fields(NeedleTemplate))}"
        raise UserError(where, got=shown(given), rule=rule, do="write such a table")
    return _made(NeedleTemplate, given, where)


def _made(cls: type[_Kind], given: Mapping[str, Any], where: str) -> _Kind:
    kind = "needle" if cls is NeedleTemplate else "passkey"
    known = {field.name: field.default is MISSING for field in fields(cls)}
    for name in given:
        if name not in known:
            rule = f"the fields are {', '.join(known)}"
            raise UserError(f"{where} {name}", got="an unknown field", rule=rule, do="rename it")
    for name, needed in known.items():
        if needed and name not in given:
            raise UserError(f"{where} {name}", got="no such field", rule=f"a {kind} template has it", do="add it")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return cls(**values)
