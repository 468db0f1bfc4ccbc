"""Long prompts by chunks: the same numbers, in memory that grows by the cache alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import longrope
import longrope.runtime.room as room
from commands import write_checkpoint
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.model import load_model
from longrope.runtime.attention import attend
from longrope.runtime.caches import CACHE, RoomyCache, cache_of
from longrope.windows import Window
from models import ARCHITECTURES, ORIGINAL, build, tokens
from test_runtime import ENDS, FAMILIES, GREEDY, Reference, generate, table_of, text


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("past", [1, 100, 1000, 20_000])
@pytest.mark.parametrize("new", [2, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_a_chunk_is_that_under_a_mask(
    heads: tuple[int, int], past: int, new: int, dtype: torch.dtype
) -> None:
    drawn = torch.Generator().manual_seed(past + new)
    query = torch.randn(2, heads[0], new, 16, generator=drawn).to(dtype)
    # Views of a longer tensor, as those of a cache with room are
    key, value = (torch.randn(2, heads[1], past + new + 50, 16, generator=drawn).to(dtype) for _ in range(2))
    key, value = key[:, :, : past + new], value[:, :, : past + new]
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    keys, values = (each.repeat_interleave(heads[0] // heads[1], 1).float() for each in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), keys, values, mask, scale=0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(attend(query, key, value, 0.3).float(), expected, atol=tolerance)


@pytest.mark.parametrize("family", sorted({*FAMILIES, *ARCHITECTURES} - {"llama4"}))
def test_a_prompt_by_chunks_goes_on_as_one_that_was_run_whole(family: str) -> None:
    model: Any = build(family).requires_grad_(False)
    longrope.apply(model, table_of(model), chunk=11)
    reference = Reference(family)
    for prompt in (ORIGINAL - 3, ORIGINAL + 5):
        ids = text(prompt)
        assert generate(model, ids, 12) == reference.greedy(ids, 12)


def attended_lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys each call of the attention of a chunk is given, from now on."""
    seen: list[int] = []

    def noted(query: Any, key: Any, value: Any, scale: Any = None) -> Any:
        seen.append(key.shape[2])
        return attend(query, key, value, scale)

    monkeypatch.setattr("longrope.runtime.attention.attend", noted)
    return seen


def test_a_chunk_is_attended_to_without_a_mask_and_into_a_cache_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama").requires_grad_(False)
    longrope.apply(model, table_of(model), chunk=11)
    seen = attended_lengths(monkeypatch)
    ids = text(40)
    made = model.generate(torch.tensor([ids]), max_new_tokens=9, return_dict_in_generate=True, **GREEDY)
    assert seen == [22, 22, 33, 33, 39, 39], "of two layers; the first chunk is causal by itself, the last token alone"
    assert isinstance(cache_of(made), RoomyCache)
    layer: Any = cache_of(made).layers[0]
    assert layer.capacity == 49
    assert model.config._attn_implementation == "sdpa"


def test_under_autocast_a_prompt_by_chunks_has_the_logits_of_a_whole_pass(tmp_path: Path) -> None:
    loaded = load_model(
        str(write_checkpoint(tmp_path / "model")), LoadOptions(device="cpu", dtype="autocast", threads=1)
    )
    model: Any = loaded.model
    applied = longrope.apply(model, table_of(model), chunk=11)
    assert applied.switch is not None
    ids = tokens(60)
    with torch.inference_mode(), loaded.autocast():
        cache = RoomyCache(model.config, 70)
        for _ in applied.switch.fill(cache, ids[:, :-1], 60):
            pass
        by_chunks = model(ids[:, -1:], **{CACHE: cache}).logits[0, -1]
        whole = model(ids).logits[0, -1]
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}  # type: ignore[union-attr]
    assert torch.allclose(by_chunks.float(), whole.float(), atol=0.05)


