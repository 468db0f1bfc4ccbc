"""What is searched and how: the command's words, checked, with each method's own defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from longrope.baselines import attention_factor
from longrope.errors import UserError, shown
from longrope.evaluate.templates import NeedleTemplate, describe_template
from longrope.lengths import format_length
from longrope.search.methods import METHODS
from longrope.search.needle import DEPTHS, DIGITS, Depth
from longrope.search.space import START_TOKENS
from longrope.windows import default_window_count

_OBJECTIVES = ("perplexity", "needle", "both")
_STAGES = ("second", "recovery")
# A recovery is at short lengths, where the windows of a longer search would be few tokens.
_RECOVERY_TOKENS = 65536
_SPACES = ("longrope", "longrope2")
# So few search windows are not what gradients are taken on: they would be learned by heart. More of them are, rather
# than others, because an epoch is then no longer than what Adam averages over, and the windows' differences cancel.
_FEW, _INSTEAD = 3, 64
_MOST_DIGITS = 18
_DECIDING = 1  # windows of the target length, where a shorter one is searched


def is_number(value: object) -> bool:
    """Whether a value is a finite number; true and false are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of so many digits that no float holds it
        return False


_TYPES: Mapping[type, tuple[Callable[[Any], bool], str]] = {
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "it is a whole number"),
    float: (lambda value: isinstance(value, float) or is_number(value), "it is a finite number"),  # ranges are below
    bool: (lambda value: isinstance(value, bool), "it is true or false"),
    str: (lambda value: isinstance(value, str), "it is a word, or a finite number"),
}
"""What is good for a field of a type, and that in words; other texts than these are words of a list."""


