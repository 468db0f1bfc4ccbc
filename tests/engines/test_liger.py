"""Liger's kernel in the loss: Triton's interpreter runs it, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.model import NO_TARGET
from longrope.training import loss
from longrope.training.loss import chunked_loss
from models import build, tokens


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])  # plain logits, capped ones, scaled ones
def test_loss_and_gradients_are_those_of_the_class(name: str) -> None:
    """In a process of its own: Triton has to know that it interprets before anything imports it."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, name]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr


def check(name: str) -> None:
    """Compare with the class's own loss."""
    kernel = import_module("liger_kernel.transformers.functional").liger_cross_entropy
    model: Any = build(name).requires_grad_(True)
    ids = tokens(40, batch=2)
    labels = ids.clone()
    labels[0, :7] = NO_TARGET
    expected = model(input_ids=ids, labels=labels, use_cache=False).loss
    expected.backward()
    gradients = {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    called = []

    def watched(*arguments: Any, **keywords: Any) -> Any:
        called.append(len(arguments[0]))
        return kernel(*arguments, **keywords)

    for attribute, value in (("_kernel", lambda device: watched), ("_LEAST_ROWS", 16), ("chunk_rows", lambda *_: 16)):
        setattr(loss, attribute, value)
    with chunked_loss(model):
        found = model(input_ids=ids, labels=labels).loss
        found.backward()
    assert len(called) > 2, "by chunks"
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert gradients
    for key, each in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(each.grad, gradients[key], rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    check(sys.argv[1])
