"""`longrope finetune`: transformers.Trainer with the factors installed, as a run that goes on after any end."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from longrope import __version__
from longrope.checkpoint import FACTORS_FILE, LoadOptions, load_options
from longrope.convert import factors_file, read_factors
from longrope.describe import describe_model, describe_options
from longrope.documents import Document, hold_out, read_sources
from longrope.errors import UserError
from longrope.evaluate.perplexity import out_of_memory
from longrope.factors import FactorTable
from longrope.files import disk_errors
from longrope.lengths import as_length, format_length
from longrope.memory import Kept, free_memory
from longrope.model import LoadedModel, load_model
from longrope.runs import ADAPTER, CHECKPOINT, LOSSES, METRICS, RunFolder, command_line, default_run_path
from longrope.training.callbacks import Progress, Watch
from longrope.training.lora import LoraSettings, merged, with_lora
from longrope.training.loss import chunked_loss
from longrope.training.recipes import SAVED, Recipe, recipe_of
from longrope.training.sharded import check_shards
from longrope.training.state import damaged, keep_losses, last_whole
from longrope.training.trainer import ShardingTrainer, gathered
from longrope.training.windows import LongWindows, MixedWindows, collate
from longrope.training.world import World
from longrope.training.written import write_checkpoint, write_whole

logger = logging.getLogger(__name__)

DEFAULT_TRACKER = "tensorboard"
STATE = "checkpoints"
_PROBE = 32  # tokens; what a training keeps is measured at one, two and four times as many
_OPTIMIZER_BYTES = 12  # a gradient and two moments in float32


@dataclass(frozen=True)
class Training:
    """What is trained and how: the words of the command.

    length: of a window in tokens. hold_out: leave out the documents that `extend` holds out, to measure on. mixed:
    share of windows that are packed of short documents under the row of their own length. lora: its rank, None for all
    weights. gradient_checkpointing: None is as memory asks for it. save_every: steps between checkpoints, of which the
    last `keep` stay. save_dtype: of the checkpoint that is written at the end, None for that of training. tracker:
    whatever Trainer reports to.
    """

    length: int
    documents: Sequence[str] = ()
    short_documents: Sequence[str] = ()
    hold_out: bool = False
    mixed: float | None = None
    lora: LoraSettings | None = None
    gradient_checkpointing: bool | None = None
    save_every: int | None = None
    keep: int = 2
    save_dtype: str | None = None
    tracker: str = DEFAULT_TRACKER
    seed: int = 0


def finetune(
    model: str | LoadedModel,
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

    factors: a table or its file, by default those beside the weights; windows get the row of their length. Writes the
    run `out` (runs/finetune-MODEL-LENGTH by default): checkpoint/, a transformers folder with its factors.json, or, of
    LoRA that is not merged, adapter/. Resumes a run that is there from its last whole checkpoint, and ends in the same
    weights. recipe: one of RECIPES by name. lora: the rank of adapters, by default all weights are trained. on_progress
    is called after each step. options: LoadOptions as one object. keywords: the fields of Recipe, Training,
    LoraSettings (embeddings, norms, merge) and LoadOptions. Raises UserError for bad input, for a window that does not
    fit into memory, and for a loss that is no number.
    """
    given, chosen, options = _settings(as_length(length), recipe, lora, options, keywords)
    world = World.told()
    world.check(batch=chosen.batch, length=given.length, mixed=given.mixed is not None)
    options = world.placed(options)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, options)
    table = read_factors(factors_file(factors)) if isinstance(factors, str | Path) else factors or loaded.table
    if table is None:
        rule = "a model is trained with the factors of the longer window"
        raise UserError("--factors", got=f"none, and no {FACTORS_FILE} beside the weights", rule=rule, do="give a run")
    loaded.check(table)
    served = served_table(table, given, loaded.rope.original_length)
    windows, documents = _windows(loaded, given, chosen)
    settings = _described(given, chosen) | describe_options(loaded) | {"factors": [row.key for row in served.rows]}
    config = {
        "command": "finetune",
        "longrope": __version__,
        "model": describe_model(loaded),
        "settings": settings,
        "documents": {"train": [{"name": each.name, "sha256": each.sha256} for each in documents]},
        "ignored": {"command_line": command_line()},
    }
    path = Path(out) if out is not None else default_run_path("finetune", loaded.name, given.length)
    with ExitStack() as stack:
        run = stack.enter_context(RunFolder.open(path, config)) if world.main else None
        before, last = world.first(lambda: _begin(run, served))
        if before is not None:
            logger.info("%s is finished: its measurements are in %s", path, path / METRICS)
            return before
        losses = _train(loaded, served, given, chosen, windows, path, world, last, on_progress)
        result = {"method": "training", "length": given.length, "value": losses[-1], "tokens": None, "ci": None}
        told: dict[str, Any] = {"command": "finetune", "model": loaded.name, "settings": settings, "measure": "loss"}
        told |= {"results": [result], "losses": losses}
        return world.first(lambda: _end(run, told))


