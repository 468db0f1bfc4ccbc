"""The exact switch at run time: what it costs beside stock transformers, and what long prompts take.

    python benchmarks/runtime.py --document BOOK    # all figures, about half an hour on 2 quiet cores
    python benchmarks/runtime.py --quick            # only that it runs: its figures mean nothing

docs/benchmarks.md says what is measured and how. Ends with status 1 when a figure misses its limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import Figure, arguments, paired, run_benchmark, spread, timed
from longrope.baselines import baseline
from longrope.checkpoint import TINY, LoadOptions
from longrope.documents import read_sources
from longrope.evaluate.passkey import PasskeyMeasure
from longrope.factors import FactorTable, unscaled
from longrope.model import LoadedModel, load_model
from longrope.runtime.caches import CACHE, cache_of
from longrope.runtime.switch import Switch
from longrope.windows import Window, windows_of

DECODING = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompt: int = 1024
    new: int = 128
    blocks: int = 15
    prompts: int = 31
    switches: int = 15
    windows: int = 32
    tries: int = 20
    tiny: tuple[int, ...] = (32_768, 65_536, 131_072)
    narrow: tuple[int, ...] = (131_072, 262_144, 524_288)
    document: int = 131_072


QUICK = Sizes(
    prompt=64, new=8, blocks=1, prompts=1, switches=1, windows=2, tries=2,
    tiny=(8192, 12_288), narrow=(8192, 16_384), document=4096,
)  # fmt: skip


def table_of(loaded: LoadedModel) -> FactorTable:
    """Three rows for an extension to 8x: that of the model, and YaRN's at 2x and 8x."""
    shape = loaded.rope.shape
    rows = [unscaled(shape.pairs, shape.original_length)]
    rows += [baseline("yarn", shape, ratio * shape.original_length) for ratio in (2, 8)]
    return FactorTable(shape.rope_theta, shape.rotary_dim, shape.original_length, tuple(rows))


def beside_stock(loaded: LoadedModel, sizes: Sizes) -> list[Figure]:
    """Prefill and decoding under a row beside the same row in stock transformers, in turn."""
    from transformers import AutoModelForCausalLM

    from longrope.checkpoint import model_source
    from longrope.convert import to_transformers_config

    row = baseline("yarn", loaded.rope.shape, 8 * loaded.rope.original_length)
    shape = loaded.rope.shape
    table = FactorTable(shape.rope_theta, shape.rotary_dim, shape.original_length, (row,))
    doubled = FactorTable(
        shape.rope_theta, shape.rotary_dim, shape.original_length,
        (row.with_values(up_to=shape.original_length), row),
    )  # fmt: skip
    kept = ("rope_parameters", "max_position_embeddings")
    keys = {name: value for name, value in to_transformers_config(doubled).items() if name in kept}
    stock: Any = AutoModelForCausalLM.from_pretrained(model_source(TINY), dtype=torch.float32, **keys)
    stock = stock.eval().to(loaded.device)
    ours: Any = loaded.model
    ids = torch.randint(256, (1, sizes.prompt), generator=torch.Generator().manual_seed(0)).to(loaded.device)

    def generate(model: Any, new: int) -> Callable[[], float]:
        def once() -> float:
            with torch.inference_mode():
                return timed(lambda: model.generate(ids, max_new_tokens=new, **DECODING))

        return once

    figures = []
    switch = Switch(loaded.model, loaded.patch(), table)
    try:
        with torch.inference_mode():
            gap = float((ours(ids).logits - stock(ids).logits).abs().max())
        for name, new, blocks in (("a prompt", 1, sizes.prompts), ("a prompt and new tokens", sizes.new, sizes.blocks)):
            measured = paired(generate(ours, new), generate(stock, new), blocks)
            figures.append(
                Figure(
                    "seconds of generate, ours / stock transformers",
                    f"tiny in float32, {name}: {sizes.prompt:,} + {new}",
                    float(np.median(measured.ratios)),
                    1 / 0.97,
                    "",
                    {**measured.details(), "largest_logit_gap": gap},
                )
            )
    finally:
        switch.undo()
    return figures


