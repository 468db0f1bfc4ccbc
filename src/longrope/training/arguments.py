"""How transformers.Trainer is told to train, and whether that fits into memory."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from longrope.checkpoint import AUTOCAST
from longrope.errors import UserError
from longrope.lengths import format_length
from longrope.memory import Kept, free_memory
from longrope.model import LoadedModel
from longrope.training.loss import loss_bytes
from longrope.training.recipes import Recipe
from longrope.training.settings import DEFAULT_TRACKER, Training
from longrope.training.state import windows_of_a_pass
from longrope.training.world import World

logger = logging.getLogger(__name__)

_PROBE = 32  # tokens; what a training keeps is measured at one, two and four times as many
_OPTIMIZER_BYTES = 12  # of a weight: its gradient and two moments in float32
_REDUCTION_BYTES = 4  # of a weight, where processes sum gradients: in buffers beside them


def arguments_of(
    loaded: LoadedModel, trained: Any, given: Training, recipe: Recipe, state: Path, world: World, last: Path | None
) -> TrainingArguments:
    """What Trainer is told. trained: the model, with its adapters where it has any. state: the folder of checkpoints,
    last: the one to go on from, whose windows run together as they did before, while these fit.

    Raises UserError when a window does not fit into memory, with what would.
    """
    share = recipe.batch // world.windows_at_once
    # Short documents among mixed windows are rows of another length, a batch by themselves.
    most = 1 if given.mixed is not None else max(1, loaded.batch_tokens // given.length)
    sizes = [size for size in range(min(share, most), 0, -1) if share % size == 0]
    on_cuda = loaded.device.type == "cuda"
    if on_cuda:
        half = loaded.options.dtype != "float32" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        half = loaded.options.dtype in (AUTOCAST, "bfloat16")
    # Windows that are grouped otherwise are summed otherwise, and differ in rounding.
    before = None if last is None else windows_of_a_pass(last)
    if before in sizes:
        sizes = sizes[sizes.index(before) :]
    preferred = sizes[:1] if before in sizes else sizes
    # Of shards nothing is estimated: what does not fit into one process is what they are for.
    together, again = sizes[0], given.gradient_checkpointing is not False
    if world.window_size == 1 and not world.sharded:
        room = room_for_windows(loaded, trained, world)
        together, again = windows_at_once(loaded, trained, given, sizes, room, half=half, preferred=preferred)
        if before is not None and together != before:
            logger.info("%d windows run together, where %d did before: losses may differ in rounding", together, before)
    # Its name from transformers 5.23 on, which warns of the older one.
    twice = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    made = TrainingArguments(
        output_dir=str(state),
        max_steps=cast(int, recipe.steps),
        per_device_train_batch_size=together,
        gradient_accumulation_steps=share // together,
        learning_rate=recipe.learning_rate,
        # Trainer's own `constant` knows no warm-up.
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        # Where weights are updated in one kernel: torch's other way on CUDA takes a copy of all of them for a step.
        optim="adamw_torch_fused" if on_cuda else "adamw_torch",
        bf16=half,
        **{f"{twice}_checkpointing": bool(again), f"{twice}_checkpointing_kwargs": {"use_reentrant": False}},  # type: ignore[arg-type]
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=given.save_every or max(1, cast(int, recipe.steps) // 20),
        seed=given.seed,
        data_seed=given.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=trackers(given.tracker),
        disable_tqdm=True,
        use_cpu=loaded.device.type == "cpu",
        dataloader_pin_memory=on_cuda,
        # Some classes have weights that get no gradient in a pass: what an expert is given depends on the text.
        ddp_find_unused_parameters=world.size > 1,
        # Between reductions FSDP would keep the gradient of all weights on every device, in bfloat16.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} if world.sharded else None,
    )
    # A launcher's configuration has one, too, which Trainer takes where bf16 is off.
    made.mixed_precision = "bf16" if half else "no"
    return made if world.size > 1 else on_one_device(made)


def on_one_device(arguments: TrainingArguments) -> TrainingArguments:
    """The same for the first device alone: one process would copy the model onto all that it sees (DataParallel)."""
    if arguments.n_gpu > 1:  # which asks for the device, on which it depends
        arguments._n_gpu = 1
    return arguments


def trackers(wanted: str) -> list[str]:
    """What Trainer reports to; TensorBoard, which nobody asked for by name, where it is installed.

    wanted: names with commas between, or none. Raises UserError for one that Trainer does not know, or that is not
    installed.
    """
    if wanted == "none" or (wanted == DEFAULT_TRACKER and find_spec("tensorboard") is None):
        return []
    here: list[str] = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    if wanted == "all":
        return here
    for name in (names := wanted.split(",")):
        if name not in INTEGRATION_TO_CALLBACK:
            rule = f"it is none, all, or some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, with commas between"
            raise UserError("--tracker", got=repr(name), rule=rule, do="choose one of them, or leave it out")
        if name not in here:
            rule, do = "a tracker is a package that is installed", "install it, or give another --tracker, or none"
            raise UserError("--tracker", got=f"{name}, which is not there", rule=rule, do=do)
    return names


def room_for_windows(loaded: LoadedModel, trained: Any, world: World) -> float:
    """Bytes for windows beside gradients and optimizer: the least of all processes, which have to share alike."""
    weights = sum(each.numel() for each in trained.parameters() if each.requires_grad)
    beside = (_OPTIMIZER_BYTES + (_REDUCTION_BYTES if world.size > 1 else 0)) * weights
    processes = world.local_size if loaded.device.type == "cpu" else 1
    # Of a model over several devices each has a share of the layers.
    devices = {each.device for each in trained.parameters()}
    return world.least(len(devices) * min(map(free_memory, devices)) / processes - beside)


def windows_at_once(
    loaded: LoadedModel,
    trained: Any,
    given: Training,
    sizes: Sequence[int],
    room: float,
    *,
    half: bool,
    preferred: Sequence[int] | None = None,
) -> tuple[int, bool]:
    """Windows of a pass, the first of `sizes` that fits, and whether layers are computed twice.

    Fewer of them at once cost less than that; preferred: those sizes that are tried before it. room: bytes for them.
    half: whether products are computed in bfloat16. Raises UserError when one window does not fit even so, with what
    would.
    """
    config = loaded.model.config.get_text_config()
    kept = [_kept(loaded, trained, given.length, half=half)]
    if given.mixed is not None:
        kept.append(_of_rows(_kept(loaded, trained, given.length, half=half, packed=True), loaded.rope.original_length))
    layers = config.num_hidden_layers
    # What each layer is given; beside it weights under autocast in the forward pass, one layer's activations after it.
    beside = 4 * layers * config.hidden_size
    twice = [Kept(one.constant, beside, 0.0) for one in kept]
    twice += [Kept(one.constant / layers, one.linear / layers + beside, one.quadratic / layers) for one in kept]
    wanted = given.gradient_checkpointing
    again = wanted is not False

    def needed(windows: int, estimates: list[Kept], length: int = given.length) -> float:
        of_loss = loss_bytes(config.vocab_size, loaded.device.type, windows * length)
        return windows * max(one(length) for one in estimates) + of_loss

    for together in (sizes if preferred is None else preferred) if wanted is None else ():
        if needed(together, kept) <= 0.6 * room:
            return together, False
    estimates = twice if again else kept
    for together in sizes:
        if needed(together, estimates) <= room:
            return together, again
    longest = max(0, bisect_right(range(given.length), room, key=lambda length: needed(1, estimates, length)) - 1)
    raise UserError(
        "memory",
        got=f"windows of {given.length} tokens, of which one takes {needed(1, estimates) / 2**30:.1f} GiB",
        rule=f"there are {max(0, room) / 2**30:.1f} GiB beside the weights, their gradients and Adam's moments",
        do=f"use at most {format_length(longest)} tokens here, --lora, a larger device, or several",
    )


def _of_rows(kept: Kept, length: int) -> Kept:
    """The same where a window is rows of some length: what grows with its square grows with the rows."""
    return Kept(kept.constant, kept.linear + kept.quadratic * length, 0.0)


def _kept(loaded: LoadedModel, trained: Any, length: int, *, half: bool, packed: bool = False) -> Kept:
    """What a window of up to `length` tokens keeps for its backward pass. packed: of two documents."""
    config = loaded.model.config.get_text_config()
    least = max(4, min(_PROBE, length // 4))

    def run(tokens: int) -> None:
        ids = torch.arange(tokens, device=loaded.device)[None] % min(100, config.vocab_size)
        # Attention inside packed documents is given a mask of all pairs, which is kept.
        positions = ids.new_tensor([*range(tokens // 2), *range(tokens - tokens // 2)])[None]
        more = {"position_ids": positions} if packed else {}
        with torch.autocast(loaded.device.type, torch.bfloat16, enabled=half), torch.enable_grad():
            trained(input_ids=ids, labels=ids, use_cache=False, **more)

    with _masks_of_local_layers(config, length, least // 2):
        return Kept.measured(trained, [least, 2 * least, 4 * least], run)


@contextmanager
def _masks_of_local_layers(config: Any, length: int, probe: int) -> Iterator[None]:
    """Local attention is given a mask of all pairs as soon as a window is longer than it reaches: in a probe, too."""
    reach = getattr(config, "sliding_window", None)
    if not isinstance(reach, int) or reach >= length:
        yield
        return
    config.sliding_window = min(reach, probe)
    try:
        yield
    finally:
        config.sliding_window = reach
