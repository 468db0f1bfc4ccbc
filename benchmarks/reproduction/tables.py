"""The paper's further tables on the reproduction's models, each a part that is made when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope.evaluate.methods import method_factors
from longrope.evaluate.nonuniformity import collect, studies
from longrope.evaluate.nonuniformity import rows as distinct
from longrope.extension.plan import search_settings
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel, load_model
from longrope.runs import DONE
from longrope.search.driver import choose_search_windows, search_windows
from longrope.training.run import finetune
from longrope.windows import Window
from reproduction.core import passkeys, passkeys_by_row, perplexity, searches, tell_passkeys
from reproduction.setting import Setting, cut, with_recall
from reproduction.state import State

WITHOUT = ("none", "pi", "ntk", "dynamic-ntk", "yarn")
MIXED = 0.75
"""Windows of short documents, in LongRoPE2's parts. Its own mixture is 3 of 10 billion tokens (section 4.1), with which
this model stayed above the limit."""
MIXED_STEPS = 2
"""Times the steps of the plan, so that half of its long windows are left; short ones cost next to nothing."""


def without(setting: Setting, state: State) -> None:
    """Tables 1 and 3, figure 3: the base model at every power of two, by method, without fine-tuning."""
    searches(setting, state)
    base = setting.load(setting.base)
    original, longest = setting.size.length, setting.trained[-1]
    searched = {stage.to: found(setting, stage.to) for stage in setting.plan.stages if stage.do == "search"}
    value = _values(setting, state, setting.base, setting.judged(2 * longest))
    by_method: dict[str, dict[str, float]] = {}
    for length in [original << power for power in range(1, (longest // original).bit_length())]:
        for name in WITHOUT:
            row = method_factors(base, name, length, length)
            by_method.setdefault(name, {})[str(length)] = value(f"{name} untrained", length, row)
        if length in searched:
            row = searched[length].row_for(length)
            ours = by_method.setdefault("searched", {})[str(length)] = value("searched untrained", length, row)
            best = min((by_method[name][str(length)], name) for name in WITHOUT)
            state.figure(
                "perplexity without fine-tuning, searched / the best of the others",
                f"{length // original}x; the best is {best[1]}", ours / best[0], 1.0, ours=ours, theirs=best[0],
            )  # fmt: skip
    state.table("perplexity without fine-tuning", by_method)


def found(setting: Setting, length: int) -> FactorTable:
    """What the search for a length found on the base model."""
    return FactorTable.load(setting.stage("search", length) / "factors.json")


def nonuniform(setting: Setting, state: State) -> None:
    """Tables 2 and 11: groups of pairs, start tokens and attention factors at the first fine-tuning's length."""
    searches(setting, state)
    target = setting.trained[0]
    lines = studies(setting.load(setting.base), target, table=found(setting, target))
    value = _values(setting, state, setting.base, setting.judged(2 * setting.trained[-1]))
    values = {label: value(label, target, row) for label, row in distinct(lines).items()}
    state.table("non-uniformity", collect(lines, values))


