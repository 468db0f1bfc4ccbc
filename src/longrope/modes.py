"""What a program has set for all of torch, kept away from what is computed here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def torch_as_imported() -> Iterator[None]:
    """No autocast, no inference mode, gradients on, new tensors in float32 on the CPU, whatever is set around it."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def apart(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A public function that computes with torch as it is imported, and leaves its number of threads as it was."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        threads = torch.get_num_threads()
        try:
            with torch_as_imported():
                return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run
