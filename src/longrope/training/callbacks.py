"""What is seen of a training while it runs: losses on disk, progress, and its end when a loss is no number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longrope.errors import UserError
from longrope.files import read_lines
from longrope.training.state import checkpoints, log_loss, loss_line, mark_whole, remove


@dataclass(frozen=True)
class Progress:
    """Where a training is: steps done of all, the loss of the last, seconds left (about)."""

    done: int
    total: int
    loss: float
    seconds_left: float


class Watch(TrainerCallback):
    """Writes a line a step, marks checkpoints whole, and stops where a loss or a gradient is no number.

    path: of the losses. of: the identity of the run. keep: checkpoints that stay. total: steps.
    """

    def __init__(
        self, path: Path, *, of: str, keep: int, total: int, on_progress: Callable[[Progress], None] | None
    ) -> None:
        self.path, self.of, self.keep, self.total, self.on_progress = path, of, keep, total, on_progress
        self._begun: tuple[float, int] | None = None

    def losses(self) -> list[float]:
        """The loss of every step so far."""
        return [float(line["loss"]) for line in read_lines(self.path)]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count."""
        self._begun = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the loss of a step. Raises UserError for one that is no number, before anything is saved of it."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"a loss of {loss}" if not math.isfinite(loss) else f"a gradient of norm {norm}"
            # The weights before this step are what went wrong: those that a later step began with have shown a loss.
            saved = [step for step in checkpoints(Path(str(args.output_dir))) if step < state.global_step - 1]
            kept = f"checkpoint-{saved[-1]} is the last good one" if saved else "no good one was saved yet"
            rule = "the loss stays a number"
            do = f"{kept}; train with a lower --learning-rate or a longer --warmup into another --out"
            raise UserError("training", got=f"{what} at step {state.global_step}", rule=rule, do=do)
        log_loss(self.path, loss_line(state.global_step, logs))
        self._remove_all_but(self.keep, args)  # this is the loss of weights after the last of them, or later
        if self.on_progress and self._begun:
            begun, first = self._begun
            rate = (time.perf_counter() - begun) / max(1, state.global_step - first)
            left = rate * (self.total - state.global_step)
            self.on_progress(Progress(state.global_step, self.total, loss, left))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint whole, when all processes have written what is theirs, and remove older ones.

        Trainer would remove them before that: of one that is to stay, a kill in between would leave none.
        """
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_whole(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self.of)
            # The one before stays until its weights have shown a loss: they may be no numbers.
            self._remove_all_but(max(2, self.keep), args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing follows that would show a loss."""
        if state.is_world_process_zero:
            self._remove_all_but(self.keep, args)

    def _remove_all_but(self, last: int, args: TrainingArguments) -> None:
        for older in list(checkpoints(Path(str(args.output_dir))).values())[:-last]:
            remove(older)
