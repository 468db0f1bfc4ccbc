"""Peak memory and time of one long prompt: run by runtime.py, each length in a process of its own.

    python benchmarks/prefill.py {tiny,narrow} --tokens 131072 ...

Prints one JSON object: bytes in use before the prompt, the peak during it, their difference, what the cache itself
holds, and seconds. `narrow` has two layers and one head of 64 numbers, so that half a million tokens fit anywhere. With
--document the prompt is that of a text, and its perplexity is measured on the way, chunk by chunk.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from common import random_llama
from longrope.baselines import baseline
from longrope.checkpoint import TINY, LoadOptions
from longrope.factors import FactorTable
from longrope.model import LoadedModel, load_model
from longrope.runtime.caches import RoomyCache
from longrope.runtime.chunks import CHUNK
from longrope.runtime.room import bytes_a_token
from longrope.runtime.switch import Switch
from longrope.runtime.text import prompt_ids
from memory import highest, resident

WARM_UP = 3  # chunks


def prompt(loaded: LoadedModel, tokens: int, document: str | None, seed: int) -> torch.Tensor:
    """Token ids (1, tokens): the beginning of a text, or random ones."""
    if document is None:
        vocabulary = loaded.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
    ids = prompt_ids(loaded.tokenizer, Path(document).read_text("utf-8"))
    assert len(ids) >= tokens, f"the document has {len(ids)} tokens"
    return torch.tensor([ids[:tokens]])


@torch.inference_mode()
def run(loaded: LoadedModel, switch: Switch, ids: torch.Tensor, scored: bool) -> tuple[float, Any]:
    """(summed loss in nats, cache) of a prompt."""
    cache = RoomyCache(loaded.model.config, ids.shape[1])
    total = 0.0
    with loaded.autocast():
        for start, outputs in switch.fill(cache, ids, ids.shape[1]):
            if scored:
                piece = ids[:, start : start + outputs.last_hidden_state.shape[1]]
                targets = ids[0, start + 1 : start + piece.shape[1] + 1]
                for first, _, logits in loaded.tail(outputs, piece):
                    wanted = targets[first : first + logits.shape[1]]
                    scores = logits[0, : len(wanted)].float()
                    total += float(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"))
    return total, cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["tiny", "narrow"])
    for name, default in (("tokens", None), ("chunk", CHUNK), ("seed", 0), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, required=default is None, default=default)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--document")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model == "tiny":
        loaded = load_model(TINY, LoadOptions(device=args.device, threads=args.threads))
    else:
        loaded = random_llama(vocabulary=259, hidden=64, layers=2, seed=args.seed, device=args.device)
    shape = loaded.rope.shape
    row = baseline("yarn", shape, args.tokens)
    switch = Switch(
        loaded.model, loaded.patch(), FactorTable(shape.rope_theta, shape.rotary_dim, shape.original_length, (row,)),
        chunk=args.chunk,
    )  # fmt: skip
    ids = prompt(loaded, args.tokens, args.document, args.seed).to(loaded.device)
    run(loaded, switch, ids[:, : min(args.tokens, WARM_UP * args.chunk)], args.document is not None)
    before, begun = resident(loaded.device), time.perf_counter()
    loss, cache = run(loaded, switch, ids, args.document is not None)
    seconds, peak = time.perf_counter() - begun, highest(loaded.device)
    told = {"tokens": args.tokens, "before_bytes": before, "peak_bytes": peak, "call_bytes": peak - before}
    told |= {"cache_bytes_a_token": bytes_a_token(cache), "seconds": round(seconds, 3)}
    if args.document is not None:
        told["perplexity"] = math.exp(loss / (args.tokens - 1))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
