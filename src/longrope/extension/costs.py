"""What the stages of a plan cost, nothing computed: --dry-run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from longrope.extension.plan import Plan, Stage, measured_lengths, search_settings
from longrope.factors import FactorTable, RopeFactors, last_row
from longrope.lengths import format_length
from longrope.model import LoadedModel
from longrope.search.descent import DescentSettings, batch_size
from longrope.search.driver import SearchWindows, make_budget, make_problem, make_space, measured_windows
from longrope.search.evolution import EvolutionSettings
from longrope.search.methods import gradient_windows
from longrope.search.settings import SearchSettings
from longrope.training.recipes import Recipe, recipe_of
from longrope.windows import Window, default_window_count

_DECIDED = 5  # candidates at the target, after a search at a shorter length


@dataclass(frozen=True)
class Work:
    """So many windows of one length: their loss (`forward`), its `gradient` in the factors, or a step to `train` on.

    at_once: how many of them several workers can do side by side, the others waiting for what comes of these.
    """

    kind: str
    length: int
    windows: int
    at_once: int = 1

    @property
    def token_passes(self) -> int:
        """Tokens through the model; a backward pass counts as two more."""
        return (1 if self.kind == "forward" else 3) * self.windows * self.length


@dataclass(frozen=True)
class Cost:
    """What a stage takes: its work, its token-passes, and of what they are made, in words.

    batch: windows of a training step, 0 where nothing is trained. adapters: rank of LoRA, 0 for all weights. begins:
    length beyond which a shorter search may be, 0 where there is none.
    """

    stage: str
    length: int
    made_of: str
    work: tuple[Work, ...]
    batch: int = 0
    adapters: int = 0
    begins: int = 0

    @property
    def token_passes(self) -> int:
        """Of all its work."""
        return sum(each.token_passes for each in self.work)

    def to_dict(self) -> dict[str, Any]:
        """As a result of --json."""
        told = {"method": self.stage, "length": self.length, "value": None, "tokens": self.token_passes, "ci": None}
        return told | {"made_of": self.made_of}


def costs(loaded: LoadedModel, plan: Plan) -> list[Cost]:
    """The stages with what each costs at most, nothing computed: what --dry-run prints, and `plan`.

    loaded: its weights are not looked at, and may be nowhere.
    """
    found, reached, known = [], loaded.rope.original_length, list[int]()
    for stage in plan.stages:
        if stage.do == "finetune":
            steps, batch = _steps(stage)
            reached, known = stage.to, [stage.to]
            made_of = f"{steps} steps of {batch} windows of {stage.window:,} tokens, three passes each"
            trained = (Work("train", stage.window, steps * batch),)
            found.append(Cost(stage.name, stage.window, made_of, trained, batch, stage.settings.get("lora") or 0))
        else:
            work, made_of = _searched(loaded, stage, reached, known)
            settings = search_settings(stage, 0)
            if (inner := settings.shorter) is not None:
                work += (Work("forward", stage.to, _DECIDED * settings.window_count),)
                work += (Work("forward", inner.to, measured_windows(inner)),)
                made_of = f"{made_of}, {_DECIDED} at the target"
            work += (Work("forward", stage.to, measured_windows(settings)),)
            made_of = f"{made_of}, and what they found measured"
            begins = reached if stage.do == "second" else loaded.rope.original_length
            begins = 0 if stage.do == "recovery" else begins
            known += [each for each in (stage.to, settings.search_length) if each and stage.do != "search"]
            found.append(Cost(stage.name, stage.to, made_of, work, begins=begins))
    return found + _measured(plan, loaded.rope.original_length)


def _measured(plan: Plan, original_length: int) -> list[Cost]:
    """What is measured when all stages are done: the base model too, where it was trained."""
    lengths, tries = measured_lengths(plan, [original_length]), plan.measures.passkey
    losses = [Work("forward", each, plan.measures.windows or default_window_count(each)) for each in lengths]
    losses += [each for each in losses if each.length == original_length]
    found = [Cost("perplexity", max(lengths), f"at {', '.join(map(format_length, lengths))}", tuple(losses))]
    if tries:
        prompts = tuple(Work("forward", each, tries) for each in lengths)
        found.append(Cost("passkey", max(lengths), f"{tries} tries of each length", prompts))
    return found


def _steps(stage: Stage) -> tuple[int, int]:
    names = {each.name for each in fields(Recipe)}
    given = {name: value for name, value in stage.settings.items() if name in names}
    recipe = recipe_of(stage.settings.get("recipe"), given)
    assert recipe.steps is not None, "checked with the plan"
    return recipe.steps, recipe.batch


def _searched(loaded: LoadedModel, stage: Stage, reached: int, known: Sequence[int]) -> tuple[tuple[Work, ...], str]:
    """What a search takes at most, of a model that was trained so far by then, and of what it is made.

    known: lengths of the rows that there are by then. What they hold is not: each is another one, so that no two of
    a recovery's seeds are the same.
    """
    settings = search_settings(stage, 0)
    settings = settings.shorter or settings
    as_trained = _by_then(loaded, stage, reached, known)
    init = scaling_of(loaded.meaning, as_trained, settings) if stage.do == "recovery" else []
    count = settings.window_count * settings.together
    empty = SearchWindows([_window(settings.to)] * count)
    problem = make_problem(as_trained, settings, empty, init)
    budget = make_budget(settings, empty, len(problem.seeds))
    made_of = f"up to {budget.total:,} evaluations of {budget.evaluation:,} tokens"
    # The seeds come first, then the descents, each gradient in place of three evaluations.
    passes = budget.total * count
    gradients = settings.together * gradient_windows(settings.method, count // settings.together, DescentSettings())
    gradients = max(0, min(gradients, (passes - count * len(problem.seeds)) // 3))
    sizes = EvolutionSettings.for_length(settings.to)
    children = sizes.mutations + sizes.crossovers if settings.method == "evolution" else count
    work = (
        Work("forward", settings.to, passes - 3 * gradients, children),
        Work("gradient", settings.to, gradients, settings.together * batch_size(count // settings.together)),
    )
    return tuple(each for each in work if each.windows), made_of


def scaling_of(base: FactorTable, loaded: LoadedModel, settings: SearchSettings) -> list[FactorTable]:
    """What a recovery begins with beside the original RoPE, where the base had a scaling of its own: that.

    base: the base model's own table. It is what short texts were read under, before any stage. None where the search
    does not reach it.
    """
    row = last_row(base, settings.to)
    if set(row.rescale) == {1.0} or not make_space(loaded, settings).holds(row):
        return []
    return [replace(base, rows=(row.with_values(up_to=settings.to),))]


def _by_then(loaded: LoadedModel, stage: Stage, reached: int, known: Sequence[int]) -> LoadedModel:
    """The model that a search is of: the base as it is, or with rows as a training up to `reached` leaves it."""
    if stage.on == "base" or not known:
        return loaded
    pairs, original = loaded.rope.shape.pairs, loaded.rope.original_length
    lengths = sorted(set(known)) if stage.do == "recovery" and stage.to >= reached else [reached]
    scales = [max(2.0, each / original) for each in lengths]
    vectors = [np.full(pairs, scale) for scale in scales]
    if stage.do == "search":  # where only what lies within the bounds is a seed, and no baseline comes twice
        vectors = [make_space(loaded, search_settings(stage, 0)).repair(np.linspace(1.0, scales[0], pairs))]
    rows = [
        RopeFactors(each, tuple(vector.tolist()), attention_factor=1 + math.log(scale) / 100)
        for each, vector, scale in zip(lengths, vectors, scales, strict=True)
    ]
    trained = replace(loaded, table=replace(loaded.meaning, rows=tuple(rows)))
    return trained.fine_tuned() if stage.do == "second" else trained


def _window(length: int) -> Window:
    return Window("", "", 0, np.broadcast_to(np.int64(0), (length,)))
