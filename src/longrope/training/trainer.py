"""transformers.Trainer, with FSDP on CPUs as well: accelerate turns it on for accelerators only."""

from __future__ import annotations

from typing import Any

from accelerate.utils.dataclasses import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer


class ShardingTrainer(Trainer):
    """Trainer that shards weights wherever a launcher asks for it, on two CPU processes too, as in our tests."""

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


def gathered(model: Any) -> dict[str, Any]:
    """The whole weights of a sharded model, on the main process and in its memory; all processes have to ask.

    A weight that is tied to another is there once, as transformers saves it.
    """
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    return {name: weight for name, weight in whole.items() if name not in tied}
