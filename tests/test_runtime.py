"""The exact switch: whatever way tokens come, the logits are those of a pass over the whole text so far."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    TextIteratorStreamer,
)

import longrope
from byte_tokenizer import PAD, byte_tokenizer
from commands import write_checkpoint
from longrope.configs import rope_config
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.patch import Patch, widen_window
from longrope.runtime.caches import CACHE, CACHE_NAMES, cache_of
from longrope.runtime.switch import POLICIES
from models import ORIGINAL, build, tokens

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "olmo2")
ENDS = (ORIGINAL, 56, 80)


def table_of(model: Any) -> FactorTable:
    """Three rows that differ in everything a row has: factors, start tokens and attention factor."""
    rope = rope_config(model.config.get_text_config().to_dict())
    spread = np.linspace(0, 1, rope.shape.pairs)
    rows = (
        RopeFactors(ENDS[0], tuple(1 + 0.5 * spread)),
        RopeFactors(ENDS[1], tuple(1.5 + 2 * spread), start_tokens=3, attention_factor=1.1),
        RopeFactors(ENDS[2], tuple(3 + 4 * spread), attention_factor=1.2),
    )
    return FactorTable(rope.rope_theta, rope.rotary_dim, rope.original_length, rows)


class Reference:
    """Another model with the same weights: every text is run whole, alone and without a cache, under its row."""

    def __init__(self, family: str) -> None:
        self.model: Any = build(family).requires_grad_(False)
        self.table = table_of(self.model)
        self.patch = Patch(self.model, rope_config(self.model.config.get_text_config().to_dict()).shape)
        self.patch.widen_window(ENDS[-1])

    def logits(self, ids: list[int]) -> Tensor:
        self.patch.install(self.table.row_for(len(ids)))
        answer: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        return answer

    def greedy(self, ids: list[int], new: int) -> list[int]:
        for _ in range(new):
            ids = [*ids, int(self.logits(ids).argmax())]
        return ids


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Reference]]:
    model = build(request.param).requires_grad_(False)
    with longrope.apply(model, table_of(model)):
        yield model, Reference(request.param)


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[Any, Reference]]:
    model = build("llama").requires_grad_(False)
    with longrope.apply(model, table_of(model)):
        yield model, Reference("llama")


def text(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in tokens(length, seed=seed)[0]]


GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def generate(model: Any, ids: list[int], new: int, **more: Any) -> list[int]:
    made = model.generate(torch.tensor([ids]), max_new_tokens=new, **(GREEDY | more))
    return [int(token) for token in made[0]]


def test_tokens_across_every_boundary_are_those_of_a_full_recompute(pair: tuple[Any, Reference]) -> None:
    model, reference = pair
    ids = text(ORIGINAL - 4)
    assert generate(model, ids, 16) == reference.greedy(ids, 16)


def test_logits_of_a_loop_with_a_cache_are_those_of_a_full_recompute(pair: tuple[Any, Reference]) -> None:
    model, reference = pair
    ids = text(ENDS[1] + 6)
    start = ORIGINAL - 2
    output = model(torch.tensor([ids[:start]]))
    for end in range(start, len(ids)):
        assert torch.allclose(output.logits[0, -1], reference.logits(ids[:end]), atol=2e-5), end
        output = model(torch.tensor([ids[end : end + 1]]), **{CACHE: cache_of(output)})


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # transformers says so of the older name
def test_a_cache_by_its_older_name_is_seen_too(pair: tuple[Any, Reference]) -> None:
    model, reference = pair
    older, ids = CACHE_NAMES[-1], text(ORIGINAL + 4)
    output = model(torch.tensor([ids[: ORIGINAL - 1]]))
    for end in range(ORIGINAL - 1, len(ids)):
        output = model(torch.tensor([ids[end : end + 1]]), **{older: cache_of(output)})
    assert torch.allclose(output.logits[0, -1], reference.logits(ids), atol=2e-5)
    cache = cache_of(model(torch.tensor([ids[:-1]])))
    assert generate(model, ids, 4, **{older: cache}) == reference.greedy(ids, 4)


def test_each_sequence_of_a_padded_batch_has_the_row_of_its_own_length(pair: tuple[Any, Reference]) -> None:
    model, reference = pair
    texts = [text(ORIGINAL - 6), text(ORIGINAL - 1, 1), text(ENDS[1] - 2, 2), text(9, 3)]
    width = max(len(each) for each in texts)
    for left in (True, False):
        pads = [[PAD] * (width - len(each)) for each in texts]
        ids = torch.tensor([pad + each if left else each + pad for each, pad in zip(texts, pads, strict=True)])
        mask = (ids != PAD).long()
        made = model.generate(ids, attention_mask=mask, max_new_tokens=10, **GREEDY)
        assert torch.equal(made[:, :width], ids)
        for row, each in zip(made, texts, strict=True):
            assert [*each, *row[width:].tolist()] == reference.greedy(each, 10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gemma3"}))  # which has a dict for each type of layer
def test_stock_transformers_is_wrong_where_ours_is_exact(family: str) -> None:
    """The gap that this exists for: logits of a cached token after the boundary, in a loop with a cache."""
    bare: Any = build(family)
    table = table_of(bare)
    rows = [table.rows[0], table.rows[2].with_values(attention_factor=1.0)]
    own = bare.config.rope_parameters
    rope = {
        **own, "rope_type": "longrope", "short_factor": list(rows[0].rescale), "long_factor": list(rows[1].rescale),
        "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.0,
    }  # fmt: skip
    stock: Any = build(family, max_position_embeddings=ENDS[2], rope_parameters=rope).requires_grad_(False)
    widen_window(stock, ENDS[2])
    ids = text(ORIGINAL + 1)

    def after_the_boundary(model: Any) -> Tensor:
        cache = cache_of(model(torch.tensor([ids[:ORIGINAL]])))
        answer: Tensor = model(torch.tensor([ids[ORIGINAL:]]), **{CACHE: cache}).logits[0, -1]
        return answer

    whole = stock(torch.tensor([ids]), use_cache=False).logits[0, -1]
    assert (after_the_boundary(stock) - whole).abs().max() > 100 * 1e-5
    ours: Any = bare.requires_grad_(False)
    longrope.apply(ours, replace(table, rows=tuple(rows)))
    assert torch.allclose(after_the_boundary(ours), whole, atol=1e-5)


def test_a_short_text_beside_a_long_one_keeps_its_row(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    short, long = text(16), text(ENDS[1], 1)
    ids = torch.tensor([[PAD] * (len(long) - len(short)) + short, long])
    mask = (ids != PAD).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    for row, each in zip(logits, (short, long), strict=True):
        assert torch.allclose(row, reference.logits(each), atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"use_cache": False},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 5},
    ],
    ids=lambda how: next(iter(how)) + "-" + str(next(iter(how.values()))),
)
@pytest.mark.parametrize("prompt", [ORIGINAL - 3, ORIGINAL + 1])
def test_every_way_to_generate_is_exact(llama: tuple[Any, Reference], how: dict[str, Any], prompt: int) -> None:
    model, reference = llama
    if how.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        # transformers offloads from CUDA alone: here its layers are taken through the same calls without it
        how = {CACHE: DynamicCache(config=model.config)}
    ids = text(prompt) if "prompt_lookup_num_tokens" not in how else (text(6) * 20)[:prompt]
    assert generate(model, ids, 12, **how) == reference.greedy(ids, 12)


def test_an_assistant_is_exact_and_so_is_what_it_assists(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    assistant: Any = build("llama").requires_grad_(False)
    with torch.no_grad():
        for weight in assistant.parameters():  # a worse model: some of its proposals are rejected
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    longrope.apply(assistant, table_of(assistant))
    for prompt in (ORIGINAL - 4, ENDS[1] - 3):
        ids = text(prompt)
        assert generate(model, ids, 14, assistant_model=assistant) == reference.greedy(ids, 14)


def test_beams_are_those_of_a_search_without_a_cache(llama: tuple[Any, Reference]) -> None:
    model, _ = llama
    ids = torch.tensor([text(ORIGINAL - 4), text(ORIGINAL - 4, 1)])
    more = GREEDY | {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 14}
    more |= {"return_dict_in_generate": True, "output_scores": True}
    cached, whole = (model.generate(ids, use_cache=use, **more) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    assert torch.allclose(cached.sequences_scores, whole.sequences_scores, atol=1e-5)


def test_sampling_draws_the_same_with_and_without_a_cache(llama: tuple[Any, Reference]) -> None:
    model, _ = llama
    made = []
    for use in (True, False):
        torch.manual_seed(5)
        options = GREEDY | {"do_sample": True, "num_return_sequences": 3, "use_cache": use}
        made.append(model.generate(torch.tensor([text(ORIGINAL - 4)]), max_new_tokens=16, **options))
    assert torch.equal(*made)


def test_a_streamed_text_is_the_one_that_is_returned(llama: tuple[Any, Reference]) -> None:
    model, _ = llama
    tokenizer = byte_tokenizer(ORIGINAL)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    ids = text(ORIGINAL - 4)
    made = generate(model, ids, 12, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(made[len(ids) :])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_forward_pass_is_exact(llama: tuple[Any, Reference]) -> None:
    """With a static cache, as transformers compiles on CUDA; torch compiles for CPUs too."""
    from transformers import CompileConfig

    model, reference = llama
    compiled: Any = CompileConfig(backend="eager", mode=None)  # type: ignore[arg-type]
    compiled._compile_all_devices = True
    ids = text(ORIGINAL - 3)
    try:
        made = generate(model, ids, 10, cache_implementation="static", compile_config=compiled)
    finally:
        torch._dynamo.reset()
    assert made == reference.greedy(ids, 10)


def test_a_loop_with_a_static_cache_is_exact(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    ids = text(ENDS[1] + 4)
    cache = StaticCache(config=model.config, max_cache_len=ENDS[2])
    start = ORIGINAL - 2
    output = model(torch.tensor([ids[:start]]), **{CACHE: cache})
    for end in range(start, len(ids)):
        assert torch.allclose(output.logits[0, -1], reference.logits(ids[:end]), atol=2e-5), end
        output = model(torch.tensor([ids[end : end + 1]]), **{CACHE: cache})


def test_several_tokens_on_top_of_a_cache_each_have_the_row_of_their_length(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    ids = text(ENDS[1] + 5)
    cache = cache_of(model(torch.tensor([ids[:10]])))
    output = model(torch.tensor([ids[10:]]), **{CACHE: cache}, output_hidden_states=True)
    assert output.logits.shape[1] == output.hidden_states[-1].shape[1] == len(ids) - 10
    for end in (11, ORIGINAL, ORIGINAL + 1, ENDS[1], ENDS[1] + 1, len(ids)):
        assert torch.allclose(output.logits[0, end - 11], reference.logits(ids[:end]), atol=2e-5), end
    last = model(torch.tensor([ids[20:]]), **{CACHE: cropped(cache_of(output), 20)}, logits_to_keep=2)
    assert torch.allclose(last.logits[0], output.logits[0, -2:], atol=2e-5)


def cropped(cache: Any, length: int) -> Any:
    cache.crop(length - cache.get_seq_length())
    return cache


def test_a_cropped_cache_goes_back_to_the_row_of_its_length(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    ids = text(ORIGINAL + 4)
    cache = cropped(cache_of(model(torch.tensor([ids]))), ORIGINAL - 2)
    output = model(torch.tensor([ids[ORIGINAL - 2 : ORIGINAL - 1]]), **{CACHE: cache})
    assert torch.allclose(output.logits[0, -1], reference.logits(ids[: ORIGINAL - 1]), atol=2e-5)


def test_a_copied_prompt_goes_on_in_two_ways(llama: tuple[Any, Reference]) -> None:
    """The prompt cache of transformers' documentation: deep copies of a cache, each going across the boundary."""
    model, reference = llama
    ids = text(ORIGINAL - 2)
    prompt = cache_of(model(torch.tensor([ids])))
    for seed in (1, 2):
        longer = [*ids, *text(6, seed)]
        cache = copy.deepcopy(prompt)
        made = generate(model, longer, 3, **{CACHE: cache})
        assert made == reference.greedy(longer, 3)


