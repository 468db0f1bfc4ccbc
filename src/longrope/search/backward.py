"""The loss of windows and its gradient by rescale and attention factors, in memory near that of a forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longrope.errors import UserError
from longrope.evaluate.perplexity import run_if_it_fits, window_too_long
from longrope.factors import RopeFactors
from longrope.memory import Kept, free_memory, passing
from longrope.model import NO_TARGET, LoadedModel, with_forward
from longrope.patch import Patch
from longrope.windows import Window

logger = logging.getLogger(__name__)

# Of the memory that is free, what the activations of a window may take before they are computed twice instead.
_SHARE_OF_MEMORY = 0.4
_PROBE = 64  # tokens


def loss_gradient(
    loaded: LoadedModel, patch: Patch, factors: RopeFactors, windows: Sequence[Window]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float, int]:
    """Loss in nats of each window (N,), the gradient of their sum by rescale (P,) and by attention factor, and tokens.

    The gradient is that of the losses times their windows' weights. The tokens are those of forward passes made twice,
    because their activations did not fit into memory. Windows run one by one. Raises UserError, with a length that
    would fit, when one does not fit even so.
    """
    losses = []
    rescale, attention_factor, recomputed = np.zeros(len(factors.rescale)), 0.0, 0
    for window in windows:
        if loaded.checkpoint_from is None:
            activation_bytes(loaded, patch, factors, window)
        again = loaded.checkpoint_from is not None and len(window.ids) >= loaded.checkpoint_from
        found = None
        if not again:
            found = run_if_it_fits(lambda ids, w=window: _one(loaded, patch, factors, ids, w, False), _ids(window))  # type: ignore[misc]
            again = found is None
        if found is None:
            loaded.checkpoint_from = min(loaded.checkpoint_from or len(window.ids), len(window.ids))
            found = run_if_it_fits(lambda ids, w=window: _one(loaded, patch, factors, ids, w, True), _ids(window))  # type: ignore[misc]
        if found is None:
            raise window_too_long(lambda ids: _one(loaded, patch, factors, ids, None, True), _ids(window))
        losses.append(found[0])
        rescale += window.weight * found[1]
        attention_factor += window.weight * found[2]
        recomputed += len(window.ids) if again else 0
    return np.array(losses), rescale, attention_factor, recomputed


def _ids(window: Window) -> Tensor:
    return torch.from_numpy(window.ids.copy())[None]  # a worker's windows cannot be written to, which torch warns of


def _one(
    loaded: LoadedModel, patch: Patch, factors: RopeFactors, ids: Tensor, window: Window | None, again: bool
) -> tuple[float, NDArray[np.float64], float]:
    """Loss and gradient of one window; `again` computes activations of each layer a second time."""
    scored_from = window.scored_from if window else 1
    ids = ids.to(loaded.device)
    rescale = torch.tensor(factors.rescale, dtype=patch.precision, device=ids.device, requires_grad=True)
    scale = torch.tensor(factors.attention_factor, dtype=patch.precision, device=ids.device, requires_grad=True)
    patch.install_tensors(factors, rescale, scale)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=NO_TARGET)
    targets[:, : scored_from - 1] = NO_TARGET
    total = 0.0
    try:
        with torch.enable_grad(), loaded.autocast(), _checkpointed(loaded) if again else nullcontext():
            outputs = loaded.decoder(input_ids=ids, use_cache=False)
            hidden: Tensor = outputs.last_hidden_state
            if not hidden.requires_grad:
                raise _no_derivative(loaded)
            by_hidden = torch.empty_like(hidden)
            with passing():
                for start, piece, logits in loaded.tail(outputs, ids):
                    end = start + piece.shape[1]
                    wanted = targets[:, start:end].flatten().to(logits.device)
                    loss = torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1).float(), wanted, ignore_index=NO_TARGET, reduction="sum"
                    )
                    total += float(loss.detach())
                    # The chunk's logits are done with here, so that those of two chunks are never in memory.
                    by_hidden[:, start:end] = torch.autograd.grad(loss, piece)[0]
                    del loss, logits
            by_rescale, by_scale = torch.autograd.grad(hidden, (rescale, scale), by_hidden)
    finally:
        patch.install(factors)  # lets go of the graph
    return total, by_rescale.cpu().double().numpy(), float(by_scale)


def _no_derivative(loaded: LoadedModel) -> UserError:
    return UserError(
        "--method",
        got=f"{loaded.name}, whose attention passes no derivative on to its RoPE",
        rule="gradient and hybrid differentiate the loss by the factors",
        do="use --method evolution, or another --attention",
    )


@contextmanager
def _checkpointed(loaded: LoadedModel) -> Iterator[None]:
    """Activation checkpointing of every decoder layer: only its input is kept, the rest is computed again."""
    with ExitStack() as stack:
        for layer in decoder_layers(loaded.decoder):
            stack.enter_context(with_forward(layer, _twice(layer.forward)))
        yield


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a decoder: its longest list of modules, the first of equals."""
    lists = [list(each) for each in decoder.modules() if isinstance(each, nn.ModuleList)]
    return max(lists, key=len, default=[])


def activation_bytes(loaded: LoadedModel, patch: Patch, factors: RopeFactors, window: Window) -> int:
    """About the memory that the gradient of a window takes beyond the weights, and whether layers are computed twice.

    Sets `checkpoint_from` where it is not known yet. Raises UserError when the loss has no derivative by the factors.
    """
    kept = _measure_kept(loaded, patch, factors, window)
    if loaded.checkpoint_from is None:
        room = _SHARE_OF_MEMORY * loaded.memory_share * free_memory(loaded.device)
        loaded.checkpoint_from = 1 + kept.tokens(room)
        logger.debug("activations of windows from %d tokens on are computed twice", loaded.checkpoint_from)
    tokens = len(window.ids)
    if tokens < loaded.checkpoint_from:
        return int(kept(tokens))
    layers = decoder_layers(loaded.decoder)
    width = loaded.model.config.get_text_config().hidden_size
    inputs = len(layers) * tokens * width * torch.finfo(loaded.model.dtype).bits // 8
    return int(inputs + kept(tokens) / max(1, len(layers)))


def _measure_kept(loaded: LoadedModel, patch: Patch, factors: RopeFactors, window: Window) -> Kept:
    """What a few tokens keep: measured at three lengths."""
    least = max(4, min(_PROBE, len(window.ids) // 16))
    lengths = [least, 2 * least, 4 * least]
    return Kept.measured(
        loaded.model, lengths, lambda length: _one(loaded, patch, factors, _ids(window)[:, :length], None, False)
    )
