"""The tokens of one forward pass: where they stand, which are padding, and a pass cut into pieces."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longrope.errors import UserError
from longrope.runtime.history import Flags, History, Whole

# Inputs of a forward pass with a column for each new token
_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")


def is_flat(mask: Any) -> bool:
    """Whether a mask is one of transformers' two-dimensional ones."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def attended_columns(inputs: Tensor, flat: Tensor | None, mask: Any, cached: int) -> Flags:
    """What is attended (B, t) of the new tokens of a forward pass; the rest is padding.

    flat: the two-dimensional mask, where it is known; mask: whatever the pass was given. Raises UserError for a mask
    with too few columns.
    """
    batch, new = inputs.shape[:2]
    if flat is not None:
        attended = flat[:, cached : cached + new].detach().cpu().numpy() != 0
        if attended.shape[1] < new:
            got, rule = f"{flat.shape[1]} columns", f"it has one for each of the {cached + new} tokens, cached ones too"
            raise UserError("attention mask", got=got, rule=rule, do="append a column for each new token")
        return np.array(np.broadcast_to(attended, (batch, new)))
    if isinstance(mask, Mapping):
        mask = next((each for each in mask.values() if isinstance(each, Tensor)), None)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] >= cached + new:
        own = torch.diagonal(mask[:, 0, :, cached : cached + new], dim1=1, dim2=2)  # whether a token sees itself
        seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        return np.array(np.broadcast_to(seen.cpu().numpy(), (batch, new)))
    return np.ones((batch, new), dtype=bool)


def _check_holes(attended: Flags, history: History | None, flat: Tensor | None) -> None:
    """Raise UserError when padding stands between tokens of a text, or cached ones are masked otherwise than before."""
    hole = "a mask with holes"
    begun = np.zeros(len(attended), dtype=bool) if history is None else history.last >= 0
    ended = begun & (~history.seen_last() if history is not None else False)
    started = np.maximum.accumulate(np.concatenate([begun[:, None], attended], 1), 1)[:, :-1]
    gaps = np.concatenate([ended[:, None], started & ~attended], 1)
    wrong = bool((attended & np.maximum.accumulate(gaps, 1)[:, :-1]).any())
    if history is not None and flat is not None and not wrong:
        before = history.seen()
        if bool(((flat[:, : history.columns] != 0).cpu().numpy() != before).any()):
            wrong, hole = True, "cached tokens masked otherwise than before"
    if wrong:
        rule, do = "padding is at one side of a text, and stays", "pad on the left, and append a 1 for each new token"
        raise UserError("attention mask", got=hole, rule=rule, do=do)


def _positions_of(position_ids: Tensor | None, attended: Flags, last: Whole) -> Whole:
    """Positions (B, t) of new tokens: those that are given, else they go on after the last of each text.

    last: (B,) positions of the tokens before, -1 where there are none. Raises UserError for another shape.
    """
    batch, new = attended.shape
    if position_ids is None:
        return np.asarray(np.maximum(last[:, None] + attended.cumsum(1), 0), dtype=np.int64)
    positions = position_ids.detach().cpu().numpy().astype(np.int64)
    if positions.ndim != 2 or positions.shape[1] != new or positions.shape[0] not in (1, batch):
        got, rule = f"shape {tuple(position_ids.shape)}", f"they are ({batch}, {new}) here, one for each token"
        raise UserError("position_ids", got=got, rule=rule, do="leave them out, or give those of the new tokens")
    return np.array(np.broadcast_to(positions, (batch, new)))


def placed(
    given: dict[str, Any],
    attended: Flags,
    cached: int,
    history: History | None,
    last: Whole,
    flat: Tensor | None,
    device: torch.device,
) -> Whole:
    """Positions (B, t) of the new tokens of a pass, which is given those, and a mask, where it lacks what they need.

    last: (B,) positions of the tokens before. Raises UserError for tokens that do not go on from those in the cache.
    """
    if len(last) != len(attended):
        got, rule = f"{len(attended)}, {len(last)} in the cache", "a cache goes on with as many sequences as it has"
        raise UserError("batch", got=got, rule=rule, do="use a cache of its own")
    _check_holes(attended, history, flat)
    positions = _positions_of(given.get("position_ids"), attended, last)
    # Some classes (Bamba) count from 0 in every pass, whatever is in the cache
    elsewhere = cached > 0 or (positions != np.arange(attended.shape[1]))[attended].any()
    if given.get("position_ids") is None and elsewhere:
        given["position_ids"] = torch.tensor(positions, device=device)
    if given.get("attention_mask") is None and history is not None and history.padded:
        whole = np.concatenate([history.seen(), attended], 1)
        given["attention_mask"] = torch.tensor(whole.astype(np.int64), device=device)
    return positions


def next_positions(history: History, position_ids: Tensor | None, flat: Tensor | None, batch: int) -> list[int] | None:
    """Positions (B,) of one further token of each sequence that goes on right behind its last; None for any other.

    What nearly every token of a text is, so that it is cheap: without arrays.
    """
    column, last = history.columns, history.at
    if len(last) != batch or (flat is not None and flat.shape[1] <= column):
        return None
    if position_ids is None:
        if history.padded:
            return None
        positions = [column] * batch
    elif position_ids.ndim == 2 and position_ids.shape[1] == 1:
        positions = [int(position) for position in position_ids[:, 0].tolist()]
    else:
        return None
    positions = positions if len(positions) == batch else positions * batch
    if positions != [each + 1 for each in last] or (flat is not None and not all(flat[:, column].tolist())):
        return None
    return positions


def lengths_of(last: Whole, positions: Whole, attended: Flags) -> Whole:
    """Lengths (B, t) of each sequence up to each new token. Raises UserError for positions that do not ascend.

    last: (B,) positions of the tokens before, -1 where there are none.
    """
    reached = np.where(attended, positions, -1)
    highest = np.maximum.accumulate(np.concatenate([last[:, None], reached], 1), 1)
    earlier = highest[:, :-1]
    if (attended & (positions <= earlier)).any():
        row, column = np.argwhere(attended & (positions <= earlier))[0]
        raise UserError(
            "position_ids",
            got=f"position {positions[row, column]} after {earlier[row, column]}",
            rule="positions of a sequence ascend",
            do="give one text a row, padded on the left, and no position_ids or those of its tokens",
        )
    return np.asarray(highest[:, 1:] + 1)


def columns_of(given: Mapping[str, Any], new: int, cached: int, start: int, end: int) -> dict[str, Any]:
    """What a forward pass was given, for its tokens start to end alone, with the logits of all of these."""
    piece = dict(given) | {"return_dict": True, "logits_to_keep": 0}
    for name in _BY_TOKEN:
        if isinstance(value := piece.get(name), Tensor):
            piece[name] = value[:, start:end] if name == "inputs_embeds" else value[..., start:end]
    mask = piece.get("attention_mask")
    cut = partial(_mask_columns, new=new, cached=cached, start=start, end=end)
    piece["attention_mask"] = {kind: cut(each) for kind, each in mask.items()} if isinstance(mask, dict) else cut(mask)
    return piece


def _mask_columns(mask: Any, *, new: int, cached: int, start: int, end: int) -> Any:
    if not isinstance(mask, Tensor):
        return mask
    if mask.ndim == 2:
        return mask[:, : cached + end] if mask.shape[1] == cached + new else mask
    seen = mask[:, :, start:end]
    return seen[..., : cached + end] if mask.shape[-1] == cached + new else seen
