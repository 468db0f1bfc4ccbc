"""What the stages of a plan cost, nothing computed: --dry-run."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from longrope.extension.plan import Plan, Stage, measured_lengths, search_settings
from longrope.factors import unscaled
from longrope.lengths import format_length
from longrope.model import LoadedModel
from longrope.search.driver import SearchWindows, make_budget, make_problem
from longrope.training.recipes import Recipe, recipe_of
from longrope.windows import Window, default_window_count

_DECIDED = 5  # candidates at the target, after a search at a shorter length


@dataclass(frozen=True)
class Cost:
    """What a stage takes: token-passes (a backward pass counts as two more), and of what that is made, in words."""

    stage: str
    length: int
    token_passes: int
    made_of: str

    def to_dict(self) -> dict[str, Any]:
        """As a result of --json."""
        told = {"method": self.stage, "length": self.length, "value": None, "tokens": self.token_passes, "ci": None}
        return told | {"made_of": self.made_of}


def costs(loaded: LoadedModel, plan: Plan) -> list[Cost]:
    """The stages with what each costs at most, nothing computed: what --dry-run prints."""
    found, reached = [], loaded.rope.original_length
    for stage in plan.stages:
        if stage.do == "finetune":
            steps, batch = _steps(stage)
            tokens, reached = 3 * steps * batch * stage.to, stage.to
            made_of = f"{steps} steps of {batch} windows of {stage.to:,} tokens, three passes each"
        else:
            evaluations, evaluation = _evaluations(loaded, stage, reached)
            tokens, made_of = evaluations * evaluation, f"up to {evaluations:,} evaluations of {evaluation:,} tokens"
            if stage.settings.get("search_length"):
                decided = _DECIDED * stage.settings.get("windows", 1) * stage.to
                tokens, made_of = tokens + decided, f"{made_of}, {_DECIDED} at the target"
        found.append(Cost(stage.name, stage.to, tokens, made_of))
    lengths = measured_lengths(plan)
    found.append(
        Cost(
            "perplexity",
            max(lengths),
            sum(lengths) * (plan.measures.windows or 8),
            f"at {', '.join(map(format_length, lengths))}",
        )
    )
    if tries := plan.measures.passkey:
        found.append(Cost("passkey", max(lengths), tries * sum(lengths), f"{tries} tries of each length"))
    return found


def _steps(stage: Stage) -> tuple[int, int]:
    names = {each.name for each in fields(Recipe)}
    given = {name: value for name, value in stage.settings.items() if name in names}
    recipe = recipe_of(stage.settings.get("recipe"), given)
    assert recipe.steps is not None, "checked with the plan"
    return recipe.steps, recipe.batch


def _evaluations(loaded: LoadedModel, stage: Stage, reached: int) -> tuple[int, int]:
    """(evaluations at most, tokens of one), of a model that reaches so far by then."""
    row = unscaled(loaded.rope.shape.pairs, reached)
    as_trained = replace(
        loaded, table=replace(loaded.meaning, rows=(row,)), under=row if stage.do == "second" else None
    )
    settings = search_settings(stage, 0)
    settings = settings.shorter or settings
    count = settings.window_count or default_window_count(settings.to)
    empty = SearchWindows([_window(settings.to)] * count)
    problem = make_problem(as_trained, settings, empty)
    budget = make_budget(settings, empty, len(problem.seeds))
    return budget.total, budget.evaluation


def _window(length: int) -> Window:
    return Window("", "", 0, np.broadcast_to(np.int64(0), (length,)))
