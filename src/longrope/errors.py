"""The one exception that means "the input is wrong": it becomes one line and exit code 2."""

from __future__ import annotations

from functools import partial
from typing import Any
from unicodedata import category

_MOST = 1000
"""Letters of a part of a line; what is longer is cut, for a name in a file may have millions."""

_SHOWN = 60


class UserError(ValueError):
    """Bad usage or input, told in one line: what, what was got, the rule, what to do."""

    def __init__(self, what: str, *, got: object, rule: str, do: str) -> None:
        self.what, self.got, self.rule, self.do = what, got, rule, do
        parts = (each if len(each) <= _MOST else f"{each[:_MOST]} ..." for each in (what, str(got), rule, do))
        super().__init__(one_line("{}: got {}; {}; {}".format(*parts)))

    def changed(self, **parts: Any) -> UserError:
        """The same error with some of its parts (what, got, rule, do) in other words: those of whoever asked."""
        own: dict[str, Any] = {"what": self.what, "got": self.got, "rule": self.rule, "do": self.do}
        return UserError(**own | parts)

    def __reduce__(self) -> tuple[Any, ...]:  # it comes back from a worker in another process
        return partial(UserError, self.what, got=str(self.got), rule=self.rule, do=self.do), ()


def shown(value: object) -> str:
    """A value of a file, as the line of an error shows it: its beginning."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def first_line(error: BaseException) -> str:
    """The first line of what a library's exception says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(text: str) -> str:
    """A text in one line, as a terminal shows it: names in files are bytes that others chose."""
    return printable(" ".join(text.split()))


def printable(text: str, kept: str = "") -> str:
    """A text whose control characters, and what else a terminal would act on, are written out: \\x1b; not `kept`."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in kept or category(letter) == "Zs" else _written_out(letter)
        for letter in text
    )


def _written_out(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def plural(count: int, noun: str) -> str:
    """`1 candidate`, `2 candidates`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
