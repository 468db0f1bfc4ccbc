"""`longrope extend`: the stages of an extension in order, each a run inside the run, resumable."""

from __future__ import annotations

import hashlib
import logging
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope import __version__
from longrope.checkpoint import LoadOptions, as_model, load_options, load_tokenizer
from longrope.describe import describe_documents, describe_options, describe_trained
from longrope.documents import Document, as_sources, hold_out, read_sources
from longrope.errors import UserError, plural
from longrope.extension.costs import costs, scaling_of
from longrope.extension.done import DOCUMENTS, Done
from longrope.extension.finish import PASSKEY, measure, write_checkpoint
from longrope.extension.going import Extension, Texts, Watching, check_documents, launcher_words, texts_of
from longrope.extension.plan import (
    WITHOUT_TRAINING,
    Plan,
    Stage,
    default_plan,
    measured_lengths,
    read_plan,
    search_settings,
)
from longrope.factors import FactorTable, RopeFactors
from longrope.files import disk_errors
from longrope.launched import run_launched
from longrope.lengths import as_length, format_length
from longrope.model import LoadedModel, load_model
from longrope.modes import apart
from longrope.report import write_report
from longrope.runs import CHECKPOINT, CONFIG, FACTORS, RESULTS, RunFolder, command_line, default_run_path
from longrope.search.driver import choose_search_windows, search_windows
from longrope.training.arguments import trackers
from longrope.training.run import finetune
from longrope.training.settings import check_numbers, check_seed
from longrope.training.world import check_first_device
from longrope.workers import options_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@apart
def extend(
    model: str | Path,
    *,
    to: int | str,
    documents: str | Path | Sequence[str | Path],
    unseen: str | Path | Sequence[str | Path] = (),
    search_documents: str | Path | Sequence[str | Path] = (),
    stages: str | Path | Plan | None = None,
    train: bool = True,
    dry_run: bool = False,
    out: str | Path | None = None,
    workers: str | int | None = None,
    launcher: str | None = None,
    tracker: str = "tensorboard",
    seed: int = 0,
    options: LoadOptions | None = None,
    watching: Watching | None = None,
    at_most: int | None = None,
    **load: Any,
) -> dict[str, Any]:
    """Extend a model to `to` tokens by the stages of a plan; what metrics.json holds.

    Without `stages` (a TOML file, or one of PLANS) they follow from the ratio, see `default_plan`. Trains and searches
    on `documents`, of which a part is held out to measure on unless `unseen` names others; searches on
    `search_documents` where these are given. train=False leaves out everything that needs training. dry_run: gives
    the stages with what each costs at most, as --json prints them, and computes and writes nothing. launcher: a command
    such as `torchrun --nproc-per-node 8` that runs the fine-tuning on several devices. The run `out`
    (runs/extend-MODEL-LENGTH by default) has a run for each stage; the same call goes on with what is not done. It ends
    with factors.json, checkpoint/, metrics.json and report.html. workers: as for `search`. tracker: whatever Trainer
    reports to. seed: fixes windows and every random choice. watching: what is called as it goes on. at_most: end after
    so many stages that were not done before, with the stages and their seconds instead of what metrics.json holds; the
    same call goes on, and what follows the last stage is done by the call after it. options: LoadOptions as one object;
    load: its fields. Raises UserError for bad input, and for a stage whose inputs or files have changed since it was
    made.
    """
    model, watching = as_model(model), watching or Watching()
    documents, unseen, search_documents = map(as_sources, (documents, unseen, search_documents))
    workers = None if workers is None else str(workers)
    launched = launcher_words(launcher)
    options = load_options(options, load)
    target = as_length(to)
    if dry_run:
        given = {"documents": documents, "unseen": unseen, "search_documents": search_documents}
        return _dry(model, target, stages, **given, train=train, seed=seed, options=options)
    options = options_for(workers, options)
    loaded = load_model(model, options)
    plan = plan_for(loaded.rope.original_length, target, stages, train=train)
    warn(plan, loaded.rope.original_length)
    _check_numbers(plan, options, seed)
    if plan.trains:  # what it would refuse after the searches
        trackers(tracker)
        if launcher is None:
            check_first_device(options.device)
    texts = texts_of(loaded, documents, unseen, search_documents)
    check_documents(loaded, plan, texts, seed)
    path = Path(out) if out is not None else default_run_path("extend", loaded.name, target)
    config = _config(loaded, plan, texts, target, seed, documents, unseen, search_documents)
    with RunFolder.open(path, config) as run:
        done = Done(path)
        for stage in plan.stages:  # those of a stage that is done, too: told before any other is made
            done.check_documents(stage.name, _own_documents(stage, loaded.tokenizer))
        if run.finished:
            watching.stage(f"{path} is finished")
            return run.finished_with(CHECKPOINT)
        if texts.hold_out:
            held, left = map(_named, (texts.unseen, texts.trained))
            logger.info("held out of all stages and measured on: %s; left for the stages: %s", held, left)
        going = Extension(
            run=path,
            plan=plan,
            options=options,
            base=model,
            texts=texts,
            seed=seed,
            workers=workers,
            launcher=launched,
            tracker=tracker,
            watching=watching,
            done=done,
            original_length=loaded.rope.original_length,
            scaling=loaded.meaning,
            current=model,
            _loaded=loaded,
        )
        del loaded  # `going` lets it go when a training takes the memory
        made = 0
        for stage in plan.stages:
            made += _make(going, stage)
            if at_most is not None and made >= at_most:
                return {"stages": going.told()}
        assert going.table is not None, "a plan has a search"
        going.table = replace(going.table, provenance=_provenance(plan))
        run.save_factors(going.table)
        write_checkpoint(going, going.table)
        run.save_metrics(measure(going, run, going.table) | {"stages": going.told()})
        write_report(path)
        run.finish()
        return run.metrics()


