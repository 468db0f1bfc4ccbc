"""Factors on a model, until they are taken off again."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from longrope.checkpoint import CONFIG_ENTRY
from longrope.factors import FactorTable, RopeFactors
from longrope.patch import Patch
from longrope.runtime.switch import Switch


class Applied:
    """Factors on a model: `undo`, or leaving it as a context, restores the model.

    switch: what makes a table exact at run time; None for a single row.
    """

    def __init__(self, model: PreTrainedModel, patch: Patch, factors: FactorTable | RopeFactors, **how: Any) -> None:
        self._model, self._patch = model, patch
        self.switch = Switch(model, patch, factors, **how) if isinstance(factors, FactorTable) else None
        if isinstance(factors, FactorTable):
            # A checkpoint that is saved says by itself what it was served with
            setattr(model.config, CONFIG_ENTRY, factors.to_dict())
        else:
            patch.install(factors)
        self.reach = factors.rows[-1].up_to if isinstance(factors, FactorTable) else factors.up_to
        """The longest text in tokens."""

    @property
    def recomputed(self) -> int:
        """Tokens that were run again at switches so far."""
        return 0 if self.switch is None else self.switch.recomputed

    def undo(self) -> None:
        """Restore the model."""
        if self.switch is not None:
            vars(self._model.config).pop(CONFIG_ENTRY, None)
            self.switch.undo()
        self._patch.undo()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
