"""What must be equal on any model with factors: a cached run and whole passes, a loss by chunks and the class's own.

Every check returns what is wrong, in words, or nothing. Raises UserError where the tool refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import longrope.model
import longrope.training.loss
from architectures_small import ORIGINAL
from longrope.api import switched
from longrope.checkpoint import LoadOptions
from longrope.evaluate.perplexity import token_losses, token_losses_by_chunks
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel, load_model
from longrope.runtime.caches import CACHE, RoomyCache, cache_of, makes_its_own
from longrope.training.loss import chunked_loss

_ENDS = (ORIGINAL, ORIGINAL + 8, ORIGINAL + 32)
_PROMPT, _TOKENS, _CHUNK = ORIGINAL - 6, ORIGINAL + 14, 16
_CLOSE = 2e-4
"""Of the spread of logits: float32 in another order of sums. Another row moves them by more than a hundredth."""


def loaded_model(folder: Path) -> LoadedModel:
    """The checkpoint in float32 on one thread."""
    return load_model(str(folder), LoadOptions(device="cpu", dtype="float32", threads=1))


def rows_of(loaded: LoadedModel) -> FactorTable:
    """Three rows that differ in everything a row has: factors, start tokens and attention factor."""
    rope, spread = loaded.rope, np.linspace(0, 1, loaded.rope.shape.pairs)
    rows = (
        RopeFactors(_ENDS[0], tuple(1 + 0.5 * spread)),
        RopeFactors(_ENDS[1], tuple(1.5 + 2 * spread), start_tokens=3, attention_factor=1.1),
        RopeFactors(_ENDS[2], tuple(3 + 4 * spread), attention_factor=1.2),
    )
    return FactorTable(rope.rope_theta, rope.rotary_dim, rope.original_length, rows)


def _ids(loaded: LoadedModel, batch: int, length: int) -> Tensor:
    made = torch.Generator().manual_seed(1)
    return torch.randint(0, 250, (batch, length), generator=made).to(loaded.device)


@torch.no_grad()
def _whole(folder: Path, ids: Tensor) -> list[Tensor]:
    """Logits (1, V) after each token from the prompt's last on: a pass over all before, alone, under its row."""
    loaded = loaded_model(folder)
    table = rows_of(loaded)
    loaded.widen_window(_ENDS[-1])
    answers, model = [], loaded.model
    with loaded.patch() as patch:
        for length in range(_PROMPT, ids.shape[1] + 1):
            patch.install(table.row_for(length))
            answers.append(model(input_ids=ids[:, :length], use_cache=False).logits[:, -1])
    return answers


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std().clamp(min=1e-6))


def _steps(model: Any, cache: Any, ids: Tensor, start: int) -> list[Tensor]:
    """Logits (1, V) of a caller's own loop: tokens up to `start` at once, then one by one."""
    answers = []
    for end in range(start, ids.shape[1] + 1):
        begin = 0 if end == start else end - 1
        outputs = model(input_ids=ids[:, begin:end], use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = cache_of(outputs)
        answers.append(outputs.logits[:, -1])
    return answers


@torch.no_grad()
def cached_run(folder: Path) -> str:
    """A text that grows token by token past two boundaries, beside a pass over the whole text at each length."""
    loaded = loaded_model(folder)
    ids = _ids(loaded, 1, _TOKENS)
    expected = _whole(folder, ids)
    with switched(loaded, rows_of(loaded), chunk=_CHUNK) as applied:
        found = _steps(loaded.model, None, ids, _PROMPT)
        again = applied.recomputed
    gaps = [_gap(*pair) for pair in zip(found, expected, strict=True)]
    if max(gaps) > _CLOSE:
        first = next(index for index, gap in enumerate(gaps) if gap > _CLOSE)
        return f"cached logits differ by {max(gaps):.2g} of their spread, first at token {_PROMPT + first}"
    return "" if again else "no cache was made again at a boundary"


@torch.no_grad()
def generated(folder: Path) -> str:
    """Greedy tokens of `generate` of a prompt by chunks, beside those of whole passes, wherever these are clear."""
    loaded = loaded_model(folder)
    ids = _ids(loaded, 1, _PROMPT)
    settings: dict[str, Any] = {"max_new_tokens": _TOKENS - _PROMPT, "do_sample": False, "eos_token_id": None}
    with switched(loaded, rows_of(loaded), chunk=_CHUNK):
        own: Any = loaded.model
        cache = {} if makes_its_own(own) else {CACHE: RoomyCache(own.config.get_text_config(), _TOKENS)}
        made = own.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings, **cache)
    if made.shape[1] != _TOKENS:
        return f"{made.shape[1]} tokens instead of {_TOKENS}"
    for place, logits in enumerate(_whole(folder, made[:, :-1]), _PROMPT):
        best = logits[0].topk(2).values
        behind = float((best[0] - logits[0, made[0, place]]) / logits.std())
        if behind > _CLOSE:
            return f"token {place} is {behind:.2g} of the spread of logits behind the likeliest of a whole pass"
    return ""


@torch.no_grad()
def losses(folder: Path) -> str:
    """Losses of windows together and by chunks of logits, beside those of transformers alone, window by window."""
    loaded = loaded_model(folder)
    ids = _ids(loaded, 2, 2 * ORIGINAL)
    own: Any = loaded.model
    single = [own(input_ids=row[None], use_cache=False).logits[0, :-1].float() for row in ids]
    expected = [torch.nn.functional.cross_entropy(each, row[1:]) for each, row in zip(single, ids, strict=True)]
    rows, longrope.model.chunk_rows = longrope.model.chunk_rows, lambda vocabulary, device: 14
    try:
        found = token_losses(loaded, ids).mean(1)
    finally:
        longrope.model.chunk_rows = rows
    gap = float((found - torch.stack(expected)).abs().max())
    if gap > 1e-4:
        return f"losses of windows differ by {gap:.2g} from those of transformers"
    if makes_its_own(own):
        return ""
    gap = float((token_losses_by_chunks(loaded, ids, _CHUNK).mean(1) - torch.stack(expected)).abs().max())
    return f"losses of windows by chunks differ by {gap:.2g} from those of transformers" if gap > 1e-4 else ""


def gradients(folder: Path) -> str:
    """Loss and gradients of a training's forward pass, beside the class's own of the same labels."""
    loaded = loaded_model(folder)
    model: Any = loaded.model.requires_grad_(True)  # in eval mode: dropout would differ between two passes
    ids = _ids(loaded, 2, ORIGINAL - 3)
    own = model(input_ids=ids, labels=ids, use_cache=False).loss
    own.backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    with chunked_loss(model):
        ours = model(input_ids=ids, labels=ids).loss
        ours.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    if abs(float(own.detach() - ours.detach())) > 1e-4:
        return f"the loss of a training is {float(ours.detach()):.6g}, and the class's own {float(own.detach()):.6g}"
    if set(found) != set(expected):
        return f"{len(set(found) ^ set(expected))} weights have a gradient in one of two trainings alone"
    largest = max(float(each.abs().max()) for each in expected.values())
    gap = max(float((found[name] - each).abs().max()) for name, each in expected.items()) / max(largest, 1e-9)
    return f"gradients of a training differ by {gap:.2g} of the largest" if gap > 1e-3 else ""
