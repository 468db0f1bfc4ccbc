"""Shared by all tests: one thread, no network, quiet transformers; a folder that a command runs in."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray puts a token into the home folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logs_are_seen() -> None:
    """A command that a test runs by another way than `commands.longrope` would keep what follows from `caplog`."""
    logger = logging.getLogger("longrope")
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `model`, documents `texts` and its factors `good.json`."""
    from commands import table, write_checkpoint, write_documents

    folder = tmp_path_factory.mktemp("ground")
    write_checkpoint(folder / "model")
    write_documents(folder / "texts")
    table().save(folder / "good.json")
    return folder


@pytest.fixture
def here(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which has the same as the module's `ground`."""
    shutil.copytree(ground, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
