"""What is trained and how: the command's words, checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longrope.checkpoint import AUTOCAST, LoadOptions, load_options, taken
from longrope.documents import as_sources
from longrope.errors import UserError
from longrope.training.lora import LoraSettings
from longrope.training.recipes import SAVED, Recipe, recipe_of

logger = logging.getLogger(__name__)

_HALF = ("bfloat16", "float16")
DEFAULT_TRACKER = "tensorboard"
"""What Trainer reports to where nothing is asked for."""


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
    documents: str | Sequence[str] = ()
    short_documents: str | Sequence[str] = ()
    hold_out: bool = False
    mixed: float | None = None
    lora: LoraSettings | None = None
    gradient_checkpointing: bool | None = None
    save_every: int | None = None
    keep: int = 2
    save_dtype: str | None = None
    tracker: str = DEFAULT_TRACKER
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("documents", "short_documents"):
            object.__setattr__(self, name, as_sources(getattr(self, name)))


def settings_of(
    length: int, recipe: str | None, lora: int | None, options: LoadOptions | None, keywords: dict[str, Any]
) -> tuple[Training, Recipe, LoadOptions]:
    """What the words of the command come to; keywords: the fields of all four, which are taken out of them.

    lora: the rank of adapters, None for all weights. Raises UserError for what cannot be trained like that.
    """
    chosen = recipe_of(recipe, taken(Recipe, keywords))
    of_lora = taken(LoraSettings, keywords)
    if lora is None and any(of_lora.values()):
        name = next(name for name, value in of_lora.items() if value)
        raise UserError(f"--{name}", got="no --lora", rule="it is a setting of LoRA", do="give --lora RANK")
    adapters = None if lora is None else LoraSettings(rank=lora, **of_lora)
    given = Training(length=length, lora=adapters, **taken(Training, keywords))
    if not given.documents:
        raise UserError("--documents", got="none", rule="a model is trained on documents", do="give at least one")
    if given.short_documents and given.mixed is None:
        rule, do = "they are what windows of --mixed are packed of", "give --mixed, such as 0.3, or leave them out"
        raise UserError("--short-documents", got="no --mixed", rule=rule, do=do)
    for flag, value in (("--save-every", given.save_every), ("--keep", given.keep)):
        if value is not None and value < 1:
            raise UserError(flag, got=value, rule="it is at least 1", do="give a larger number")
    if given.save_dtype not in (None, *SAVED):
        rule, do = f"it is one of {', '.join(SAVED)}", "choose one of them, or leave it out"
        raise UserError("--save-dtype", got=repr(given.save_dtype), rule=rule, do=do)
    if given.save_dtype is not None and adapters is not None and not adapters.merge:
        rule, do = "it is of the checkpoint with merged adapters", "give --merge, too, or leave it out"
        raise UserError("--save-dtype", got=f"{given.save_dtype} without --merge", rule=rule, do=do)
    check_seed(given.seed)
    options = load_options(options, keywords)
    check_numbers(options, adapters=adapters is not None)
    return given, chosen, options if adapters is not None else _of_all_weights(options)


def check_numbers(options: LoadOptions, *, adapters: bool) -> None:
    """Raise UserError for numbers in which nothing can be trained; adapters: beside weights that are frozen."""
    if adapters and options.dtype == "float16":
        rule = "the gradient of one token among those of a step rounds to nothing in it"
        raise UserError("--dtype", got="float16", rule=rule, do="give bfloat16 or float32")
    if options.quantize is not None and not adapters:
        rule = "weights of so few bits are not trained"
        raise UserError("--quantize", got=f"{options.quantize} without --lora", rule=rule, do="give --lora RANK")


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that Trainer's generators do not take."""
    if not 0 <= seed < 2**32:
        raise UserError(
            "--seed", got=seed, rule="it is from 0 to below 2^32 where something is trained", do="take another"
        )


def _of_all_weights(options: LoadOptions) -> LoadOptions:
    """All weights are trained in float32, under autocast; a frozen base is in half precision where that computes fast.

    In half precision a step of the papers' learning rate is below half a unit of most weights, and rounds to nothing.
    """
    if options.dtype in _HALF:
        logger.info("--dtype %s: weights are trained in float32, and multiplied in bfloat16", options.dtype)
        return replace(options, dtype=AUTOCAST)
    if options.dtype == "auto" and options.placement != "cpu":
        return replace(options, dtype=AUTOCAST)
    return options


def described(given: Training, recipe: Recipe) -> dict[str, Any]:
    """What the result depends on, for config.json."""
    apart = ("tracker", "keep", "lora", "hold_out", "save_dtype")
    told = {name: value for name, value in vars(given).items() if name not in apart}
    told |= {"hold_out": True} if given.hold_out else {}
    told |= {"save_dtype": given.save_dtype} if given.save_dtype else {}
    told |= {"documents": list(given.documents), "short_documents": list(given.short_documents)}
    return told | vars(recipe) | {"lora": vars(given.lora) if given.lora else None}
