"""The stages of an extension as a plan: read from TOML, or made for a ratio; checked before anything is computed."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from longrope.errors import UserError, shown
from longrope.evaluate.templates import needle_template_of
from longrope.files import LARGEST, check_regular, disk_errors
from longrope.lengths import LONGEST, format_length, parse_length
from longrope.search.loop import Budget
from longrope.search.settings import SearchSettings, is_number
from longrope.training.recipes import RECIPES, SAVED, Recipe, recipe_of
from longrope.windows import LEAST

PLANS = ("longrope", "longrope-mistral", "longrope2")
"""Plans of ours by name: the two papers'."""
_KINDS = ("search", "finetune", "second", "recovery")
WITHOUT_TRAINING = 8
"""Up to this ratio factors alone are enough (LongRoPE, section 4.2: 8 times without fine-tuning)."""
_FIRST, _LAST = 32, 64  # ratios of the two fine-tunings
_OF_SEARCH = {each.name for each in fields(SearchSettings)} - {"to", "stage", "seed"}
_OF_TRAINING = {each.name for each in fields(Recipe)} | {
    *("documents", "short_documents", "recipe", "mixed", "lora", "embeddings", "norms", "gradient_checkpointing"),
    *("save_every", "keep", "save_dtype", "window_length"),
}
_LISTS = {
    "documents": "it is a list of further documents of this stage",
    "short_documents": "it is a list of the short documents of this stage",
}
_MORE_OF_TRAINING: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("mixed", lambda value: type(value) in (int, float) and 0 < value < 1, "it is a share between 0 and 1"),
    *((name, lambda value: type(value) is int and value >= 1, "it is a whole number of at least 1") for name in
      ("lora", "save_every", "keep")),
    *((name, lambda value: isinstance(value, bool), "it is true or false") for name in
      ("embeddings", "norms", "gradient_checkpointing")),
    ("save_dtype", lambda value: value in SAVED, f"it is one of {', '.join(SAVED)}"),
    ("recipe", lambda value: isinstance(value, str), f"it is one of {', '.join(RECIPES)}"),
    *((name, lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value), rule) for
      name, rule in _LISTS.items()),
)  # fmt: skip
_OF_MEASURES = {"lengths": list, "windows": int, "passkey": int}


