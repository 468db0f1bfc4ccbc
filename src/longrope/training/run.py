"""`longrope finetune`: transformers.Trainer with the factors installed, as a run that goes on after any end."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback

from longrope import __version__
from longrope.checkpoint import LoadOptions
from longrope.convert import as_table
from longrope.describe import describe_documents, describe_options, describe_trained, versions
from longrope.documents import Document, hold_out, others, read_sources
from longrope.errors import UserError, first_line, plural
from longrope.evaluate.perplexity import out_of_memory
from longrope.factors import FACTORS, FactorTable
from longrope.files import disk_errors
from longrope.folders import replaced_folder
from longrope.lengths import as_length
from longrope.model import LoadedModel, load_model
from longrope.modes import apart
from longrope.runs import ADAPTER, CHECKPOINT, LOSSES, METRICS, RunFolder, command_line, default_run_path, identity
from longrope.training.apart import check_shareable, documents_are_apart
from longrope.training.arguments import arguments_of, trackers
from longrope.training.callbacks import Progress, Watch
from longrope.training.lora import merged, with_lora
from longrope.training.loss import chunked_loss
from longrope.training.recipes import Recipe
from longrope.training.settings import DEFAULT_TRACKER, Training, described, settings_of
from longrope.training.sharded import check_kind, check_shards
from longrope.training.state import damaged, keep_losses, last_whole
from longrope.training.trainer import ResumingTrainer, ShardingTrainer, UnreadableError, failures_of_shards, gathered
from longrope.training.windows import LongWindows, MixedWindows, collate_shared, collate_to_learned
from longrope.training.world import World
from longrope.training.written import write_beside_adapters, write_checkpoint
from longrope.vocabulary import check_end

logger = logging.getLogger(__name__)

STATE = "checkpoints"
"""Folder of a run's training checkpoints, from which it goes on."""


