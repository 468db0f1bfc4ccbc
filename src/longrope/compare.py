"""The table of methods by length."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope.checkpoint import LoadOptions, load_options, taken
from longrope.convert import as_table, factors_file
from longrope.describe import describe_options
from longrope.errors import UserError
from longrope.evaluate.execute import OnStep, Rows
from longrope.evaluate.harness_run import HarnessSettings, harness_run
from longrope.evaluate.methods import DEFAULT_METHODS, method_factors, rows_of
from longrope.evaluate.recorded import measure_run
from longrope.evaluate.run import COMPARED, MeasureSettings, check_measure, make_measure
from longrope.factors import FACTORS, FactorTable
from longrope.lengths import as_lengths
from longrope.model import LoadedModel, as_loaded
from longrope.modes import apart
from longrope.runs import default_run_path
from longrope.workers import options_for

Table = FactorTable | str | Path
"""A table, or what has one: a file of factors, or the folder of a run or a checkpoint."""


@apart
def compare(
    model: str | Path | LoadedModel,
    *,
    lengths: int | str | Sequence[int | str],
    measure: str = "perplexity",
    methods: str | Sequence[str] = DEFAULT_METHODS,
    factors: Table | Sequence[Table] | Mapping[str, Table] | None = None,
    stage: str | None = None,
    out: str | Path | None = None,
    workers: str | int | None = None,
    options: LoadOptions | None = None,
    on_step: OnStep | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """A `measure` of methods and factor tables at lengths, on the same items; returns metrics.json's dict.

    model: a folder, a Hub id or `tiny`, or one from load_model. lengths: in tokens. methods: their names, or one text
    with commas. factors: a table or its file or run, several, or several by the names that they get in the results; by
    themselves files are named as the command names them. options: LoadOptions as one object. workers: as for `search`.
    on_step is called before each piece.

    Baselines are set up for the longest length; with stage="second" on top of what the checkpoint was fine-tuned with,
    as its second interpolation. Without `factors` those beside the weights are compared; an empty mapping ignores them,
    as does "none". Writes a run folder `out` (runs/compare-MODEL-LENGTH by default, with the measure in its name
    where it is not perplexity) and resumes one that is there; a finished one is read, not measured again. Of `stdlib`
    the unseen share is used. `keywords` are the fields of MeasureSettings (`documents`, `windows`, `seed`, ...) and of
    LoadOptions; the rest is as in `evaluate`. `harness` has the fields of HarnessSettings instead, and gives a prompt
    the factors of the smallest of the lengths that holds it. Raises UserError for bad input.
    """
    if stage not in (None, "second"):
        rule = "it is second: methods on top of the checkpoint's own factors"
        raise UserError("--stage", got=repr(stage), rule=rule, do="give that, or leave it out")
    suite = HarnessSettings.taken(keywords) if measure == "harness" else None
    given = MeasureSettings(**taken(MeasureSettings, keywords))
    if suite is None:
        check_measure(measure, given, COMPARED)
    elif workers is not None:
        raise UserError("--workers", got=workers, rule="one process asks lm-eval's tasks", do="leave it out")
    wanted = as_lengths(lengths)
    methods = [part.strip() for part in methods.split(",")] if isinstance(methods, str) else list(methods)
    named = None if factors is None else named_tables(factors, taken=[*methods, "checkpoint"])
    place = None if workers is None else str(workers)
    options = options_for(place, load_options(options, keywords))
    if named == {}:
        options = replace(options, own_factors=False)
    loaded = as_loaded(model, options)
    if stage == "second":
        loaded = _second(loaded, max(wanted, default=0))
    if named is None:
        beyond = stage == "second" and min(wanted, default=0) > loaded.meaning.rows[-1].up_to
        named = {} if loaded.table is None or beyond else {"checkpoint": loaded.table}
    _check(loaded, wanted, methods, named)
    settings: dict[str, Any] = {
        "lengths": wanted,
        "methods": methods,
        "stage": stage,
        "factors": {name: [row.key for row in table.rows] for name, table in named.items()},
    }
    command = "compare" if measure == "perplexity" else f"compare-{measure}"
    out = out if out is not None else default_run_path(command, loaded.name, max(wanted))
    rows = rows_of(loaded, wanted, methods, named)
    if suite is not None:
        for table in named.values():
            table.row_for(max(wanted))  # all have the same prompts, as long as the longest of the lengths
        tables = {method: _table_of(loaded, method, rows) for method in methods} | named
        return harness_run(command, loaded, tables, suite, settings, length=max(wanted), out=out)
    made, documents = make_measure(measure, loaded, wanted, given)
    settings |= {"seed": given.seed, **describe_options(loaded)}
    return measure_run(
        command, loaded, made, rows, settings, documents=documents, out=out, workers=place, on_step=on_step
    )


def named_tables(
    given: Table | Sequence[Table] | Mapping[str, Table], taken: Collection[str] = ()
) -> dict[str, FactorTable]:
    """Factor tables by the name they get in results; none at all for the word none.

    Without a name of its own a file gets the run's folder or its stem, and a table `factors`, with -2, -3, .. if taken.
    """
    if isinstance(given, Mapping):
        return {name: as_table(each) for name, each in given.items()}
    listed = [given] if isinstance(given, FactorTable | str | Path) else list(given)
    if listed == ["none"]:
        return {}
    tables: dict[str, FactorTable] = {}
    for each in listed:
        stem, number = _name_of(each), 2
        name = stem
        while name in tables or name in taken:
            name, number = f"{stem}-{number}", number + 1
        tables[name] = as_table(each)
    return tables


def _name_of(given: Table) -> str:
    if isinstance(given, FactorTable):
        return "factors"
    path = factors_file(given)
    return path.absolute().parent.name if path.name == FACTORS else path.stem


def _second(loaded: LoadedModel, longest: int) -> LoadedModel:
    """The model for a second interpolation. Raises UserError for lengths that its own factors reach."""
    loaded = loaded.fine_tuned()
    reach = loaded.trained.up_to
    if longest <= reach:
        got, rule = f"at most {longest} tokens", f"the checkpoint's factors reach {reach}"
        do = "give longer ones, or of an extension the checkpoint of its last fine-tuning"
        raise UserError("--lengths", got=got, rule=rule, do=do)
    return loaded


def _table_of(loaded: LoadedModel, method: str, rows: Rows) -> FactorTable | None:
    """A baseline as a table, by the lengths that are compared; None for the checkpoint as it is."""
    of_method = {length: row for (name, length), row in rows.items() if name == method and row is not None}
    found = tuple(row.with_values(up_to=length) for length, row in sorted(of_method.items()))
    shape = loaded.rope.shape
    return FactorTable(shape.rope_theta, shape.rotary_dim, loaded.rope.original_length, found) if found else None


def _check(
    loaded: LoadedModel, lengths: Sequence[int], methods: Sequence[str], tables: Mapping[str, FactorTable]
) -> None:
    """Raise UserError for what cannot be compared, before anything is written."""
    if not lengths or not (methods or tables):
        got = f"{len(lengths)} lengths, {len(methods)} methods and {len(tables)} tables"
        raise UserError("compare", got=got, rule="there is something to compare", do="give lengths and methods")
    for method in methods:
        method_factors(loaded, method, max(lengths), max(lengths))
    for name, table in tables.items():
        loaded.check(table)
        if name in methods:
            rule = "a table's name is none of the methods compared"
            raise UserError("factors", got=f"a table named {name}", rule=rule, do="choose another name for it")
        table.row_for(min(lengths))  # one that reaches no length at all would be left out without a word
