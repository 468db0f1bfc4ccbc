"""What the page says in words and numbers: the headline, the cards, the tables, the settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longrope.lengths import format_length
from longrope.report.read import RunData
from longrope.report.results import MEASURES, Against, Result, length_of
from longrope.report.searched import counts, evaluations_text, number_text, objective_text
from longrope.report.style import (
    Look,
    count_text,
    duration_text,
    is_ours,
    length_text,
    look,
    percent_text,
    title_of,
    value_text,
)
from longrope.runs import lower_is_better

# What a measure must be told beside the model, its factors and lengths.
_FURTHER = {
    "perplexity": ["--documents", "D"],
    "needle": ["--documents", "D"],
    "harness": ["--tasks", "A,B"],
    "nonuniformity": ["--documents", "D"],
}


@dataclass(frozen=True)
class Verdict:
    """Our best method against the best baseline at one length; `change` is the relative difference."""

    length: int
    ours: Result
    baseline: Result | None
    change: float | None


@dataclass(frozen=True)
class Card:
    """A key number with its name and a remark."""

    name: str
    value: str
    remark: str


@dataclass(frozen=True)
class Cell:
    """One figure of the table; `title` tells how it was measured, `mark` is "~" where it may be as good as the best."""

    text: str
    interval: str
    best: bool
    title: str
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """One method of the table."""

    method: str
    look: Look
    cells: tuple[Cell, ...]


def best_of(results: Iterable[Result], measure: str) -> Result | None:
    """The best of some results, None when none has a value."""
    sign = 1 if lower_is_better(measure) else -1
    valued = [(sign * result.value, result) for result in results if result.value is not None]
    return min(valued, key=lambda pair: pair[0])[1] if valued else None


def verdict(run: RunData) -> Verdict | None:
    """The comparison at the target length, else at the longest length where one of ours has a value."""
    if run.measure in ("harness", "nonuniformity"):  # rows of a study and means over metrics are no methods at a length
        return None
    ours = [result for result in run.results if is_ours(result.method)]
    at_target = [result for result in ours if result.length == run.target_length]
    longest = max((result.length for result in ours if result.value is not None), default=None)
    best = best_of(at_target, run.measure) or best_of((r for r in ours if r.length == longest), run.measure)
    if best is None:
        return None
    rivals = (result for result in run.results if result.length == best.length and not is_ours(result.method))
    rival = best_of(rivals, run.measure)
    change = best.value / rival.value - 1 if rival and rival.value and best.value is not None else None
    return Verdict(best.length, best, rival, change)


def headline(run: RunData) -> str:
    """The result in one sentence."""
    return f"{model_name(run)}{_lengths_asked(run)}: {_outcome(run)}"


def model_name(run: RunData) -> str:
    """The model as it was named in the command."""
    return str(run.model.get("name", "a model without a name"))


def _lengths_asked(run: RunData) -> str:
    original, target = run.original_length, run.target_length
    if original is None or target is None:
        return ""
    return f", {length_text(original)} → {length_text(target)} tokens"


def _outcome(run: RunData) -> str:
    found = verdict(run)
    if found:
        rival = found.baseline
        against = f", {look(rival.method).label} {_short(rival.value)}" if rival else ""
        change = "" if found.change is None else f" ({percent_text(found.change)})"
        at = "" if found.length == run.target_length else f" at {length_text(found.length)}"
        return f"{run.measure}{at} {_short(found.ours.value)}{against}{change}"
    if run.measure in ("harness", "nonuniformity") and run.results:
        return f"{title_of(run.measure).lower()}, {len(run.results)} results"
    if best := best_of((r for r in run.results if r.length == max(run.lengths)), run.measure):
        value = f"{run.measure} {_short(best.value)} at {length_text(best.length)} tokens"
        return f"{look(best.method).label} is the best of {len({r.method for r in run.results})}, {value}"
    if values := [each.value for each in run.evaluations if each.kind == "complete" and each.value is not None]:
        return f"best value {_short(min(values))} after {evaluations_text(run)}"
    return "no figures yet"


def _short(value: float | None) -> str:
    """A value for a sentence: 4.27 where the table has 4.268."""
    return f"{value:.2f}" if value is not None and 0.1 <= abs(value) < 100 else value_text(value)


def cards(run: RunData) -> list[Card]:
    """The key numbers, as many of them as are known."""
    found = verdict(run)
    made = [_extension_card(run)]
    if found:
        interval = _interval(found.ours)
        name = f"{run.measure.capitalize()} at {length_text(found.length)}"
        made.append(Card(name, value_text(found.ours.value), interval or look(found.ours.method).label))
    if found and found.baseline:
        label = look(found.baseline.method).label
        change = "" if found.change is None else f", ours {percent_text(found.change)}"
        made.append(Card("Best baseline", value_text(found.baseline.value), f"{label}{change}"))
    if run.table:
        row = run.table.rows[-1]
        made.append(Card("Attention factor", f"{row.attention_factor:.3f}", f"{row.start_tokens} start tokens"))
    if run.evaluations:
        made.append(_search_card(run))
    return [card for card in made if card]


def _extension_card(run: RunData) -> Card | None:
    original, target = run.original_length, run.target_length
    if not original or not target:
        return None
    return Card("Extension", f"{target / original:.4g}×", f"{length_text(original)} → {length_text(target)} tokens")


def _search_card(run: RunData) -> Card:
    tokens = counts(run.evaluations).tokens
    seconds = duration_text(sum(evaluation.seconds for evaluation in run.evaluations))
    if run.evaluation_tokens is None:
        return Card("Token-passes", count_text(tokens), f"{seconds} of work")
    remark = f"{count_text(tokens)} token-passes, {seconds} of work"
    return Card("Evaluations", number_text(tokens / run.evaluation_tokens), remark)


def _interval(result: Result) -> str:
    return f"{value_text(result.ci[0])} – {value_text(result.ci[1])}" if result.ci else ""


def methods_of(run: RunData) -> list[str]:
    """Methods, the best at the target (or the longest measured) length first."""
    length = run.target_length if run.target_length in run.lengths else max(run.lengths, default=None)
    sign = 1 if lower_is_better(run.measure) else -1

    def rank(method: str) -> tuple[bool, float]:
        result = run.result(method, length)
        value = result.value if result else None
        return value is None, sign * (value or 0.0)

    return sorted(dict.fromkeys(result.method for result in run.results), key=rank)


def table_rows(run: RunData) -> list[Row]:
    """The table of values, a row a method and a column a length; the best of a column is marked."""
    methods = methods_of(run)
    best = {length: best_of((r for r in run.results if r.length == length), run.measure) for length in run.lengths}
    return [
        Row(
            method,
            look(method, methods),
            tuple(_cell(run.measure, run.result(method, length), best[length]) for length in run.lengths),
        )
        for method in methods
    ]


def _cell(measure: str, result: Result | None, best: Result | None) -> Cell:
    if result is None:
        return Cell("", "", best=False, title="not measured")
    tokens = "" if result.tokens is None else f"{result.tokens:,} tokens"
    is_best = best is not None and result.value is not None and result.value == best.value
    title = tokens if result.value is not None else f"not finite {tokens}".strip()
    if result.against:
        title += f"; {_against(measure, result.against)}"
    mark = "" if result.told_apart else "~"
    return Cell(value_text(result.value), _interval(result), best=is_best, title=title, mark=mark)


def _against(measure: str, against: Against) -> str:
    """A paired difference in words; of shares it is in points."""
    figures = [against.value, *(against.ci or ())]
    told = [f"{100 * figure:+.2f}".replace("-", "\u2212") for figure in figures if figure is not None]
    unit = "%" if lower_is_better(measure) else " points"
    interval = " ({} to {}, paired)".format(*told[1:]) if against.ci and len(told) == len(figures) else ""
    return f"{told[0] if told else 'no number'}{unit if told else ''}{interval} against {look(against.method).label}"


def seen_rows(run: RunData) -> list[Row]:
    """The table of what was measured on the windows of the search, where `table_rows` has held-out ones."""
    return table_rows(replace(run, results=run.seen))


def measured_on(run: RunData) -> str:
    """Which windows the results come from, as a sentence; nothing of measures that make their own prompts."""
    if run.measure not in ("perplexity", "nonuniformity"):
        return ""
    if shared := run.searched_on.get(run.measure):
        return f"Measured on documents of which the search has read {shared}, too."
    if any(result.seen for result in run.results):
        return "Measured on the windows that the search itself used."
    of = "windows that the search did not see" if run.documents.get("search") else "the windows listed below"
    return f"Measured on {of}."


@dataclass(frozen=True)
class StageRow:
    """A stage of an extension in the table of stages."""

    name: str
    to: str
    asked: str
    outcome: str
    time: str


def stage_rows(run: RunData) -> list[StageRow]:
    """The stages of an extension, what was asked of each and what came of it."""
    rows = []
    for stage in run.stages:
        told = {key: value for key, value in stage.asked.items() if key not in ("stage", "do", "to")}
        asked = ", ".join(key if isinstance(value, Mapping) else f"{key} {value}" for key, value in told.items())
        to = length_of(stage.asked.get("to"))
        time = "not done" if stage.seconds is None else duration_text(stage.seconds)
        time += " since it was resumed" if stage.resumed else ""
        rows.append(StageRow(stage.name, length_text(to) if to else "", asked, _came_of(stage.run), time))
    return rows


def _came_of(run: RunData | None) -> str:
    if run is None:
        return ""
    if losses := [loss for _, loss in run.losses if loss is not None]:
        return f"loss {value_text(losses[0])} → {value_text(losses[-1])} in {len(run.losses)} steps"
    if values := [each.value for each in run.evaluations if each.kind == "complete" and each.value is not None]:
        return f"{objective_text(run.settings)} {value_text(min(values))} after {evaluations_text(run)}"
    return ""


def not_measured(runs: Sequence[RunData]) -> dict[str, str]:
    """The measures that no run has, each with the command that makes it."""
    run = next((run for run in runs if run.table), runs[0])
    lengths = sorted({*run.lengths, *([run.target_length] if run.target_length else [])})
    there = {measure for each in runs for measure in each.measures}
    made = {}
    for measure in MEASURES:
        if measure not in there:
            model = f"{run.path}/checkpoint" if run.stages else str(run.model.get("name", "MODEL"))
            words = ["longrope", "evaluate", measure, model]
            words += ["--factors", run.path] if run.table and not run.stages else []
            if measure == "nonuniformity":  # at one length, beyond the original one
                words += ["--lengths", format_length(lengths[-1]) if lengths else "N"]
            elif measure != "harness":
                words += ["--lengths", ",".join(format_length(length) for length in lengths) or "N"]
            words += _FURTHER.get(measure, [])
            made[measure] = shlex.join([*words, "--out", f"{run.path}/{measure}"])
    return made


def missing(run: RunData) -> list[str]:
    """What the run does not have, a sentence each."""
    said = []
    if not run.config:
        said.append("What was asked: there is no config.json.")
    if not run.results and not run.losses:
        said.append(f"{run.measure.capitalize()} by length: there is no metrics.json with results.")
    if run.table is None:
        said.append("The factors: there is no factors.json.")
    if not run.evaluations and not run.losses and not run.stages:
        said.append("The convergence: there is no evaluations.jsonl with evaluations.")
    return said + [f"Inside the run, {sentence}" for sentence in run.left_out]


def missing_of(runs: Sequence[RunData]) -> list[str]:
    """What each of several runs does not have, and what lies inside it and is not shown."""
    return [f"{run.name}: {sentence}" for run in runs for sentence in missing(run)]


def settings(run: RunData) -> dict[str, str]:
    """Everything in config.json but the documents, by dotted key, as text."""
    return {key: value for key, value in _flat(run.config).items() if not key.startswith(("documents.", "results."))}


def _flat(data: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list) or not any(isinstance(item, Mapping) for item in value):
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def command_lines(run: RunData) -> str:
    """The command of a run and those of the runs inside it, a line each; without what a library call made."""
    typed = dict.fromkeys(_typed(config) for config in (run.config, *run.inner))  # one that made several runs once
    return "\n".join(line for line in typed if line)


def command_line(run: RunData) -> str:
    """The command as it was typed, where config.json has it under "ignored"; a library call has none."""
    return _typed(run.config)


def _typed(config: Mapping[str, Any]) -> str:
    ignored = config.get("ignored", {})
    typed = ignored.get("command_line") if isinstance(ignored, Mapping) else None
    if isinstance(typed, list):
        return shlex.join(str(word) for word in typed)
    return typed if isinstance(typed, str) else ""
