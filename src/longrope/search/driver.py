"""The search as a run: windows, seeds, ask -> evaluate -> tell, the archive on disk, the factor table at the end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from longrope import __version__
from longrope.baselines import attention_factor
from longrope.checkpoint import LoadOptions, load_options
from longrope.describe import describe_model, describe_options, describe_windows, metrics
from longrope.documents import Document, read_sources
from longrope.errors import UserError
from longrope.evaluate.methods import Result, measure_methods
from longrope.factors import FactorTable, RopeFactors, last_row
from longrope.lengths import as_length, format_length
from longrope.model import LoadedModel, load_model
from longrope.runs import FACTORS, RunFolder, command_line, default_run_path
from longrope.search.evolution import Candidate, Evolution, EvolutionSettings
from longrope.search.objective import Objective, PerplexityObjective
from longrope.search.space import START_TOKENS, Space
from longrope.windows import Window, fingerprint, windows_of

logger = logging.getLogger(__name__)

METHODS = ("evolution",)
SEEDS = ("pi", "ntk", "yarn")
METHODS_BESIDE = ("pi", "ntk", "yarn", "yarn+su")


@dataclass(frozen=True)
class SearchSettings:
    """What is searched and how; `check` them against a model before use."""

    to: int
    """Target length in tokens."""
    method: str = "evolution"
    """evolution: Algorithm 1 of the paper."""
    start_tokens: str = "search"
    """n-hat: a number, or `search` over the paper's list."""
    attention_factor: str = "su"
    """m: su, yarn, none or a number."""
    windows: int | None = None
    """Search windows; by default 8 up to 32k, 5 below 512k, 3 from there."""
    evaluations: int | None = None
    """Limit of candidate evaluations; by default the method's own, 1,344 up to 256k."""
    seed: int = 0

    def check(self, original_length: int) -> None:
        """Raise UserError when they make no sense for a model of this original length."""
        if self.to <= original_length:
            raise UserError(
                "--to",
                got=f"{self.to} tokens",
                rule=f"the target is longer than the model's original length of {original_length}",
                do=f"give a longer target, such as {format_length(8 * original_length)}, or --original-length",
            )
        if self.method not in METHODS:
            rule = f"it is one of {', '.join(METHODS)}"
            raise UserError("--method", got=repr(self.method), rule=rule, do="choose one of them")
        for flag, value in (("--windows", self.windows), ("--evaluations", self.evaluations)):
            if value is not None and value < 1:
                raise UserError(flag, got=value, rule="it is at least 1", do="give a larger number")
        if self.start_tokens != "search" and not (self.start_tokens.isdecimal() and int(self.start_tokens) < self.to):
            rule = "it is a number of tokens below the target, or search"
            raise UserError("--start-tokens", got=repr(self.start_tokens), rule=rule, do="give 0, a number or search")
        attention_factor(self.attention_factor, self.to / original_length, original_length)

    @property
    def start_choices(self) -> tuple[int, ...]:
        """The values of n-hat that are tried."""
        if self.start_tokens != "search":
            return (int(self.start_tokens),)
        return tuple(start for start in START_TOKENS if start < self.to)


SETTINGS = tuple(each.name for each in fields(SearchSettings) if each.name != "to")


@dataclass(frozen=True)
class Progress:
    """Where a search is: evaluations done of how many, the iteration, the best value, candidates a second."""

    done: int
    total: int
    iteration: int
    best: float
    rate: float


OnProgress = Callable[[Progress], None]


def search(
    model: str | LoadedModel,
    *,
    to: int | str,
    documents: Sequence[str],
    unseen: Sequence[str] = (),
    out: str | Path | None = None,
    init: Sequence[FactorTable] = (),
    options: LoadOptions | None = None,
    on_progress: OnProgress | None = None,
    **keywords: Any,
) -> FactorTable:
    """Search rescale factors that give `model` a window of `to` tokens, on windows of `documents`.

    Writes a run folder `out` (by default runs/search-MODEL-LENGTH) and resumes one that is there; on a finished one it
    returns its table. `unseen` documents are only measured, at the end. `keywords` are the fields of
    SearchSettings and of LoadOptions, which are the command's words. Returns the table of two rows that factors.json
    holds. Raises UserError for bad input.
    """
    chosen = SearchSettings(to=as_length(to), **{name: keywords.pop(name) for name in SETTINGS if name in keywords})
    options = load_options(options, keywords)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, options)
    chosen.check(loaded.rope.original_length)
    searched = read_sources(documents, share="search", tokenizer=loaded.tokenizer)
    held = read_sources(unseen, share="unseen", tokenizer=loaded.tokenizer) if unseen else []
    windows = windows_of(loaded, searched, chosen.to, chosen.windows, chosen.seed)
    left = without(held, searched) if held else []
    judged = windows_of(loaded, left, chosen.to, chosen.windows, chosen.seed) if left else []
    return search_windows(loaded, chosen, windows, judged, out=out, init=init, on_progress=on_progress)