def cost_of_a_switch(loaded: LoadedModel, sizes: Sizes) -> Figure:
    """What the token after a boundary takes beyond any other, in prefills of the text before it."""
    model: Any = loaded.model
    table = table_of(loaded)
    boundary = table.rows[1].up_to
    switch = Switch(loaded.model, loaded.patch(), table)
    ids = torch.randint(256, (1, boundary + 1), generator=torch.Generator().manual_seed(1)).to(loaded.device)
    ratios = []
    try:
        with torch.inference_mode():
            for _ in range(sizes.switches + 1):
                cache = cache_of(model(ids[:, : boundary - 1]))
                step = timed(partial(model, ids[:, boundary - 1 : boundary], **{CACHE: cache}))
                crossing = timed(partial(model, ids[:, boundary:], **{CACHE: cache}))
                prefill = timed(lambda: model(ids[:, :boundary], logits_to_keep=1))
                ratios.append((crossing - step) / prefill)
    finally:
        switch.undo()
    told = {"prefills": spread(ratios[1:])}
    return Figure(
        "cost of a switch in prefills", f"tiny, after {boundary} tokens", told["prefills"]["median"], 1.15, "", told
    )


def losses_around(loaded: LoadedModel, windows: list[Window], boundary: int, around: int) -> dict[str, Tensor]:
    """Mean losses (2 around,) of the tokens around a boundary: in a loop with a cache, and each by a whole pass."""
    model: Any = loaded.model
    ids = torch.from_numpy(np.stack([window.ids for window in windows])).to(loaded.device)
    table, start = table_of(loaded), boundary - around

    def loss(logits: Tensor, at: int) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, -1].float(), ids[:, at])

    cached, whole, stale = [], [], []
    with torch.inference_mode():
        switch = Switch(loaded.model, loaded.patch(), table)
        cache = cache_of(model(ids[:, :start]))
        for at in range(start, start + 2 * around):
            output = model(ids[:, at : at + 1], **{CACHE: cache})
            cached.append(loss(output.logits, at + 1))
        switch.undo()
        with loaded.patch() as patch:
            for at in range(start, start + 2 * around):
                patch.install(table.row_for(at + 1))
                whole.append(loss(model(ids[:, : at + 1], use_cache=False).logits, at + 1))
            patch.install(table.row_for(start))
            cache = cache_of(model(ids[:, :start]))
            for at in range(start, start + 2 * around):
                patch.install(table.row_for(at + 1))  # keys stay as they were cached, as in stock transformers
                stale.append(loss(model(ids[:, at : at + 1], **{CACHE: cache}).logits, at + 1))
    return {name: torch.stack(each) for name, each in (("cached", cached), ("whole", whole), ("stale", stale))}


def at_boundaries(loaded: LoadedModel, sizes: Sizes) -> list[Figure]:
    """Losses and passkeys below, at and above each boundary, beside those of whole passes under each row."""
    figures, around, table = [], 4, table_of(loaded)
    documents = read_sources(["stdlib"], share="unseen")
    for row in table.rows[:-1]:
        boundary = row.up_to
        windows = windows_of(loaded, documents, boundary + around + 1, sizes.windows, 0)
        losses = losses_around(loaded, windows, boundary, around)
        gap = float((losses["cached"] - losses["whole"]).abs().max())
        told = {name: [round(float(value), 4) for value in each] for name, each in losses.items()}
        details = {"windows": len(windows), "losses_of_tokens_around_it": told}
        figures.append(
            Figure(
                "loss in a loop with a cache, largest gap to whole passes",
                f"{boundary} tokens, nats",
                gap,
                2e-3,
                "",
                details,
            )
        )
        figures.append(_passkeys(loaded, table, boundary, sizes))
    return figures


