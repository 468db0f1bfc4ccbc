"""Put factors on a transformers model and off again, without rebuilding it.

The model's rotary embedding module is wrapped by one of ours that computes cos and sin with `rope.py` and lays them
out as the wrapped class does. How a class lays them out is not looked up but measured: the wrapped module is asked for
a few positions, and ours must give the same numbers; a module for which no layout does is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.baselines import RopeShape
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.rope import RopeTensors, cos_sin, inverse_frequencies, regime

Layout = Callable[[Tensor, Tensor], Any]
"""Cos and sin (B, T, P) as a class of transformers has them."""


def _halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def _interleaved(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)


def _single(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos, sin


def _complex(cos: Tensor, sin: Tensor) -> Tensor:
    return torch.complex(cos.float(), sin.float())


# Llama, Mistral, Qwen, ...; Cohere, ...; GPT-OSS; Llama 4
_LAYOUTS: tuple[Layout, ...] = (_halves, _interleaved, _single, _complex)

CHOOSE_ROPE = "choose a RoPE model (Llama, Mistral, Qwen, Phi, Gemma, OLMo, GPT-NeoX, ...)"
"""What to do about a model that has none."""

# The layers that are extended in a model whose layer types rotate differently (Gemma 3, OLMo 3): the global ones.
EXTENDED_LAYERS = "full_attention"
_LOCAL_LAYERS = ("sliding_attention", "chunked_attention")


@dataclass
class Chosen:
    """Rows (B,), or (1,) for all, of a table that the next passes use; None: each sequence by its length."""

    rows: Tensor | None = None


class ScaledRotary(nn.Module):
    """Stands in a model for its rotary embedding `stock` and rotates by whatever rows it was last given."""

    def __init__(self, stock: nn.Module, shape: RopeShape, chosen: Chosen | None = None) -> None:
        super().__init__()
        self.stock = stock
        self.shape = shape
        self.layout = _measured_layout(stock, shape)
        self.rope: RopeTensors | None = None
        self.by_length = False
        self.chosen = chosen or Chosen()  # of all rotary embeddings of a model: what is set for every token is set once
        self._one: tuple[Tensor, RopeTensors] | None = None

    def __getattr__(self, name: str) -> Any:
        """What a class asks its rotary embedding for beside cos and sin, such as its configuration; no frequencies."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = None if name == "stock" else getattr(self.stock, name, None)
            if found is None or isinstance(found, Tensor):  # a class that rotates by itself would not see factors
                raise
            return found

    def set(self, rope: RopeTensors | None, *, by_length: bool = False) -> None:
        """Rotate by these rows: by the first one whatever the length, or each sequence by its own; None is stock."""
        self.rope, self.by_length, self._one = rope, by_length, None

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Cos and sin as the wrapped class returns them, in the dtype of x; layers not extended get its own."""
        if self.rope is None or layer_type not in (None, EXTENDED_LAYERS):
            return self.stock(x, position_ids) if layer_type is None else self.stock(x, position_ids, layer_type)
        if position_ids.ndim != 2:
            raise _unknown_rotary(self.stock, "it rotates by several positions for each token, as multimodal RoPE does")
        if self.rope.base.device != x.device:
            self.rope, self._one = self.rope.to(x.device), None
        rope, rows = self.rope, None
        if self.by_length:
            rows = self.chosen.rows
            if rows is None:
                rows = _rows_by_length(position_ids, rope.up_to)
            elif rows.numel() == 1:
                if self._one is None or self._one[0] is not rows:
                    self._one = rows, rope.row(int(rows))
                rope, rows = self._one[1], None
            else:
                rows = rows.to(x.device)
        # Entering a context costs as much as the arithmetic of one token
        on = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(device_type=x.device.type, enabled=False) if on else nullcontext():
            cos, sin = cos_sin(position_ids, rope, rows)
            laid_out = self.layout(cos, sin)
        return tuple(part.to(x.dtype) for part in laid_out) if isinstance(laid_out, tuple) else laid_out


def _rows_by_length(position_ids: Tensor, up_to: Tensor) -> Tensor:
    """Regime (B,) of each sequence of a forward pass; a change of regime inside a cached sequence is refused."""
    lengths = position_ids.amax(-1) + 1
    rows = regime(lengths, up_to)
    if bool((rows >= len(up_to)).any()):
        raise UserError(
            "sequence",
            got=f"{int(lengths.max())} tokens",
            rule=f"the factor table ends at {int(up_to[-1])}",
            do="use a shorter sequence, or search factors for a longer target",
        )
    cached = position_ids.amin(-1)  # tokens that an earlier forward pass already rotated
    stale = (cached > 0) & (regime(cached.clamp(min=1), up_to) != rows)
    if bool(stale.any()):
        raise UserError(
            "sequence",
            got=f"{int(cached.max())} cached tokens and {int(lengths.max())} in all",
            rule="keys cached under one row of the factor table are wrong under another",
            do="run the whole sequence again without its cache, or install the row of its final length",
        )
    return rows


class Patch:
    """Factors on a model: `install` puts some on (or changes them, in microseconds), `undo` restores the model.

    shape: the RoPE the factors are relative to. Raises UserError when the model has no rotary embedding that can be
    rescaled. Usable as a context manager; leaving it undoes.
    """

    def __init__(self, model: PreTrainedModel, shape: RopeShape, *, precision: torch.dtype = torch.float32) -> None:
        self.model, self.shape, self.precision = model, shape, precision
        self._restore: list[Callable[[], None]] = []
        check_has_rotary(model)
        places = list(rotary_modules(model))
        if any(isinstance(stock, ScaledRotary) for _, _, stock in places):
            raise UserError(
                "model",
                got="a model that already carries factors",
                rule="factors replace the model's own RoPE, once",
                do="undo the first patch, or install on it",
            )
        self._chosen = Chosen()
        self._places = [
            (parent, name, stock, ScaledRotary(stock, shape, self._chosen)) for parent, name, stock in places
        ]
        for parent, name, _, scaled in self._places:
            setattr(parent, name, scaled)

    def install(self, factors: RopeFactors | FactorTable | None) -> None:
        """Rotate by these factors at every length, or by the row of a table that each sequence's length asks for.

        None rotates as the checkpoint does by itself.
        """
        assert self._places, "the patch has been undone"
        if factors is None:
            for *_, scaled in self._places:
                scaled.set(None)
            return
        rows = factors.rows if isinstance(factors, FactorTable) else (factors,)
        for row in rows:
            if len(row.rescale) != self.shape.pairs:
                raise UserError(
                    "factors",
                    got=f"{len(row.rescale)} rescale factors",
                    rule=f"the model rotates {self.shape.pairs} pairs",
                    do="give the factors that were searched for this model",
                )
        device = self._places[0][3].rope.base.device if self._places[0][3].rope is not None else "cpu"
        rope = RopeTensors.of(rows, self.shape.rope_theta, device=device, precision=self.precision)
        for *_, scaled in self._places:
            scaled.set(rope, by_length=isinstance(factors, FactorTable))

    def use_rows(self, rows: Tensor | None) -> None:
        """Let the sequences of the next passes use these rows (B,) or (1,) of a table; None: by their lengths again."""
        self._chosen.rows = rows

    def install_tensors(self, factors: RopeFactors, rescale: Tensor, attention_factor: Tensor) -> None:
        """Rotate by rescale factors (P,) and an attention factor () that may ask for gradients.

        All else is that of `factors`; the tensors are in the patch's precision.
        """
        assert self._places, "the patch has been undone"
        of_factors = RopeTensors.of((factors,), self.shape.rope_theta, device=rescale.device, precision=self.precision)
        rotations = inverse_frequencies(self.shape.rope_theta, rescale)[None]
        rope = replace(of_factors, rotations=rotations, attention_factor=attention_factor[None])
        for *_, scaled in self._places:
            scaled.set(rope)

    def widen_window(self, target: int, *, shared: bool = False) -> str | None:
        """`widen_window` of the model, until `undo`."""
        note, restore = widen_window(self.model, target, shared=shared)
        self._restore.append(restore)
        return note

    def undo(self) -> None:
        """Put the model's own rotary embedding back, and its sliding window."""
        while self._restore:
            self._restore.pop()()
        for parent, name, stock, _ in self._places:
            setattr(parent, name, stock)
        self._places = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def has_local_layers(config: Any) -> bool:
    """Whether only some layers of a transformers text config have its sliding window: then it is as it should be."""
    kinds = getattr(config, "layer_types", None) or ()
    return EXTENDED_LAYERS in kinds and any(kind in _LOCAL_LAYERS for kind in kinds)


