"""Processes that train together: who writes, which device is whose, and how a batch is shared out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils.operations import broadcast_object_list, gather_object

from longrope.checkpoint import LoadOptions
from longrope.errors import UserError

# The first process alone saves, which takes long for a large model: NCCL's own ten minutes would end the others.
_PATIENCE = timedelta(hours=2)
_SHARDS = "SHARDED_STATE_DICT"
_Told = TypeVar("_Told")


@dataclass(frozen=True)
class World:
    """What a launcher (torchrun, accelerate launch) has told this process; alone without one.

    size: processes in all. rank: this one, 0 writes. local_rank: on this machine, which has local_size of them.
    window_size: processes that share one window (context parallelism). sharded: whether FSDP shards the weights.
    """

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    window_size: int = 1
    sharded: bool = False

    @classmethod
    def told(cls) -> World:
        """From the environment that launchers set.

        Raises UserError for tensor parallelism, DeepSpeed, the older FSDP, and checkpoints of FSDP that are not shards.
        """
        number = {
            name: int(os.environ.get(variable, default))
            for name, variable, default in (
                ("size", "WORLD_SIZE", "1"),
                ("rank", "RANK", "0"),
                ("local_rank", "LOCAL_RANK", "0"),
                ("local_size", "LOCAL_WORLD_SIZE", "1"),
            )
        }
        if _is_set("ACCELERATE_USE_DEEPSPEED"):
            rule = "weights are sharded by FSDP, whose checkpoints are written whole here; DeepSpeed's are not"
            do = "use a configuration with FSDP, such as examples/accelerate/8-gpus.yaml"
            raise UserError("processes", got="DeepSpeed", rule=rule, do=do)
        shared = 1
        if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
            sizes = {kind: int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) for kind in ("CP", "SP", "TP")}
            if sizes["TP"] > 1:
                rule = "weights are sharded by FSDP, windows by context parallelism"
                got = f"tensor parallelism over {sizes['TP']} processes"
                raise UserError("processes", got=got, rule=rule, do="set parallelism_config_tp_size to 1")
            if sizes["SP"] > 1:
                got, rule = (
                    f"sequence parallelism over {sizes['SP']} processes",
                    "it is DeepSpeed's, which is not used",
                )
                do = "share windows by context parallelism: parallelism_config_cp_size"
                raise UserError("processes", got=got, rule=rule, do=do)
            shared = sizes["CP"]
        # Without a launcher one process has nothing to share; accelerate shards over one that it has launched, too.
        sharded = _is_set("ACCELERATE_USE_FSDP") and (number["size"] > 1 or "LOCAL_RANK" in os.environ)
        if sharded:
            _check_fsdp()
        return cls(**number, window_size=shared, sharded=sharded)

    @property
    def main(self) -> bool:
        """Whether this process writes the run."""
        return self.rank == 0

    @property
    def windows_at_once(self) -> int:
        """Processes, or groups of them, that each have windows of their own."""
        return self.size // self.window_size

    def check(self, *, batch: int, length: int, mixed: bool, attention: str = "auto") -> None:
        """Raise UserError for a batch that the processes cannot share, and for windows that cannot be cut."""
        if self.size % self.window_size:
            got, rule = f"{self.size} processes", f"{self.window_size} of them share a window"
            raise UserError("processes", got=got, rule=rule, do=f"start a multiple of {self.window_size}")
        if batch % self.windows_at_once:
            rule = f"{self.windows_at_once} processes share a batch evenly"
            raise UserError("--batch", got=batch, rule=rule, do=f"give a multiple of {self.windows_at_once}")
        pieces = 2 * self.window_size  # each process has one from either end, so that all have as much to attend to
        if self.window_size > 1 and length % pieces:
            got, rule = f"{length} tokens", f"{self.window_size} processes share a window in {pieces} equal pieces"
            raise UserError("--length", got=got, rule=rule, do=f"give a multiple of {pieces}")
        if attention not in ("auto", "sdpa") and self.window_size > 1:
            got, rule = repr(attention), "context parallelism is torch's, of its own attention"
            raise UserError("--attention", got=got, rule=rule, do="leave it out, or give sdpa")
        if mixed and self.window_size > 1:
            got = f"{self.window_size} processes to a window"
            rule = "attention of a packed window stays inside its documents, which context parallelism cannot keep to"
            raise UserError("--mixed", got=got, rule=rule, do="use FSDP without it, or leave --mixed out")

    def placed(self, options: LoadOptions) -> LoadOptions:
        """Options that load the model onto this process's device, and start what the processes talk by."""
        if self.size == 1:
            check_first_device(options.device)
            return options
        device = options.device
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{self.local_rank}"
            torch.cuda.set_device(self.local_rank)
        elif device == "auto":
            device = "cpu"
        if device not in ("cpu", f"cuda:{self.local_rank}"):
            rule = "each process has a device of its own"
            raise UserError("--device", got=repr(options.device), rule=rule, do="leave it out, or give cpu or cuda")
        PartialState(cpu=device == "cpu", timeout=_PATIENCE)
        return replace(options, device=device)

    def first(self, work: Callable[[], _Told]) -> _Told:
        """What the main process finds out, told to all; it alone works."""
        if self.size == 1:
            return work()
        found: list[Any] = [work() if self.main else None]
        broadcast_object_list(found, from_process=0)
        return found[0]  # type: ignore[no-any-return]

    def least(self, value: float) -> float:
        """The least of what all processes have."""
        return value if self.size == 1 else min(gather_object([value]))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            PartialState().wait_for_everyone()


def _check_fsdp() -> None:
    """Raise UserError for what accelerate's FSDP can be told that a training here cannot go on from."""
    do = "set it so in the configuration, as examples/accelerate/8-gpus.yaml has it"
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError("processes", got=f"fsdp_version {version}", rule="weights are sharded by version 2", do=do)
    if (kind := os.environ.get("FSDP_STATE_DICT_TYPE", _SHARDS)) != _SHARDS:
        rule = f"a training goes on from shards: {_SHARDS}"
        raise UserError("processes", got=f"fsdp_state_dict_type {kind}", rule=rule, do=do)


def check_first_device(device: str) -> None:
    """Raise UserError for another device than one process trains on."""
    if device.startswith("cuda:") and device != "cuda:0":
        rule = "Trainer trains on the first device that it sees"
        do = f"give cuda, and CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')} before the command"
        raise UserError("--device", got=repr(device), rule=rule, do=do)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
