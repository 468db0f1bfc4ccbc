"""The loss of a causal language model by chunks of tokens: logits of a whole window are never in memory.

A chunk's logits are differentiated as soon as they are there, so that nothing of them is kept for the backward pass and
nothing is computed twice. What runs on a chunk is the class's own code after its decoder, so that caps and scales of
logits are as the class has them. On CUDA Liger's kernel makes the loss of a chunk and its gradient in one pass, where
it is installed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from longrope.errors import UserError
from longrope.memory import passing
from longrope.model import NO_TARGET, answering, cast_once, chunk_rows, decoder_of, own_rows, with_forward

# Fewer rows wait for the output projection and for its gradient, which is as large, rather than compute.
_LEAST_ROWS = 256


@contextmanager
def chunked_loss(model: nn.Module) -> Iterator[None]:
    """Let `model(input_ids, labels=...)` return its loss alone, made by chunks, until the end of the block.

    model: a causal language model of transformers, as it is before PEFT, FSDP or DDP wrap it. Without labels it answers
    as before. The loss is the mean over targets, or their sum over `num_items_in_batch`, as transformers has it. Raises
    UserError for a model that adds other losses to it.
    """
    config: Any = cast(Any, model).config.get_text_config()
    for name, off in (("output_router_logits", "false"), ("z_loss_coefficient", "0")):
        if getattr(config, name, False):
            rule = "the loss is that of the next token alone"
            raise UserError("model", got=f"{name} in its config", rule=rule, do=f"set it to {off}")
    own = model.forward
    vocabulary = int(config.vocab_size)

    def forward(
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return own(input_ids=input_ids, **inputs)
        inputs["use_cache"] = False
        decoder = decoder_of(model)
        outputs = decoder(input_ids=input_ids, **inputs)
        targets = shift_labels
        if targets is None:
            targets = torch.nn.functional.pad(cast(Tensor, labels)[:, 1:], (0, 1), value=NO_TARGET)
        hidden: Tensor = outputs.last_hidden_state
        given, targets = targets.device, targets.to(hidden.device)

        def logits_of(piece: Tensor, start: int) -> Tensor:
            outputs.last_hidden_state = piece
            ids = None if input_ids is None else input_ids[:, start : start + piece.shape[1]]
            with answering(decoder, outputs):
                return cast(Tensor, own(input_ids=ids, use_cache=False).logits)

        head = _head(model)
        rows = max(1, _chunk(vocabulary, hidden.device.type) // hidden.shape[0])
        with _called_once(model, head, hidden) as plain:
            trained = (*_trained(plain), *_beside(model, decoder, plain))
            total = _ChunkedLoss.apply(hidden, targets, logits_of, rows, plain, *trained)  # type: ignore[no-untyped-call]
        count = (targets != NO_TARGET).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=mean_of(total, count, given))

    with _prepared_anew(model), _told_of_the_step(model), with_forward(model, forward):
        yield


@contextmanager
def _told_of_the_step(model: nn.Module) -> Iterator[None]:
    """Let Trainer tell the forward pass how many tokens a step learns, where a class says that its own knows no such
    thing (Gemma 3n and 4): the loss of a step would depend on how its windows are shared out over passes."""
    name = "accepts_loss_kwargs"
    if not hasattr(type(model), name):
        yield
        return
    vars(model)[name] = True
    try:
        yield
    finally:
        del vars(model)[name]


@contextmanager
def _prepared_anew(model: nn.Module) -> Iterator[None]:
    """Let accelerate prepare a model for a training of this block, as if it had prepared it for none before.

    It puts autocast around the forward pass that it finds, once: a model that bears its mark is left as it is. So the
    forward pass of a block that follows another training would run without, in float32.
    """
    names = ("_is_accelerate_prepared", "_original_forward")
    before = {name: vars(model).pop(name) for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


def _chunk(vocabulary: int, device: str) -> int:
    return max(_LEAST_ROWS, chunk_rows(vocabulary, device))


def loss_bytes(vocabulary: int, device: str, tokens: int) -> int:
    """About what the loss takes while it is computed: the logits of a chunk in float32, their softmax and gradient."""
    return 3 * 4 * vocabulary * min(tokens, _chunk(vocabulary, device))


def mean_of(total: Tensor, count: Tensor | int, device: torch.device) -> Tensor:
    """A sum over tokens by their number, on the device of what the model was given.

    Of a model over several devices the sum is on the last; Trainer counts on the first, and wants the loss there.
    """
    return (total / (count.to(total.device) if isinstance(count, Tensor) else count)).to(device)


def _head(model: Any) -> nn.Module:
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        rule, do = "logits follow from an output projection", "choose another model"
        raise UserError("model", got=f"{type(model).__name__} without one", rule=rule, do=do)
    return head


@contextmanager
def _called_once(model: nn.Module, head: nn.Module, hidden: Tensor) -> Iterator[nn.Module]:
    """The output projection without the hooks of FSDP, in its place in the model; those are called once, before.

    FSDP gathers what a module needs when it is called, and counts the calls of a group: one a forward pass. Here it is
    called for every chunk, with weights that stay gathered until the backward pass.
    """
    if not (head._forward_pre_hooks or head._forward_hooks):
        yield head
        return
    with torch.no_grad():
        head(hidden[:, :1])
    plain: nn.Module = object.__new__(type(head))  # FSDP's class has a __new__ that copy.copy stumbles over
    vars(plain).update(vars(head))
    vars(plain)["_forward_pre_hooks"], vars(plain)["_forward_hooks"] = OrderedDict(), OrderedDict()
    vars(plain)["_parameters"] = dict(head._parameters)
    places = [(parent, name) for parent in model.modules() for name, child in parent.named_children() if child is head]
    for parent, name in places:
        parent._modules[name] = plain
    try:
        yield plain
    finally:
        for parent, name in places:
            parent._modules[name] = head


def _trained(head: nn.Module) -> list[nn.Parameter]:
    return [each for each in head.parameters() if each.requires_grad]


def _beside(model: nn.Module, decoder: nn.Module, head: nn.Module) -> list[nn.Parameter]:
    """What is trained and belongs neither to the decoder nor to the output projection (ModernBERT's transform)."""
    others = {id(each) for part in (decoder, head) for each in part.parameters()}
    return [each for each in model.parameters() if each.requires_grad and id(each) not in others]


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part.float() if total is None else total.add_(part)


@cache
def _ligers() -> Callable[..., Tensor] | None:
    """Liger's cross-entropy, a kernel for GPUs, where it is installed."""
    if find_spec("liger_kernel") is None:
        return None
    return cast(Callable[..., Tensor], import_module("liger_kernel.transformers.functional").liger_cross_entropy)


def _kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The kernel that computes a loss on a device, None for torch's own functions."""
    return _ligers() if device.type == "cuda" else None


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (N, V) and targets (N,), summed, in float32."""
    if kernel := _kernel(logits.device):
        # It writes the gradient over what it is given, which the class's own backward pass may still read, and its sum
        # is in that dtype.
        own = logits.to(torch.float32, copy=True)
        return kernel(own, targets, ignore_index=NO_TARGET, reduction="sum")
    return cross_entropy(logits.float(), targets, ignore_index=NO_TARGET, reduction="sum")


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden states (B, T, D) and targets (B, T), differentiated in its forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        logits_of: Callable[[Tensor, int], Tensor],
        rows: int,
        head: nn.Module,
        *parameters: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5:])
        by_hidden = torch.zeros_like(hidden) if wanted else None
        # Of half-precision weights the sum over chunks is kept in float32: there are many.
        of_head = len(_trained(head))
        by_parameters: list[Tensor | None] = [
            torch.zeros_like(each, dtype=torch.float32) if wanted and place < of_head else None
            for place, each in enumerate(parameters)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.set_grad_enabled(wanted), cast_once(head), passing():
            used = (*_trained(head), *parameters[of_head:])
            for start in range(0, hidden.shape[1], rows):
                chosen = targets[:, start : start + rows]
                if not bool((chosen != NO_TARGET).any()):
                    continue
                piece = own_rows(hidden.detach(), start, start + rows).requires_grad_(wanted)
                logits = logits_of(piece, start)
                # Of a model over several devices the logits may be on the first, and the hidden states on the last.
                loss = _summed(logits.flatten(0, 1), chosen.flatten().to(logits.device))
                total += loss.detach().to(total.device)
                if by_hidden is not None:
                    by_piece, *by_each = torch.autograd.grad(loss, (piece, *used), allow_unused=True)
                    by_hidden[:, start : start + rows] = by_piece
                    for place, part in enumerate(by_each):
                        if part is not None:  # other parts of a model, such as those of images, take no part
                            by_parameters[place] = _added(by_parameters[place], part)
                del logits, loss
        if by_hidden is not None:
            ctx.save_for_backward(by_hidden, *by_parameters)
            ctx.dtypes = [each.dtype for each in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (scale,) = gradients
        by_hidden, *by_parameters = ctx.saved_tensors
        pairs = zip(by_parameters, ctx.dtypes, strict=True)
        scaled = [None if each is None else (each * scale).to(dtype) for each, dtype in pairs]
        return by_hidden * scale.to(by_hidden.dtype), None, None, None, None, *scaled