def widen_window(model: PreTrainedModel, target: int, *, shared: bool = False) -> tuple[str | None, Callable[[], None]]:
    """Widen a sliding window that every layer has to `target` tokens; local layers of a model that has both stay.

    shared: take it away altogether, however wide: processes that share a window of tokens (accelerate's context
    parallelism) refuse a model that has one. Returns what is to be said of it, if anything, and what takes it back.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None or (window >= target and not shared):
        return None, _as_it_is
    if set(getattr(config, "layer_types", None) or ()) == {EXTENDED_LAYERS}:
        return None, _as_it_is  # no layer has it
    if has_local_layers(config):
        by_type = isinstance((config.rope_parameters or {}).get(EXTENDED_LAYERS), Mapping)
        rescaled = "" if by_type else " and share the rescaled RoPE"
        return f"local layers keep their sliding window of {window} tokens{rescaled}", _as_it_is
    holders = [each for each in (config, *model.modules()) if getattr(each, "sliding_window", None) == window]
    _give_window(holders, None if shared else target)
    restore = partial(_give_window, holders, window)
    return None if window >= target else f"sliding window widened from {window} to {target} tokens", restore


def _give_window(holders: list[Any], width: int | None) -> None:
    for holder in holders:
        setattr(holder, "sliding_window", width)  # noqa: B010  (an attribute that only some classes declare)


def _as_it_is() -> None:
    """Nothing to take back."""


def global_layers_turn(
    config: Any, decoder: nn.Module, stock: Callable[[], object], scaled: Callable[[], object]
) -> bool:
    """Whether factors change a layer that sees the whole text, in a model that has local layers too.

    config: of the text; decoder: its layers and nothing else's, such as those of images, of which there may be as many.
    `stock` and `scaled` run the model without and with factors. Measured: in the second run each such layer is given
    the hidden states of the first again, so that what it returns differs only where it rotates itself (Cohere 2,
    EXAONE 4 and most of Llama 4 do not: extending them would change their local layers alone).
    """
    kinds = getattr(config, "layer_types", None) or ()
    lists = [each for each in decoder.modules() if isinstance(each, nn.ModuleList) and len(each) == len(kinds)]
    if len(set(kinds)) < 2 or EXTENDED_LAYERS not in kinds or not lists:
        return True
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    changed: list[bool] = []

    def give(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if layer not in seen:
            return None
        hidden = seen[layer][0]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def take(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden, returned = args[0] if args else kwargs["hidden_states"], output[0] if type(output) is tuple else output
        if layer in seen:
            changed.append(not torch.equal(returned, seen[layer][1]))
        else:
            seen[layer] = (hidden, returned)

    layers = [layer for layer, kind in zip(lists[0], kinds, strict=True) if kind == EXTENDED_LAYERS]
    hooks = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(take, with_kwargs=True) for layer in layers]
    try:
        stock()
        scaled()
    finally:
        for hook in hooks:
            hook.remove()
    return any(changed)


def rotary_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute, module) of every rotary embedding: a module that owns inverse frequencies."""
    for parent in list(model.modules()):
        if isinstance(parent, ScaledRotary):
            continue
        for name, child in parent.named_children():
            own = any(key.endswith("inv_freq") for key, _ in child.named_buffers(recurse=False))
            if own or isinstance(child, ScaledRotary):
                yield parent, name, child


