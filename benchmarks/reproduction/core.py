"""The core: the base model, all stages of the plan, and the figures that must hold."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope.evaluate.passkey import PasskeyMeasure
from longrope.evaluate.perplexity import window_losses
from longrope.evaluate.recorded import measure_run
from longrope.extension.run import extend
from longrope.factors import RopeFactors
from longrope.model import LoadedModel
from longrope.runs import DONE
from longrope.windows import Window
from reproduction.setting import Setting, Size, cut, with_recall
from reproduction.state import State

SECOND = ("pi", "ntk", "yarn")
PRETRAIN = Path(__file__).parents[2] / "tools" / "pretrain.py"
# The paper's own figures, beside which ours are put: tables 6, 9 and 10, and figure 4.
PAPER = {"ratio": 7.08 / 6.17, "recovery": 3.85 / 3.58, "passkey": 0.9}


def perplexity(loaded: LoadedModel, row: RopeFactors | None, windows: Sequence[Window]) -> float:
    """Token-weighted perplexity of some windows under a row of factors."""
    loaded.widen_window(len(windows[0].ids))
    with loaded.patch() as patch:
        patch.install(row)
        losses = sum(float(each) for window in windows for each in window_losses(loaded, [window]))
    return math.exp(losses / sum(window.scored for window in windows))


def base(setting: Setting, state: State) -> None:
    """Train the base model, where its weights are not there yet; on shorter windows first, where its size says so."""
    if setting.base.is_dir():
        return
    size, before = setting.size, setting.state / "base-first"
    init = size.init
    if size.first is not None:
        if not (before / "model").is_dir():
            state.begin()
            length, tokens = size.first
            pretrain(setting, replace(size, length=length, tokens=tokens), before)
        init = str(before / "model")
    state.begin()
    pretrain(setting, replace(size, init=init), setting.state / "base")


def pretrain(setting: Setting, size: Size, out: Path) -> None:
    """A training by the script that made `tiny`, in a process of its own."""
    words = [sys.executable, str(PRETRAIN), "--out", str(out)]
    words += ["--documents", str(setting.documents / "train"), "--seed", str(setting.seed)]
    for name in ("length", "tokens", "batch", "recall", "hidden", "intermediate", "layers", "heads", "theta"):
        words += [f"--{name}", str(getattr(size, name))]
    words += ["--kv-heads", str(size.heads), "--head-dim", str(size.head_dim)]
    words += ["--learning-rate", str(size.learning_rate), "--init", size.init]
    subprocess.run(words, check=True)


def stages(setting: Setting, state: State) -> None:
    """All stages of the plan: trained on the training documents, searched on validation, never on test.

    Where the calls are limited, one stage at a time, and what follows the last one as one more.
    """
    while not (setting.run / DONE).exists():
        state.begin()
        _extend(setting, at_most=1 if state.cut else None)


def searches(setting: Setting, state: State) -> None:
    """The searches on the base model alone, which the tables without fine-tuning are of."""
    base(setting, state)
    while not all((setting.run / stage.name / DONE).exists() for stage in setting.plan.stages if stage.do == "search"):
        state.begin()
        _extend(setting, at_most=1)


def _extend(setting: Setting, at_most: int | None) -> None:
    """Go on with the extension, by so many stages."""
    extend(
        str(setting.base),
        to=setting.plan.target,
        documents=[str(setting.documents / "train")],
        search_documents=[str(setting.documents / "validation")],
        unseen=[str(setting.documents / "test")],
        stages=with_recall(setting),
        out=setting.run,
        tracker="none",
        seed=setting.seed,
        options=setting.options,
        at_most=at_most,
    )


def lengths(setting: Setting, state: State) -> None:
    """Perplexity on the same tokens: the base at its length, fine-tuned at theirs, at the target by every method."""
    original, target, trained = setting.size.length, setting.plan.target, setting.trained
    windows = setting.judged(target)
    final = setting.run / "checkpoint"

    def value(model: Path, name: str, length: int, row: RopeFactors | None) -> float:
        key = f"ppl {setting.key(model)} {name} {length} {row.key if row else ''} {len(windows)} windows of {target}"
        return float(state.once(key, lambda: perplexity(setting.load(model), row, cut(windows, length))))

    at_original = value(setting.base, "base", original, None)
    table = setting.load(final).meaning
    by_length: dict[str, dict[int, float]] = {"base": {original: at_original}, "fine-tuned": {}, "ours": {}}
    for length in trained:
        model = setting.stage("finetune", length) / "checkpoint"
        row = setting.load(model).meaning.row_for(length)
        by_length["fine-tuned"][length] = value(model, "fine-tuned", length, row)
        state.figure(
            f"perplexity at {length // original}x after fine-tuning / of the base at its own length",
            "the same tokens of the test document", by_length["fine-tuned"][length] / at_original, 1.0,
        )  # fmt: skip
    longest, row = trained[-1], table.row_for(trained[-1])
    by_length["ours"][longest] = by_length["fine-tuned"][longest]
    if row.key != setting.trained_with.key:  # searched anew
        by_length["ours"][longest] = value(final, "ours", longest, row)
        state.figure(
            f"perplexity at {longest // original}x by the final table / of the base at its own length",
            "the same tokens of the test document", by_length["ours"][longest] / at_original, 1.0,
        )  # fmt: skip
    recovered = by_length["ours"][original] = value(final, "recovered", original, table.row_for(original))
    unrecovered = value(final, "not recovered", original, setting.trained_with)
    state.figure(
        "short window after recovery / base", "windows of the original length", recovered / at_original, 1.02,
        paper=PAPER["recovery"], without_recovery=unrecovered / at_original,
    )  # fmt: skip
    ours = by_length["ours"][target] = value(final, "ours", target, table.row_for(target))
    state.figure(
        f"perplexity at {target // original}x / at the fine-tuned length", "under the row that was trained with",
        ours / by_length["fine-tuned"][longest], 1.15, aim=1.10, paper=PAPER["ratio"],
        by_the_final_table=ours / by_length["ours"][longest],
    )  # fmt: skip
    second = replace(setting.load(final), under=setting.trained_with)
    rows = {name: second.baseline(name, target) for name in SECOND}
    for name in SECOND:
        theirs = value(final, f"second {name}", target, rows[name])
        by_length.setdefault(name, {})[target] = theirs
        on = f"second interpolation to {target // original}x"
        state.figure(f"perplexity, ours / {name}", on, ours / theirs, 1.0, ours=ours, theirs=theirs)
    state.table("perplexity by length", {name: {str(k): v for k, v in row.items()} for name, row in by_length.items()})


def passkey(setting: Setting, state: State) -> None:
    """Passkeys at every power of two up to the fine-tuned length."""
    original, longest = setting.size.length, setting.trained[-1]
    if not (setting.state / "passkey" / DONE).exists():
        state.begin()
    lengths = [original << power for power in range((longest // original).bit_length())]
    tries = setting.size.tries
    measured = passkeys(setting, lengths, "passkey", tries, setting.seed)
    tell_passkeys(setting, state, "passkeys", f"{tries} tries a length", measured)


def passkeys(
    setting: Setting, wanted: list[int], name: str, tries: int, seed: int
) -> list[tuple[int, float, list[float] | None]]:
    """(length, share found, interval) of the final checkpoint, as a run of its own."""
    table = setting.load(setting.final).meaning
    rows = {("longrope", length): table.row_for(length) for length in wanted}
    done = passkeys_by_row(setting, rows, name, tries, seed)
    return [(each["length"], each["value"], each["ci"]) for each in done]


def passkeys_by_row(
    setting: Setting, rows: Mapping[tuple[str, int], RopeFactors], name: str, tries: int, seed: int
) -> list[dict[str, Any]]:
    """The results of the final checkpoint under some rows by name and length, as a run of its own."""
    measure, wanted = PasskeyMeasure(tries=tries, seed=seed), [length for _, length in rows]
    loaded, out = setting.load(setting.final), setting.state / name
    results: list[dict[str, Any]] = measure_run("reproduce", loaded, measure, rows, {"lengths": wanted}, out=out)[
        "results"
    ]
    return results


def tell_passkeys(
    setting: Setting, state: State, what: str, on: str, measured: list[tuple[int, float, list[float] | None]]
) -> None:
    """The table of passkeys found, and what is missed at the worst length, up to the fine-tuned one where it is there.

    Beyond it the paper's 90% are an aim.
    """
    trained = [length for length, _, _ in measured if length <= setting.trained[-1]]
    longest = max(trained or [length for length, _, _ in measured])
    found = {length: share for length, share, _ in measured if length <= longest}
    worst = min(found, key=lambda length: found[length])
    failed = [length for length, share, _ in measured if share < PAPER["passkey"]]
    state.figure(
        f"{what} missed, at the worst length up to {longest // setting.size.length}x", on,
        1 - found[worst], 0.1, worst_length=worst, paper=1 - PAPER["passkey"],
        first_length_that_fails=failed[0] if failed else None,
    )  # fmt: skip
    state.table(f"{what} found", [[length, share, ci] for length, share, ci in measured])


CORE = {"base": base, "stages": stages, "lengths": lengths, "passkey": passkey}