def _passkeys(loaded: LoadedModel, table: FactorTable, boundary: int, sizes: Sizes) -> Figure:
    """Keys that generation finds around a boundary, and that a whole pass under the row of the length finds."""
    measure, model = PasskeyMeasure(sizes.tries), loaded.model
    generated, passes = {}, {}
    for length in (boundary - 4, boundary, boundary + 1, boundary + 4):
        items = measure.items(loaded, length)
        with loaded.patch() as patch, torch.inference_mode():
            found = []
            for item in items:
                ids, size = torch.from_numpy(item.ids)[None].to(loaded.device), int(item.data["answer"])
                right = []
                for at in range(length - size, length):
                    patch.install(table.row_for(at))
                    whole: Any = model
                    right.append(int(whole(ids[:, :at], use_cache=False).logits[0, -1].argmax()) == int(ids[0, at]))
                found.append(all(right))
            passes[length] = sum(found)
        switch = Switch(model, loaded.patch(), table)
        with torch.inference_mode():
            written = []
            for item in items:
                ids, size = torch.from_numpy(item.ids)[None].to(loaded.device), int(item.data["answer"])
                made = switch.model.generate(ids[:, :-size], max_new_tokens=size, **DECODING)
                written.append(torch.equal(made, ids))
            generated[length] = sum(written)
        switch.undo()
    gap = max(abs(generated[length] - passes[length]) for length in passes)
    details = {"tries": sizes.tries, "by_generate": generated, "by_whole_passes": passes}
    return Figure("passkeys found by generate, largest gap to whole passes", f"{boundary} tokens", gap, 0, "", details)


def measured_prompt(model: str, tokens: int, seed: int, threads: int, device: str, *more: str) -> dict[str, Any]:
    """What prefill.py measures, in a process of its own."""
    script = str(Path(__file__).with_name("prefill.py"))
    command = [sys.executable, script, model, f"--tokens={tokens}", f"--seed={seed}", f"--threads={threads}"]
    done = subprocess.run([*command, f"--device={device}", *more], stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def slope(model: str, lengths: tuple[int, ...], seed: int, threads: int, device: str) -> Figure:
    """Bytes of peak memory a token of the prompt, in bytes that the cache takes for it."""
    told = [measured_prompt(model, tokens, seed, threads, device) for tokens in lengths]
    each, _ = np.polyfit([one["tokens"] for one in told], [one["peak_bytes"] for one in told], 1)
    on = f"{model}, {lengths[0]:,} to {lengths[-1]:,} tokens"
    value = float(each / told[-1]["cache_bytes_a_token"])
    return Figure(
        "peak memory a token of a prompt, in what the cache takes for it", on, value, 1.15, "", {"prompts": told}
    )


def measure_all(sizes: Sizes, document: str | None, *, seed: int, threads: int, device: str) -> list[Figure]:
    """All figures."""
    loaded = load_model(TINY, LoadOptions(device=device, dtype="float32", threads=threads))
    figures = [*beside_stock(loaded, sizes), cost_of_a_switch(loaded, sizes), *at_boundaries(loaded, sizes)]
    figures += [slope(name, getattr(sizes, name), seed, threads, device) for name in ("tiny", "narrow")]
    more = ("--document", document) if document else ()
    told = measured_prompt("tiny", sizes.document, seed, threads, device, *more)
    on = f"tiny, {sizes.document:,} tokens of " + (Path(document).stem if document else "noise")
    figures.append(Figure("minutes of one long prompt", on, told["seconds"] / 60, 30, "min", told))
    return figures


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--document", help="a text of enough tokens for the longest prompt; noise without")
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    return run_benchmark(
        "runtime",
        args,
        asdict(sizes),
        lambda: measure_all(sizes, args.document, seed=args.seed, threads=args.threads, device=args.device),
    )


if __name__ == "__main__":
    sys.exit(main())