def _named(documents: Sequence[Document]) -> str:
    """Documents in words: a single one by its name, which says where it is a part of one."""
    name = documents[0].name
    return name if len(documents) == 1 else f"{plural(len(documents), 'document')}, such as {name}"


def _check_numbers(plan: Plan, options: LoadOptions, seed: int) -> None:
    """Raise UserError, before any search, for what a fine-tuning of the plan would refuse."""
    for stage in plan.stages:
        if stage.do == "finetune":
            check_seed(seed)
            check_numbers(options, adapters=stage.settings.get("lora") is not None)


def plan_for(original_length: int, target: int, stages: str | Path | Plan | None, *, train: bool = True) -> Plan:
    """The plan of an extension. Raises UserError for one that does not end at the target."""
    if target <= original_length:
        got, rule = f"{target} tokens", f"the target is longer than the model's original length of {original_length}"
        raise UserError("--to", got=got, rule=rule, do=f"give one such as {format_length(8 * original_length)}")
    if stages is None:
        plan = default_plan(original_length, target)
    else:
        plan = stages if isinstance(stages, Plan) else read_plan(stages, original_length)
        if plan.target != target:
            got, rule = f"{format_length(target)}", f"the stages end at {format_length(plan.target)}"
            raise UserError("--to", got=got, rule=rule, do="give that length, or another plan")
    if train:
        return plan
    search = plan.without_training()
    _tell_left_out(plan, search, named=stages is not None)
    return search


def _tell_left_out(plan: Plan, search: Plan, *, named: bool) -> None:
    """Say which stages of a plan that was given are not made without training."""
    kept = {(stage.do, stage.to) for stage in search.stages}
    left_out = [stage.name for stage in plan.stages if (stage.do, stage.to) not in kept]
    if named and left_out:
        logger.info("--no-finetune is one search at the target, and leaves out %s of the plan", ", ".join(left_out))


def _make(going: Extension, stage: Stage) -> bool:
    """A stage, made or found done; the table and the model afterwards. Whether it was made now."""
    say, folder = going.watching.stage, going.run / stage.name
    model = going.base if stage.on == "base" else going.current
    inputs = {"model": going.hash_of(model)}
    if stage.do == "finetune":
        inputs["factors"] = going.tables[stage.to].row_for(stage.to).key
        inputs |= _own_documents(stage, load_tokenizer(going.base, trust_remote_code=going.options.trust_remote_code))
    elif rows := _rows_about(going, stage):
        inputs["rows"] = ", ".join(f"{row.up_to}: {row.key}" for row in rows.rows)
    before = going.done.has(stage.name, inputs)
    if before:
        say(f"{stage.name} is done")
    else:
        say(f"{stage.name} begins")
        _forget_measurements(going.run)
        going.done.forget(stage.name)
        resumed = (folder / CONFIG).exists()  # of a process that ended on its way, and told nobody how long it took
        begun = time.perf_counter()
        with _stage_told(going, stage):
            if stage.do == "finetune":
                _train(going, stage, model, folder)
            else:
                _search(going, stage, model, folder)
        going.done.add(stage.name, inputs, time.perf_counter() - begun, resumed=resumed)
    found = FactorTable.load(folder / FACTORS)
    if stage.do == "finetune":
        going.current, going.table = str(folder / CHECKPOINT), found
    elif stage.do == "search":
        going.tables[stage.to] = found
        if going.current == going.base:
            going.table = found if going.table is None else with_found(going.table, found, stage)
    else:  # rows more of the same model
        assert going.table is not None, "the order of stages is checked"
        going.table = with_found(going.table, found, stage)
    return not before


