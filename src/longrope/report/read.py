"""The files of a run folder, checked, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from longrope.baselines import RopeShape
from longrope.errors import UserError
from longrope.factors import FactorTable
from longrope.files import read_json, read_lines
from longrope.report.results import RUN_SEPARATOR, Result, check, length_of, number, read_mapping, read_measured
from longrope.runs import CONFIG, DONE, EVALUATIONS, FACTORS, LOSSES, METRICS, STAGES

_Kind = Literal["complete", "failed", "partial", "gradient", "unrounded"]


@dataclass(frozen=True)
class Evaluation:
    """One piece of work of a search: its origin and kind, the value that it gave, its cost in token-passes and seconds.

    complete: a candidate's last piece, with which its value is known. failed: a loss is not finite. partial: a
    candidate on some of the windows. gradient: of a descent. unrounded: a comparison, never a result. candidate: equal
    for all pieces of the same factors. recomputed: tokens run again to save memory, not among `tokens`.
    """

    origin: str
    kind: _Kind
    candidate: str
    value: float | None
    tokens: float
    seconds: float
    recomputed: float


@dataclass(frozen=True)
class Document:
    """A document by name and hash, and the token at which its window starts."""

    name: str
    sha256: str
    start: int | None


@dataclass(frozen=True)
class Stage:
    """A stage of an extension: its folder's name, what was asked, seconds (None while it is not done), and its run.

    resumed: the seconds are those since it last went on.
    """

    name: str
    asked: Mapping[str, Any]
    seconds: float | None
    run: RunData | None
    resumed: bool = False


@dataclass(frozen=True)
class RunData:
    """What a run folder holds; empty or None where a file is not there.

    results: of the first measure, on held-out windows where there are some, else on all. seen: beside those, on the
    windows of the search. measures: all results by measure. inner: config.json of the runs inside it, whose results
    are among them. left_out: what lies inside and is not shown, a sentence each. searched_on: by measure, documents
    that the search has read, too. losses: (step, loss) of a training. path: as it was given. stages: of an extension.
    """

    name: str
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    documents: Mapping[str, tuple[Document, ...]]
    measure: str
    results: tuple[Result, ...]
    seen: tuple[Result, ...]
    table: FactorTable | None
    evaluations: tuple[Evaluation, ...]
    finished: bool
    measures: Mapping[str, tuple[Result, ...]] = field(default_factory=dict)
    inner: tuple[Mapping[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()
    searched_on: Mapping[str, int] = field(default_factory=dict)
    losses: tuple[tuple[float, float | None], ...] = ()
    path: str = "RUN"
    stages: tuple[Stage, ...] = ()

    def of(self, measure: str) -> RunData:
        """The same run with the results of another of its measures."""
        results = self.measures.get(measure, ())
        unseen = tuple(result for result in results if not result.seen)
        seen = tuple(result for result in results if result.seen) if unseen else ()
        return replace(self, measure=measure, results=unseen or results, seen=seen)

    @property
    def original_length(self) -> int | None:
        """Trained length in tokens, None when nothing says it."""
        length = self.model.get("original_length", self.table.original_length if self.table else None)
        return length_of(length)

    @property
    def target_length(self) -> int | None:
        """Wanted length in tokens: asked for, else the longest row of the factors, else the longest measured."""
        if asked := length_of(self.settings.get("to")):
            return asked
        if self.table:
            return self.table.lengths[-1]
        return max((result.length for result in self.results), default=None)

    @property
    def evaluation_tokens(self) -> int | None:
        """Token-passes of one evaluation: all search windows, each of the target length. None when nothing says it."""
        windows, target = len(self.documents.get("search", ())), length_of(self.settings.get("to"))
        return windows * target if target and windows else None

    @property
    def lengths(self) -> list[int]:
        """Measured lengths, ascending."""
        return sorted({result.length for result in self.results})

    def result(self, method: str, length: int | None) -> Result | None:
        """What was measured for a method at a length (the last one when there are several)."""
        found = [result for result in self.results if (result.method, result.length) == (method, length)]
        return found[-1] if found else None


def read_run(run: Path) -> RunData:
    """Read a run folder. Raises UserError for a folder that is no run and for a corrupt file, naming it."""
    files = (CONFIG, METRICS, FACTORS, EVALUATIONS, LOSSES)
    if not any((run / name).is_file() for name in files):
        got = f"{run}, which has none of {', '.join(files)}" if run.is_dir() else f"{run}, which is no folder"
        raise UserError("run", got=got, rule="a run is a folder that a command wrote", do="give the --out of a command")
    config = read_mapping(run / CONFIG)
    measured = read_measured(run, config)
    metrics, measures = measured.own, measured.measures
    if "command" not in config and (run / CONFIG).exists():  # a checkpoint has a config.json too
        got = f"{run}, whose {CONFIG} names no command"
        raise UserError("run", got=got, rule="a run is a folder that a command wrote", do="give the --out of a command")
    model = config.get("model", metrics.get("model", {}))
    if isinstance(model, str):
        model = {"name": model}
    check(isinstance(model, Mapping), run / CONFIG, "model is an object or a name")
    settings = config.get("settings", metrics.get("settings", {}))
    check(isinstance(settings, Mapping), run / CONFIG, "settings is an object")
    # The page of a demo is part of the demo, so it is made before DONE; by then everything is measured.
    finished = (run / DONE).exists() or bool(metrics)
    data = RunData(
        name=run.resolve().name.replace(RUN_SEPARATOR, " "),
        config=config,
        model=model,
        settings=settings,
        documents=_documents(config.get("documents", {}), run / CONFIG),
        measure="",
        results=(),
        seen=(),
        # Of a run that goes on nothing says whether they are as they were written, or those of a smaller budget.
        table=_table(run / FACTORS) if finished or not config else None,
        evaluations=tuple(
            _evaluation(record, line, run / EVALUATIONS)
            for line, record in enumerate(read_lines(run / EVALUATIONS), start=1)
        ),
        finished=finished,
        measures=measures,
        inner=measured.inner,
        left_out=measured.left_out,
        losses=_losses(run / LOSSES),
        searched_on=measured.searched_on,
        path=str(run),
        stages=_stages(run, settings) if config.get("command") == "extend" else (),
    )
    return data.of(next(iter(measures), str(metrics.get("measure", "perplexity"))))


def _stages(run: Path, settings: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages that config.json names, with the runs they have made and the seconds of those that are done."""
    asked = settings.get("stages", {})
    rule = "stages are objects by name"
    good = isinstance(asked, Mapping) and all(isinstance(each, Mapping) for each in asked.values())
    check(good, run / CONFIG, rule)
    lines = read_lines(run / STAGES)
    done = {str(line.get("stage")): line for line in lines}
    seconds = {name: number(line.get("seconds"), run / STAGES, "seconds") for name, line in done.items()}
    resumed = {name for name, line in done.items() if line.get("resumed")}
    return tuple(
        Stage(
            name,
            each,
            seconds.get(name),
            read_run(run / name) if (run / name / CONFIG).is_file() else None,
            name in resumed,
        )
        for name, each in asked.items()
        if Path(name).name == name  # a folder inside the run
    )


