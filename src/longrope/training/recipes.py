"""How the papers fine-tune: what is said there by name, and what one's own run changes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any

from longrope.errors import UserError

_FLOAT32 = 3e38  # torch's scalars of a step end there
_SCHEDULES = ("linear", "cosine", "constant")
SAVED = ("float32", "bfloat16", "float16")
"""Dtypes of a written checkpoint."""


@dataclass(frozen=True)
class Recipe:
    """An optimizer's settings: AdamW with a schedule over `steps` steps of `batch` windows."""

    learning_rate: float = 2e-5
    schedule: str = "linear"
    warmup: int = 0
    batch: int = 32
    steps: int | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0

    def changed(self, given: Mapping[str, Any]) -> Recipe:
        """The recipe with what is given (not None) instead. Raises UserError for values that cannot be."""
        made = replace(self, **{name: value for name, value in given.items() if value is not None})
        for flag, value, good, rule in (
            (
                "--learning-rate",
                made.learning_rate,
                0 < made.learning_rate < _FLOAT32,
                "it is above 0 and a number of float32",
            ),
            ("--schedule", made.schedule, made.schedule in _SCHEDULES, f"it is one of {', '.join(_SCHEDULES)}"),
            ("--warmup", made.warmup, made.warmup >= 0, "it is not negative"),
            ("--batch", made.batch, made.batch >= 1, "it is at least 1"),
            ("--beta1", made.beta1, 0 <= made.beta1 < 1, "it is from 0 to below 1"),
            ("--beta2", made.beta2, 0 <= made.beta2 < 1, "it is from 0 to below 1"),
            ("--clip", made.clip, 0 < made.clip < inf, "it is above 0 and a number"),
            ("--weight-decay", made.weight_decay, 0 <= made.weight_decay < inf, "it is not negative"),
            ("--steps", made.steps, made.steps is None or made.steps >= 1, "it is at least 1"),
        ):
            if not good:
                raise UserError(flag, got=value, rule=rule, do="give another value")
        return made


# LongRoPE, section 4.1: learning rate, schedule, batch and steps; what it does not say (Adam's betas, clipping) is as
# in the fine-tuning of PI. LongRoPE2, section 4.1: one epoch of its data, so that the steps are the user's to give.
RECIPES: Mapping[str, Recipe] = {
    "longrope-llama2": Recipe(learning_rate=2e-5, schedule="linear", batch=32, steps=400),
    "longrope-mistral": Recipe(learning_rate=1e-6, schedule="constant", batch=64, steps=400),
    "longrope2": Recipe(learning_rate=2e-5, schedule="cosine", batch=64),
}
_DEFAULT = "longrope-llama2"


def recipe_of(name: str | None, given: Mapping[str, Any]) -> Recipe:
    """A recipe by name with changes. Raises UserError for a name that is none, and when nothing says the steps."""
    if name is not None and name not in RECIPES:
        rule = f"it is one of {', '.join(RECIPES)}"
        raise UserError("--recipe", got=repr(name), rule=rule, do="choose one of them, or leave it out")
    assert set(given) <= {field.name for field in fields(Recipe)}, "settings of a recipe"
    made = RECIPES[name or _DEFAULT].changed(given)
    if made.steps is None or (name is None and given.get("steps") is None):
        raise UserError("--steps", got="none", rule="a training has a number of steps", do="give --steps")
    return made
