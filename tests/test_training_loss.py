"""The loss by chunks is the model's own, with its gradients, for every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import longrope.training.loss
from longrope.errors import UserError
from longrope.training.loss import chunked_loss
from models import ARCHITECTURES, build, tokens


def both(name: str, monkeypatch: pytest.MonkeyPatch, rows: int, **more: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(its own loss, ours, largest difference of each gradient over its largest entry)."""
    model: Any = build(name).train().requires_grad_(True)
    ids = tokens(45, 2)
    labels = ids.clone()
    labels[0, :9] = -100
    inputs = {"input_ids": ids, "labels": labels, **more}
    own = model(**inputs).loss
    own.backward()
    expected = {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(longrope.training.loss, "chunk_rows", lambda vocabulary, device: rows)
    monkeypatch.setattr(longrope.training.loss, "_LEAST_ROWS", 1)
    with chunked_loss(model):
        outputs = model(**inputs)
        outputs.loss.backward()
        assert outputs.logits is None
    found = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
    assert set(found) == set(expected)
    gaps = {key: (found[key] - each).abs().max() / each.abs().max().clamp(min=1e-12) for key, each in expected.items()}
    return own.detach(), outputs.loss.detach(), gaps


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, ours, gaps = both(name, monkeypatch, rows=14)
    assert float(ours) == pytest.approx(float(own), rel=1e-5)
    assert max(map(float, gaps.values())) < 1e-4


@pytest.mark.parametrize("rows", [1, 1000])
def test_the_size_of_a_chunk_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, ours, gaps = both("llama", monkeypatch, rows=rows, num_items_in_batch=torch.tensor(17))
    assert float(ours) == pytest.approx(float(own), rel=1e-6)
    assert max(map(float, gaps.values())) < 1e-5


def test_without_labels_the_model_answers_as_before_and_afterwards_is_as_it_was() -> None:
    model: Any = build("llama")
    ids = tokens(20)
    expected = model(input_ids=ids).logits
    with chunked_loss(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert "forward" not in vars(model)


def test_a_forward_pass_that_accelerate_put_on_the_model_is_there_again_afterwards() -> None:
    model: Any = build("llama")
    of_class, calls = model.forward, list[int]()

    def hooked(**inputs: Any) -> Any:
        calls.append(1)
        return of_class(**inputs)

    vars(model)["forward"] = hooked
    with chunked_loss(model):
        model(input_ids=tokens(20), labels=tokens(20))
    calls.clear()
    model(input_ids=tokens(20))
    assert calls == [1]


def test_a_training_after_another_one_of_the_same_model_is_under_autocast_too(tmp_path: Path) -> None:
    model: Any = build("llama").requires_grad_(True)
    items = [{"input_ids": ids, "labels": ids} for ids in tokens(20, 2)]
    dtypes: list[torch.dtype] = []
    hook = lambda layer, inputs, output: dtypes.append(output.dtype)  # noqa: E731
    model.model.layers[0].self_attn.q_proj.register_forward_hook(hook)

    def train() -> set[torch.dtype]:
        dtypes.clear()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, bf16=True, use_cpu=True, save_strategy="no", report_to=[]
        )
        Trainer(model=model, args=arguments, train_dataset=items).train()
        return set(dtypes)

    with chunked_loss(model):
        assert train() == {torch.bfloat16}
    assert "forward" not in vars(model)
    assert train() == {torch.bfloat16}  # a bare one, which leaves its forward pass and accelerate's mark on the model
    with chunked_loss(model):
        assert train() == {torch.bfloat16}
    assert train() == {torch.bfloat16}


def test_half_precision_weights_have_gradients_of_their_dtype() -> None:
    made: Any = build("llama")
    model = made.to(torch.bfloat16).train().requires_grad_(True)
    ids = tokens(40)
    with chunked_loss(model):
        model(input_ids=ids, labels=ids).loss.backward()
    assert {each.grad.dtype for each in model.parameters()} == {torch.bfloat16}


def test_under_autocast_it_is_that_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, ours, gaps = both("llama", monkeypatch, rows=14)
    assert float(ours) == pytest.approx(float(own), rel=2e-3)
    assert max(map(float, gaps.values())) < 0.05


def test_frozen_weights_have_none_and_a_loss_without_gradients_is_a_number() -> None:
    model: Any = build("llama").requires_grad_(False)
    ids = tokens(40)
    with chunked_loss(model):
        loss = model(input_ids=ids, labels=ids).loss
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-6)


def test_a_model_with_another_loss_beside_is_refused() -> None:
    model: Any = build("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(UserError, match=r"^model: got output_router_logits in its config; .*; set it to false$"):
        chunked_loss(model).__enter__()
