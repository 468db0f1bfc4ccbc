"""`longrope evaluate`: one measure of one model by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrope.checkpoint import LoadOptions, load_options, taken
from longrope.convert import as_table
from longrope.describe import describe_options
from longrope.documents import as_sources, read_sources
from longrope.errors import UserError
from longrope.evaluate.execute import OnStep
from longrope.evaluate.measures import Measure
from longrope.evaluate.methods import Result
from longrope.evaluate.needle import NeedleMeasure
from longrope.evaluate.nonuniformity import collect, rows, studies
from longrope.evaluate.passkey import PasskeyMeasure
from longrope.evaluate.perplexity import check_stride
from longrope.evaluate.perplexity_measure import PerplexityMeasure
from longrope.evaluate.recorded import measure_run
from longrope.evaluate.ruler import SAMPLES, Ruler
from longrope.evaluate.templates import read_needle_template, read_passkey_template
from longrope.factors import FactorTable
from longrope.lengths import as_lengths
from longrope.model import LoadedModel, as_loaded
from longrope.modes import apart
from longrope.windows import Window, whole_documents, windows_of
from longrope.workers import options_for


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured and how: the words of the command. None is the measure's own default.

    windows: of each length, for perplexity and nonuniformity. stride: slides a window over whole documents. tries:
    prompts a length (passkey) or a cell (needle). depths, digits: of needle. tasks, samples, questions: of RULER.
    groups: of pairs, for nonuniformity. template: a TOML file with the prompts' texts. chat: prompts go through the
    tokenizer's chat template.
    """

    documents: str | Sequence[str] = ()
    windows: int | None = None
    stride: int | None = None
    tries: int | None = None
    depths: int = 10
    digits: int = 7
    tasks: Sequence[str] | None = None
    samples: int = SAMPLES
    questions: str | Path | None = None
    groups: int | None = None
    template: str | Path | None = None
    chat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", as_sources(self.documents))


_Made = tuple[Measure, list[Window]]
"""A measure, and the windows of documents it is on, where it is on windows."""


def _perplexity(loaded: LoadedModel, lengths: Sequence[int], given: MeasureSettings) -> _Made:
    found = read_sources(given.documents, share="unseen", tokenizer=loaded.tokenizer)
    chosen: dict[int, list[Window]] = {}
    for length in lengths:
        if given.stride is None:
            chosen[length] = windows_of(loaded, found, length, given.windows, given.seed)
        else:
            check_stride(length, given.stride)
            chosen[length] = whole_documents(loaded, found, length, given.windows)
    return PerplexityMeasure(chosen, given.stride), [window for length in chosen for window in chosen[length]]


def _passkey(loaded: LoadedModel, lengths: Sequence[int], given: MeasureSettings) -> _Made:
    template = None if given.template is None else read_passkey_template(given.template)
    return PasskeyMeasure(tries=given.tries or 10, seed=given.seed, template=template, chat=given.chat), []


def _needle(loaded: LoadedModel, lengths: Sequence[int], given: MeasureSettings) -> _Made:
    template = None if given.template is None else read_needle_template(given.template)
    found = read_sources(given.documents, share="unseen", tokenizer=loaded.tokenizer)
    numbers = {"depths": given.depths, "tries": given.tries or 3, "digits": given.digits, "seed": given.seed}
    return NeedleMeasure(found, template=template, chat=given.chat, **numbers), []


def _ruler(loaded: LoadedModel, lengths: Sequence[int], given: MeasureSettings) -> _Made:
    found = read_sources(given.documents, share="unseen", tokenizer=loaded.tokenizer) if given.documents else []
    made = Ruler.of(
        given.tasks,
        samples=given.samples,
        seed=given.seed,
        chat=given.chat,
        questions=given.questions,
        haystack=[document.text for document in found],
        templates=given.template,
    )
    return made, []


_MAKERS: Mapping[str, Callable[[LoadedModel, Sequence[int], MeasureSettings], _Made]] = {
    "perplexity": _perplexity,
    "passkey": _passkey,
    "needle": _needle,
    "ruler": _ruler,
}
COMPARED = (*_MAKERS, "harness")  # what methods can be compared in
_MEASURES = (*_MAKERS, "nonuniformity", "harness")
_MOST_DIGITS = 18  # numbers are drawn as 64-bit integers
_OF_DOCUMENTS = ("perplexity", "needle", "nonuniformity")


def make_measure(name: str, loaded: LoadedModel, lengths: Sequence[int], given: MeasureSettings) -> _Made:
    """The measure of a name with its settings. Raises UserError when it cannot be made."""
    return _MAKERS[name](loaded, lengths, given)