@dataclass(frozen=True)
class Stage:
    """One step: what it does, for which length in tokens, with which settings of its command.

    number: its place, from 1 on. on: `base`, the model that the extension began with, or `last`, what the fine-tuning
    before has made of it.
    """

    number: int
    do: str
    to: int
    on: str = "last"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder in the run."""
        return f"{self.number:02}-{self.do}-{format_length(self.to)}"

    @property
    def window(self) -> int:
        """Tokens of a window of a fine-tuning: its length, unless it says shorter ones under the same factors."""
        return int(self.settings.get("window_length", self.to))

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        on = {"on": self.on} if self.do == "search" else {}
        return {"stage": self.name, "do": self.do, "to": self.to, **on, **self.settings}


@dataclass(frozen=True)
class Measures:
    """What is measured at the end: lengths (None is what the factor table has), windows of each, tries of passkeys."""

    lengths: tuple[int, ...] | None = None
    windows: int | None = None
    passkey: int = 10


@dataclass(frozen=True)
class Plan:
    """Stages in order, and what is measured at the end."""

    stages: tuple[Stage, ...]
    measures: Measures = Measures()

    @property
    def target(self) -> int:
        """The longest length."""
        return max(stage.to for stage in self.stages)

    @property
    def trains(self) -> bool:
        """Whether a stage of it fine-tunes."""
        return any(stage.do == "finetune" for stage in self.stages)

    def without_training(self) -> Plan:
        """One search at the target, with the settings of the longest search there is."""
        searches = [stage for stage in self.stages if stage.do == "search"]
        settings = max(searches, key=lambda stage: stage.to).settings if searches else {}
        return Plan((Stage(1, "search", self.target, settings=settings),), self.measures)


def default_plan(original_length: int, target: int) -> Plan:
    """The stages for a ratio: up to 8 a search; up to 64 fine-tuning, too; beyond a second interpolation.

    As the paper has them: above 32 the fine-tuning is in two steps, of 32 and 64 times the original length, whose
    factors are both searched on the base model; recovery at the end, at the original length and twice that.
    """
    ratio = target / original_length
    if ratio <= WITHOUT_TRAINING:
        return make_plan({"stages": [{"do": "search", "to": target}]}, original_length)
    trained = [target] if ratio <= _FIRST else [_FIRST * original_length, min(target, _LAST * original_length)]
    steps = (400, 600)
    stages: list[dict[str, Any]] = [{"do": "search", "to": length, "on": "base"} for length in trained]
    stages += [
        {"do": "finetune", "to": length, "recipe": "longrope-llama2", "steps": count}
        for length, count in zip(trained, steps, strict=False)
    ]
    if target > trained[-1]:
        stages.append({"do": "second", "to": target})
    stages.append({"do": "recovery", "to": [original_length, 2 * original_length]})
    return make_plan({"stages": stages}, original_length)


def read_plan(source: str | Path, original_length: int) -> Plan:
    """A plan from a TOML file, or one of ours by name. Raises UserError when it is none, saying what and where."""
    if str(source) in PLANS:
        text, where = files("longrope.extension").joinpath("plans", f"{source}.toml").read_text("utf-8"), str(source)
    else:
        path, where = Path(source), str(source)
        if not path.is_file():
            got, rule = f"{path}, which is no file", f"it is a TOML file, or one of {', '.join(PLANS)}"
            raise UserError("--stages", got=got, rule=rule, do="give the path of a plan")
        check_regular(path, "plan", LARGEST)
        with disk_errors(path):
            text = path.read_text("utf-8", errors="replace")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists in lists
        raise UserError("--stages", got=f"{where} ({error})", rule="a plan is TOML", do="correct the file") from None
    try:
        return make_plan(data, original_length)
    except UserError as error:
        raise error.changed(what=f"--stages: {where}: {error.what}") from None


def make_plan(data: Mapping[str, Any], original_length: int) -> Plan:
    """The plan of a parsed file. Raises UserError for what is no stage, and for an order that makes no sense."""
    _known("plan", data, {"stages", "measure"})
    listed = data.get("stages")
    if not isinstance(listed, list) or not listed or not all(isinstance(each, Mapping) for each in listed):
        raise _wrong("stages", shown(listed), "a plan has one or more [[stages]]")
    stages: list[Stage] = []
    for each in listed:
        stages += _stages(each, len(stages) + 1, original_length)
    _check_order(stages, original_length)
    plan = Plan(tuple(stages), _measures(data.get("measure", {}), original_length))
    lengths = plan.measures.lengths
    if lengths is not None and (not lengths or max(lengths) > plan.target):
        named = ", ".join(map(format_length, lengths)) or "none"
        raise _wrong("measure: lengths", named, f"there is at least one, and none beyond {format_length(plan.target)}")
    return plan


def _stages(data: Mapping[str, Any], number: int, original_length: int) -> list[Stage]:
    """The stages of one table; a recovery may have several lengths, each a stage of its own."""
    where, do = f"stage {number}", data.get("do")
    if do not in _KINDS:
        raise _wrong(f"{where}: do", shown(do), f"it is one of {', '.join(_KINDS)}")
    settings = {key: value for key, value in data.items() if key not in ("do", "to", "on")}
    _known(where, settings, _OF_TRAINING if do == "finetune" else _OF_SEARCH)
    on = data.get("on", "base" if do == "search" else "last")
    if on not in ("base", "last") or (do != "search" and "on" in data):
        raise _wrong(f"{where}: on", shown(on), "it is base or last, and of a search only")
    lengths = data.get("to")
    if not isinstance(lengths, list):
        lengths = [lengths]
    if len(lengths) != 1 and (do != "recovery" or not lengths):
        raise _wrong(f"{where}: to", f"{len(lengths)} lengths", "it is one length, or several of a recovery")
    for name in ("start_tokens", "attention_factor"):  # numbers too
        if is_number(settings.get(name)):
            settings[name] = str(settings[name])
    for name in _LISTS:  # or one alone
        if isinstance(settings.get(name), str):
            settings[name] = [settings[name]]
    for name in ("search_length", "window_length"):
        if name in settings:
            settings[name] = _length(settings[name], f"{where}: {name}", original_length)
    if do == "finetune":
        _check_training(settings, where)
    else:
        _check_search(settings, do, where)
    return [
        Stage(number + place, do, _length(each, f"{where}: to", original_length), on, settings)
        for place, each in enumerate(lengths)
    ]


def _check_training(settings: Mapping[str, Any], where: str) -> None:
    numbers = {each.name: settings[each.name] for each in fields(Recipe) if each.name in settings}
    for name, good, rule in _MORE_OF_TRAINING:
        if name in settings and not good(settings[name]):
            raise _wrong(f"{where}: {name}", shown(settings[name]), rule)
    if settings.get("lora") is None and (alone := [each for each in ("embeddings", "norms") if settings.get(each)]):
        raise _wrong(f"{where}: {alone[0]}", "no lora", "it is a setting of LoRA")
    if "short_documents" in settings and "mixed" not in settings:
        raise _wrong(f"{where}: short_documents", "no mixed", "they are what windows of mixed are packed of")
    for name, value in numbers.items():
        kind: Any = str if name == "schedule" else int if name in ("steps", "batch", "warmup") else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise _wrong(f"{where}: {name}", shown(value), "it is a number, of schedule a word")
        if not isinstance(value, str) and not is_number(value):
            raise _wrong(f"{where}: {name}", shown(value), "it is a finite number")
    try:
        recipe_of(settings.get("recipe"), numbers)
    except UserError as error:
        raise error.changed(what=f"{where}: {error.what}") from None


def _check_search(settings: Mapping[str, Any], do: str, where: str) -> None:
    try:
        _settings_of(1, do, 0, settings).check_words()
    except UserError as error:
        raise error.changed(what=f"{where}: {error.what}") from None


def _check_order(stages: Sequence[Stage], original_length: int) -> None:
    searched: set[int] = set()
    trained: int | None = None
    reached = 0  # of the fine-tuned model's rows
    for stage in stages:
        where, to = f"stage {stage.number} ({stage.do})", format_length(stage.to)
        if stage.do == "search":
            searched.add(stage.to)
            if stage.to <= original_length:
                raise _wrong(where, to, f"a search goes beyond the original length of {original_length}")
        elif stage.do == "finetune":
            if stage.to not in searched:
                raise _wrong(where, f"no search for {to} before it", "a fine-tuning uses factors of its length")
            if trained is not None and stage.to < trained:
                raise _wrong(where, to, f"a later fine-tuning is not shorter than the one before, {trained}")
            if not original_length < stage.window <= stage.to:
                rule = f"it is above the original length of {original_length}, and at most {to}, whose factors it has"
                raise _wrong(f"{where}: window_length", stage.window, rule)
            trained = reached = stage.to
        elif trained is None:
            raise _wrong(where, "no fine-tuning before it", "it is a search on the fine-tuned model")
        elif stage.do == "second" and stage.to <= trained:
            raise _wrong(where, to, f"a second interpolation goes beyond the fine-tuned length of {trained}")
        elif stage.do == "recovery" and not original_length <= stage.to <= reached:
            raise _wrong(where, to, f"a recovery is from the original length up to {reached}, where its rows end")
        if stage.do != "finetune":
            known = {"search": None, "second": trained, "recovery": reached}[stage.do]
            try:
                settings = search_settings(stage, 0)
                settings.check(original_length, known)
                Budget(settings.evaluation, expected=1, token_passes=settings.token_passes).check()
            except UserError as error:
                raise error.changed(what=f"{where}: {error.what}") from None
        reached = max(reached, stage.to) if stage.do == "second" else reached
    end = max([stage.to for stage in stages if stage.do == "second"] or [trained or max(searched)])
    if unused := [stage for stage in stages if stage.to > end]:
        rule = f"the stages end with factors up to {format_length(end)}: a search beyond is followed by a fine-tuning"
        raise _wrong(unused[0].name, "nothing that uses it", rule)
    trainings = {stage.to for stage in stages if stage.do == "finetune"}
    if idle := [stage for stage in stages if stage.do == "search" and trainings and stage.to not in trainings]:
        rule = "a search on the base model is followed by a fine-tuning to its length, or the stages have none"
        raise _wrong(idle[0].name, "nothing that uses it", rule)
    names = Counter((stage.do, stage.to) for stage in stages if stage.do != "finetune")
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise _wrong("stages", f"two of {twice[0]} to {format_length(twice[1])}", "each is there once")
    if trained is not None and any(stage.do == "finetune" and stage.to == trained for stage in stages):
        last = max(stage.number for stage in stages if stage.do == "finetune")
        if early := [stage for stage in stages if stage.do in ("second", "recovery") and stage.number < last]:
            raise _wrong(early[0].name, "a fine-tuning after it", "it is a search on the final model")


def _measures(data: object, original_length: int) -> Measures:
    if not isinstance(data, Mapping):
        raise _wrong("measure", shown(data), "it is a table")
    _known("measure", data, set(_OF_MEASURES))
    for name, value in data.items():
        kind: Any = _OF_MEASURES[name]
        if isinstance(value, bool) or not isinstance(value, kind) or (kind is int and value < (name == "windows")):
            raise _wrong(f"measure: {name}", shown(value), "lengths are a list, windows and passkey whole numbers")
    lengths = data.get("lengths")
    made = None if lengths is None else sorted({_length(each, "measure", original_length) for each in lengths})
    if made and made[0] < LEAST:
        raise _wrong("measure: lengths", made[0], f"a window is of at least {LEAST} tokens")
    return Measures(None if made is None else tuple(made), data.get("windows"), data.get("passkey", 10))


def _length(value: object, where: str, original_length: int) -> int:
    """Tokens of `128k`, of a number, or of `32x`, so many times the original length."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LONGEST:
        return value
    if isinstance(value, str):
        if times := re.fullmatch(r"([0-9]{1,6})x", value.strip()):
            if 0 < int(times[1]) * original_length <= LONGEST:
                return int(times[1]) * original_length
        elif not value.strip().endswith("x"):
            return parse_length(value)
    raise _wrong(where, shown(value), 'it is a length such as "128k", or a multiple of the original one such as "32x"')


