"""Greedy generation under the factors that a model carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig

from longrope.evaluate.perplexity import run_if_it_fits, window_too_long
from longrope.model import LoadedModel
from longrope.runtime.text import ends_of_text


def greedy(loaded: LoadedModel, ids: NDArray[np.int64], tokens: int) -> list[int]:
    """The most likely continuation of a prompt (T,), token by token: at most `tokens`, up to an end of text.

    The model carries one row of factors, or none, so that the keys that generation caches stay right; under a whole
    table, ScaledRotary refuses a sequence that changes its row. One prompt at a time: in a batch its values would be
    rounded otherwise, and a record would depend on what it was measured with. Raises UserError when there is not
    enough memory.
    """

    def run(batch: Tensor) -> Tensor:
        batch = batch.to(loaded.device)
        model: Any = loaded.model
        with torch.inference_mode(), loaded.autocast():
            whole: Tensor = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens)
        return whole[0, batch.shape[1] :].cpu()

    prompt = torch.from_numpy(ids)[None]
    with _greedily(loaded):
        made = run_if_it_fits(run, prompt)
        if made is None:
            raise window_too_long(run, prompt)
    return [int(token) for token in made]


@contextmanager
def _greedily(loaded: LoadedModel) -> Iterator[None]:
    """Give a model generation settings that only say where a text ends.

    Its own may ask for sampling or penalise repetition; `generate` would fill in every setting that is not given.
    """
    model: Any = loaded.model
    own = model.generation_config
    ends = ends_of_text(loaded)
    # Nothing is padded: the token is named so that `generate` need not choose one and say so.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, use_cache=True, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    try:
        yield
    finally:
        model.generation_config = own
