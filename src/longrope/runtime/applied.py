"""Factors on a model, until they are taken off again."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from longrope.baselines import RopeShape
from longrope.checkpoint import CONFIG_ENTRY
from longrope.factors import FactorTable, RopeFactors
from longrope.patch import Patch
from longrope.runtime.switch import Switch


class Applied:
    """Factors on a model: `undo`, or leaving it as a context, restores the model.

    A single row of factors is a table of one row. reach: the longest text in tokens.
    """

    def __init__(
        self, model: PreTrainedModel, patch: Patch, shape: RopeShape, factors: FactorTable | RopeFactors, **how: Any
    ) -> None:
        if isinstance(factors, RopeFactors):
            patch.install(factors)  # says of itself what is wrong with it
            factors = FactorTable(shape.rope_theta, shape.rotary_dim, shape.original_length, (factors,))
        self._config, self._patch = model.config, patch
        self.switch = Switch(model, patch, factors, **how)
        self.reach = factors.rows[-1].up_to
        # A checkpoint that is saved says by itself what it was served with
        self._before = vars(model.config).get(CONFIG_ENTRY)
        setattr(model.config, CONFIG_ENTRY, factors.to_be_given_away().to_dict())
        self._undone = False

    @property
    def recomputed(self) -> int:
        """Tokens that were run again at switches so far."""
        return self.switch.recomputed

    def undo(self) -> None:
        """Restore the model; a second time does nothing."""
        if self._undone:
            return
        self._undone = True
        vars(self._config).pop(CONFIG_ENTRY, None)
        if self._before is not None:
            setattr(self._config, CONFIG_ENTRY, self._before)
        self.switch.undo()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