@dataclass(frozen=True)
class SearchSettings:
    """What is searched and how; `check` them against a model before use. None is the method's own default."""

    to: int
    """Target length in tokens."""
    method: str = "hybrid"
    """evolution: Algorithm 1 of the paper. gradient: descent from the best seeds. hybrid: seeds, descent, evolution."""
    objective: str = "perplexity"
    """perplexity; needle: the loss of the answer to a question about a needle in a real document (LongRoPE2); both: the
    geometric mean of the perplexities of as many whole windows and of the answers of as many needles."""
    space: str = "longrope"
    """longrope, or longrope2: from the real critical dimension on, NTK below."""
    start_tokens: str | None = None
    """n-hat: a number, or `search` over the paper's list. By default search in evolution, else 0."""
    attention_factor: str | None = None
    """m: su, yarn, none, a number or search. By default su in evolution, else search."""
    stage: str | None = None
    """None: a first extension. second: the checkpoint was fine-tuned with its longest row, and what is searched
    multiplies that. recovery: factors for a length that the checkpoint's row reaches already."""
    search_length: int | None = None
    """A shorter length that is searched instead, where the target is too dear: what is found there is carried over to
    the target, where a few evaluations decide."""
    needle_depth: Depth = "spread"
    """Where the needle is: spread over the documents, or at their start (as LongRoPE2 has it)."""
    needle_digits: int = DIGITS
    """Digits of the number that is asked for."""
    needle_template: NeedleTemplate | None = None
    """The needle's wording, such as one in another language; by default ours."""
    race: bool = False
    """Whether evolution drops children that cannot become parents before all windows are run; off in the paper's."""
    windows: int | None = None
    """Search windows, of each kind where the objective is both; by default 8 up to 32k, 5 below 512k, 3 from there."""
    gradient_windows: int | None = None
    """Further windows (of each kind) of the same documents that gradients are taken on, as far as there are; 0: the
    search windows. By default 0, and 64 where there are fewer than 4 search windows."""
    evaluations: int | None = None
    """Limit in evaluations of all search windows; by default the method's own size."""
    token_passes: int | None = None
    """Limit in token-passes."""
    hours: float | None = None
    """Limit in hours of the search, all its processes together."""
    seed: int = 0

    def resolved(self) -> SearchSettings:
        """With the method's defaults in place of None, for what is not a limit."""
        paper = self.method == "evolution"
        return replace(
            self,
            start_tokens=("search" if paper else "0") if self.start_tokens is None else self.start_tokens,
            attention_factor=("su" if paper else "search") if self.attention_factor is None else self.attention_factor,
        )

    def check(self, original_length: int, reached: int | None = None) -> None:
        """Raise UserError when they make no sense for a model of this original length.

        reached: the longest length of the checkpoint's own factors.
        """
        self.check_words()
        reached = reached or original_length
        if self.stage == "recovery":
            if reached <= original_length:
                got, rule = "a checkpoint that is not extended", "a recovery is of one that was fine-tuned with factors"
                raise UserError("--stage", got=got, rule=rule, do="give such a checkpoint, or leave out --stage")
            if not original_length <= self.to <= reached:
                raise UserError(
                    "--to",
                    got=f"{self.to} tokens",
                    rule=f"a recovery is for lengths from the original {original_length} to {reached}, where the "
                    "checkpoint's own factors end",
                    do="give such a length",
                )
        elif self.stage == "second" and self.to <= reached:
            raise UserError(
                "--to",
                got=f"{self.to} tokens",
                rule=f"a second interpolation goes beyond {reached} tokens, where the checkpoint's own factors end",
                do=f"give a longer target, such as {format_length(8 * reached)}",
            )
        elif self.to <= original_length:
            raise UserError(
                "--to",
                got=f"{self.to} tokens",
                rule=f"the target is longer than the model's original length of {original_length}",
                do=f"give a longer target, such as {format_length(8 * original_length)}, or --original-length",
            )
        least = reached if self.stage == "second" else original_length
        if self.search_length is not None and (self.stage == "recovery" or not least < self.search_length < self.to):
            raise UserError(
                "--search-length",
                got=f"{self.search_length} tokens" + (" in a recovery" if self.stage == "recovery" else ""),
                rule=f"it is an extension that is shorter than the target: above {least} and below {self.to}",
                do="give such a length, or leave it out",
            )
        if self.search_length is not None and self.objective != "perplexity":
            got = f"--objective {self.objective}"
            rule = "what is found at a shorter length is decided between by perplexity"
            raise UserError("--search-length", got=got, rule=rule, do="leave one of them out")
        self._check_factors(original_length)

    def check_words(self) -> None:
        """Raise UserError for what makes no sense for any model."""
        words = {
            "--method": (self.method, METHODS),
            "--objective": (self.objective, _OBJECTIVES),
            "--space": (self.space, _SPACES),
            "--needle-depth": (self.needle_depth, DEPTHS),
        }
        if self.stage is not None:
            words["--stage"] = (self.stage, _STAGES)
        if not isinstance(self.needle_template, NeedleTemplate | None):
            got, rule = f"a {type(self.needle_template).__name__}", "it is a NeedleTemplate, or the path of its file"
            raise UserError("--needle-template", got=got, rule=rule, do="give one of them")
        for flag, (word, known) in words.items():
            if word not in known:
                rule = f"it is one of {', '.join(known)}"
                raise UserError(flag, got=repr(word), rule=rule, do="choose one of them")
        self._check_types()
        numbers = {
            "--windows": self.windows,
            "--evaluations": self.evaluations,
            "--token-passes": self.token_passes,
        }
        for flag, value in numbers.items():
            if value is not None and value < 1:
                raise UserError(flag, got=value, rule="it is at least 1", do="give a larger number")
        if self.gradient_windows is not None and self.gradient_windows < 0:
            rule = "it is at least 0"
            raise UserError("--gradient-windows", got=self.gradient_windows, rule=rule, do="give 0 for none of its own")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise UserError("--hours", got=self.hours, rule="it is a number above 0", do="give a larger number")
        if not 1 <= self.needle_digits <= _MOST_DIGITS:
            rule = f"a number has 1 to {_MOST_DIGITS} of them"
            raise UserError("--needle-digits", got=self.needle_digits, rule=rule, do="use 7 as in LongRoPE2")
        self._check_needle()
        if self.gradient_windows and self.method == "evolution":
            got, rule = "--method evolution", "it takes no gradients"
            raise UserError("--gradient-windows", got=got, rule=rule, do="leave it out, or choose gradient or hybrid")
        if self.race and self.method != "evolution":
            rule = f"it is a choice of evolution; {self.method} always races"
            raise UserError("--race", got=f"--method {self.method}", rule=rule, do="leave it out")

    def _check_needle(self) -> None:
        """Raise UserError for what says how needles are, where there are none; what a default says is nobody's word."""
        given = {
            "--needle-template": (self.needle_template, None, "the wording"),
            "--needle-depth": (self.needle_depth, "spread", "the place"),
            "--needle-digits": (self.needle_digits, DIGITS, "the number"),
        }
        for flag, (value, default, what) in given.items():
            if value != default and self.objective == "perplexity":
                got, rule = "--objective perplexity", f"it is {what} of the needle objective"
                raise UserError(flag, got=got, rule=rule, do="leave it out, or choose needle or both")

    def _check_types(self) -> None:
        """Raise UserError for what is of another type than its field: a file and a caller may give any."""
        for name, kinds in _types().items():
            value = getattr(self, name)
            for kind, (good, rule) in _TYPES.items():
                if kind in kinds and not good(value) and not (value is None and type(None) in kinds):
                    flag = "--" + name.replace("_", "-")
                    raise UserError(flag, got=shown(value), rule=rule, do="give one")

    def _check_factors(self, original_length: int) -> None:
        start, rule = self.resolved().start_tokens or "", self.resolved().attention_factor or ""
        if start != "search" and not (start.isdecimal() and int(start) < self.to):
            told = "it is a number of tokens below the target, or search"
            raise UserError("--start-tokens", got=repr(start), rule=told, do="give 0, a number or search")
        if rule != "search":
            try:
                attention_factor(rule, self.to / original_length, original_length)
            except UserError:
                told = "it is su, yarn, none, search or a positive number"
                raise UserError("--attention-factor", got=repr(rule), rule=told, do="choose one of them") from None

    def further_windows(self, searched: int) -> int:
        """How many further windows gradients are taken on, where there are so many search windows."""
        if self.method == "evolution":
            return 0
        if self.gradient_windows is None:
            return _INSTEAD if searched <= _FEW else 0
        return self.gradient_windows

    @property
    def shorter(self) -> SearchSettings | None:
        """The search at the shorter length, if there is one."""
        return None if self.search_length is None else replace(self, to=self.search_length, search_length=None)

    @property
    def window_count(self) -> int:
        """How many search windows of the target length, of each kind where the objective is both."""
        if self.windows is not None:
            return self.windows
        if self.search_length is not None:
            return _DECIDING
        least = -(-_RECOVERY_TOKENS // self.to) if self.stage == "recovery" else 0
        return max(default_window_count(self.to), least)

    @property
    def whole_windows(self) -> Mapping[int, int]:
        """How many windows of which lengths the documents have to hold: a needle's span is shorter than a window.

        Further windows for gradients are as many as there are.
        """
        shorter = self.shorter.whole_windows if self.shorter else {}
        return {self.to: self.window_count, **shorter}

    @property
    def evaluation(self) -> int:
        """Tokens of an evaluation as the limits count them: of the shorter search where there is one."""
        limited = self.shorter or self
        return limited.to * limited.window_count * limited.together

    @property
    def together(self) -> int:
        """Windows that are compared as one: a whole window and a needle where the objective is both."""
        return 2 if self.objective == "both" else 1

    @property
    def start_choices(self) -> tuple[int, ...]:
        """The values of n-hat that are tried."""
        start = self.resolved().start_tokens or "0"
        if start != "search":
            return (int(start),)
        return tuple(each for each in START_TOKENS if each < self.to)

    @property
    def searches_attention(self) -> bool:
        """Whether the attention factor is searched."""
        return self.resolved().attention_factor == "search"

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: resolved, without the number of windows, which are listed there."""
        told = {name: value for name, value in vars(self.resolved()).items() if name != "windows"}
        wording = told.pop("needle_template")
        return told if wording is None else told | {"needle_template": describe_template(wording)}


@cache
def _types() -> Mapping[str, tuple[Any, ...]]:
    """The types that each field may have, as it is annotated."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(SearchSettings).items()}


BUDGET = ("evaluations", "token_passes", "hours")
"""Settings that are limits, which may grow when a run goes on."""
