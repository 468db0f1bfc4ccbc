"""The training script resumes to the weights of a training that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import recall

SCRIPT = Path(__file__).parents[1] / "tools" / "pretrain.py"
SHAPE = "--hidden 32 --intermediate 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16"
SMALL = f"--length 192 --batch 2 --tokens 2304 {SHAPE}"


def pretrain(documents: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--documents", str(documents), "--out", str(out), "--save-every", "2", *SMALL.split(), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums of several threads are rounded as they happen to end
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_resumed_training_ends_in_the_same_weights(tmp_path: Path) -> None:
    documents = tmp_path / "text.txt"
    documents.write_text("Some words to learn, and some more of them. " * 200)
    assert pretrain(documents, tmp_path / "whole").returncode == 0
    assert pretrain(documents, tmp_path / "cut").returncode == 0
    # As if it had been killed after its second checkpoint of three.
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    assert pretrain(documents, tmp_path / "cut").returncode == 0
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all((whole[name] == cut[name]).all() for name in whole)
    assert json.loads((tmp_path / "cut" / "model" / "config.json").read_text())["num_key_value_heads"] == 1

    refused = pretrain(documents, tmp_path / "cut", "--theta", "300")
    assert refused.returncode == 2
    assert "holds a training with other settings" in refused.stderr


@pytest.mark.parametrize("size", [191, 255, 1023])
def test_recall_tasks_have_the_size_asked_for_and_can_be_answered(size: int) -> None:
    rng = np.random.default_rng(0)
    prose = b"plain text without any key in it; " * 40
    for _ in range(200):
        assert len(recall.recall_text(rng, size, prose)) == size
        text = recall._passkey(rng, size, prose)
        answer = text.rsplit(b" ", 1)[1].rstrip(b".")
        assert text.count(answer) >= 2


@pytest.mark.parametrize("size", [160, 400, 4094])
def test_windows_of_recall_have_the_size_asked_for_at_every_draw(size: int) -> None:
    rng = np.random.default_rng(0)
    prose = rng.integers(32, 127, size=size, dtype=np.uint8).tobytes()
    windows = [recall.recall_window(rng, size, prose) for _ in range(200)]
    assert {len(window) for window in windows} == {size}


def test_a_question_asks_for_a_key_that_its_prompt_states_near_or_far() -> None:
    rng, size = np.random.default_rng(0), 4094
    prose = rng.integers(97, 122, size=size, dtype=np.uint8).tobytes()
    made = [recall.recall_question(rng, size, prose) for _ in range(400)]
    distances, lengths = [], []
    for prompt, answer in made:
        key = answer[1:-1]
        assert answer == b" %s." % key
        assert prompt.endswith(b" is")
        assert b" is %s. Remember it." % key in prompt
        distances.append(len(prompt) - prompt.index(b" is " + key))
        lengths.append(len(prompt + answer))
    assert max(lengths) == size
    assert 130 < sum(length == size for length in lengths) < 190
    few = sum(answer[1:-1].isdigit() and len(set(answer[1:-1])) <= 3 for _, answer in made)
    assert 120 < few < 220, "three in eight, and some that come so by chance"
    assert min(lengths) < 2 * recall.SHORTEST
    assert sum(distance > 0.9 * size for distance in distances) > 30
    assert sum(distance < 200 for distance in distances) > 30


def test_excerpts_are_pieces_of_the_texts() -> None:
    texts = [bytes(range(97, 122)) * 100, b"ABCDEFGH" * 300]
    made = recall.excerpts(np.random.default_rng(0), 4094, texts)
    assert len(made) == 4094
    assert all(any(piece in text for text in texts) for piece in made.split(b"\n\n"))