def without(held: Sequence[Document], searched: Sequence[Document]) -> list[Document]:
    """The held-out documents that are none of those searched on. Raises UserError when none is left."""
    seen = {document.sha256 for document in searched}
    left = [document for document in held if document.sha256 not in seen]
    if not left:
        got = f"{len(held)} documents, all of them also in --documents"
        raise UserError("--unseen", got=got, rule="the search does not see them", do="give other documents")
    if len(left) < len(held):
        logger.info("%d of the unseen documents are searched on too, and left out", len(held) - len(left))
    return left


def search_windows(
    loaded: LoadedModel,
    settings: SearchSettings,
    windows: Sequence[Window],
    unseen: Sequence[Window] = (),
    *,
    out: str | Path | None = None,
    init: Sequence[FactorTable] = (),
    on_progress: OnProgress | None = None,
) -> FactorTable:
    """The search on windows already chosen; see `search`."""
    settings.check(loaded.rope.original_length)
    for table in init:
        loaded.check(table)
    make_strategy(loaded, settings, init)  # refuses a seed that does not fit before anything is written
    path = Path(out) if out is not None else default_run_path("search", loaded.name, settings.to)
    config = run_config("search", loaded, settings, windows, unseen, init)
    with RunFolder.open(path, config, budget_keys=("evaluations",)) as run:
        if run.finished:
            logger.info("%s is finished: its factors are in %s", path, path / FACTORS)
            return FactorTable.load(path / FACTORS)
        table = run_search(run, loaded, settings, windows, init=init, on_progress=on_progress)
        results = measure_result(run, loaded, table, settings.to, windows, unseen)
        run.save_metrics(metrics("search", loaded, config["settings"], results))
        run.finish()
    return table


def run_search(
    run: RunFolder,
    loaded: LoadedModel,
    settings: SearchSettings,
    windows: Sequence[Window],
    *,
    init: Sequence[FactorTable] = (),
    on_progress: OnProgress | None = None,
) -> FactorTable:
    """The search itself, in an open run folder: evaluations.jsonl while it goes on, factors.json at its end."""
    loaded.widen_window(settings.to)
    for note in loaded.notes:
        logger.info(note)
    if known := len(run.evaluations()):
        logger.info("resuming %s after %d evaluations", run.path, known)
    strategy = make_strategy(loaded, settings, init)
    own = last_row(loaded.meaning, settings.to)
    if set(own.rescale) != {1.0} and "own" not in strategy.seeds:
        logger.info("the checkpoint's own scaling, up to %g, is outside this search: it is no seed", max(own.rescale))
    for row in (last_row(table, settings.to) for table in init):
        if list(row.rescale) != sorted(row.rescale):
            logger.info("a vector given by --init is not ascending: it is sorted, since the search keeps that order")
    total = min(settings.evaluations or strategy.settings.evaluations, strategy.settings.evaluations)
    with PerplexityObjective(loaded, windows) as objective:
        best = evaluate_all(strategy, objective, run, total, on_progress)
    if best is None:
        raise UserError(
            "search",
            got=f"no finite perplexity from {total} candidates",
            rule="at least one candidate has one",
            do="check the checkpoint with --dtype float32, or give other documents",
        )
    value, candidate = best
    table = make_table(loaded, settings, windows, candidate.factors, value)
    run.save_factors(table)
    return table


def make_strategy(loaded: LoadedModel, settings: SearchSettings, init: Sequence[FactorTable] = ()) -> Evolution:
    """Algorithm 1 on this model, seeded by PI, NTK, YaRN, the checkpoint's own scaling and the vectors given."""
    shape = loaded.rope.shape
    ratio, trained = settings.to / shape.original_length, max(loaded.trained_rescale)
    space = Space(shape.pairs, ratio, settings.start_choices, trained)
    chosen = attention_factor(settings.attention_factor, space.ratio, shape.original_length)
    start = 0 if 0 in settings.start_choices else settings.start_choices[0]
    seeds = [(name, loaded.baseline(name, settings.to)) for name in SEEDS]
    own = last_row(loaded.meaning, settings.to)
    if set(own.rescale) != {1.0} and space.holds(own):
        seeds.append(("own", own))
    for table in init:
        row = last_row(table, settings.to)
        space.check(row, table.model or "a vector")
        seeds.append(("init", row))
    fixed = {"attention_factor": chosen, "up_to": settings.to}
    placed = [(name, row.with_values(start_tokens=_start(row, settings, start), **fixed)) for name, row in seeds]
    rng = np.random.default_rng(settings.seed)
    return Evolution(space, placed, EvolutionSettings.for_length(settings.to), rng)