def _known(where: str, data: Mapping[str, Any], names: set[str]) -> None:
    if unknown := sorted(set(data) - names):
        raise _wrong(where, ", ".join(unknown), f"its keys are {', '.join(sorted(names))}")


def _wrong(what: str, got: object, rule: str) -> UserError:
    return UserError(what, got=got, rule=rule, do="correct the plan")


def search_settings(stage: Stage, seed: int) -> SearchSettings:
    """The settings of the search that a stage is."""
    return _settings_of(stage.to, stage.do, seed, stage.settings)


def _settings_of(to: int, do: str, seed: int, settings: Mapping[str, Any]) -> SearchSettings:
    given = dict(settings)
    if "needle_template" in given:
        given["needle_template"] = needle_template_of(given["needle_template"], "needle_template")
    return SearchSettings(to=to, stage=None if do == "search" else do, seed=seed, **given)


def measured_lengths(plan: Plan, further: Sequence[int] = ()) -> list[int]:
    """The lengths of a plan's measurements: those it names, or all of the stages and further ones, of the table.

    Among the stages' are those that searches for longer ones are made at, whose rows are in the table at the end.
    """
    if plan.measures.lengths is not None:
        return list(plan.measures.lengths)
    trains = any(stage.do == "finetune" for stage in plan.stages)
    served = [stage for stage in plan.stages if stage.do == "second" or (stage.do == "search" and not trains)]
    searched = [stage.settings["search_length"] for stage in served if "search_length" in stage.settings]
    return sorted({*(stage.to for stage in plan.stages), *searched, *further})
