"""`longrope plan`: MODEL, a target and machines in, every stage's cost out; nothing is computed but that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longrope.checkpoint import LoadOptions, as_model
from longrope.errors import UserError
from longrope.extension.costs import costs
from longrope.extension.run import plan_for
from longrope.lengths import as_length
from longrope.memory import free_memory
from longrope.modes import apart
from longrope.planning.machines import Machine, machine_of
from longrope.planning.precision import QUANTIZED, precision_of
from longrope.planning.rates import measured_rates
from longrope.planning.stages import UTILISATION, Settings, StageCost, stage_costs
from longrope.planning.subject import shape_of, subject
from longrope.training.lora import LoraSettings

CPU = "cpu"
"""In place of GPUs: this machine."""


@apart
def plan(
    model: str | Path,
    *,
    to: int | str,
    gpus: str = CPU,
    flops: float | None = None,
    mfu: float | None = None,
    stages: str | Path | None = None,
    train: bool = True,
    lora: int | None = None,
    quantize: str | None = None,
    dtype: str = "auto",
    original_length: int | None = None,
) -> dict[str, Any]:
    """The document of the command: every stage of an extension to `to` tokens on machines such as `8xH100-80GB`.

    model: a folder, a config.json, a Hub id or `tiny`; no weights are read. gpus: `cpu` is this machine, whose rates
    are measured, a few seconds. flops: TFLOP/s of a device in bf16, which `gpus` may name by its memory alone. mfu: the
    share of them that is reached, by default 0.3 to 0.4 by stage. stages, train: as in `extend`. lora: rank of
    adapters, which are trained in place of all weights. quantize: 8bit or 4bit for the base. dtype: of LoadOptions.
    original_length: in tokens, where the configuration does not say it right. Raises UserError for bad input.
    """
    model, to = as_model(model), as_length(to)
    settings = Settings(dtype=dtype, lora=lora, quantize=quantize, utilisation=mfu)
    peak = None if flops is None else 1e12 * flops
    check(settings, peak)
    machine = None if gpus == CPU else machine_of(gpus, peak)
    _check_has_a_use(machine, flops=flops, mfu=mfu)
    precision_of(settings.dtype, cuda=machine is not None)
    if machine is None:
        settings = replace(settings, dtype=LoadOptions(device="cpu", dtype=settings.dtype).resolved().dtype)
    loaded = subject(model, LoadOptions(device="cpu", original_length=original_length))
    chosen = plan_for(loaded.rope.original_length, to, stages, train=train)
    shape = shape_of(loaded.model, model)
    work = costs(loaded, chosen)
    if lora is not None and not any(each.batch for each in work):
        got, rule = f"{lora} without a stage that trains", "adapters are trained in fine-tuning stages"
        do = "give --stages with one, or leave it out" if train else "leave out --no-finetune or --lora"
        raise UserError("--lora", got=got, rule=rule, do=do)
    if settings.quantize is not None and any(each.batch and not (settings.lora or each.adapters) for each in work):
        rule = "weights of so few bits are not trained"
        got = f"{settings.quantize} without --lora"
        raise UserError("--quantize", got=got, rule=rule, do="give --lora RANK, or --no-finetune")
    if machine is None:
        machine = Machine(CPU, 1, float(free_memory(torch.device("cpu"))), None, kind="cpu")
        rates = measured_rates(shape, precision_of(settings.dtype, cuda=False), min(to, 4096))
        settings = replace(settings, rates=rates)
    found = stage_costs(shape, work, machine, settings)
    return _document(model, to, machine, settings, found) | {"parameters": shape.parameters}


def check(settings: Settings, peak: float | None = None) -> None:
    """Raise UserError for settings that cannot be."""
    if settings.utilisation is not None and not 0 < settings.utilisation <= 1:
        rule = "it is a share of a GPU's peak, above 0 and at most 1"
        raise UserError("--mfu", got=settings.utilisation, rule=rule, do="give one such as 0.4, or leave it out")
    if peak is not None and not 0 < peak < 1e18:
        raise UserError("--flops", got=peak / 1e12, rule="it is TFLOP/s of one device, above 0", do="give 312 or so")
    if settings.lora is not None:
        LoraSettings(rank=settings.lora)
    if settings.quantize is not None and settings.quantize not in QUANTIZED:
        rule = f"it is one of {', '.join(QUANTIZED)}"
        raise UserError("--quantize", got=repr(settings.quantize), rule=rule, do="choose one of them")


def _check_has_a_use(machine: Machine | None, *, flops: float | None, mfu: float | None) -> None:
    """Raise UserError for rates that say nothing about the machine."""
    if machine is None:
        for flag, value in (("--flops", flops), ("--mfu", mfu)):
            if value is not None:
                rule, do = "the rates of this machine are measured", "name other devices with --gpus, or leave it out"
                raise UserError(flag, got=f"{value:g} with --gpus {CPU}", rule=rule, do=do)
    elif machine.peak is None and mfu is not None:
        rule = "it is a share of a peak, which the memory of a device does not say"
        raise UserError("--mfu", got=f"{mfu:g} without a peak", rule=rule, do="give --flops, too, or leave it out")


def _document(model: str, to: int, machine: Machine, settings: Settings, found: list[StageCost]) -> dict[str, Any]:
    told: dict[str, Any] = {"to": to, "gpus": machine.name, "dtype": settings.dtype, "lora": settings.lora}
    told |= {"quantize": settings.quantize, "bytes_each": round(machine.bytes_each), "peak_flops": machine.peak}
    if settings.rates is not None:
        told |= {"measured_rates": {name: round(value) for name, value in vars(settings.rates).items()}}
    elif machine.peak is not None:
        kinds = UTILISATION if settings.utilisation is None else dict.fromkeys(UTILISATION, settings.utilisation)
        told |= {"mfu": dict(kinds)}
    return {"command": "plan", "model": model, "settings": told, "results": [each.to_dict() for each in found]}