@contextmanager
def _stage_told(going: Extension, stage: Stage) -> Iterator[None]:
    """A stage's folder that is not its run is no reason for another --out: the stage is made again."""
    try:
        yield
    except UserError as error:
        if error.what != "--out" or "another process" in error.rule:
            raise
        raise error.changed(what="stage", do=going.done.again(stage.name)) from None


def _forget_measurements(run: Path) -> None:
    """What is there of a checkpoint that a stage, made now, is not in: it was made again after the run had measured."""
    with disk_errors(run):
        (run / RESULTS).unlink(missing_ok=True)
        if (run / PASSKEY).is_dir():
            shutil.rmtree(run / PASSKEY)


def _provenance(plan: Plan) -> dict[str, str]:
    """What a table's provenance says: rows of several searches, which have values of their own, are of the stages."""
    return {"command": "extend", "stages": ", ".join(stage.name for stage in plan.stages), "longrope": __version__}


def _own_documents(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of the documents that a stage alone is trained on, by the setting that names them."""
    found = {}
    for name in DOCUMENTS:
        if sources := stage.settings.get(name):
            documents = read_sources(sources, share="search", tokenizer=tokenizer)
            hashes = "".join(f"{document.sha256}\n" for document in documents)
            found[name] = f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"
    return found


def with_found(table: FactorTable, found: FactorTable, stage: Stage) -> FactorTable:
    """A table with what a stage found: the row of its length, and that of the length searched at unless it has one."""
    shorter = search_settings(stage, 0).search_length
    known = {row.up_to for row in table.rows}
    for row in found.rows:
        if row.up_to == stage.to or (row.up_to == shorter and shorter not in known):
            table = with_row(table, row)
    return table


def with_row(table: FactorTable, row: RopeFactors) -> FactorTable:
    """A table with one row more, or another one of that length."""
    rows = [each for each in table.rows if each.up_to != row.up_to]
    return replace(table, rows=tuple(sorted([*rows, row], key=lambda each: each.up_to)))


def _search(going: Extension, stage: Stage, model: str, folder: Path) -> None:
    settings = search_settings(stage, going.seed)
    loaded, init = going.model(model), list[FactorTable]()
    if stage.do == "second":
        loaded = loaded.fine_tuned()
    elif rows := _rows_about(going, stage):
        loaded = replace(loaded, table=rows)
    if stage.do == "recovery":
        init = scaling_of(going.scaling, loaded, settings)
    windows = choose_search_windows(loaded, settings, going.texts.search)  # what is unseen is measured at the end
    with going.watching.search() as on_progress:
        search_windows(loaded, settings, windows, out=folder, init=init, workers=going.workers, on_progress=on_progress)


def _rows_about(going: Extension, stage: Stage) -> FactorTable | None:
    """The table so far, for a recovery from the fine-tuned length on: it starts at the rows about its length.

    One below starts between the original RoPE and what the weights were trained with, which their checkpoint knows.
    """
    trained = max((each.to for each in going.plan.stages if each.do == "finetune"), default=0)
    return going.table if stage.do == "recovery" and stage.to >= trained else None


def _train(going: Extension, stage: Stage, model: str, folder: Path) -> None:
    _check_unchanged(going)
    going.forget()
    factors = going.run / f"{_searched(going.plan, stage.to).name}" / FACTORS
    if going.launcher:
        _launch(going, stage, model, factors, folder)
        return
    settings = {name: value for name, value in stage.settings.items() if name != "window_length"}
    documents = [*going.texts.training, *settings.pop("documents", [])]
    if settings.get("lora") is not None:
        settings["merge"] = True  # the next stage searches on the weights
    with going.watching.training() as on_progress:
        finetune(
            model,
            length=stage.window,
            factors=factors,
            documents=documents,
            hold_out=going.texts.hold_out,
            out=folder,
            seed=going.seed,
            tracker=going.tracker,
            options=going.options,
            on_progress=on_progress,
            **settings,
        )


def _check_unchanged(going: Extension) -> None:
    """Raise UserError for documents that are no longer those of the run: a training reads them for itself."""
    tokenizer = load_tokenizer(going.base, trust_remote_code=going.options.trust_remote_code)
    read = read_sources(going.texts.training, share="search", tokenizer=tokenizer)
    now = hold_out(read)[0] if going.texts.hold_out else read
    if sorted(each.sha256 for each in now) != sorted(each.sha256 for each in going.texts.trained):
        got, rule = "other texts than when this began", "all stages are made of the same ones, and measured on others"
        do = "put them back, and the same command goes on; or extend with these into another --out"
        raise UserError("--documents", got=got, rule=rule, do=do)


def _launch(going: Extension, stage: Stage, model: str, factors: Path, folder: Path) -> None:
    """Fine-tune by a command that starts several processes."""
    words = [*going.launcher, "-m", "longrope", "finetune", model]
    words += ["--length", str(stage.window), "--factors", str(factors)]
    for source in [*going.texts.training, *stage.settings.get("documents", [])]:
        words += ["--documents", source]
    words += ["--hold-out"] if going.texts.hold_out else []
    words += ["--merge"] if stage.settings.get("lora") is not None else []
    for name, value in stage.settings.items():
        if name in ("documents", "window_length"):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [word for each in value for word in (flag, each)]
            continue
        words += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    options = going.options
    # A search may be on a device of its choice, or on all; each process of a training has its own.
    words += ["--device", options.device if options.device in ("cpu", "mps") else "auto"]
    words += ["--dtype", options.dtype, "--attention", options.attention]
    words += ["--quantize", options.quantize] if options.quantize else []
    words += ["--original-length", str(options.original_length)] if options.original_length else []
    words += ["--threads", str(options.threads)] if options.threads else []
    words += ["--rope-precision", options.rope_precision, *(["--trust-remote-code"] * options.trust_remote_code)]
    words += ["--out", str(folder), "--seed", str(going.seed), "--tracker", going.tracker]
    try:
        ended = run_launched(words)
    except OSError as error:
        rule, do = "it is a command that starts python -m", "give one such as torchrun --nproc-per-node 8"
        raise UserError("--launcher", got=f"{words[0]} ({error.strerror})", rule=rule, do=do) from None
    if ended:
        rule, do = "it trains the stage", "mend what it said above: the same command goes on"
        raise UserError("--launcher", got=f"{shlex.join(going.launcher)}, which ended with {ended}", rule=rule, do=do)


def _searched(plan: Plan, length: int) -> Stage:
    return next(stage for stage in plan.stages if stage.do == "search" and stage.to == length)


def _config(
    loaded: LoadedModel,
    plan: Plan,
    texts: Texts,
    target: int,
    seed: int,
    documents: Sequence[str],
    unseen: Sequence[str],
    search_documents: Sequence[str],
) -> dict[str, Any]:
    """config.json: everything the result depends on."""
    settings = {
        "to": target,
        "stages": {stage.name: stage.to_dict() for stage in plan.stages},
        "measure": {"windows": plan.measures.windows, "passkey": plan.measures.passkey},
        "lengths": measured_lengths(plan),
        "seed": seed,
        "documents": list(documents),
        "unseen": list(unseen),
        "search_documents": list(search_documents),
    }
    return {
        "command": "extend",
        "longrope": __version__,
        "model": describe_trained(loaded),
        "settings": settings | describe_options(loaded),
        "documents": {
            "train": describe_documents(texts.trained),
            "search": describe_documents(texts.search),
            "unseen": describe_documents(texts.unseen),
        },
        "ignored": {"command_line": command_line()},
    }


def warn(plan: Plan, original_length: int) -> None:
    """Say, before it begins, that nothing trains at a ratio where that costs much."""
    if plan.target > WITHOUT_TRAINING * original_length and not plan.trains:
        told = "beyond %d times the original length factors alone lose much: without training this is a measurement"
        logger.warning(told, WITHOUT_TRAINING)


def _dry(
    model: str,
    target: int,
    stages: str | Path | Plan | None,
    *,
    documents: Sequence[str],
    unseen: Sequence[str],
    search_documents: Sequence[str],
    train: bool,
    seed: int,
    options: LoadOptions,
) -> dict[str, Any]:
    """The stages of an extension and what each costs at most; nothing is computed or written.

    Raises UserError for documents that cannot be read; that they are too short is said.
    """
    loaded = load_model(model, options)
    plan = plan_for(loaded.rope.original_length, target, stages, train=train)
    warn(plan, loaded.rope.original_length)
    _check_numbers(plan, options, seed)
    texts = texts_of(loaded, documents, unseen, search_documents)
    try:
        check_documents(loaded, plan, texts, seed)
    except UserError as error:  # what it would cost is what was asked for
        logger.warning("with these documents it is going to be refused: %s", error)
    results = [cost.to_dict() for cost in costs(loaded, plan)]
    return {"command": "extend", "model": model, "settings": {"to": target}, "results": results}
