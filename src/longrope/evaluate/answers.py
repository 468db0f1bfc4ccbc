"""Whether a model would write the answer that ends a prompt, and how likely it finds it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from longrope.evaluate.perplexity import in_batches
from longrope.model import LoadedModel


def answers(
    loaded: LoadedModel, prompts: NDArray[np.int64], sizes: Sequence[int]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(found (N,), losses (N,) in nats) of the last `sizes` tokens of prompts (N, T), under the factors carried now.

    An answer counts as found when every one of its tokens is the most likely one after the right ones before it, which
    is when greedy decoding writes it.
    """
    longest = max(sizes)

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), loaded.autocast():
            ids = ids.to(loaded.device)
            logits: torch.Tensor = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=longest + 1).logits
            given, wanted = logits[:, :-1], ids[:, -longest:].to(logits.device)
            losses = torch.nn.functional.cross_entropy(given.float().transpose(1, 2), wanted, reduction="none")
            return torch.stack((given.argmax(-1) == wanted, losses), dim=-1).cpu()

    scored = in_batches(loaded, run, torch.from_numpy(prompts)).double()
    rows = [row[-size:] for row, size in zip(scored, sizes, strict=True)]
    found = np.array([bool(row[:, 0].all()) for row in rows])
    return found, np.array([float(row[:, 1].sum()) for row in rows])
