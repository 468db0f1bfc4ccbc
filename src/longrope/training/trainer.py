"""transformers.Trainer with weights in shards (FSDP), on CPUs as well, in the precision of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.dataclasses import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer


class ShardingTrainer(Trainer):
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
