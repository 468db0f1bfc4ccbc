"""Tasks out, outcomes in, every outcome on disk at once, until the search ends or its budget does."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrope.errors import UserError
from longrope.runs import EVALUATIONS, RunFolder
from longrope.search.archive import Archive
from longrope.search.tasks import Outcome, Proposal, Steps, Task

if TYPE_CHECKING:
    from longrope.workers import Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a search is: evaluations done of how many (in token-passes), the round, the best value, their rate.

    done: to a tenth, and what evaluations.jsonl adds up to, as the page tells it: a candidate that is tried on some
    windows only is a part of one. origin: of the candidate that was done last.
    """

    done: float
    total: int
    iteration: int
    best: float
    rate: float
    origin: str = ""


OnProgress = Callable[[Progress], None]
"""Called after each task of a search."""


@dataclass(frozen=True)
class Budget:
    """What a search may cost. evaluation: tokens of all search windows. expected: evaluations of a whole search."""

    evaluation: int
    expected: int
    evaluations: int | None = None
    token_passes: int | None = None
    hours: float | None = None
    gradient_bytes: int | None = None
    """About the memory of a gradient beyond the weights, where the search takes any."""

    @property
    def tokens(self) -> float:
        """Token-passes that are allowed; infinite without a limit."""
        by_count = math.inf if self.evaluations is None else self.evaluations * self.evaluation
        return min(by_count, math.inf if self.token_passes is None else self.token_passes)

    @property
    def total(self) -> int:
        """Evaluations that a search is going to take, at most."""
        return max(1, min(self.expected, math.floor(min(self.tokens, 2**62) / self.evaluation)))

    def check(self) -> None:
        """Raise UserError when it does not reach for one evaluation."""
        if self.tokens < self.evaluation:
            raise UserError(
                "--token-passes",
                got=f"{self.token_passes:,}",
                rule=f"one evaluation of all search windows takes {self.evaluation:,}",
                do=f"give at least {self.evaluation:,}, or fewer --windows",
            )