@apart
def finetune(
    model: str | Path | LoadedModel,
    *,
    length: int | str,
    factors: FactorTable | str | Path | None = None,
    recipe: str | None = None,
    lora: int | None = None,
    out: str | Path | None = None,
    options: LoadOptions | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Train a model on windows of `length` tokens under its factors; what metrics.json holds.

    model: MODEL as every command takes it. One from load_model stays as it is: its weights are read again, with its
    options; its tokenizer and its table are those that it has. factors: a table or its file, by default those beside
    the weights; windows get the row of their length. Writes the run `out` (runs/finetune-MODEL-LENGTH by default):
    checkpoint/, a transformers folder with its factors.json, or, of LoRA that is not merged, adapter/. Resumes a run
    that is there from its last whole checkpoint, and ends in the same weights. recipe: one of RECIPES by name. lora:
    the rank of adapters, by default all weights are trained. on_progress is called after each step. options:
    LoadOptions as one object. keywords: the fields of Recipe, Training, LoraSettings (embeddings, norms, merge) and
    LoadOptions. Raises UserError for bad input, for a window that does not fit into memory, and for a loss that is no
    number.
    """
    if isinstance(model, LoadedModel):
        options = options or model.options
    given, chosen, options = settings_of(as_length(length), recipe, lora, options, keywords)
    world = World.told()
    mixed = given.mixed is not None
    world.check(batch=chosen.batch, length=given.length, mixed=mixed, attention=options.attention)
    options = world.placed(options)
    if not trackers(given.tracker) and given.tracker == DEFAULT_TRACKER:
        logger.info("no TensorBoard here: the losses are in %s alone (install longrope[tensorboard])", LOSSES)
    # Anew, also where one is given: that would be another model afterwards, under the same name.
    loaded = load_model(model.name if isinstance(model, LoadedModel) else model, options)
    if isinstance(model, LoadedModel):
        loaded.batch_tokens, loaded.tokenizer, loaded.table = model.batch_tokens, model.tokenizer, model.table
    table = loaded.table if factors is None else as_table(factors)
    if table is None:
        rule = "a model is trained with the factors of the longer window"
        raise UserError("--factors", got=f"none, and no {FACTORS} beside the weights", rule=rule, do="give a run")
    loaded.check(table)
    check_end(loaded.name, loaded.model, loaded.tokenizer)
    if world.window_size > 1:
        check_shareable(loaded)
    served = served_table(table, given, loaded.rope.original_length)
    windows, documents = _windows(loaded, given, chosen)
    settings = described(given, chosen) | describe_options(loaded) | {"factors": [row.key for row in served.rows]}
    config = {
        "command": "finetune",
        "longrope": __version__,
        "model": describe_trained(loaded),
        "settings": settings,
        "documents": {"train": describe_documents(documents)},
        "ignored": {"command_line": command_line()},
    }
    path = Path(out) if out is not None else default_run_path("finetune", loaded.name, given.length)
    made = CHECKPOINT if given.lora is None or given.lora.merge else ADAPTER
    with ExitStack() as stack:
        run = stack.enter_context(RunFolder.open(path, config)) if world.main else None
        before, last = world.first(lambda: _begin(run, served, identity(config), made, sharded=world.sharded))
        if before is not None:
            logger.info("%s is finished: its measurements are in %s", path, path / METRICS)
            return before
        watch = Watch(
            path / LOSSES,
            of=identity(config),
            keep=given.keep,
            total=cast(int, chosen.steps),
            on_progress=on_progress,
        )
        losses = _train(loaded, served, given, chosen, windows, path, world, last, watch)
        result = {"method": "training", "length": given.length, "value": losses[-1], "tokens": None, "ci": None}
        told: dict[str, Any] = {"command": "finetune", "model": loaded.name, "settings": settings, "measure": "loss"}
        told |= {"versions": versions("accelerate", *(["peft"] if given.lora else []))}
        told |= {"results": [result], "losses": losses}
        return world.first(lambda: _end(run, told))


def _begin(
    run: RunFolder | None, table: FactorTable, of: str, made: str, *, sharded: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """What the main process finds in a run: its metrics where it is finished, else the checkpoint to go on from.

    made: the folder that it ends with.
    """
    assert run is not None, "the main process opened it"
    if run.finished:
        return run.finished_with(made), None
    run.save_factors(table)
    last = last_whole(run.path / STATE, of)
    check_shards(last)
    check_kind(last, sharded=sharded)
    keep_losses(run.path / LOSSES, last)
    return None, None if last is None else str(last)


def _end(run: RunFolder | None, told: dict[str, Any]) -> dict[str, Any]:
    assert run is not None, "the main process opened it"
    run.save_metrics(told)
    run.finish()
    return run.metrics()


def served_table(table: FactorTable, given: Training, original_length: int) -> FactorTable:
    """The table that a trained model is for: the row of its windows and, where short ones were among them, that below.

    Rows beyond it belong to other weights. Raises UserError when the table does not reach the windows, and for mixed
    windows when it has no row for the original length.
    """
    row = table.row_for(given.length)
    if given.mixed is None:
        return replace(table, rows=(row,))
    short = table.row_for(original_length)
    if short.up_to >= row.up_to:
        rule = f"short documents have a row of their own, up to {original_length} tokens"
        raise UserError("--mixed", got=f"one row up to {row.up_to}", rule=rule, do="give a table with both")
    return replace(table, rows=(short.with_values(up_to=original_length), row))


def _windows(loaded: LoadedModel, given: Training, recipe: Recipe) -> tuple[LongWindows | MixedWindows, list[Document]]:
    assert recipe.steps is not None, "checked with the recipe"
    documents = read_sources(given.documents, share="search", tokenizer=loaded.tokenizer)
    held: list[Document] = []
    if given.hold_out:
        documents, held = hold_out(documents)
    long = LongWindows(
        documents, loaded.tokenizer, length=given.length, count=recipe.steps * recipe.batch, seed=given.seed
    )
    if long.left_out:
        logger.info("%s with completions left out: longer than a window", plural(long.left_out, "prompt"))
    if long.too_short:
        logger.info("%s left out: shorter than a window", plural(long.too_short, "document"))
    if recipe.steps * recipe.batch > long.an_epoch:
        rounds = recipe.steps * recipe.batch / long.an_epoch
        logger.info("the documents hold %d windows: each is read %.1f times", long.an_epoch, rounds)
    if given.mixed is None:
        return long, documents
    short = documents
    if given.short_documents:
        short = read_sources(given.short_documents, share="search", tokenizer=loaded.tokenizer)
        if given.hold_out:
            short = _held_out_of(short, held)
        documents = [*documents, *short]
    original = loaded.rope.original_length
    with loaded.looking():
        apart = documents_are_apart(loaded)
    if not apart:
        logger.info("what stands before a document reaches into it in this model: each is a row of its own")
    mixed = MixedWindows(long, short, loaded.tokenizer, short_length=original, share=given.mixed, apart=apart)
    if mixed.left_out:
        what = plural(mixed.left_out, "prompt")
        logger.info("%s with completions left out of packed windows: longer than %d tokens", what, original)
    return mixed, documents


def _held_out_of(short: Sequence[Document], held: Sequence[Document]) -> list[Document]:
    """The short documents to train on. Raises UserError where all were held out of the long ones."""
    left = others(short, held)
    # Of a single document a quarter is held out, which a copy of the whole has, too, and another may be a part of.
    if len(held) == 1:
        cut = held[0].text
        left = [each for each in left if cut not in each.text and each.text.strip() not in cut]
    if not left:
        rule = "what --hold-out leaves out of --documents is not trained on as a short document either"
        raise UserError("--short-documents", got="only documents that are held out", rule=rule, do="give others")
    return hold_out(left)[0]


def _train(
    loaded: LoadedModel,
    table: FactorTable,
    given: Training,
    recipe: Recipe,
    windows: Dataset[Any],
    path: Path,
    world: World,
    last: str | None,
    watch: Watch,
) -> list[float]:
    """The losses of all steps; writes what was trained into the run."""
    model: Any = loaded.model
    if given.lora is None:
        model.requires_grad_(True)
    with loaded.patch() as patch:
        note = patch.widen_window(given.length, shared=world.window_size > 1)
        patch.install(table if given.mixed is not None else table.rows[-1])
        if note:
            logger.info(note)
        trained = model
        if given.lora is not None:
            with loaded.looking():
                trained = with_lora(model, given.lora, given.seed, quantized=loaded.options.quantize is not None)
        with chunked_loss(model):
            arguments = arguments_of(
                loaded, trained, given, recipe, path / STATE, world, None if last is None else Path(last)
            )
            # Of mixed windows the length decides which factors they have: a cut one stays longer than short documents.
            least = 1 if given.mixed is None else loaded.rope.original_length + 1
            # Shared windows are cut into equal parts.
            collator = collate_shared if world.window_size > 1 else partial(collate_to_learned, at_least=least)
            with disk_errors(path):  # it makes the folder of its checkpoints
                trainer = (ShardingTrainer if world.sharded else ResumingTrainer)(
                    model=trained, args=arguments, train_dataset=windows, data_collator=collator, callbacks=[watch]
                )
            for callback in (PrinterCallback, ProgressCallback):  # stdout is for our JSON
                trainer.remove_callback(callback)
            with _failures_told(path, given, last):
                trainer.train(resume_from_checkpoint=last)
            # Of shards the whole is gathered, for which all processes are needed.
            whole = gathered(trainer.model) if world.sharded else None
        model.config.use_cache = True  # Trainer switched it off
        if given.lora is not None and world.main:
            with replaced_folder(path / ADAPTER) as folder:
                trained.save_pretrained(folder, state_dict=whole)
                write_beside_adapters(folder, loaded, table, described(given, recipe))
    if given.lora is not None and given.lora.merge and world.main:
        # Into shards and weights of few bits nothing can be merged: a model that is loaded anew takes what was saved.
        anew = world.sharded or loaded.options.quantize is not None
        # A GPU still holds what was trained, and has no room for it beside.
        whole_options = replace(loaded.options, quantize=None, device="cpu", attention="auto")
        model = merged(load_model(loaded.name, whole_options).model if anew else trained, path / ADAPTER)
        whole = None
    if (given.lora is None or given.lora.merge) and world.main:
        with replaced_folder(path / CHECKPOINT) as folder:
            write_checkpoint(folder, model, loaded, table, described(given, recipe), whole, given.save_dtype)
    world.wait()
    return watch.losses()


@contextmanager
def _failures_told(path: Path, given: Training, last: str | None) -> Iterator[None]:
    """What goes wrong in Trainer that is not ours: memory, disks, checkpoints that cannot be read."""
    try:
        with disk_errors(path), failures_of_shards(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that torch then refuses
            yield
    except UserError:
        raise
    except Exception as error:
        said = first_line(error)[:200]
        if isinstance(error, RuntimeError) and out_of_memory(error):
            rule, do = "a step fits into the device's memory", "use a shorter --length, or --lora"
            raise UserError("memory", got=f"windows of {given.length} tokens", rule=rule, do=do) from None
        if last is not None and isinstance(error, UnreadableError):
            raise damaged(Path(last), said) from None
        raise