def check_has_rotary(model: nn.Module) -> None:
    """Raise UserError for a model without a rotary embedding."""
    if next(rotary_modules(model), None) is None:
        raise UserError(
            "model",
            got=f"{type(model).__name__}, which has no rotary embedding",
            rule="only a model with RoPE can be extended",
            do=CHOOSE_ROPE,
        )


def stock_frequencies(stock: nn.Module) -> tuple[Tensor, float, str | None]:
    """Inverse frequencies (P,), attention factor and layer type of the extended layers of a rotary embedding."""
    buffers = dict(stock.named_buffers(recurse=False))
    if "inv_freq" in buffers:
        return buffers["inv_freq"], _scaling(stock), None
    if f"{EXTENDED_LAYERS}_inv_freq" in buffers:
        scaling = float(getattr(stock, f"{EXTENDED_LAYERS}_attention_scaling", 1.0))
        return buffers[f"{EXTENDED_LAYERS}_inv_freq"], scaling, EXTENDED_LAYERS
    raise _unknown_rotary(stock, "its layers are of no known type")


def _scaling(stock: nn.Module) -> float:
    """What multiplies cos and sin of short sequences."""
    if type(stock).__name__ == "PhimoeRotaryEmbedding" and getattr(stock, "rope_type", "default") != "default":
        config: Any = stock.config
        return float(config.rope_parameters["short_mscale"])  # and not what it has computed
    return float(getattr(stock, "attention_scaling", 1.0))