def check_measure(name: str, given: MeasureSettings, known: Sequence[str] = _MEASURES) -> None:
    """Raise UserError, before a model is loaded, for a measure that does not exist or lacks its documents."""
    if name not in known:
        rule = f"it is one of {', '.join(known)}"
        raise UserError("measure", got=repr(name), rule=rule, do="choose one of them")
    if name in _OF_DOCUMENTS and not given.documents:
        raise UserError("--documents", got="none", rule=f"{name} is measured on documents", do="give at least one")
    for what, value in (
        ("--tries", given.tries),
        ("--depths", given.depths),
        ("--digits", given.digits),
        ("--windows", given.windows),
    ):
        if value is not None and value < 1:
            raise UserError(what, got=value, rule="it is at least 1", do="give a larger number")
    if given.digits > _MOST_DIGITS:
        rule = f"a number has at most {_MOST_DIGITS}"
        raise UserError("--digits", got=given.digits, rule=rule, do="give a smaller number")


@apart
def evaluate(
    measure: str,
    model: str | Path | LoadedModel,
    *,
    lengths: int | str | Sequence[int | str] = (),
    factors: FactorTable | str | Path | None = None,
    out: str | Path | None = None,
    workers: str | int | None = None,
    options: LoadOptions | None = None,
    on_step: OnStep | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Measure `perplexity`, `passkey`, `needle`, `ruler` or `nonuniformity` at lengths; what --json prints.

    measure: one of those, or `harness`. model: a folder, a Hub id or `tiny`, or one from load_model. `harness` takes no
    lengths, workers and on_step, and has the fields of HarnessSettings as keywords.

    factors: a table or its file, by default the checkpoint's own factors.json; "none" ignores that one. Writes a run
    folder where `out` names one, and resumes one that is there item by item; a finished one is read, not measured
    again. workers: as for `search`. on_step is called before each piece. options: LoadOptions as one object; `keywords`
    are the fields of MeasureSettings and of LoadOptions. Raises UserError for bad input.
    """
    if measure == "harness":
        from longrope.evaluate.harness_run import evaluate_harness  # which needs this module

        if lengths or workers is not None:
            rule = "every prompt has its own length, and one process asks them"
            raise UserError("harness", got="lengths or workers", rule=rule, do="leave them out")
        return evaluate_harness(model, factors=factors, out=out, options=options, **keywords)
    given = MeasureSettings(**taken(MeasureSettings, keywords))
    check_measure(measure, given)
    wanted = as_lengths(lengths)
    if not wanted:
        raise UserError("lengths", got="none", rule="there is at least one", do="give lengths in tokens")
    place = None if workers is None else str(workers)
    options = options_for(place, load_options(options, keywords))
    if factors == "none":
        options = replace(options, own_factors=False)
    loaded = as_loaded(model, options)
    table = table_of(loaded, factors)
    if measure == "nonuniformity":
        return study(loaded, wanted, table, given, out=out, workers=place, on_step=on_step)
    wanted_rows = {
        ("factors" if table else "none", length): table.row_for(length) if table else None for length in wanted
    }
    made, documents = make_measure(measure, loaded, wanted, given)
    settings = {"lengths": wanted, "seed": given.seed, **describe_options(loaded)}
    settings |= {"factors": [row.key if row else None for row in wanted_rows.values()]}
    return measure_run(
        f"evaluate {measure}",
        loaded,
        made,
        wanted_rows,
        settings,
        documents=documents,
        out=out,
        workers=place,
        on_step=on_step,
    )


def study(
    loaded: LoadedModel,
    lengths: Sequence[int],
    table: FactorTable | None,
    given: MeasureSettings,
    *,
    out: str | Path | None = None,
    workers: str | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """What non-uniformity gives at one length: perplexity of every row of the studies; they stand in `pi`'s details."""
    if len(lengths) != 1:
        got, rule = f"{len(lengths)} lengths", "what is stretched is stretched to one target"
        raise UserError("--lengths", got=got, rule=rule, do="give one")
    (target,) = lengths
    lines = studies(loaded, target, table=table, groups=given.groups)
    made, documents = _perplexity(loaded, lengths, given)

    def conclude(results: list[Result]) -> list[Result]:
        details = collect(lines, {result.method: result.value for result in results})
        return [replace(result, details=details if result.method == "pi" else {}) for result in results]

    settings = {"lengths": [target], "seed": given.seed, "groups": given.groups, **describe_options(loaded)}
    return measure_run(
        "evaluate nonuniformity",
        loaded,
        made,
        {(label, target): row for label, row in rows(lines).items()},
        settings | {"factors": [row.key for row in table.rows] if table else None},
        name="nonuniformity",
        conclude=conclude,
        documents=documents,
        out=out,
        workers=workers,
        on_step=on_step,
    )


def table_of(loaded: LoadedModel, factors: FactorTable | str | Path | None) -> FactorTable | None:
    """The table to measure, None for the checkpoint as it is without its factors.json."""
    if factors is None:
        return loaded.table  # checked when it was loaded
    if factors == "none":
        return None
    table = as_table(factors)
    loaded.check(table)
    return table