def _begin(run: RunFolder | None, table: FactorTable) -> tuple[dict[str, Any] | None, str | None]:
    """What the main process finds in a run: its metrics where it is finished, else the checkpoint to go on from."""
    assert run is not None, "the main process opened it"
    if run.finished:
        return run.metrics(), None
    run.save_factors(table)
    last = last_whole(run.path / STATE)
    check_shards(last)
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


def _settings(
    length: int, recipe: str | None, lora: int | None, options: LoadOptions | None, keywords: dict[str, Any]
) -> tuple[Training, Recipe, LoadOptions]:
    def taken(kind: Any) -> dict[str, Any]:
        return {each.name: keywords.pop(each.name) for each in fields(kind) if each.name in keywords}

    chosen = recipe_of(recipe, taken(Recipe))
    of_lora = taken(LoraSettings)
    if lora is None and any(of_lora.values()):
        name = next(name for name, value in of_lora.items() if value)
        raise UserError(f"--{name}", got="no --lora", rule="it is a setting of LoRA", do="give --lora RANK")
    adapters = None if lora is None else LoraSettings(rank=lora, **of_lora)
    given = Training(length=length, lora=adapters, **taken(Training))
    if not given.documents:
        raise UserError("--documents", got="none", rule="a model is trained on documents", do="give at least one")
    for flag, value in (("--save-every", given.save_every), ("--keep", given.keep)):
        if value is not None and value < 1:
            raise UserError(flag, got=value, rule="it is at least 1", do="give a larger number")
    if given.save_dtype not in (None, *SAVED):
        rule, do = f"it is one of {', '.join(SAVED)}", "choose one of them, or leave it out"
        raise UserError("--save-dtype", got=repr(given.save_dtype), rule=rule, do=do)
    options = load_options(options, keywords)
    if options.quantize is not None and adapters is None:
        rule = "weights of so few bits are not trained"
        raise UserError("--quantize", got=f"{options.quantize} without --lora", rule=rule, do="give --lora RANK")
    # All weights are trained in float32, under autocast; a frozen base is in half precision where that computes fast.
    if options.dtype == "auto" and options.placement != "cpu" and adapters is None:
        options = replace(options, dtype="float32")
    return given, chosen, options


def _described(given: Training, recipe: Recipe) -> dict[str, Any]:
    apart = ("tracker", "keep", "lora", "hold_out", "save_dtype")
    told = {name: value for name, value in vars(given).items() if name not in apart}
    told |= {"hold_out": True} if given.hold_out else {}
    told |= {"save_dtype": given.save_dtype} if given.save_dtype else {}
    told |= {"documents": list(given.documents), "short_documents": list(given.short_documents)}
    return told | vars(recipe) | {"lora": vars(given.lora) if given.lora else None}


def _windows(loaded: LoadedModel, given: Training, recipe: Recipe) -> tuple[LongWindows | MixedWindows, list[Document]]:
    assert recipe.steps is not None, "checked with the recipe"
    documents = read_sources(given.documents, share="search", tokenizer=loaded.tokenizer)
    if given.hold_out:
        documents, _ = hold_out(documents)
    long = LongWindows(
        documents, loaded.tokenizer, length=given.length, count=recipe.steps * recipe.batch, seed=given.seed
    )
    if recipe.steps * recipe.batch > long.an_epoch:
        rounds = recipe.steps * recipe.batch / long.an_epoch
        logger.info("the documents hold %d windows: each is read %.1f times", long.an_epoch, rounds)
    if given.mixed is None:
        return long, documents
    short = documents
    if given.short_documents:
        short = read_sources(given.short_documents, share="search", tokenizer=loaded.tokenizer)
        documents = [*documents, *short]
    original = loaded.rope.original_length
    return MixedWindows(long, short, loaded.tokenizer, short_length=original, share=given.mixed), documents


def _train(
    loaded: LoadedModel,
    table: FactorTable,
    given: Training,
    recipe: Recipe,
    windows: Dataset[Any],
    path: Path,
    world: World,
    last: str | None,
    on_progress: Callable[[Progress], None] | None,
) -> list[float]:
    """The losses of all steps; writes what was trained into the run."""
    model: Any = loaded.model
    if given.lora is None:
        model.requires_grad_(True)
    with loaded.patch() as patch:
        note = patch.widen_window(given.length)
        patch.install(table if given.mixed is not None else table.rows[-1])
        if note:
            logger.info(note)
        trained = (
            model
            if given.lora is None
            else with_lora(model, given.lora, given.seed, quantized=loaded.options.quantize is not None)
        )
        with chunked_loss(model):
            arguments = _arguments(loaded, trained, given, recipe, path / STATE, world)
            watch = Watch(path / LOSSES, total=cast(int, recipe.steps), on_progress=on_progress)
            trainer = (ShardingTrainer if world.sharded else Trainer)(
                model=trained, args=arguments, train_dataset=windows, data_collator=collate, callbacks=[watch]
            )
            for callback in (PrinterCallback, ProgressCallback):  # stdout is for our JSON
                trainer.remove_callback(callback)
            with _told(path, given, last, watch):
                trainer.train(resume_from_checkpoint=last)
            # Of shards the whole is gathered, for which all processes are needed.
            whole = gathered(trainer.model) if world.sharded else None
        model.config.use_cache = True  # Trainer switched it off
        if given.lora is not None and world.main:
            write_whole(path / ADAPTER, lambda folder: trained.save_pretrained(folder, state_dict=whole))
    if given.lora is not None and given.lora.merge and world.main:
        # Into shards and weights of few bits nothing can be merged: a model that is loaded anew takes what was saved.
        anew = world.sharded or loaded.options.quantize is not None
        whole_options = replace(loaded.options, quantize=None)
        model = merged(load_model(loaded.name, whole_options).model if anew else trained, path / ADAPTER)
        whole = None
    if (given.lora is None or given.lora.merge) and world.main:
        dtype = given.save_dtype
        write_whole(path / CHECKPOINT, lambda folder: write_checkpoint(folder, model, loaded, table, whole, dtype))
    world.wait()
    return watch.losses()


