"""The words of RULER's prompts: English ones of our own, and those of a TOML file that replaces them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope.errors import UserError
from longrope.evaluate.wording import placeholders, read_toml

Texts = Mapping[str, Mapping[str, Any]]
"""Table -> key -> a text with placeholders; in the table `words`, a list of texts."""

ENGLISH: Texts = {
    "niah": {
        "prompt": "The text below hides magic {type_needle_v}. Remember them.\n{context}\n"
        "Which magic {type_needle_v} does the text give for {query}?",
        "answer_prefix": "The magic {type_needle_v} for {query} are:",
        "prompt_one": "The text below hides a magic {type_needle_v}. Remember it.\n{context}\n"
        "Which magic {type_needle_v} does the text give for {query}?",
        "answer_prefix_one": "The magic {type_needle_v} for {query} is:",
        "needle": "One magic {type_needle_v} for {key} is: {value}.",
        "number": "number",
        "numbers": "numbers",
        "uuid": "UUID",
        "uuids": "UUIDs",
    },
    "vt": {
        "prompt": "The text below hides assignments of variables. Follow who holds which value.\n{context}\n"
        "Which variables hold the value {query}?",
        "answer_prefix": "Answer: {num_v} variables hold the value {query}, and they are:",
        "assign": "VAR {name} = {value}.",
        "copy": "VAR {name} = VAR {source}.",
    },
    "cwe": {
        "prompt": "In the numbered list below some words come up more often than the others. Remember those.\n"
        "{context}\nWhich ten words are the most common in the list?",
        "answer_prefix": "Answer: the ten words that come up most often in the list are:",
    },
    "fwe": {
        "prompt": "Count how often each coded word comes up in the text below.\n{context}\n"
        "Leave the dots aside and explain nothing. Which three coded words come up most often?",
        "answer_prefix": "Answer: the three most frequent coded words are:",
    },
    "qa": {
        "prompt": "Answer a question from the documents below, in as few words as it takes.\n\n{context}\n\n"
        "Answer the question from the documents above, in as few words as it takes.\nQuestion: {query}",
        "answer_prefix": "Answer:",
        "document": "Document {i}:\n{document}",
    },
    "words": {
        "sentences": [
            "The kettle sings on the stove.",
            "A boat drifts past the mill.",
            "Rain taps at the window.",
            "The baker opens at dawn.",
            "Two cats sleep on the wall.",
            "The road bends by the orchard.",
            "Snow lies on the far hills.",
            "Somebody whistles in the yard.",
            "The clock in the hall is slow.",
            "Leaves gather at the gate.",
            "The ferry comes at noon.",
            "Smoke rises from the chimney.",
        ],
        "adjectives": (
            "amber ancient arctic bitter blunt bold brave brief bright brisk calm careful civil clear clever cold "
            "copper cosmic crisp curious damp daring dark deep distant dusty eager early elder empty faint fair fancy "
            "fierce final flat fond formal frail fresh gentle giant glad golden grand green happy hidden hollow honest "
            "humble icy idle inner ivory jolly keen kind large late lively lonely loud lucky mellow merry mild modest "
            "narrow neat noble northern odd olive open pale patient plain polite proud pure quaint quick quiet rapid "
            "rare ready rigid rough round royal rusty scarlet secret sharp shiny silent silver simple slim solid "
            "southern steady stern sturdy subtle sunny swift tall tame tender tidy tiny tough velvet vivid warm wary "
            "wide wild wise wooden young"
        ).split(),
        "nouns": (
            "acorn anchor anvil apron arch arrow badger banner barn basin basket beacon bell bench berry blanket "
            "bridge bucket button cabin camel candle canyon carpet castle cedar cello chapel cherry circle cliff cloak "
            "cobbler comet compass copse cradle crane crown dagger desert dragon drum eagle engine falcon feather "
            "fiddle finch flask forest fountain garden glacier glove goblet hammer harbor harp hawk hazel helmet heron "
            "island jacket jigsaw kettle kitten ladder lagoon lantern ledger lemon letter lily lizard locket magnet "
            "mantle maple marble market meadow mirror monkey mountain needle nickel orchard otter oven oyster paddle "
            "palace parrot pebble pepper piano pillow pirate planet pocket prairie puzzle quarry quill rabbit raven "
            "ribbon river rocket saddle sailor shovel sparrow spoon stable statue stream table teapot temple thistle "
            "thunder timber tower trumpet tunnel turnip valley village violin wagon walnut whistle willow window wizard"
        ).split(),
    },
}
"""Our own wording."""

# Placeholders of each text: those it may have, then those that it must have.
_NIAH = ({"type_needle_v", "query", "context"}, {"query", "context"})
_NIAH_PREFIX: tuple[set[str], set[str]] = ({"type_needle_v", "query"}, set())
_NOTHING: tuple[set[str], set[str]] = (set(), set())
_PLACEHOLDERS: Mapping[str, Mapping[str, tuple[set[str], set[str]]]] = {
    "niah": {
        "prompt": _NIAH,
        "answer_prefix": _NIAH_PREFIX,
        "prompt_one": _NIAH,
        "answer_prefix_one": _NIAH_PREFIX,
        "needle": ({"type_needle_v", "key", "value"}, {"key", "value"}),
        **dict.fromkeys(("number", "numbers", "uuid", "uuids"), _NOTHING),
    },
    "vt": {
        "prompt": ({"context", "query", "num_v"}, {"context", "query"}),
        "answer_prefix": ({"query", "num_v"}, set()),
        "assign": ({"name", "value"}, {"name", "value"}),
        "copy": ({"name", "source"}, {"name", "source"}),
    },
    "cwe": {"prompt": ({"context"}, {"context"}), "answer_prefix": _NOTHING},
    "fwe": {"prompt": ({"context"}, {"context"}), "answer_prefix": _NOTHING},
    "qa": {
        "prompt": ({"context", "query"}, {"context", "query"}),
        "answer_prefix": ({"query"}, set()),
        "document": ({"i", "document"}, {"document"}),
    },
}


def read_templates(path: str | Path) -> Texts:
    """The English texts with those of a TOML file in their place.

    Raises UserError for a file that cannot be read, for a table, key or placeholder that RULER does not know, and for
    a text without a placeholder that it needs.
    """
    given = read_toml(Path(path))
    texts = {table: dict(copy.deepcopy(dict(of_table))) for table, of_table in ENGLISH.items()}
    for table, changes in given.items():
        if table not in texts or not isinstance(changes, dict):
            raise _unknown(f"the table {table!r}", f"the tables are {', '.join(texts)}")
        for key, value in changes.items():
            if key not in texts[table]:
                raise _unknown(f"the key {key!r} in [{table}]", f"its keys are {', '.join(texts[table])}")
            texts[table][key] = _words(key, value) if table == "words" else _text(table, key, value)
    return texts


def _words(key: str, value: object) -> list[str]:
    words = [each.strip() for each in value if isinstance(each, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(words) != len(value) or len(set(words)) < 2 or not all(words):
        rule = "it is a list of two different texts or more"
        raise UserError("templates", got=f"words.{key} of another kind", rule=rule, do="correct the file")
    return words


def _text(table: str, key: str, value: object) -> str:
    """The text, checked. Raises UserError."""
    where = f"{table}.{key}"
    allowed, needed = _PLACEHOLDERS[table][key]
    told = f"its placeholders are {', '.join(f'{{{name}}}' for name in sorted(allowed)) or 'none'}"
    if not isinstance(value, str):
        raise UserError("templates", got=f"{where} of another kind", rule="it is a text", do="correct the file")
    try:
        placed = placeholders(value)
    except ValueError as error:
        rule = f"a brace that is no placeholder is written twice ({error})"
        raise UserError("templates", got=f"a lone brace in {where}", rule=rule, do="correct the file") from error
    for each in placed:
        if each not in allowed:
            raise _unknown(f"the placeholder {{{each}}} in {where}", told)
    missing = sorted(needed - set(placed))
    if missing:
        got = f"{where} without {{{missing[0]}}}"
        raise UserError("templates", got=got, rule="without it the task cannot be solved", do="add it")
    return value


def _unknown(got: str, rule: str) -> UserError:
    return UserError("templates", got=got, rule=rule, do="correct the file")
