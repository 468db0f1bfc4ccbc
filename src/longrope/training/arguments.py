"""How transformers.Trainer is told to train, and whether that fits into memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments

from longrope.checkpoint import AUTOCAST
from longrope.errors import UserError
from longrope.lengths import format_length
from longrope.memory import Kept, free_memory
from longrope.model import LoadedModel
from longrope.training.recipes import Recipe
from longrope.training.settings import DEFAULT_TRACKER, Training
from longrope.training.world import World

_PROBE = 32  # tokens; what a training keeps is measured at one, two and four times as many
_OPTIMIZER_BYTES = 12  # a gradient and two moments in float32


def arguments_of(
    loaded: LoadedModel, trained: Any, given: Training, recipe: Recipe, state: Path, world: World
) -> TrainingArguments:
    """What Trainer is told. trained: the model, with its adapters where it has any. state: the folder of checkpoints.

    Raises UserError when a batch does not fit into memory, with what would.
    """
    share = recipe.batch // world.windows_at_once
    together = next(
        size for size in range(min(share, max(1, loaded.batch_tokens // given.length)), 0, -1) if share % size == 0
    )
    # Of shards nothing is estimated: what does not fit into one process is what they are for.
    again = given.gradient_checkpointing is not False
    if world.window_size == 1 and not world.sharded:
        again = computed_twice(loaded, trained, given, together)
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
        bf16=loaded.options.dtype in (AUTOCAST, "bfloat16") or loaded.device.type == "cuda",
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


def computed_twice(loaded: LoadedModel, trained: Any, given: Training, together: int) -> bool:
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