def _start(row: RopeFactors, settings: SearchSettings, default: int) -> int:
    return row.start_tokens if row.start_tokens in settings.start_choices else default


def evaluate_all(
    strategy: Evolution,
    objective: Objective,
    run: RunFolder,
    total: int,
    on_progress: OnProgress | None = None,
) -> tuple[float, Candidate] | None:
    """Ask, evaluate, tell, until the search ends or `total` candidates are evaluated; the best of all.

    Resuming is replaying: the strategy is asked from the start, and candidates whose value is in evaluations.jsonl are
    not evaluated again. So an interrupted search ends as one that never was.
    """
    known = {record["key"]: record["value"] for record in run.evaluations()}
    done, fresh, best, begun = 0, 0, math.inf, time.perf_counter()
    while not strategy.finished and done < total:
        generation = strategy.ask()
        results = []
        for candidate in generation[: total - done]:
            key = candidate.factors.key
            if key not in known:
                evaluation = objective(candidate.factors)
                fresh += 1
                run.log_evaluation(
                    {
                        "index": done,
                        "iteration": candidate.iteration,
                        "origin": candidate.origin,
                        "key": key,
                        "rescale": list(candidate.factors.rescale),
                        "start_tokens": candidate.factors.start_tokens,
                        "attention_factor": candidate.factors.attention_factor,
                        "value": evaluation.value,
                        "tokens": evaluation.tokens,
                        "seconds": round(evaluation.seconds, 4),
                    }
                )
                known[key] = evaluation.value if math.isfinite(evaluation.value) else None
            value = math.nan if known[key] is None else float(known[key])
            results.append((candidate, value))
            done += 1
            best = min(best, value) if math.isfinite(value) else best
            if on_progress:
                rate = fresh / (time.perf_counter() - begun)
                on_progress(Progress(done, total, candidate.iteration, best, rate))
        strategy.tell(results)
    return strategy.best


def make_table(
    loaded: LoadedModel, settings: SearchSettings, windows: Sequence[Window], found: RopeFactors, value: float
) -> FactorTable:
    """Two rows: the checkpoint as it is up to its original length (all 1 where it is not scaled), and the found one."""
    rope = loaded.rope
    short = last_row(loaded.meaning, rope.original_length).with_values(up_to=rope.original_length)
    return FactorTable(
        rope_theta=rope.rope_theta,
        rotary_dim=rope.rotary_dim,
        original_length=rope.original_length,
        rows=(short, found.with_values(up_to=settings.to)),
        model=loaded.name,
        provenance={
            "method": settings.method,
            "objective": "perplexity",
            "value": value,
            "seed": settings.seed,
            "documents": fingerprint(windows),
            "longrope": __version__,
        },
    )


def measure_result(
    run: RunFolder,
    loaded: LoadedModel,
    table: FactorTable,
    target: int,
    windows: Sequence[Window],
    unseen: Sequence[Window],
) -> list[Result]:
    """The table and the baselines at the target length, on the search windows and on unseen ones."""
    known = [Result.from_dict(line) for line in run.results()]
    results = []
    for name, chosen in (("search", windows), ("unseen", unseen)):
        if chosen:
            results += measure_methods(
                loaded,
                {target: chosen},
                METHODS_BESIDE,
                {"longrope": table},
                windows_name=name,
                known=known,
                on_result=lambda result: run.log_result(result.to_dict()),
            )
    return results


def run_config(
    command: str,
    loaded: LoadedModel,
    settings: SearchSettings,
    windows: Sequence[Window],
    unseen: Sequence[Window],
    init: Sequence[FactorTable] = (),
) -> dict[str, Any]:
    """What config.json of a run that searches holds: everything its result depends on."""
    chosen = {name: value for name, value in vars(settings).items() if name != "windows"}
    return {
        "command": command,
        "longrope": __version__,
        "model": describe_model(loaded),
        "settings": chosen | describe_options(loaded) | {"init": [row.key for table in init for row in table.rows]},
        "documents": {"search": describe_windows(windows), "unseen": describe_windows(unseen)},
        "ignored": {"command_line": command_line()},
    }
