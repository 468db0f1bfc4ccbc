"""Factors on a transformers model of one's own, and a generation loop of one's own that passes a boundary of the table.

python examples/own_loop.py [--factors examples/tiny-2k.json]

The text grows from 250 tokens past 256, where the table's second row begins. The cache is made again there, once; at
the end the logits are those of one pass over the whole text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import longrope
from longrope.checkpoint import model_source


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=Path, default=Path(__file__).with_name("tiny-2k.json"))
    args = parser.parse_args()

    checkpoint = model_source("tiny")  # the embedded model's folder; any folder or Hub id does
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = Path(argparse.__file__).read_text()[:249]  # a byte is a token, and BOS makes 250
    ids = torch.tensor([tokenizer(text)["input_ids"]])

    with longrope.apply(model, args.factors) as handle, torch.no_grad():
        answer = model(input_ids=ids, use_cache=True)
        cache = "cache" if "cache" in answer else "past_key_values"  # its name before transformers 5.24
        for _ in range(20):
            token = answer.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, token), dim=1)
            answer = model(input_ids=token, **{cache: answer[cache]}, use_cache=True)
        whole = model(input_ids=ids).logits[:, -1]
        gap = (answer.logits[:, -1] - whole).abs().max().item()
        print(f"{ids.shape[1]} tokens, {handle.recomputed} of them run again, largest gap to one pass {gap:.1e}")
        print(repr(tokenizer.decode(ids[0, 250:])))
        if handle.recomputed == 0 or gap > 1e-3:
            raise SystemExit("the switch was not exact")


if __name__ == "__main__":
    main()
