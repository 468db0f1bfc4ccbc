"""transformers.Trainer that resumes whole models, and with weights in shards (FSDP) in the precision of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import ENOENT
from functools import partial, wraps
from typing import Any

import torch
from accelerate.utils.dataclasses import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, Trainer

from longrope.errors import first_line
from longrope.evaluate.perplexity import out_of_memory


class UnreadableError(Exception):
    """What went wrong while a checkpoint was read."""


@contextmanager
def failures_of_shards() -> Iterator[None]:
    """Raise what went wrong in some process with shards; torch's own is no Exception, and its text a traceback."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise (causes[0] if causes else RuntimeError("torch could not write or read shards")) from None


def _reading(read: Callable[..., None]) -> Callable[..., None]:
    """A method of Trainer that reads a part of a checkpoint; but for memory and disks it raises UnreadableError."""

    @wraps(read)
    def told(self: Trainer, checkpoint: str | None, *given: Any) -> None:
        try:
            with failures_of_shards():
                read(self, checkpoint, *given)
        except OSError as error:
            if error.errno not in (None, ENOENT):  # the disk's own
                raise
            raise UnreadableError(first_line(error)) from error
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            raise UnreadableError(first_line(error)) from error

    return told


class ResumingTrainer(Trainer):
    """Trainer whose checkpoints have the weights of all parts of a model under their own names, and are read whole.

    transformers writes a checkpoint under the names of the files that a class was published in: of most mixtures of
    experts, and of many others, these are not those of its modules. Trainer would go on without what it does not find,
    with the weights of the base.
    """

    _load_from_checkpoint = _reading(Trainer._load_from_checkpoint)
    _load_optimizer_and_scheduler = _reading(Trainer._load_optimizer_and_scheduler)
    _load_scaler = _reading(Trainer._load_scaler)
    _load_rng_state = _reading(Trainer._load_rng_state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):  # adapters have names of their own
            super()._save(output_dir, state_dict)
            return
        vars(model)["save_pretrained"] = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del vars(model)["save_pretrained"]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise ValueError for weights that a checkpoint lacks, and for others than the model's."""
        model = self.accelerator.unwrap_model(self.model)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        if other := [*({*load_result.missing_keys} - tied - ignored), *load_result.unexpected_keys]:
            raise ValueError(f"weights under other names than the model's: {sorted(other)[0]}")
        super()._issue_warnings_after_load(load_result)


class ShardingTrainer(ResumingTrainer):
    """Trainer that shards weights wherever a launcher asks for it, on two CPU processes too, as in our tests.

    Weights are gathered in bfloat16 where accelerate says so. Gradients are summed and losses told in float32, as one
    process does it, where accelerate has bfloat16 for both.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; where it is of CPUs, with the FSDP that its environment describes."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU:
            plugin = FullyShardedDataParallelPlugin()
            if state.mixed_precision != "no":
                plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True
        plugin = state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            # A class may name layers of parts that it has not (Gemma 3 another tower's), which accelerate refuses.
            named = getattr(self.model, "_no_split_modules", None) or ()
            assert self.model is not None, "Trainer has it before it makes this"
            there = {type(each).__name__ for each in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(there.intersection(named)) or None
        if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = policy

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; FSDP casts tensors that a model is given, and a count of tokens is no bfloat16."""
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.item()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def gathered(model: Any) -> dict[str, Any]:
    """The whole weights of a sharded model, on the main process and in its memory; all processes have to ask.

    A weight that is tied to another is there once, as transformers saves it.
    """
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    return {name: weight for name, weight in whole.items() if name not in tied}
