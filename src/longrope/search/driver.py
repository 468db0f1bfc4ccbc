"""The search as a run: windows, seeds, the loop of tasks, the factor table at the end, and what it is worth."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from longrope import __version__
from longrope.baselines import attention_factor
from longrope.checkpoint import LoadOptions, load_options, taken
from longrope.convert import as_table
from longrope.describe import describe_model, describe_options, describe_windows, metrics
from longrope.documents import Document, as_sources, others, read_sources
from longrope.errors import UserError, plural
from longrope.evaluate.methods import Result, outdone
from longrope.evaluate.recorded import measure_methods
from longrope.evaluate.templates import read_needle_template
from longrope.factors import FactorTable, RopeFactors, last_row
from longrope.lengths import as_length, format_length
from longrope.model import LoadedModel, as_loaded
from longrope.modes import apart
from longrope.runs import FACTORS, RunFolder, command_line, default_run_path
from longrope.search import methods, seeds, shorter
from longrope.search.archive import Archive
from longrope.search.critical import LongRope2
from longrope.search.descent import DescentSettings
from longrope.search.evolution import EvolutionSettings
from longrope.search.loop import Budget, Loop, OnProgress
from longrope.search.needle import needle_windows
from longrope.search.objective import Evaluator
from longrope.search.settings import BUDGET, SearchSettings
from longrope.search.space import LongRope, Space
from longrope.search.tasks import Steps
from longrope.windows import Window, fingerprint, spare_windows, windows_of
from longrope.workers import open_workers, options_for

logger = logging.getLogger(__name__)

_METHODS_BESIDE = ("pi", "ntk", "yarn", "yarn+su", "llama3+su")


@dataclass(frozen=True)
class SearchWindows:
    """Windows of a search: those that candidates are compared on, further ones for gradients, and unseen ones."""

    search: Sequence[Window]
    gradient: Sequence[Window] = ()
    unseen: Sequence[Window] = ()
    shorter: SearchWindows | None = None
    """Those of the search at a shorter length, if there is one."""
    measured: Sequence[Window] = ()
    """Whole windows of the searched documents that the result is measured on, where the objective is another one."""


@apart
def search(
    model: str | Path | LoadedModel,
    *,
    to: int | str,
    documents: str | Path | Sequence[str | Path],
    unseen: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    init: FactorTable | str | Path | Sequence[FactorTable | str | Path] = (),
    workers: str | int | None = None,
    options: LoadOptions | None = None,
    on_progress: OnProgress | None = None,
    **keywords: Any,
) -> FactorTable:
    """Search rescale factors that give `model` a window of `to` tokens, on windows of `documents`.

    Writes a run folder `out` (by default runs/search-MODEL-LENGTH) and resumes one that is there; on a finished one it
    returns its table. `unseen` documents are only measured, at the end. `init` are further seeds, as tables, files or
    runs. `workers`: a number of Ray workers on this machine, `ray` or `ray:ADDRESS` for a cluster; by default all is
    done in this process. on_progress is called after each task. options: LoadOptions as one object. `keywords` are the
    fields of SearchSettings and of LoadOptions, which are the command's words; needle_template may be a file. Returns
    the table that factors.json holds. Raises UserError for bad input.
    """
    for name in ("start_tokens", "attention_factor"):  # numbers too, from Python
        if keywords.get(name) is not None:
            keywords[name] = str(keywords[name])
    if isinstance(keywords.get("needle_template"), str | Path):
        keywords["needle_template"] = read_needle_template(keywords["needle_template"])
    chosen = SearchSettings(to=as_length(to), **taken(SearchSettings, keywords))
    workers = None if workers is None else str(workers)
    if isinstance(model, LoadedModel) and (options is not None or keywords):
        rule, do = "a model that is loaded keeps its own options", "give them to load_model"
        raise UserError("options", got=", ".join(keywords) or "LoadOptions", rule=rule, do=do)
    options = options_for(workers, load_options(options, keywords))
    chosen.check_words()
    vectors = [as_table(each) for each in ([init] if isinstance(init, FactorTable | str | Path) else init)]
    loaded = prepared(as_loaded(model, options), chosen)
    searched = read_sources(as_sources(documents), share="search", tokenizer=loaded.tokenizer)
    held = read_sources(as_sources(unseen), share="unseen", tokenizer=loaded.tokenizer) if unseen else []
    windows = choose_search_windows(loaded, chosen, searched, without(held, searched) if held else [])
    return search_windows(loaded, chosen, windows, out=out, init=vectors, workers=workers, on_progress=on_progress)


def prepared(loaded: LoadedModel, settings: SearchSettings) -> LoadedModel:
    """The model as a search of this stage takes it. Raises UserError when the settings make no sense for it."""
    if settings.stage == "second":
        loaded = loaded.fine_tuned()
    settings.check(loaded.rope.original_length, loaded.meaning.rows[-1].up_to)
    return loaded


def without(held: Sequence[Document], searched: Sequence[Document]) -> list[Document]:
    """The held-out documents that are none of those searched on. Raises UserError when none is left."""
    left = others(held, searched)
    if not left:
        got = f"{plural(len(held), 'document')}, all of them also in --documents"
        raise UserError("--unseen", got=got, rule="the search does not see them", do="give other documents")
    if len(left) < len(held):
        logger.info("%d of the unseen documents are searched on too, and left out", len(held) - len(left))
    return left


def choose_search_windows(
    loaded: LoadedModel, settings: SearchSettings, searched: Sequence[Document], unseen: Sequence[Document] = ()
) -> SearchWindows:
    """The windows of a search, fixed by its seed. Raises UserError when the documents do not hold them."""
    if (inner := settings.shorter) is not None:
        judged = windows_of(loaded, unseen, settings.to, settings.windows, settings.seed) if unseen else []
        few = windows_of(loaded, searched, settings.to, settings.window_count, settings.seed)
        at_inner = choose_search_windows(loaded, inner, searched)
        return SearchWindows(few, unseen=judged, shorter=at_inner)
    length, count, seed = settings.to, settings.window_count, settings.seed
    judged = windows_of(loaded, unseen, length, count, seed) if unseen else []
    plain = windows_of(loaded, searched, length, count, seed)
    wanted = settings.further_windows(len(plain))
    if settings.objective == "perplexity":
        further = spare_windows(searched, loaded.tokenizer, length=length, count=wanted, seed=seed, taken=plain)
        return SearchWindows(plain, further, judged)

    def needles(number: int, seed: int, taken: Sequence[Window] | None = None) -> list[Window]:
        return needle_windows(
            searched,
            loaded.tokenizer,
            length=length,
            count=number,
            seed=seed,
            depth=settings.needle_depth,
            digits=settings.needle_digits,
            template=settings.needle_template,
            taken=taken,
        )

    first = needles(count, seed)
    spare: list[Window] = []
    if settings.objective == "both":
        spare = spare_windows(searched, loaded.tokenizer, length=length, count=wanted, seed=seed, taken=plain)
        wanted = len(spare)
    # Another seed, so that keys and numbers are others too.
    further = needles(wanted, seed + 1, first) if wanted else []
    if settings.objective == "both":
        weight = sum(window.scored for window in plain) / sum(window.scored for window in first)
        first, further = in_turn(plain, first, weight), in_turn(spare[: len(further)], further, weight)
    return SearchWindows(first, further, judged, measured=plain)


def in_turn(plain: Sequence[Window], needles: Sequence[Window], weight: float) -> list[Window]:
    """Pairs of a whole window and a needle, whose tokens have the weight."""
    weighted = [replace(window, weight=weight) for window in needles]
    return [window for pair in zip(plain, weighted, strict=True) for window in pair]


def search_windows(
    loaded: LoadedModel,
    settings: SearchSettings,
    windows: SearchWindows,
    *,
    out: str | Path | None = None,
    init: Sequence[FactorTable] = (),
    workers: str | None = None,
    on_progress: OnProgress | None = None,
) -> FactorTable:
    """The search on windows already chosen; see `search`."""
    loaded = prepared(loaded, settings)
    if workers is not None and loaded.options.threads is None:
        got, rule = "a model loaded without --threads", "workers and this process have equally many threads"
        raise UserError("--workers", got=got, rule=rule, do="load it with LoadOptions(threads=1)")
    for table in init:
        loaded.check(table)
    make_problem(loaded, settings, windows, init)  # refuses a seed that does not fit before anything is written
    make_budget(settings, windows, 1).check()
    path = Path(out) if out is not None else default_run_path("search", loaded.name, settings.to)
    config = run_config("search", loaded, settings, windows, init)
    with RunFolder.open(path, config, budget_keys=BUDGET) as run:
        if run.finished:
            logger.info("%s is finished: its factors are in %s", path, path / FACTORS)
            return FactorTable.load(path / FACTORS)
        table = run_search(run, loaded, settings, windows, init=init, workers=workers, on_progress=on_progress)
        results = measure_result(run, loaded, table, settings, windows)
        run.save_metrics(metrics("search", loaded, config["settings"], results))
        run.finish()
    return table


def run_search(
    run: RunFolder,
    loaded: LoadedModel,
    settings: SearchSettings,
    windows: SearchWindows,
    *,
    init: Sequence[FactorTable] = (),
    workers: str | None = None,
    on_progress: OnProgress | None = None,
) -> FactorTable:
    """The search itself, in an open run folder: evaluations.jsonl while it goes on, factors.json at its end."""
    loaded.widen_window(settings.to)
    for note in loaded.notes:
        logger.info(note)
    if known := len(run.evaluations()):
        logger.info("resuming %s after %d evaluations", run.path, known)
    problem = make_problem(loaded, settings, windows, init)
    at_shorter: RopeFactors | None = None
    if windows.shorter is not None:
        at_shorter = _at_shorter(run, loaded, settings, windows, init, workers, on_progress)
        problem = replace(problem, seeds=_to_decide(loaded, settings, at_shorter))
    archive = Archive.of(windows.search, settings.together)
    everything = [*windows.search, *windows.gradient]
    budget = make_budget(settings, windows, len(problem.seeds))
    if settings.method != "evolution" and windows.shorter is None:
        with Evaluator(loaded, everything, loaded.trained) as evaluator:  # before anything is paid for
            budget = replace(budget, gradient_bytes=evaluator.gradient_bytes(problem.seeds[0][1]))
    with open_workers(workers, loaded, partial(Evaluator, windows=everything, trained=loaded.trained)) as opened:
        loop = Loop(run, archive, opened, [len(window.ids) for window in everything], budget)
        loop.go(make_steps(problem, settings, archive), on_progress)
    if archive.best is None:
        raise UserError(
            "search",
            got=f"no finite value from {len(loop.known)} tasks",
            rule="at least one candidate has one",
            do="check the checkpoint with --dtype float32, or give other documents",
        )
    value, found = archive.best
    table = make_table(loaded, settings, windows, found, value, at_shorter)
    run.save_factors(table)
    return table


def _at_shorter(
    run: RunFolder,
    loaded: LoadedModel,
    settings: SearchSettings,
    windows: SearchWindows,
    init: Sequence[FactorTable],
    workers: str | None,
    on_progress: OnProgress | None,
) -> RopeFactors:
    """What the search at the shorter length found there, which is a run inside this one."""
    inner = settings.shorter
    assert inner is not None
    assert windows.shorter is not None
    path = run.path / f"search-{format_length(inner.to)}"
    table = search_windows(
        loaded, inner, windows.shorter, out=path, init=init, workers=workers, on_progress=on_progress
    )
    return table.row_for(inner.to)


def _to_decide(loaded: LoadedModel, settings: SearchSettings, at_shorter: RopeFactors) -> seeds.Seeds:
    """What is decided between at the target, after the search at the shorter length."""
    found = seeds.relative(at_shorter, loaded.trained)
    to, length, searched = settings.to, loaded.trained.up_to, settings.searches_attention
    rule = settings.resolved().attention_factor or "su"
    rules = [attention_factor(name, to / length, length) for name in (("none", "su") if searched else (rule,))]
    ratio = at_shorter.up_to / length
    return shorter.candidates(loaded, found, ratio, make_space(loaded, settings), to, rules, searched=searched)


def make_space(loaded: LoadedModel, settings: SearchSettings) -> Space:
    """The space of rescale vectors of a search on this model."""
    shape = loaded.rope.shape
    ratio = settings.to / loaded.trained.up_to
    if settings.stage == "recovery":  # the bound of most published recovery tables, too: that of the trained length
        ratio = loaded.meaning.rows[-1].up_to / shape.original_length
    if settings.space == "longrope2":
        return LongRope2(shape, ratio, settings.start_choices)
    return LongRope(shape.pairs, ratio, settings.start_choices)


def make_problem(
    loaded: LoadedModel, settings: SearchSettings, windows: SearchWindows, init: Sequence[FactorTable] = ()
) -> methods.Problem:
    """What is searched: the space and its seeds. Raises UserError for a seed outside the bounds."""
    space, choices = make_space(loaded, settings), settings.start_choices
    names = seeds.PAPER if settings.method == "evolution" else seeds.ALL
    if settings.stage == "recovery":
        found = seeds.recovery(loaded, space, settings.to, init)
    else:
        found = seeds.vectors(loaded, space, settings.to, names, init, np.random.default_rng((settings.seed, 2)))
    length = loaded.trained.up_to
    rule = settings.resolved().attention_factor or "su"
    if settings.method == "evolution" and rule == "search":
        rule = "su"  # where its mutations begin
    factors = seeds.attention_factors(rule, settings.to / length, length)
    start = 0 if 0 in choices else choices[0]
    first = len(windows.search) if windows.gradient else 0
    return methods.Problem(
        space=space,
        seeds=seeds.with_attention(found, factors, choices, start, searched=rule == "search"),
        shape=loaded.rope.shape,
        pool=tuple(range(first, len(windows.search) + len(windows.gradient))),
        search_attention=settings.searches_attention,
    )


def make_steps(problem: methods.Problem, settings: SearchSettings, archive: Archive) -> Steps[None]:
    """The search as a generator of tasks."""
    if settings.search_length is not None:
        return shorter.decide(problem.seeds, archive)
    if settings.method == "evolution":
        sizes = EvolutionSettings.for_length(settings.to, race=settings.race)
        return methods.evolution(problem, sizes, archive, settings.race, settings.seed)
    if settings.method == "gradient":
        return methods.gradient(problem, DescentSettings(), archive, settings.seed)
    return methods.hybrid(problem, DescentSettings(), methods.PolishSettings(), archive, settings.seed)


def make_budget(settings: SearchSettings, windows: SearchWindows, tried: int) -> Budget:
    """What the search may cost and is going to cost; tried: seeds, each with each attention factor."""
    evaluations = settings.evaluations
    if settings.search_length is not None:  # the limits are those of the search at the shorter length
        total = sum(len(window.ids) for window in windows.search)
        return Budget(evaluation=total, expected=tried)
    if settings.method == "evolution":
        expected = EvolutionSettings.for_length(settings.to).evaluations
        if settings.race and evaluations is None:
            evaluations = expected  # a race that drops little must not cost more than what it replaces
    else:
        expected = methods.expected_evaluations(
            settings.method,
            tried,
            len(settings.start_choices),
            len(windows.search) // settings.together,
            DescentSettings(),
        )
    return Budget(
        evaluation=sum(len(window.ids) for window in windows.search),
        expected=expected,
        evaluations=evaluations,
        token_passes=settings.token_passes,
        hours=settings.hours,
    )


def make_table(
    loaded: LoadedModel,
    settings: SearchSettings,
    windows: SearchWindows,
    found: RopeFactors,
    value: float,
    at_shorter: RopeFactors | None = None,
) -> FactorTable:
    """The checkpoint's own rows and the found one, where that is longest; of a recovery where it belongs.

    Of a first extension two rows: the checkpoint as it is up to its original length (all 1 where it is not scaled).
    What was found at a shorter search length is the row of that length, unless the checkpoint has one.
    """
    rope, to = loaded.rope, settings.to
    if settings.stage is None:
        rows = [last_row(loaded.meaning, rope.original_length).with_values(up_to=rope.original_length)]
    else:
        rows = [row for row in loaded.meaning.rows if row.up_to != to]
    if at_shorter is not None and all(row.up_to != at_shorter.up_to for row in rows):
        rows.append(at_shorter)
    rows.append(found.over(loaded.trained).with_values(up_to=to))
    return FactorTable(
        rope_theta=rope.rope_theta,
        rotary_dim=rope.rotary_dim,
        original_length=rope.original_length,
        rows=tuple(sorted(rows, key=lambda row: row.up_to)),
        model=loaded.name,
        provenance={
            "method": settings.method,
            "objective": settings.objective,
            "space": settings.space,
            "value": value,
            "seed": settings.seed,
            "documents": fingerprint(windows.search),
            "longrope": __version__,
            **({"stage": settings.stage} if settings.stage else {}),
            **({"search_length": settings.search_length} if settings.search_length else {}),
        },
    )


def measured_beside(settings: SearchSettings, *, unseen: bool = False) -> tuple[str, ...]:
    """Methods that the found table is measured beside, on the searched documents or on unseen ones."""
    if settings.stage == "recovery":  # nothing is extended here
        return ("none",)
    if settings.search_length is not None and not unseen:
        return ()  # a target that is too dear to search at; what it was decided between is known
    return _METHODS_BESIDE


def measured_windows(settings: SearchSettings) -> int:
    """How many windows' losses are computed at the end, on the searched documents; see `measure_result`."""
    tables = 2 if settings.stage == "recovery" else 1
    return (tables + len(measured_beside(settings))) * settings.window_count


