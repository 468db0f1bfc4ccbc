"""State that FSDP keeps in shards: torch reads its list, and what is no tensor, by pickle, so both are looked at first.

Everything else that Trainer reads of a checkpoint is read by torch.load with weights_only, which runs nothing.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from longrope.errors import UserError, first_line
from longrope.training.state import damaged

_LIST = ".metadata"
_OPTIMIZER = "optimizer_0"  # the folder of an optimizer's shards
_OF_LIST = (
    "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
    "TensorStorageMetadata _MEM_FORMAT_ENCODING"
).split()
_OTHERS = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its place in Python 3.13
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}
_MOST = 2**24
"""Bytes of an item that is no tensor; they are numbers and names of an optimizer."""


class _Reader(pickle.Unpickler):
    """Makes what a list of shards is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        kind = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        of_list = module == "torch.distributed.checkpoint.metadata" and name in _OF_LIST
        if of_list or (module, name) in _OTHERS or isinstance(kind, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of it")


def check_kind(checkpoint: Path | None, *, sharded: bool) -> None:
    """Raise UserError for a checkpoint of shards where nothing is sharded now, and the other way round."""
    if checkpoint is None or (checkpoint / _OPTIMIZER).is_dir() == sharded:
        return
    held, now = ("whole state", "shards it over its processes (FSDP)") if sharded else ("shards (FSDP)", "has it whole")
    got = f"{checkpoint}, which holds {held}, in a training that {now}"
    rule, do = "a training goes on as it began", "start it with the launcher and configuration that it began with"
    raise UserError("checkpoint", got=got, rule=rule, do=do)


def check_shards(checkpoint: Path | None) -> None:
    """Raise UserError for a checkpoint whose sharded state would make torch run code, or read files elsewhere."""
    for path in sorted(checkpoint.rglob(_LIST)) if checkpoint else ():
        try:
            _check(path)
        except UserError:
            raise
        except Exception as error:  # of bytes that others chose: any
            said = f"{path.parent.name}/{_LIST} ({first_line(error)[:200]})"
            raise damaged(path.parents[1], said) from None


def _check(path: Path) -> None:
    with path.open("rb") as file:
        told = _Reader(file).load()
    tensors = {
        name for name, kind in told.state_dict_metadata.items() if type(kind).__name__ == "TensorStorageMetadata"
    }
    for index, item in told.storage_data.items():
        if Path(item.relative_path).name != item.relative_path:
            raise ValueError(f"{item.relative_path} is elsewhere")
        if item.transform_descriptors:
            raise ValueError("shards are not written like that here")
        if index.fqn in tensors:
            continue  # torch reads these with weights_only
        if not 0 <= item.length <= _MOST:
            raise ValueError(f"{index.fqn} of {item.length} bytes")
        with (path.parent / item.relative_path).open("rb") as file:
            file.seek(item.offset)
            torch.load(io.BytesIO(file.read(item.length)), map_location="cpu", weights_only=True)