def _arguments(
    loaded: LoadedModel, trained: Any, given: Training, recipe: Recipe, state: Path, world: World
) -> TrainingArguments:
    share = recipe.batch // world.windows_at_once
    together = next(
        size for size in range(min(share, max(1, loaded.batch_tokens // given.length)), 0, -1) if share % size == 0
    )
    # Of shards nothing is estimated: what does not fit into one process is what they are for.
    again = given.gradient_checkpointing is not False
    if world.window_size == 1 and not world.sharded:
        again = _fits(loaded, trained, given, together)
    # Its name from transformers 5.23 on, which warns of the older one.
    twice = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    return TrainingArguments(
        output_dir=str(state),
        max_steps=cast(int, recipe.steps),
        per_device_train_batch_size=together,
        gradient_accumulation_steps=share // together,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        optim="adamw_torch",
        bf16=loaded.options.dtype in ("auto", "bfloat16") or loaded.device.type == "cuda",
        **{f"{twice}_checkpointing": bool(again), f"{twice}_checkpointing_kwargs": {"use_reentrant": False}},  # type: ignore[arg-type]
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=given.save_every or max(1, cast(int, recipe.steps) // 20),
        save_total_limit=given.keep,
        seed=given.seed,
        data_seed=given.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=_trackers(given.tracker),
        disable_tqdm=True,
        use_cpu=loaded.device.type == "cpu",
        dataloader_pin_memory=loaded.device.type == "cuda",
        ddp_find_unused_parameters=False if world.size > 1 else None,
    )


def _trackers(wanted: str) -> list[str]:
    """What Trainer reports to; TensorBoard, which nobody asked for by name, where it is installed."""
    if wanted == "none" or (wanted == DEFAULT_TRACKER and find_spec("tensorboard") is None):
        return []
    return [wanted]


def _fits(loaded: LoadedModel, trained: Any, given: Training, together: int) -> bool:
    """Whether layers are to be computed twice. Raises UserError when a batch does not fit even so, with what would."""
    weights = sum(each.numel() for each in trained.parameters() if each.requires_grad)
    room = free_memory(loaded.device) - _OPTIMIZER_BYTES * weights
    least = max(4, min(_PROBE, given.length // 4))

    def run(length: int) -> None:
        ids = torch.arange(length, device=loaded.device)[None] % 100
        with loaded.autocast(), torch.enable_grad():
            trained(input_ids=ids, labels=ids)

    kept = Kept.measured(trained, [least, 2 * least, 4 * least], run)
    layers = loaded.model.config.get_text_config().num_hidden_layers
    # One layer's activations, and what each layer is given.
    width = loaded.model.config.get_text_config().hidden_size
    twice = Kept(kept.constant / layers, kept.linear / layers + 4 * layers * width, kept.quadratic / layers)
    wanted = given.gradient_checkpointing
    again = together * kept(given.length) > 0.6 * room if wanted is None else wanted
    needed = twice if again else kept
    if together * needed(given.length) > room:
        longest, gigabytes = max(0, needed.tokens(room / together)), together * needed(given.length) / 2**30
        raise UserError(
            "memory",
            got=f"windows of {given.length} tokens, of which {together} take {gigabytes:.1f} GiB",
            rule=f"there are {max(0, room) / 2**30:.1f} GiB beside the weights, their gradients and Adam's moments",
            do=f"use at most {format_length(longest)} tokens here, --lora, a larger device, or several",
        )
    return again


@contextmanager
def _told(path: Path, given: Training, last: str | None, watch: Watch) -> Iterator[None]:
    """What goes wrong in Trainer that is not ours: memory, disks, checkpoints that cannot be read."""
    try:
        with disk_errors(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that torch then refuses
            yield
    except UserError:
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if isinstance(error, RuntimeError) and out_of_memory(error):
            rule, do = "a step fits into the device's memory", "use a shorter --length, or --lora"
            raise UserError("memory", got=f"windows of {given.length} tokens", rule=rule, do=do) from None
        # Whatever it was, it was reading that; the random state is read once the training has begun.
        if last is not None and (not watch.begun or isinstance(error, UnpicklingError)):
            raise damaged(Path(last), said) from None
        raise