class Loop:
    """A search going on in an open run folder.

    Resuming is replaying: the search is asked from its start, and tasks whose outcome is in evaluations.jsonl are not
    done again. So an interrupted search ends as one that never was.
    """

    def __init__(
        self, run: RunFolder, archive: Archive, workers: Workers[Task, Outcome], lengths: Sequence[int], budget: Budget
    ) -> None:
        self.run, self.archive, self.workers, self.budget = run, archive, workers, budget
        self.lengths = lengths
        self.seen = archive.empty()  # as outcomes come in, where `archive` has them in the order of the tasks
        lines = run.evaluations()
        self.known = {line["key"]: self._outcome(line) for line in lines}
        self.spent, self.fresh_tokens = 0, 0
        # What evaluations.jsonl adds up to: a task that is asked for twice is spent twice, and done once.
        self.done_tokens = sum(outcome.tokens for outcome in self.known.values())
        self.index = 1 + max((line.get("index", 0) for line in lines), default=-1)
        # Seconds that the search went on for, as last written down: what ends it by the hours, here and when resumed.
        self.earlier = self.elapsed = max((float(line.get("elapsed", 0)) for line in lines), default=0.0)
        self.begun = time.perf_counter()

    def _outcome(self, line: Mapping[str, Any]) -> Outcome:
        try:
            return Outcome.from_dict(line)
        except (KeyError, TypeError, ValueError):
            got, rule = f"{self.run.path / EVALUATIONS} with a line that is not whole", "every line is an evaluation"
            raise UserError("run", got=got, rule=rule, do="remove that line, and it is evaluated again") from None

    def go(self, steps: Steps[None], on_progress: OnProgress | None = None) -> None:
        """Follow a search until it ends or the budget does; the archive then knows the best."""
        if self.known:
            self._say_cost(next(iter(self.known.values())))
        try:
            proposals = next(steps)
            while True:
                outcomes = self._do(proposals, on_progress)
                if outcomes is None:
                    logger.info("the budget is used up: the best so far is the result")
                    steps.close()
                    return
                proposals = steps.send(outcomes)
        except StopIteration:
            return

    def _do(self, proposals: Sequence[Proposal], on_progress: OnProgress | None) -> list[Outcome] | None:
        """Outcomes of a round, in order; None when the budget ended before all were there."""
        chosen = self._affordable(proposals)
        outcomes: dict[str, Outcome] = {}
        fresh: list[Proposal] = []
        asked: set[str] = set()
        for proposal in chosen:
            key = proposal.task.key
            if key in self.known:
                outcomes[key] = self.known[key]
                self.seen.add(proposal.task, outcomes[key])
            elif key not in asked:
                fresh.append(proposal)
            asked.add(key)
        ended = len(chosen) < len(proposals)
        for proposal, outcome in self._fresh(fresh):
            outcomes[proposal.task.key] = outcome
            self._show(proposal, on_progress)
        ended = ended or any(each.task.key not in outcomes for each in chosen)
        for proposal in chosen:  # in the order of the tasks, whoever finished first
            if proposal.task.key in outcomes:
                self.archive.add(proposal.task, outcomes[proposal.task.key], may_win=proposal.may_win)
        if chosen:
            self._show(chosen[-1], on_progress)
        return None if ended else [outcomes[each.task.key] for each in chosen]

    def _affordable(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """The tasks, in order, that the token-passes left allow."""
        chosen = []
        for proposal in proposals:
            passes = 3 if proposal.task.gradient else 1
            cost = passes * sum(self.lengths[window] for window in proposal.task.windows)
            if self.spent + cost > self.budget.tokens:
                break
            self.spent += cost
            chosen.append(proposal)
        return chosen

    def _fresh(self, proposals: Sequence[Proposal]) -> Iterator[tuple[Proposal, Outcome]]:
        """Outcomes of tasks that were never done, written down as each ends; until the hours are over."""
        # The very first task runs alone: what it took tells the cost of the search before the rest begins.
        rounds = [proposals] if self.known else [proposals[:1], proposals[1:]]
        for part in rounds:
            if not part or self._is_late():
                return
            first, self.index = self.index, self.index + len(part)
            is_first = not self.known
            for place, outcome in self.workers.run([proposal.task for proposal in part]):
                self._write(first + place, part[place], outcome)
                self.fresh_tokens += outcome.tokens
                self.done_tokens += outcome.tokens
                self.known[part[place].task.key] = outcome
                yield part[place], outcome
                if self._is_late():
                    return
            if is_first:
                self._say_cost(self.known[part[0].task.key])

    def _is_late(self) -> bool:
        return self.budget.hours is not None and self.elapsed >= 3600 * self.budget.hours and self.seen.best is not None

    def _write(self, index: int, proposal: Proposal, outcome: Outcome) -> None:
        task = proposal.task
        self.elapsed = round(self.earlier + time.perf_counter() - self.begun, 4)
        self.run.log_evaluation(
            {
                "index": index,
                "iteration": proposal.iteration,
                "origin": proposal.origin,
                "key": task.key,
                "rescale": list(task.factors.rescale),
                "start_tokens": task.factors.start_tokens,
                "attention_factor": task.factors.attention_factor,
                "windows": list(task.windows),
                "value": self._value(proposal, outcome),
                "elapsed": self.elapsed,
                **outcome.to_dict(),
            }
        )

    def _value(self, proposal: Proposal, outcome: Outcome) -> float | None:
        """The candidate's value where this outcome completes it."""
        value = self.seen.add(proposal.task, outcome)
        return value if value is not None and math.isfinite(value) else None

    def _say_cost(self, outcome: Outcome) -> None:
        """What the search will cost, by its first task, before the others."""
        seconds = outcome.seconds / outcome.tokens * self.budget.evaluation
        tokens = self.budget.total * self.budget.evaluation
        time_left = self.budget.total * seconds / self.workers.count
        if self.budget.hours is not None:
            time_left = min(time_left, 3600 * self.budget.hours)
        memory = "" if outcome.peak_bytes is None else f"; peak memory so far {outcome.peak_bytes / 2**30:.2g} GiB"
        if self.budget.gradient_bytes is not None:
            memory += f", activations of a gradient about {self.budget.gradient_bytes / 2**30:.2g} GiB"
        logger.info(
            "cost: up to %s evaluations of %s tokens, %s token-passes; one takes %.2g s, all about %s%s",
            f"{self.budget.total:,}",
            f"{self.budget.evaluation:,}",
            f"{tokens:,}",
            seconds,
            format_seconds(time_left),
            memory,
        )

    def _show(self, proposal: Proposal, on_progress: OnProgress | None) -> None:
        if on_progress:
            best = self.archive.best[0] if self.archive.best else math.inf
            elapsed = time.perf_counter() - self.begun
            rate = self.fresh_tokens / self.budget.evaluation / elapsed
            done = min(self.budget.total, round(self.done_tokens / self.budget.evaluation, 1))
            on_progress(Progress(done, self.budget.total, proposal.iteration, best, rate, proposal.origin))


def format_seconds(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
