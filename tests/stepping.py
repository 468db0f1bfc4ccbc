"""Follow a search's generator with closed-form outcomes: what was asked, window by window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from longrope.search.archive import Archive
from longrope.search.tasks import Gradient, Outcome, Proposal, Result, Steps, Task

Answer = Callable[[Task], Outcome]


@dataclass
class Asked:
    """The proposals of a search, by round."""

    rounds: list[list[Proposal]] = field(default_factory=list)

    @property
    def proposals(self) -> list[Proposal]:
        return [proposal for each in self.rounds for proposal in each]

    @property
    def windows(self) -> int:
        """How many windows were run in all."""
        return sum(len(proposal.task.windows) for proposal in self.proposals)

    def windows_of(self, key: str) -> list[int]:
        """The windows that a candidate was tried on, in the order in which they were asked for."""
        tasks = [each.task for each in self.proposals if not each.task.gradient and each.task.factors.key == key]
        return [window for task in tasks for window in task.windows]


def follow(steps: Steps[Result], archive: Archive, answer: Answer, asked: Asked) -> Result:
    """What the search returns; `asked` is filled."""
    try:
        proposals = next(steps)
        while True:
            asked.rounds.append(list(proposals))
            outcomes = [answer(proposal.task) for proposal in proposals]
            for proposal, outcome in zip(proposals, outcomes, strict=True):
                archive.add(proposal.task, outcome, may_win=proposal.may_win)
            proposals = steps.send(outcomes)
    except StopIteration as stop:
        result: Result = stop.value
        return result


def losses(*values: float, gradient: Gradient | None = None) -> Outcome:
    return Outcome(tuple(values), tokens=0, seconds=0.0, gradient=gradient)