def run(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = model(ids, **{CACHE: cache}).logits
    return answer


def test_a_cache_with_room_is_a_dynamic_one_that_copies_nothing() -> None:
    model: Any = build("llama").requires_grad_(False)
    roomy: Any = RoomyCache(model.config, 40)
    stock: Any = DynamicCache(config=model.config)
    ids = tokens(60, batch=2)
    places = set()
    for start, end in ((0, 20), (20, 21), (21, 38)):
        piece = ids[:, start:end]
        assert torch.equal(run(model, roomy, piece), run(model, stock, piece))
        places.add(roomy.layers[0].keys.data_ptr())
    assert len(places) == 1
    for cache in (roomy, stock):
        cache.crop(-8)
        cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(run(model, roomy, ids[:, 30:60]), run(model, stock, ids[:, 30:60])), "beyond its room it grows"
    assert roomy.get_seq_length() == 60
    assert roomy.layers[0].capacity == 90
    for cache in (roomy, stock):
        cache.reset()
    assert torch.equal(run(model, roomy, ids), run(model, stock, ids))


def test_a_cache_with_room_is_written_in_and_out_of_inference_mode() -> None:
    model: Any = build("llama").requires_grad_(False)
    cache, ids = RoomyCache(model.config, 30), tokens(30)
    with torch.inference_mode():
        run(model, cache, ids[:, :10])
    run(model, cache, ids[:, 10:20])
    with torch.inference_mode():
        last = run(model, cache, ids[:, 20:])
    assert torch.allclose(last[:, -1], model(ids).logits[:, -1], atol=1e-5)


def test_a_cache_with_room_passes_gradients_on() -> None:
    model: Any = build("llama")
    ids = tokens(20)
    gradients = []
    for cache in (RoomyCache(model.config, 30), DynamicCache(config=model.config)):
        model.zero_grad()
        run(model, cache, ids[:, :10])
        run(model, cache, ids[:, 10:]).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert torch.equal(*gradients)


def test_a_prompt_beyond_memory_is_refused_before_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama").requires_grad_(False)
    longrope.apply(model, table_of(model), chunk=11)
    # Keys and values of two layers, one head of 16 numbers in float32: 256 bytes a token
    chunk = room.chunk_bytes(model.config, 11)
    monkeypatch.setattr(room, "free_memory", lambda device: (chunk + 256 * 50) / 0.9 + 1)
    generate(model, text(40), 10)
    with pytest.raises(UserError, match=r"^memory: got a cache of 60 tokens, .* GiB are free for it; use at most 50 "):
        generate(model, text(40), 20)


def test_what_a_token_takes_is_counted_on_the_device_of_each_layer() -> None:
    """As a model over several devices has them; a device without memory stands for the second."""
    model: Any = build("llama")
    cache = DynamicCache(config=model.config)
    run(model, cache, tokens(20))
    layer: Any = cache.layers[1]
    layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    assert room.bytes_a_token(cache) == {torch.device("cpu"): 128, torch.device("meta"): 128}


def test_a_window_that_does_not_fit_whole_is_measured_by_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longrope.evaluate import perplexity

    loaded = load_model(
        str(write_checkpoint(tmp_path / "model")), LoadOptions(device="cpu", dtype="float32", threads=1)
    )
    [window] = [Window("a", "a", 0, tokens(60)[0].numpy())]
    whole = perplexity.losses_by_token(loaded, [window, window])

    def full(*given: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(perplexity, "token_losses", full)
    with pytest.raises(UserError, match=r"^memory: got a window of 60 tokens; "):
        perplexity.losses_by_token(loaded, [window])
    monkeypatch.setattr(perplexity, "CHUNK", 7)
    monkeypatch.setattr(perplexity.token_losses_by_chunks, "__defaults__", (7,))
    chunked = perplexity.losses_by_token(loaded, [window, window])
    assert loaded.by_chunks
    assert torch.allclose(chunked, whole, atol=1e-5)


def test_a_window_that_was_widened_is_room_for_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral, every layer of which has a sliding window: neither its cache nor its masks are those of a window."""
    model: Any = build("mistral").requires_grad_(False)
    longrope.apply(model, table_of(model), chunk=11)
    seen = attended_lengths(monkeypatch)
    made = model.generate(torch.tensor([text(40)]), max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
    assert seen == [22, 22, 33, 33, 39, 39]
    assert not any(cache_of(made).is_sliding)
    monkeypatch.setattr(room, "free_memory", lambda device: 0)
    with pytest.raises(UserError, match=r"^memory: got a cache of 50 tokens"):
        generate(model, text(40), 10)


def test_a_long_turn_on_top_of_a_cache_is_run_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama").requires_grad_(False)
    applied = longrope.apply(model, table_of(model), chunk=7)
    cache = RoomyCache(model.config, ENDS[2])
    first = text(ORIGINAL - 10)
    model.generate(torch.tensor([first]), max_new_tokens=1, **{CACHE: cache}, **GREEDY)
    lengths: list[int] = []
    own = model.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        lengths.append(int(kwargs["input_ids"].shape[1]))
        return own(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", counted)
    longer = [*first, *text(30, 3)]
    assert generate(model, longer, 3, **{CACHE: cache}) == Reference("llama").greedy(longer, 3)
    assert max(lengths) <= 7
    assert applied.recomputed == len(first), "made again once, under the row of the whole"


def test_logits_may_be_asked_for_between_two_chunks(tmp_path: Path) -> None:
    loaded = load_model(
        str(write_checkpoint(tmp_path / "model")), LoadOptions(device="cpu", dtype="float32", threads=1)
    )
    applied = longrope.apply(loaded.model, table_of(loaded.model), chunk=11)
    ids = tokens(70)
    whole: Any = loaded.model
    expected = whole(ids).logits
    cache, parts = RoomyCache(loaded.model.config, 70), []
    with torch.no_grad():
        for start, outputs in applied.switch.fill(cache, ids, 70):
            piece = ids[:, start : start + outputs.last_hidden_state.shape[1]]
            parts += [logits for _, _, logits in loaded.tail(outputs, piece)]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5)
