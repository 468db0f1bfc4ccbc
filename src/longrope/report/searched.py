"""What the page says of the search itself: what was searched, how, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope.errors import plural
from longrope.report.read import Evaluation, RunData
from longrope.report.style import count_text

# Settings: what the page calls them, what their words mean there, and what it says of any other value.
_WORDS: dict[str, tuple[str, dict[str, str], str]] = {
    "method": (
        "Method",
        {
            "evolution": "evolution: Algorithm 1 of LongRoPE",
            "gradient": "gradient: descent from the best seeds",
            "hybrid": "hybrid: all seeds, gradient descent from the best, a short evolution around the result",
        },
        "{}",
    ),
    "objective": (
        "Objective",
        {
            "needle": "needle: the loss of the answer to a question about a number told in a real document",
            "both": "both: perplexity of whole windows, and of the answers to questions about a number told in others",
        },
        "{}",
    ),
    "space": (
        "Space",
        {
            "longrope": "longrope: every pair is free",
            "longrope2": "longrope2: free from the real critical dimension on, NTK below",
        },
        "{}",
    ),
    "attention_factor": ("Attention factor", {"search": "searched"}, "not searched: {}"),
    "start_tokens": ("Start tokens", {"search": "searched"}, "not searched: {}"),
}


@dataclass(frozen=True)
class Counts:
    """How much of what a search did: candidates on all windows, on some only, gradient steps.

    failed: candidates of which a loss was not finite. tokens and recomputed: token-passes.
    """

    complete: int
    failed: int
    partial: int
    gradient: int
    tokens: float
    recomputed: float


def objective_text(settings: Mapping[str, Any]) -> str:
    """What the values of a search are."""
    word = str(settings.get("objective", "value"))
    return "perplexity of text and answers" if word == "both" else word


def counts(evaluations: Sequence[Evaluation]) -> Counts:
    """What the lines of evaluations.jsonl add up to."""

    def candidates(kind: str) -> set[str]:
        return {each.candidate for each in evaluations if each.kind == kind}

    complete, failed = candidates("complete"), candidates("failed")
    return Counts(
        complete=len(complete),
        failed=len(failed),
        partial=len(candidates("partial") - complete - failed - candidates("unrounded")),
        gradient=len(candidates("gradient")),
        tokens=sum(each.tokens for each in evaluations),
        recomputed=sum(each.recomputed for each in evaluations),
    )


def evaluations_text(run: RunData) -> str:
    """What a search cost: `69.4 evaluations`, each as many token-passes as all search windows have tokens."""
    tokens = counts(run.evaluations).tokens
    if run.evaluation_tokens is None:
        return f"{count_text(tokens)} token-passes"
    return f"{number_text(tokens / run.evaluation_tokens)} evaluations"


def number_text(number: float) -> str:
    """A number of evaluations, of which one may be a part: 69.4, 7, 1,344."""
    return f"{number:,.1f}".removesuffix(".0")


def search_facts(run: RunData) -> dict[str, str]:
    """What was searched and what was done for it, by name; only what the files say."""
    facts = {}
    for name, (term, words, other) in _WORDS.items():
        if (value := run.settings.get(name)) is not None:
            facts[term] = words.get(str(value), other.format(value))
    if run.evaluations:
        facts["Work"] = _work(counts(run.evaluations))
    return facts


def _work(done: Counts) -> str:
    parts = [f"{plural(done.complete, 'candidate')} on all windows"]
    if done.failed:
        parts.append(f"{done.failed:,} without a finite value")
    if done.partial:
        parts.append(f"{done.partial:,} on some windows only")
    if done.gradient:
        parts.append(plural(done.gradient, "gradient step"))
    if done.recomputed:
        parts.append(f"{count_text(done.recomputed)} tokens run again to save memory, beside the token-passes")
    return ", ".join(parts)