def test_a_reordered_cache_of_a_loop_is_exact(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    first, second = text(ORIGINAL), text(ORIGINAL, 1)
    cache = cache_of(model(torch.tensor([first, second])))
    cache.reorder_cache(torch.tensor([1, 1]))
    logits = model(torch.tensor([[7], [9]]), **{CACHE: cache}).logits[:, -1]
    for row, token in zip(logits, (7, 9), strict=True):
        assert torch.allclose(row, reference.logits([*second, token]), atol=2e-5)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    again = model(torch.tensor([[3], [4]]), **{CACHE: cache}).logits[:, -1]
    for row, token in zip(again, (3, 4), strict=True):
        assert torch.allclose(row, reference.logits([*second, 9, token]), atol=2e-5)


def test_only_the_sequences_that_pass_a_boundary_are_run_again() -> None:
    model: Any = build("llama").requires_grad_(False)
    applied = longrope.apply(model, table_of(model))
    assert applied.switch is not None
    ids = torch.tensor([[PAD] * 8 + text(ORIGINAL - 8), text(ORIGINAL, 1)])
    mask = (ids != PAD).long()
    model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
    assert applied.switch.recomputed == ORIGINAL, "one sequence of two, once"


def test_prompts_given_as_embeddings_are_exact(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    ids = text(ORIGINAL - 3)
    embedded = model.get_input_embeddings()(torch.tensor([ids]))
    made = model.generate(inputs_embeds=embedded, max_new_tokens=8, **GREEDY)
    assert made[0].tolist() == reference.greedy(ids, 8)[len(ids) :]


def test_ahead_takes_the_row_of_all_that_may_come_and_runs_nothing_again() -> None:
    model: Any = build("llama").requires_grad_(False)
    applied = longrope.apply(model, table_of(model), policy="ahead")
    assert applied.switch is not None
    ids = text(ORIGINAL - 4)
    made = generate(model, ids, 12)
    assert applied.switch.recomputed == 0
    reference = Reference("llama")
    reference.table = FactorTable(500.0, 16, ORIGINAL, (table_of(model).rows[1],))
    assert made == reference.greedy(ids, 12)
    generate(model, ids, 4)
    assert generate(model, ids, 4) == Reference("llama").greedy(ids, 4), "within the first row"


def test_fixed_takes_the_last_row_at_every_length() -> None:
    model: Any = build("llama").requires_grad_(False)
    longrope.apply(model, table_of(model), policy="fixed")
    reference = Reference("llama")
    reference.table = FactorTable(500.0, 16, ORIGINAL, (table_of(model).rows[-1],))
    ids = text(10)
    assert generate(model, ids, 12) == reference.greedy(ids, 12)
    assert torch.allclose(model(torch.tensor([ids])).logits[0, -1], reference.logits(ids), atol=1e-5)


def test_what_save_pretrained_writes_is_loaded_with_the_table(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    table = table_of(model)
    longrope.apply(model, table)
    model.save_pretrained(tmp_path / "saved")
    byte_tokenizer(ORIGINAL).save_pretrained(tmp_path / "saved")
    ids = text(ORIGINAL - 2)
    expected = generate(model, ids, 8)
    again = longrope.load(str(tmp_path / "saved"), device="cpu", dtype="float32")
    assert generate(again, ids, 8) == expected
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert generate(longrope.load(stock), ids, 8) == expected
    assert FactorTable.from_dict(stock.config.longrope_factors) == table


def test_undo_restores_the_model_and_its_methods(tmp_path: Path) -> None:
    model: Any = build("llama").requires_grad_(False)
    ids = torch.tensor([text(ENDS[0] + 2)])
    before, config = model(ids).logits, model.config.to_dict()
    applied = longrope.apply(model, table_of(model))
    assert not torch.equal(model(ids).logits, before)
    applied.undo()
    assert torch.equal(model(ids).logits, before)
    assert model.config.to_dict() == config
    assert not {"generate", "prepare_inputs_for_generation"} & set(vars(model))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    longrope.apply(model, table_of(model)).undo()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loop_that_grows_past_the_table_is_refused(policy: str) -> None:
    model: Any = build("llama").requires_grad_(False)
    longrope.apply(model, table_of(model), policy=policy)
    cache = cache_of(model(torch.tensor([text(ENDS[2] - 2)])))
    for _ in range(2):
        cache = cache_of(model(torch.tensor([[1]]), **{CACHE: cache}))
    with refused(r"^sequence: got 81 tokens; the factor table ends at 80; "):
        model(torch.tensor([[1]]), **{CACHE: cache})


def refused(match: str) -> Any:
    return pytest.raises(UserError, match=match)


def test_bad_input_is_refused_in_one_line(llama: tuple[Any, Reference]) -> None:
    model, _ = llama
    ids = torch.tensor([text(20)])
    one = torch.tensor([[1]])
    with refused(r"^sequence: got 81 tokens; the factor table ends at 80; use at most 80 tokens"):
        model(torch.tensor([text(81)]))
    with refused(r"^max_new_tokens: got 61 tokens after a prompt of 20; .* ends at 80; ask for at most 60 new tokens"):
        model.generate(ids, max_new_tokens=61, **GREEDY)
    with refused(r"^sequence: got 81 tokens"):
        model.generate(torch.tensor([text(80)]), max_new_tokens=1, **GREEDY)
    with refused(r"^position_ids: got position 4 after 5; positions of a sequence ascend; "):
        model(ids[:, :3], position_ids=torch.tensor([[3, 5, 4]]))
    cache = cache_of(model(ids))
    with refused(r"^position_ids: got position 19 after 19; "):
        model(one, **{CACHE: cache}, position_ids=torch.tensor([[19]]))
    with refused(r"^position_ids: got shape \(1, 2\); they are \(1, 1\) here"):
        model(one, **{CACHE: cache}, position_ids=torch.tensor([[20, 21]]))
    holes = torch.ones_like(ids)
    holes[0, 5:8] = 0
    with refused(r"^attention mask: got a mask with holes; padding is at one side of a text, and stays; pad on"):
        model(ids, attention_mask=holes)
    with refused(r"^attention mask: got 1 columns; it has one for each of the 21 tokens"):
        model(one, **{CACHE: cache}, attention_mask=torch.ones(1, 1))
    with refused(r"^batch: got 2, 1 in the cache; "):
        model(torch.tensor([[1], [2]]), **{CACHE: cache})
    with refused(r"^labels: got tokens across a boundary; "):
        model(torch.tensor([text(40)]), **{CACHE: cache}, labels=torch.tensor([text(40)]))
    stock: Any = build("llama").requires_grad_(False)
    with refused(r"^cache: got 20 tokens that were cached without these factors; .*start with an empty cache$"):
        model(one, **{CACHE: cache_of(stock(ids))})
    other = table_of(stock)
    applied = longrope.apply(stock, FactorTable(other.rope_theta, other.rotary_dim, ORIGINAL, other.rows[:2]))
    with refused(r"^cache: got 20 tokens that were cached without these factors; "):
        model(one, **{CACHE: cache_of(stock(ids))})
    with refused(r"^model: got a model that already carries factors; "):
        longrope.apply(stock, other)
    applied.undo()
    with refused(r"^policy: got 'banana'; it is one of exact, ahead, fixed; choose one$"):
        longrope.apply(stock, other, policy="banana")
    with refused(r"^chunk: got 0; it is at least 1 token; "):
        longrope.apply(stock, other, chunk=0)
    longrope.apply(stock, other)  # what was refused left nothing behind


def test_a_pass_that_fails_leaves_nothing_behind(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([[10_000]]))
    ids = text(20)
    assert torch.allclose(model(torch.tensor([ids])).logits[0, -1], reference.logits(ids), atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_training_passes_have_gradients_under_a_table(policy: str) -> None:
    model: Any = build("llama")
    longrope.apply(model, table_of(model), policy=policy)
    ids = torch.tensor([text(ORIGINAL + 3)])
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None and bool(torch.isfinite(weight.grad).all()) for weight in model.parameters())


def test_a_loop_that_writes_every_token_into_one_tensor_is_exact(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    ids = text(ENDS[1] + 2)
    whole, buffer = torch.tensor([ids[:20]]), torch.zeros(1, 1, dtype=torch.long)
    cache = cache_of(model(whole))
    whole.zero_()
    for end in range(20, len(ids)):
        buffer.fill_(ids[end])
        output = model(buffer, **{CACHE: cache})
    assert torch.allclose(output.logits[0, -1], reference.logits(ids), atol=2e-5)


def test_left_padding_alone_tells_each_text_its_length(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    texts = [text(16), text(ENDS[1] - 1, 1)]
    width = len(texts[1])
    ids = torch.tensor([[PAD] * (width - len(each)) + each for each in texts])
    output = model(ids, attention_mask=(ids != PAD).long())
    for step in range(4):
        for row, each in zip(output.logits[:, -1], texts, strict=True):
            assert torch.allclose(row, reference.logits(each), atol=2e-5), step
        texts = [[*each, 7 + step] for each in texts]
        # without a mask from here on: what was padding stays so
        output = model(torch.tensor([[7 + step]] * 2), **{CACHE: cache_of(output)})


def test_settings_in_a_configuration_are_those_of_transformers(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    texts = [text(ORIGINAL - 12), text(ORIGINAL - 2, 1)]
    width = len(texts[1])
    own = model.generation_config
    config: Any = GenerationConfig
    model.generation_config = config(pad_token_id=PAD)  # what a call leaves out comes from here
    try:
        for left in (True, False):
            pad = [PAD] * (width - len(texts[0]))
            ids = torch.tensor([pad + texts[0] if left else texts[0] + pad, texts[1]])
            made = model.generate(ids, generation_config=config(max_new_tokens=5, do_sample=False))
            for row, each in zip(made, texts, strict=True):
                assert [*each, *row[width:].tolist()] == reference.greedy(each, 5)
        model.generation_config = config(pad_token_id=PAD, do_sample=False)
        made = model.generate(torch.tensor([text(60)]))
        assert made.shape[1] == ENDS[2], "without a limit a text ends with the table"
    finally:
        model.generation_config = own


def test_a_model_that_is_asked_for_something_else_while_it_generates_is_exact(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    other = text(12, 5)

    class Asks:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            cache = cache_of(model(torch.tensor([other[:8]])))
            logits = model(torch.tensor([other[8:]]), **{CACHE: cache}).logits[0, -1]
            assert torch.allclose(logits, reference.logits(other), atol=2e-5)
            return scores

    ids = text(ORIGINAL + 3)
    assert generate(model, ids, 6, logits_processor=[Asks()]) == reference.greedy(ids, 6)


def test_two_threads_that_generate_wait_for_each_other(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    prompts = [text(ORIGINAL - 5, seed) for seed in range(4)]
    made: dict[int, list[int]] = {}
    workers = [threading.Thread(target=lambda n=n: made.update({n: generate(model, prompts[n], 12)})) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert made == {number: reference.greedy(ids, 12) for number, ids in enumerate(prompts)}


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"prefill_chunk_size": 9}], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "mistral"])
def test_ahead_has_one_row_in_every_way_to_generate(family: str, how: dict[str, Any]) -> None:
    model: Any = build(family).requires_grad_(False)
    reference = Reference(family)
    reference.table = replace(table_of(model), rows=(table_of(model).rows[2].with_values(up_to=ENDS[2]),))
    with longrope.apply(model, table_of(model), policy="ahead") as applied:
        ids = text(ORIGINAL - 4)
        assert generate(model, ids, 30, **how) == reference.greedy(ids, 30)
        assert applied.recomputed == 0


def test_phi3_keeps_its_cache_at_its_original_length() -> None:
    """Its class drops the cache there for a switch of its own; ours makes it again, in place and by chunks."""
    model: Any = build("phi3").requires_grad_(False)
    with longrope.apply(model, table_of(model), chunk=7) as applied:
        cache = StaticCache(config=model.config, max_cache_len=ENDS[2])
        ids = text(ORIGINAL - 3)
        assert generate(model, ids, 8, **{CACHE: cache}) == Reference("phi3").greedy(ids, 8)
        assert applied.recomputed == ORIGINAL
        assert cache.get_seq_length() == ORIGINAL + 4


def test_a_cache_is_pickled_with_what_it_was_made_of(llama: tuple[Any, Reference]) -> None:
    model, reference = llama
    ids = text(ORIGINAL)
    cache = pickle.loads(pickle.dumps(cache_of(model(torch.tensor([ids])))))
    output = model(torch.tensor([[3]]), **{CACHE: cache})
    assert torch.allclose(output.logits[0, -1], reference.logits([*ids, 3]), atol=2e-5)


def test_handles_undo_once_and_leave_what_was_there() -> None:
    model: Any = build("llama").requires_grad_(False)
    model.config.longrope_factors = table_of(model).to_dict()
    first = longrope.apply(model, table_of(model))
    first.undo()
    assert model.config.longrope_factors == table_of(model).to_dict()
    second = longrope.apply(model, table_of(model))
    first.undo()
    assert "generate" in vars(model)
    second.undo()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_what_is_no_causal_language_model_is_refused_and_left_alone() -> None:
    model: Any = build("llama").requires_grad_(False)
    with refused(r"^model: got a LlamaModel; factors at run time are for causal language models of transformers; "):
        longrope.apply(model.model, table_of(model))
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with refused(r"^model: got a PeftModelForCausalLM; .* with PEFT, apply before get_peft_model, or to the merged"):
        longrope.apply(wrapped, table_of(model))
    with refused(r"^model: got a PeftModelForCausalLM; "):
        longrope.load(wrapped, table_of(model))
    with pytest.raises(TypeError, match="a model already loaded takes no 'banana'"):
        longrope.load(build("llama"), table_of(model), banana=3)


def test_a_single_row_ends_where_it_says(llama: tuple[Any, Reference]) -> None:
    model: Any = build("llama").requires_grad_(False)
    row = table_of(model).rows[1]
    with longrope.apply(model, row):
        with refused(r"^sequence: got 57 tokens; the factor table ends at 56; "):
            model(torch.tensor([text(57)]))
        cache = cache_of(model(torch.tensor([text(20)])))
    with longrope.apply(model, table_of(model).rows[2]), refused(r"^cache: got 20 tokens that were cached without"):
        model(torch.tensor([[1]]), **{CACHE: cache})


def test_masks_that_change_what_is_cached_are_refused(llama: tuple[Any, Reference]) -> None:
    model, _ = llama
    cache = cache_of(model(torch.tensor([text(20)])))
    mask = torch.ones(1, 22, dtype=torch.long)
    mask[0, 4] = 0
    with refused(r"^attention mask: got cached tokens masked otherwise than before; "):
        model(torch.tensor([[1, 2]]), **{CACHE: cache}, attention_mask=mask)
    with refused(r"^attention mask: got a mask with holes; "):
        model.generate(torch.tensor([text(22)]), attention_mask=mask, max_new_tokens=2, **GREEDY)
    with refused(r"^output_attentions: got tokens across a boundary; "):
        model(torch.tensor([text(40)]), **{CACHE: cache}, output_attentions=True)


# Copies


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_copy_of_a_model_has_factors_of_its_own(family: str) -> None:
    """As moving averages of weights make them; taking the original's off leaves the copy's."""
    model: Any = build(family).requires_grad_(False)
    reference = Reference(family)
    applied = longrope.apply(model, reference.table)
    with pytest.raises(UserError, match=r"^model: got a model with factors on; it is not pickled; undo them first, or"):
        pickle.dumps(model)
    other, handle = copy.deepcopy((model, applied))
    applied.undo()
    assert handle.switch.model is other
    ids = torch.tensor([text(40)])
    made = other.generate(ids, max_new_tokens=12, do_sample=False)
    for end in range(40, made.shape[1]):
        assert int(reference.logits(made[0, :end].tolist()).argmax()) == int(made[0, end])
    stock: Any = build(family).requires_grad_(False)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    handle.undo()
    assert torch.equal(other(ids).logits, stock(ids).logits)


def test_factors_are_put_on_a_model_in_half_precision_of_a_large_base() -> None:
    """Its slowest frequencies are among float16's coarsest numbers."""
    rope = {"rope_type": "default", "rope_theta": 5e6}
    model: Any = build("llama", head_dim=128, rope_parameters=rope)
    model = model.half()
    longrope.apply(model, table_of(model)).undo()


# What cannot be extended


def _cohere2() -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": ORIGINAL}
    shape |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    return Cohere2ForCausalLM(Cohere2Config(**shape))


def _t5gemma() -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": ORIGINAL}
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=shape, decoder=shape, vocab_size=259))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: _cohere2(),
            r"^model: got Cohere2ForCausalLM, whose local layers alone use RoPE; factors extend layers that see",
        ),
        (
            lambda: build("smollm3", no_rope_layers=[0, 0]),
            r"^model: got SmolLM3ForCausalLM, which does not use its",
        ),
        (lambda: _t5gemma(), r"^model: got a T5GemmaForConditionalGeneration, an encoder and a decoder; factors are"),
    ],
    ids=["global-layers", "no-rope", "encoder"],
)
def test_what_load_refuses_apply_refuses_too(made: Any, message: str) -> None:
    model = made().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    table = FactorTable(500.0, 16, ORIGINAL, (RopeFactors(ORIGINAL, (1.0,) * 8),))
    with pytest.raises(UserError, match=message):
        longrope.apply(model, table)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_applying_leaves_a_model_in_training_and_random_numbers_as_they_were() -> None:
    model: Any = build("llama", attention_dropout=0.5).train()
    model.model.norm.eval()
    state = torch.get_rng_state()
    longrope.apply(model, table_of(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.norm.training
