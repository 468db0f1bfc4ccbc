"""What a search minimises: the loss of the scored tokens of its windows, and how one worker computes it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from longrope.evaluate.perplexity import window_losses
from longrope.factors import RopeFactors
from longrope.memory import peak_memory
from longrope.model import LoadedModel
from longrope.search.backward import activation_bytes, loss_gradient
from longrope.search.tasks import Gradient, Outcome, Task
from longrope.windows import Window

# A backward pass counts as two forward passes.
_PASSES_WITH_GRADIENT = 3


class Evaluator:
    """Does tasks in this process, on windows that are the same for every candidate, so that differences are paired.

    Factors of tasks multiply `trained`, by default what the weights were trained with. Carries a patch on the model for
    as long as it lives; `close` (or leaving it as a context) restores the model.
    """

    def __init__(self, loaded: LoadedModel, windows: Sequence[Window], trained: RopeFactors | None = None) -> None:
        self.loaded, self.windows, self.trained = loaded, windows, trained or loaded.trained
        self.patch = loaded.patch()

    def __call__(self, task: Task) -> Outcome:
        """The losses of a task, and their gradient when it asks for it."""
        start = time.perf_counter()
        windows = [self.windows[index] for index in task.windows]
        tokens = sum(len(window.ids) for window in windows)
        if not task.gradient:
            self.patch.install(task.factors.over(self.trained))
            losses = window_losses(self.loaded, windows)
            seconds = time.perf_counter() - start
            return Outcome(tuple(losses.tolist()), tokens, seconds, peak_bytes=peak_memory(self.loaded.device))
        factors = task.factors.over(self.trained)
        losses, rescale, attention_factor, recomputed = loss_gradient(self.loaded, self.patch, factors, windows)
        rescale, attention_factor = rescale * self.trained.vector, attention_factor * self.trained.attention_factor
        return Outcome(
            losses=tuple(losses.tolist()),
            tokens=_PASSES_WITH_GRADIENT * tokens,
            seconds=time.perf_counter() - start,
            gradient=Gradient(tuple(rescale.tolist()), attention_factor),
            recomputed=recomputed,
            peak_bytes=peak_memory(self.loaded.device),
        )

    def gradient_bytes(self, factors: RopeFactors) -> int:
        """About the memory that the gradient of the longest window takes beyond the weights.

        Raises UserError when the model's loss has no derivative by the factors.
        """
        longest = max(self.windows, key=lambda window: len(window.ids))
        return activation_bytes(self.loaded, self.patch, factors.over(self.trained), longest)

    def close(self) -> None:
        """Restore the model."""
        self.patch.undo()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