def measure_result(
    run: RunFolder, loaded: LoadedModel, table: FactorTable, settings: SearchSettings, windows: SearchWindows
) -> list[Result]:
    """The table and the baselines at the target length in perplexity, on the searched documents and on unseen ones."""
    results = []
    tables = {"longrope": table} | ({"checkpoint": loaded.meaning} if settings.stage == "recovery" else {})
    for name, chosen in (("search", windows.measured or windows.search), ("unseen", windows.unseen)):
        if chosen:
            beside = measured_beside(settings, unseen=name == "unseen")
            results += measure_methods(loaded, {settings.to: chosen}, beside, tables, run, windows_name=name)
    if settings.objective == "perplexity" and (found := outdone(results)) is not None:
        own, best = found
        logger.warning(
            "%s is at %.4f on the search windows, what was found at %.4f: give the search more evaluations, with which "
            "it goes on",
            best.method,
            best.value,
            own.value,
        )
    return results


def run_config(
    command: str,
    loaded: LoadedModel,
    settings: SearchSettings,
    windows: SearchWindows,
    init: Sequence[FactorTable] = (),
) -> dict[str, Any]:
    """What config.json of a run that searches holds: everything its result depends on."""
    chosen = settings.to_dict() | describe_options(loaded)
    if settings.stage == "recovery" and (about := seeds.rows_about(loaded.meaning, settings.to)):
        chosen["rows"] = [f"{row.up_to}: {row.key}" for row in about]  # which may be of a table that is no file yet
    return {
        "command": command,
        "longrope": __version__,
        "model": describe_model(loaded),
        "settings": chosen | {"init": [row.key for table in init for row in table.rows]},
        "documents": {
            "search": describe_windows(windows.search),
            "gradient": describe_windows(windows.gradient),
            "unseen": describe_windows(windows.unseen),
        },
        "windows": fingerprint([*windows.search, *windows.gradient]),
        "ignored": {"command_line": command_line()},
    }
