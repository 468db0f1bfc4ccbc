"""Whether our command line would take a line of the documentation: its options exist and their values can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from longrope.baselines import METHODS as BASELINES
from longrope.checkpoint import AUTOCAST, DTYPES, LoadOptions
from longrope.cli import app
from longrope.errors import UserError
from longrope.evaluate.run import COMPARED, MeasureSettings, check_measure
from longrope.export.engines import check_names
from longrope.extension.plan import PLANS
from longrope.lengths import parse_length, parse_lengths
from longrope.ray_cluster import parse_workers
from longrope.runtime.switch import POLICIES
from longrope.search.settings import SearchSettings
from longrope.training.recipes import RECIPES

COMMAND: Any = typer.main.get_command(app)


def parsed(words: Sequence[str]) -> Mapping[str, Any]:
    """The options of a line, without its first word. Raises a usage error or a UserError for what is refused."""
    command, context, left = COMMAND, None, list(words)
    if left == ["--version"]:
        return {}
    path: list[str] = []
    while hasattr(command, "commands"):
        context = command.make_context(command.name, left, parent=context, resilient_parsing=False)
        name, command, left = command.resolve_command(context, [*context._protected_args, *context.args])
        path.append(str(name))
    given: Mapping[str, Any] = command.make_context(path[-1], left, parent=context).params
    for option, value in given.items():
        if value is not None and option in CHECKS:
            CHECKS[option](value)
    _together(path[0], given)
    return given


def _lengths(value: str) -> None:
    parse_lengths(value)


def _one_of(what: str, known: Sequence[str]) -> Callable[[Any], None]:
    def check(value: str) -> None:
        if value not in known:
            raise UserError(what, got=repr(value), rule=f"it is one of {', '.join(known)}", do="choose one of them")

    return check


def _methods(value: str) -> None:
    for name in value.split(","):
        _one_of("--methods", ["none", *BASELINES])(name.removesuffix("+su"))


def _plan(value: str) -> None:
    if not str(value).endswith(".toml"):
        _one_of("--stages", list(PLANS))(str(value))


CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "lengths": _lengths,
    "length": parse_length,
    "up_to": parse_length,
    "search_length": parse_length,
    "original_length": parse_length,
    "token_passes": parse_length,
    "methods": _methods,
    "recipe": _one_of("--recipe", list(RECIPES)),
    "policy": _one_of("policy", POLICIES),
    "schedule": _one_of("--schedule", ["linear", "cosine", "constant"]),
    "workers": parse_workers,
    "stages": _plan,
    "device": lambda value: LoadOptions(device=value) if not value.startswith("cuda") else None,
    "rope_precision": lambda value: LoadOptions(rope_precision=value),
    "quantize": _one_of("--quantize", ["8bit", "4bit"]),
}


def _together(command: str, given: Mapping[str, Any]) -> None:
    """What is checked of one command's options."""
    if command == "factors":
        if given["to"] is not None:
            _one_of("--to", ["json", "transformers", "csv"])(given["to"])
    elif "to" in given:
        parse_length(given["to"])
    if command == "search":
        words = {name: given[name] for name in ("method", "objective", "space", "stage", "needle_depth", "race")}
        SearchSettings(to=parse_length(given["to"]), **words).check_words()
    elif command == "export":
        check_names(given["engine"], given["window"])
        if given["dtype"] is not None:
            _one_of("--dtype", ["f32", "f16", "bf16", "q8_0"])(given["dtype"])
    elif command == "compare":
        check_measure(given["measure"], MeasureSettings(documents=given["documents"] or ["D"]), COMPARED)
    if command != "export" and "dtype" in given:
        _one_of("--dtype", ["auto", AUTOCAST, *DTYPES])(given["dtype"])
