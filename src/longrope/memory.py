"""Memory: what a backward pass keeps, what is free, and the most that was used."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from longrope.room import free_host_memory

_PASSING: ContextVar[bool] = ContextVar("passing", default=False)


@contextmanager
def passing() -> Iterator[None]:
    """What is kept in this block is gone when the forward pass ends: `Kept.measured` leaves it out."""
    token = _PASSING.set(True)
    try:
        yield
    finally:
        _PASSING.reset(token)


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass of n tokens keeps for its backward pass: constant + linear n + quadratic n^2.

    The constant are copies of weights under autocast; the quadratic part are attention matrices, of eager attention.
    """

    constant: float
    linear: float
    quadratic: float

    @classmethod
    def through(cls, lengths: Sequence[int], kept: Sequence[int]) -> Kept:
        """The parabola through three measurements."""
        quadratic, linear, constant = np.polyfit(lengths, kept, 2)
        # Rounding of the fit must not count for a window of a million tokens.
        return cls(max(0.0, constant), max(1.0, linear), quadratic if quadratic > 0.01 else 0.0)

    @classmethod
    def measured(cls, model: nn.Module, lengths: Sequence[int], run: Callable[[int], object]) -> Kept:
        """Through what `run` keeps for its backward pass at each of three lengths, weights of the model left out."""
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        measured = []
        for length in lengths:
            storages: dict[int, int] = {}  # each once, however many views of it are kept

            def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
                storage = tensor.untyped_storage()
                if not _PASSING.get() and storage.data_ptr() not in own:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                run(length)
            measured.append(sum(storages.values()))
        return cls.through(lengths, measured)

    def __call__(self, tokens: int) -> float:
        """Bytes of a window."""
        return self.constant + self.linear * tokens + self.quadratic * tokens**2

    def tokens(self, room: float) -> int:
        """The longest window that has room."""
        rest = max(0.0, room - self.constant)
        if not self.quadratic:
            return int(rest / self.linear)
        return int((math.sqrt(self.linear**2 + 4 * self.quadratic * rest) - self.linear) / (2 * self.quadratic))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_memory()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process had in use so far: of torch's on CUDA, else its whole resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