def by_length(setting: Setting, state: State) -> None:
    """Tables 5 to 7, 9 and 10: the final model at every length, unrecovered, and by other second interpolations."""
    original, target, trained = setting.size.length, setting.plan.target, setting.trained[-1]
    final = setting.final
    table, second = setting.load(final).meaning, replace(setting.load(final), under=setting.trained_with)
    value = _values(setting, state, final, setting.judged(target))
    base = _values(setting, state, setting.base, setting.judged(target))
    found: dict[str, dict[str, float]] = {}
    for length in [original << power for power in range((target // original).bit_length())]:
        found.setdefault("ours", {})[str(length)] = value("ours", length, table.row_for(length))
        if length <= 2 * original:
            unrecovered = value("not recovered", length, setting.trained_with)
            found.setdefault("not recovered", {})[str(length)] = unrecovered
        if length <= 4 * original:
            found.setdefault("base", {})[str(length)] = base("base", length, None)
        if length > trained:
            for name in ("pi", "ntk", "yarn"):
                row = second.baseline(name, length)
                found.setdefault(f"second {name}", {})[str(length)] = value(f"second {name}", length, row)
    state.table("perplexity by length", found)


def angles(setting: Setting, state: State) -> None:
    """Angles in float32, as engines have them, beside float64 at the target."""
    final, target = setting.final, setting.plan.target
    windows = setting.judged(target)
    row = setting.load(final).meaning.row_for(target)
    single = _values(setting, state, final, windows)("ours", target, row)
    double = _once(setting, state, final, windows, "float64 angles", target, row, _with_float64)
    state.table("angles", {"float32": single, "float64": double, "length": target})


def retrieval(setting: Setting, state: State) -> None:
    """Figure 4 again, on more and other prompts, which no choice of a recipe has seen, up to twice what was trained."""
    tries = 2 * setting.size.tries
    measured = _retrieved(setting, state, setting.size.length, 2 * setting.trained[-1], tries)
    tell_passkeys(setting, state, "passkeys of other prompts", f"{tries} tries a length", measured)


def retrieval_far(setting: Setting, state: State) -> None:
    """The same beyond that, below the target, where a prompt takes a minute: as many tries as the paper's ten."""
    _far(setting, state, 4 * setting.trained[-1], setting.plan.target // 2)


def retrieval_target(setting: Setting, state: State) -> None:
    """The same at the target, where a prompt takes minutes."""
    _far(setting, state, max(4 * setting.trained[-1], setting.plan.target), setting.plan.target)


def _far(setting: Setting, state: State, first: int, last: int) -> None:
    tries = max(1, setting.size.tries // 2)
    measured = _retrieved(setting, state, first, last, tries)
    if not measured:  # of a short plan there is no length between
        state.table("passkeys of other prompts found", [])
        return
    tell_passkeys(setting, state, "passkeys of other prompts", f"{tries} tries a length", measured)


def _retrieved(
    setting: Setting, state: State, first: int, last: int, tries: int
) -> list[tuple[int, float, list[float] | None]]:
    """Passkeys at every power of two from a length to another, each a run of its own."""
    measured: list[tuple[int, float, list[float] | None]] = []
    for length in [first << power for power in range((last // first).bit_length())]:
        name = f"retrieval-{length}"
        if not (setting.state / name / DONE).exists():
            state.begin()
        measured += passkeys(setting, [length], name, tries, setting.seed + 1)
    return measured


def trained_length(setting: Setting, state: State) -> None:
    """The fine-tuned length under the row that was trained with, the one searched anew, and the next longer one."""
    length, tries = setting.trained[-1], 2 * setting.size.tries
    table = setting.load(setting.final).meaning
    rows = {"trained with": setting.trained_with, "searched anew": table.row_for(length)}
    if longer := [row for row in table.rows if row.up_to > length]:
        rows["next longer"] = longer[0]
    value = _values(setting, state, setting.final, setting.judged(setting.plan.target))
    told: dict[str, dict[str, Any]] = {name: {"perplexity": value(name, length, row)} for name, row in rows.items()}
    if not (setting.state / "trained-length" / DONE).exists():
        state.begin()
    tried = {(name, length): row for name, row in rows.items()}
    for each in passkeys_by_row(setting, tried, "trained-length", tries, setting.seed + 1):
        told[each["method"]] |= {"passkeys": each["value"], "ci": each["ci"], "tries": tries}
    state.table("the fine-tuned length by row", told)


def nearer(setting: Setting, state: State) -> None:
    """Table 9 at twice the fine-tuned length, where methods and search are made for it: a row of its own.

    It is the final table's, where that has one; else it is searched here as the plan's second interpolation is.
    """
    original, target, length = setting.size.length, setting.plan.target, 2 * setting.trained[-1]
    final = setting.load(setting.final)
    table, second = final.meaning, replace(final, under=setting.trained_with)
    own = table.row_for(length)
    if own.up_to != length:
        own = _searched_second(setting, state, length).row_for(length)
    rows = {"searched": own, "of the target": table.row_for(target)}
    rows |= {name: second.baseline(name, length) for name in ("pi", "ntk", "yarn")}
    value = _values(setting, state, setting.final, setting.judged(target))
    told = {name: value(f"at {length}: {name}", length, row) for name, row in rows.items()}
    best = min(("pi", "ntk", "yarn"), key=lambda name: told[name])
    state.figure(
        f"perplexity at {length // original}x, ours / the best of the others", f"each made for it; the best is {best}",
        told["searched"] / told[best], 1.0, ours=told["searched"], theirs=told[best],
    )  # fmt: skip
    state.table("twice the fine-tuned length", told)


def _searched_second(setting: Setting, state: State, length: int) -> FactorTable:
    """A second interpolation to some length by the settings of the plan's own, a run of the part."""
    (stage,) = [stage for stage in setting.plan.stages if stage.do == "second"]
    settings = dict(stage.settings)
    settings.pop("search_length", None)
    chosen = search_settings(replace(stage, to=length, settings=settings), setting.seed)
    loaded, out = replace(setting.load(setting.final), table=setting.trained_table), setting.state / "nearer"
    if not (out / DONE).exists():
        state.begin()
    windows = choose_search_windows(loaded, chosen, setting.texts("validation"))
    return search_windows(loaded, chosen, windows, out=out)


def direct(setting: Setting, state: State) -> None:
    """Table 12: the last fine-tuned length from the base model at once, with as many tokens as step by step."""
    searches(setting, state)
    length = setting.trained[-1]
    stages = [stage for stage in with_recall(setting).stages if stage.do == "finetune"]
    tokens = sum(stage.settings["steps"] * stage.settings["batch"] * stage.to for stage in stages)
    steps = math.ceil(tokens / (stages[-1].settings["batch"] * length))
    given = dict(stages[0].settings) | {"steps": steps}
    given |= {name: stages[-1].settings[name] for name in ("batch", "documents")}
    out = _trained(setting, state, setting.base, found(setting, length), length, given, "direct")
    windows, rows = setting.judged(setting.plan.target), (found(setting, length).row_for(length), setting.trained_with)
    values = {
        name: _values(setting, state, model, windows)(name, length, row)
        for name, model, row in (("direct", out, rows[0]), ("fine-tuned", setting.final, rows[1]))
    }
    told = {"direct": values["direct"], "step by step": values["fine-tuned"], "tokens": tokens, "steps": steps}
    state.table("direct against progressive", told)


def mixed(setting: Setting, state: State) -> None:
    """LongRoPE2's mixed windows in the first fine-tuning: short documents under the original RoPE among its windows."""
    _mixed(setting, state, setting.trained[:1])


def mixed_longest(setting: Setting, state: State) -> None:
    """The same in all fine-tunings, beginning with what the first one gave."""
    _mixed(setting, state, setting.trained)


def _mixed(setting: Setting, state: State, lengths: list[int]) -> None:
    """Mixed windows in the fine-tunings to some lengths, beside the last of them without, at its length and short."""
    searches(setting, state)
    model, original, longest = setting.base, setting.size.length, lengths[-1]
    plain = setting.final if longest == setting.trained[-1] else setting.stage("finetune", longest) / "checkpoint"
    for stage in with_recall(setting).stages:
        if stage.do == "finetune" and stage.to <= longest:
            # Prose alone is packed: of recall tasks in pieces the key and the question would lie apart.
            given = dict(stage.settings) | {"mixed": MIXED, "short_documents": [str(setting.documents / "train")]}
            given["steps"] *= MIXED_STEPS
            model = _trained(setting, state, model, found(setting, stage.to), stage.to, given, f"mixed-{stage.to}")
    windows = setting.judged(setting.plan.target)
    base = _values(setting, state, setting.base, windows)("base", original, None)
    told: dict[str, dict[str, float]] = {"base": {str(original): base}}
    row = found(setting, longest).row_for(longest)
    short = setting.load(model).meaning.row_for(original)
    plain_row = setting.trained_with if plain == setting.final else row  # as it was trained, unrecovered
    told["mixed"] = _short_and_long(_values(setting, state, model, windows), "mixed", {original: short, longest: row})
    if plain.is_dir():
        plain_values = _values(setting, state, plain, windows)
        told["without"] = _short_and_long(plain_values, "fine-tuned", {original: plain_row, longest: plain_row})
    without = told["without"][str(original)] / base if "without" in told else None
    state.figure(
        f"short window after mixed windows to {longest // original}x / base", "windows of the original length",
        told["mixed"][str(original)] / base, 1.01, share=MIXED, steps=MIXED_STEPS, without=without,
    )  # fmt: skip
    state.table("with and without mixed windows", told)


def _short_and_long(
    value: Callable[[str, int, RopeFactors | None], float], what: str, rows: Mapping[int, RopeFactors]
) -> dict[str, float]:
    """Perplexities by length, the shorter one's named for what it is."""
    short, long = sorted(rows)
    return {str(short): value(f"{what} short", short, rows[short]), str(long): value(what, long, rows[long])}


def _trained(
    setting: Setting, state: State, model: Path, table: FactorTable, length: int, given: dict[str, Any], name: str
) -> Path:
    """A fine-tuning of a part's own, resumed where it was."""
    documents = [str(setting.documents / "train"), *given.pop("documents", [])]
    out = setting.state / name
    if not (out / DONE).exists():
        state.begin()
    finetune(
        str(model), length=length, factors=table, documents=documents, out=out, seed=setting.seed, tracker="none",
        options=setting.options, **given,
    )  # fmt: skip
    return out / "checkpoint"


def _values(
    setting: Setting, state: State, model: Path, windows: list[Window]
) -> Callable[[str, int, RopeFactors | None], float]:
    """Perplexities of a model on the tokens of some windows by name, length and row, each measured once."""

    def value(name: str, length: int, row: RopeFactors | None) -> float:
        return _once(setting, state, model, windows, name, length, row, Setting.load)

    return value


def _with_float64(setting: Setting, model: Path) -> LoadedModel:
    return load_model(str(model), replace(setting.options, rope_precision="float64"))


def _once(
    setting: Setting,
    state: State,
    model: Path,
    windows: list[Window],
    name: str,
    length: int,
    row: RopeFactors | None,
    load: Callable[[Setting, Path], LoadedModel],
) -> float:
    pieces, of = cut(windows, length), len(windows[0].ids)
    key = f"ppl {setting.key(model)} {name} {length} {row.key if row else ''} {len(windows)} windows of {of}"
    return float(state.once(key, lambda: perplexity(load(setting, model), row, pieces)))


TABLES = {
    "without": without,
    "nonuniform": nonuniform,
    "by-length": by_length,
    "angles": angles,
    "retrieval": retrieval,
    "retrieval-far": retrieval_far,
    "retrieval-target": retrieval_target,
    "trained-length": trained_length,
    "nearer": nearer,
    "direct": direct,
    "mixed": mixed,
    "mixed-longest": mixed_longest,
}

STAGES_OF = {
    "base": (),
    "without": ("search",),
    "nonuniform": ("search",),
    "direct": ("search", "finetune"),
    "mixed": ("search", "finetune"),
    "mixed-longest": ("search", "finetune"),
}
"""Of which kinds of stages a part is made, where it is not of all: what comes after those changes nothing in it."""