def _documents(data: object, path: Path) -> dict[str, tuple[Document, ...]]:
    rule = "documents are lists of objects"
    check(isinstance(data, Mapping), path, rule)
    documents = {}
    for use, entries in cast(Mapping[str, Any], data).items():
        check(isinstance(entries, list) and all(isinstance(entry, Mapping) for entry in entries), path, rule)
        documents[use] = tuple(_document(entry) for entry in entries)
    return documents


def _losses(path: Path) -> tuple[tuple[float, float | None], ...]:
    lines = read_lines(path)
    steps = ((number(line.get("step"), path, "step"), number(line.get("loss"), path, "loss")) for line in lines)
    return tuple((step, loss) for step, loss in steps if step is not None)


def _document(entry: Mapping[str, Any]) -> Document:
    start = entry.get("start")
    return Document(
        str(entry.get("name", "unnamed")), str(entry.get("sha256", "")), start if isinstance(start, int) else None
    )


def _evaluation(record: Mapping[str, Any], line: int, path: Path) -> Evaluation:
    """A line of evaluations.jsonl; those of the first longrope have neither windows nor losses, and are all whole."""
    factors = [record.get(name) for name in ("rescale", "start_tokens", "attention_factor")]
    value = number(record.get("value"), path, "value")
    origin = str(record.get("origin", ""))
    losses = record.get("losses")
    check(losses is None or isinstance(losses, list), path, "losses is a list")
    kind: _Kind = "failed"
    if record.get("gradient") is not None:
        kind = "gradient"
    elif origin.endswith(" unrounded"):
        kind = "unrounded"
    elif value is not None:
        kind = "complete"
    elif losses is not None and None not in losses:
        kind = "partial"
    return Evaluation(
        origin=origin,
        kind=kind,
        candidate=f"line {line}" if factors[0] is None else str(factors),
        value=value,
        tokens=number(record.get("tokens"), path, "tokens") or 0.0,
        seconds=number(record.get("seconds"), path, "seconds") or 0.0,
        recomputed=number(record.get("recomputed"), path, "recomputed") or 0.0,
    )


def _table(path: Path) -> FactorTable | None:
    """The factors of a run; unlike FactorTable.load, every complaint names the file."""
    if not path.exists():
        return None
    data = read_json(path, "factors file")
    try:
        table = FactorTable.from_dict(data)
        shape_of(table)
    except UserError as error:
        raise error.changed(what=f"{path}: {error.what}") from None
    return table


def shape_of(table: FactorTable) -> RopeShape:
    """The RoPE that a factor table belongs to. Raises UserError when its base is not above 1."""
    return RopeShape(table.rope_theta, table.rotary_dim, table.original_length)