def _measured_layout(stock: nn.Module, shape: RopeShape) -> Layout:
    """The layout under which our cos and sin are those of `stock`. Raises UserError when there is none."""
    device = next(stock.buffers()).device
    positions = torch.arange(3, 9, device=device)[None]  # beyond 0, where every layout agrees
    x = torch.zeros(1, positions.shape[1], 1, dtype=torch.float32, device=device)
    *_, layer_type = stock_frequencies(stock)
    with torch.no_grad():
        expected = stock(x, positions) if layer_type is None else stock(x, positions, layer_type)
    # Only now: a dynamic scaling that has seen a long sequence comes back to its short frequencies in this call.
    frequencies, scaling, _ = stock_frequencies(stock)
    if frequencies.numel() != shape.pairs:
        raise _unknown_rotary(
            stock, f"it rotates {frequencies.numel()} pairs where its configuration says {shape.pairs}"
        )
    with torch.no_grad():
        rope = RopeTensors(
            up_to=torch.zeros(1, dtype=torch.float32, device=device),
            rotations=frequencies.float()[None],
            base=frequencies.float(),
            start_tokens=torch.zeros(1, dtype=torch.float32, device=device),
            attention_factor=torch.tensor([scaling], dtype=torch.float32, device=device),
            any_start_tokens=False,
        )
        cos, sin = cos_sin(positions, rope)
    for layout in _LAYOUTS:
        if _same(layout(cos, sin), expected):
            return layout
    raise _unknown_rotary(stock, "it lays out cos and sin in an unknown way")


def _same(ours: Any, stock: Any) -> bool:
    ours = ours if isinstance(ours, tuple) else (ours,)
    stock = stock if isinstance(stock, tuple) else (stock,)
    return len(ours) == len(stock) and all(
        isinstance(theirs, Tensor) and mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=0, atol=1e-6)
        for mine, theirs in zip(ours, stock, strict=True)
    )


def check_frequencies(model: nn.Module, rope_theta: float, own: RopeFactors) -> None:
    """Raise UserError unless the model rotates as its configuration, read as factors `own`, says it does.

    What is relative to the unscaled rope_theta must really be so: a class with frequencies of another form would be
    extended wrongly without a sign of it.
    """
    expected = inverse_frequencies(rope_theta, torch.tensor(own.rescale, dtype=torch.float32))
    for _, _, stock in rotary_modules(model):
        frequencies, scaling, _ = stock_frequencies(stock)
        tolerance = 1e-4 if frequencies.dtype == torch.float32 else 1e-2
        alike = frequencies.shape == expected.shape
        least = 0.0 if frequencies.dtype == torch.float32 else 1e-7  # of halves, whose smallest are coarse
        close = alike and torch.allclose(frequencies.float().cpu(), expected, rtol=tolerance, atol=least)
        if not close or abs(scaling - own.attention_factor) > 1e-4:
            raise _unknown_rotary(stock, "its frequencies are not those of its configuration")


def _unknown_rotary(stock: nn.Module, why: str) -> UserError:
    return UserError(
        "model",
        got=f"a rotary embedding {type(stock).__name__}: {why}",
        rule="the rotary embedding must be ordinary RoPE, one frequency for each pair of dimensions",
        do="this class cannot be extended; please report it",
    )
