"""The one exception that means "the input is wrong": it becomes one line and exit code 2."""

from __future__ import annotations

from functools import partial
from typing import Any


class UserError(ValueError):
    """Bad usage or input, told in one line: what, what was got, the rule, what to do."""

    def __init__(self, what: str, *, got: object, rule: str, do: str) -> None:
        self.what, self.got, self.rule, self.do = what, got, rule, do
        line = f"{what}: got {got}; {rule}; {do}"
        super().__init__(" ".join(line.split()))

    def __reduce__(self) -> tuple[Any, ...]:  # it comes back from a worker in another process
        return partial(UserError, self.what, got=str(self.got), rule=self.rule, do=self.do), ()
