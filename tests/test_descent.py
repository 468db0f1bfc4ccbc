"""Descent: on closed forms it reaches the minimum within the bounds; on real models its gradient is the derivative."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longrope.baselines import RopeShape, Vector, baseline
from longrope.checkpoint import LoadOptions
from longrope.errors import UserError
from longrope.factors import RopeFactors
from longrope.model import LoadedModel, load_model
from longrope.patch import ScaledRotary
from longrope.search.archive import Archive
from longrope.search.backward import _measure_kept, _one, decoder_layers, loss_gradient
from longrope.search.critical import LongRope2
from longrope.search.descent import DescentSettings, batch_size, descend, fine_enough, refine, step_sizes
from longrope.search.driver import search
from longrope.search.methods import PolishSettings, Problem, hybrid
from longrope.search.space import LongRope, Space
from longrope.search.tasks import Gradient, Outcome, Task
from longrope.windows import Window
from models import ARCHITECTURES, build, save, tokens
from stepping import Answer, Asked, follow, losses

SHAPE = RopeShape(500.0, 32, 256)
TARGET, RATIO = 2048, 8.0
SPACE = LongRope(SHAPE.pairs, RATIO)
START = baseline("yarn+su", SHAPE, TARGET)
COUNTS = [100] * 8
POOL = tuple(range(8, 20))  # windows that only gradients are taken on
EASE = np.random.default_rng(0).uniform(0.9, 1.1, 20)


@dataclass(frozen=True)
class Valley:
    """Loss a token: 1 + sum of a_i (log lambda_i - log wanted_i)^2 + 3 (log m - log wanted m)^2, a little by window.

    a_i grows with the square of the angle by which pair i turns over the original length, as a model's loss does.
    """

    wanted: Vector
    attention_factor: float
    sharp: float = 1.0

    @property
    def weights(self) -> Vector:
        turns = 2 * math.pi * SHAPE.original_length / (SHAPE.periods * self.wanted)
        return self.sharp * (0.05 + 0.001 * turns**2)

    def loss(self, factors: RopeFactors) -> float:
        """Of the average window, nats a token."""
        rescale = (self.weights * np.log(factors.vector / self.wanted) ** 2).sum()
        return float(1 + rescale + 3 * math.log(factors.attention_factor / self.attention_factor) ** 2)

    def __call__(self, task: Task) -> Outcome:
        scales = [100 * EASE[window] for window in task.windows]
        values = [scale * self.loss(task.factors) for scale in scales]
        if not task.gradient:
            return losses(*values)
        by_rescale = 2 * self.weights * np.log(task.factors.vector / self.wanted) / task.factors.vector
        by_attention = 6 * math.log(task.factors.attention_factor / self.attention_factor)
        gradient = Gradient(
            tuple((sum(scales) * by_rescale).tolist()), sum(scales) * by_attention / task.factors.attention_factor
        )
        return losses(*values, gradient=gradient)


def near_yarn(seed: int) -> Vector:
    """Factors in the bounds, about as far from YaRN's as those that searches find."""
    turns = 2 * math.pi * SHAPE.original_length / (SHAPE.periods * START.vector)
    moved = START.vector * np.exp(np.minimum(0.3, 4 / turns) * np.random.default_rng(seed).uniform(-1, 1, SHAPE.pairs))
    return np.clip(np.sort(moved), 1.0, SPACE.high)


def descended(
    answer: Answer, space: Space = SPACE, start: RopeFactors = START, settings: DescentSettings | None = None
) -> tuple[Asked, Archive]:
    archive, asked = Archive(COUNTS), Asked()
    rng = np.random.default_rng(0)
    follow(descend(start, space, SHAPE, archive, POOL, settings or DescentSettings(), rng), archive, answer, asked)
    return asked, archive


def stays_in_bounds(asked: Asked) -> bool:
    vectors = [each.task.factors.vector for each in asked.proposals]
    return all((np.diff(each) >= -1e-9).all() and each[0] >= 1 and each[-1] <= SPACE.high + 1e-9 for each in vectors)


@pytest.mark.parametrize("seed", range(3))
def test_a_descent_ends_near_the_minimum_within_the_bounds(seed: int) -> None:
    valley = Valley(near_yarn(seed), attention_factor=1.07)
    asked, archive = descended(valley)
    assert archive.best is not None
    excess, before = valley.loss(archive.best[1]) - 1, valley.loss(START) - 1
    assert before > 0.05, "or there is nothing to descend"
    assert excess < 0.01 * before
    assert archive.best[1].attention_factor == pytest.approx(1.07, rel=0.005)
    assert stays_in_bounds(asked)
    assert np.array_equal(archive.best[1].vector, archive.best[1].vector.round(4))


def test_a_minimum_outside_the_bounds_is_approached_along_them() -> None:
    wanted = np.concatenate([np.full(4, 0.7), np.linspace(3, 1.5, 8), np.full(4, 15.0)])
    valley = Valley(wanted, attention_factor=START.attention_factor)
    asked, archive = descended(valley, settings=DescentSettings(steps=80))
    assert stays_in_bounds(asked)
    assert archive.best is not None
    found = archive.best[1].vector
    assert (found[:4] == 1).all()
    # Weighted isotonic regression of what falls: all are one, at the mean of the wanted logs.
    weights = valley.weights[4:12]
    level = math.exp((weights * np.log(wanted[4:12])).sum() / weights.sum())
    assert np.allclose(found[4:12], level, rtol=0.1)
    assert found[-1] == SPACE.high


def test_a_step_turns_no_pair_by_more_than_the_radians_allowed() -> None:
    settings = DescentSettings()
    for space in (SPACE, LongRope2(SHAPE, RATIO)):
        vector = space.repair(START.vector)
        chart = space.chart(vector)
        sizes, x = step_sizes(chart, vector, SHAPE, settings), chart.coordinates(vector)
        reached = np.zeros(len(sizes))
        for index, size in enumerate(sizes):
            assert 0 < size <= settings.log_step
            by = 1e-6 * (np.arange(len(sizes)) == index)
            more, less = (
                SHAPE.original_length * 2 * math.pi / (SHAPE.periods * chart.vector(at)) for at in (x + by, x - by)
            )
            reached[index] = size * (np.abs(more - less) / 2e-6).max()
            assert reached[index] <= settings.radians * 1.001
        bounded = sizes < settings.log_step
        assert bounded.any() == isinstance(space, LongRope), "from a critical pair on no pair turns that far"
        assert np.allclose(reached[bounded], settings.radians, rtol=0.001), "as far as either limit allows"


def test_the_first_step_goes_down_by_the_whole_of_what_a_step_may() -> None:
    start = START.with_values(rescale=tuple(np.geomspace(1.5, 6, SHAPE.pairs)))  # no neighbours that would meet
    wanted = start.vector * np.exp(np.where(np.arange(SHAPE.pairs) % 3, 0.2, -0.2))
    settings = DescentSettings(radians=0.2, log_step=0.02)
    asked, _ = descended(Valley(wanted, attention_factor=1.0), start=start, settings=settings)
    first, second = (each[0].task.factors for each in asked.rounds[:2])
    sizes = step_sizes(SPACE.chart(start.vector), start.vector, SHAPE, settings)
    assert np.log(second.vector / first.vector) == pytest.approx(sizes * np.sign(wanted - start.vector), rel=1e-6)
    assert math.log(second.attention_factor / first.attention_factor) == pytest.approx(-settings.attention_step)


@pytest.mark.parametrize("seed", range(2))
def test_an_attention_factor_that_is_not_searched_stays_as_it_is(seed: int) -> None:
    valley = Valley(near_yarn(seed), attention_factor=1.07)
    asked, archive = descended(valley, settings=DescentSettings(attention_step=0.0))
    assert {each.task.factors.attention_factor for each in asked.proposals} == {START.attention_factor}
    assert archive.best is not None
    rest = 3 * math.log(START.attention_factor / 1.07) ** 2
    assert valley.loss(archive.best[1]) - 1 - rest < 0.01 * (valley.loss(START) - 1 - rest)


@pytest.mark.parametrize("seed", range(2))
def test_in_the_space_of_longrope2_all_that_counts_are_members(seed: int) -> None:
    space = LongRope2(SHAPE, RATIO)
    opening = dict(space.openings(np.random.default_rng(0)))["ntk-7"]
    start = START.with_values(rescale=tuple(opening))
    index = np.arange(SHAPE.pairs)
    wanted = np.where(index < 7, 11.0 ** (index / 7), np.maximum(11.0, 11 + 0.3 * (index - 7)))
    valley = Valley(wanted, attention_factor=1.1)
    asked, archive = descended(valley, space, start)
    for each in asked.proposals:
        assert space.holds(each.task.factors)
    assert archive.best is not None
    assert valley.loss(archive.best[1]) - 1 < 0.01 * (valley.loss(start) - 1)


def batches(asked: Asked) -> list[tuple[int, ...]]:
    """The windows of each step, in the order in which they were asked for."""
    steps = [each for each in asked.rounds if each[0].task.gradient]
    assert all(len({task.task.factors.key for task in each}) == 1 for each in steps), "one point a step"
    return [tuple(window for each in step for window in each.task.windows) for step in steps]


def test_gradients_are_taken_on_each_window_of_the_pool_before_any_comes_again() -> None:
    asked, _ = descended(Valley(near_yarn(0), 1.07))
    taken = batches(asked)
    assert {len(batch) for batch in taken} == {batch_size(len(COUNTS))} == {2}
    for first in range(0, len(taken) - len(taken) % 6, 6):
        once = [window for batch in taken[first : first + 6] for window in batch]
        assert sorted(once) == list(POOL)
    assert len({tuple(taken[first : first + 6]) for first in (0, 6, 12)}) == 3, "in another order every time"
    for each in asked.rounds:
        if not each[0].task.gradient:
            assert [window for task in each for window in task.task.windows] == list(range(8))


def test_on_flat_ground_it_stops_by_patience() -> None:
    settings = DescentSettings(check_every=4, patience=2, steps=100)
    asked, archive = descended(
        lambda task: losses(*[70.0] * len(task.windows), gradient=_flat(task)), settings=settings
    )
    assert len(batches(asked)) == 4 * 3, "one check that gains, and two that do not"
    assert archive.best is not None
    assert np.allclose(archive.best[1].vector, START.vector, atol=0.005)


def _flat(task: Task) -> Gradient | None:
    return Gradient((0.0,) * SHAPE.pairs, 0.0) if task.gradient else None


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["rescale", "attention_factor"])
def test_a_gradient_that_is_no_number_ends_it(step: int, bad: float, where: str) -> None:
    valley, count = Valley(near_yarn(0), 1.07), 0

    def answer(task: Task) -> Outcome:
        nonlocal count
        outcome = valley(task)
        count += task.gradient
        if outcome.gradient is None or count <= 2 * step:  # two windows a step
            return outcome
        spoilt = Gradient(outcome.gradient.rescale, bad)
        if where == "rescale":
            spoilt = Gradient((bad, *outcome.gradient.rescale[1:]), outcome.gradient.attention_factor)
        return losses(*outcome.losses, gradient=spoilt)

    asked, archive = descended(answer)
    assert len(batches(asked)) == step + 1
    assert (archive.best is None) == (step == 0)
    if archive.best is not None:
        assert valley.loss(archive.best[1]) < valley.loss(START)
    assert stays_in_bounds(asked)


def test_a_loss_that_is_no_number_on_the_way_is_no_gain_and_never_wins() -> None:
    valley = Valley(near_yarn(0), 1.07)

    def answer(task: Task) -> Outcome:
        if not task.gradient and task.factors.attention_factor > 1.09:
            return losses(*[math.nan] * len(task.windows))
        return valley(task)

    _, archive = descended(answer, start=START.with_values(attention_factor=1.3))
    assert archive.best is not None
    assert archive.best[1].attention_factor <= 1.09


def test_where_rounding_costs_too_much_a_finer_grid_is_used() -> None:
    wanted = near_yarn(0)
    exact = START.with_values(rescale=tuple(wanted), attention_factor=1.07)
    for sharp, digits in ((0.01, 2), (3.0, 3), (300.0, 4)):
        archive, asked, valley = Archive(COUNTS), Asked(), Valley(wanted, 1.07, sharp)
        follow(refine(exact, SPACE, archive, "descent", 0, True), archive, valley, asked)
        plain = exact.with_values(rescale=tuple(SPACE.repair(wanted)))
        archive = Archive(COUNTS)
        archive.add(Task(plain, archive.everything), valley(Task(plain, archive.everything)))
        follow(refine(exact, SPACE, archive, "descent", 0, True), archive, valley, asked)
        assert archive.best is not None
        found = archive.best[1].vector
        assert np.array_equal(found, found.round(digits)), "the unrounded ones may not win"
        assert digits == 2 or not np.array_equal(found, found.round(digits - 1))
        assert valley.loss(archive.best[1]) <= 1.0001, "as good as unrounded"


# The gradient of real models

LENGTH = 96
# All experts of a mixture are used: with a choice among them the loss leaps where another is chosen.
_SMOOTH: dict[str, dict[str, Any]] = {"mixtral": {"num_experts_per_tok": 3}, "gpt_oss": {"num_experts_per_tok": 3}}
_FLOAT32 = ("mixtral", "gpt_oss", "llama4")  # whose product of grouped matrices knows no float64


def loaded_model(name: str, folder: Path, **options: Any) -> LoadedModel:
    chosen = LoadOptions(device="cpu", **{"dtype": "float32", "rope_precision": "float64", **options})
    loaded = load_model(str(save(build(name, **_SMOOTH.get(name, {})), folder / name)), chosen)
    loaded.widen_window(LENGTH)
    return loaded


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded_model("llama", tmp_path_factory.mktemp("small"))


@pytest.fixture
def fresh(small: LoadedModel) -> Iterator[LoadedModel]:
    """The small model with nothing measured yet, and whatever a test did to it undone."""
    small.checkpoint_from = None
    yield small
    small.checkpoint_from = None


def window(seed: int, length: int = LENGTH, scored_from: int = 1) -> Window:
    return Window(str(seed), str(seed), 0, tokens(length, seed=seed)[0].numpy(), scored_from)


def some_factors(loaded: LoadedModel, start_tokens: int = 4) -> RopeFactors:
    pairs = loaded.rope.shape.pairs
    rescale = tuple((1 + 3 * np.arange(pairs) / pairs).tolist())
    return RopeFactors(LENGTH, rescale, start_tokens=start_tokens, attention_factor=1.1)


def loss_of(loaded: LoadedModel, factors: RopeFactors, windows: Sequence[Window]) -> float:
    """Summed cross-entropy of the scored tokens, of whole logits in float64."""
    total = 0.0
    with loaded.patch() as patch, torch.no_grad():
        patch.install(factors)
        for each in windows:
            ids = torch.from_numpy(each.ids)[None]
            logits = loaded.model(input_ids=ids, use_cache=False).logits[0, each.scored_from - 1 : -1]
            wanted = ids[0, each.scored_from :]
            total += float(torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum"))
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_is_that_of_finite_differences_on_every_architecture(name: str, tmp_path: Path) -> None:
    loaded = loaded_model(name, tmp_path)
    if name not in _FLOAT32:
        loaded.model.double()
    factors, windows = some_factors(loaded), [window(1), window(2, scored_from=60)]
    loaded.checkpoint_from = 10 * LENGTH
    with loaded.patch() as patch:
        plain = loss_gradient(loaded, patch, factors, windows)
    found, by_rescale, by_attention, recomputed = plain
    assert recomputed == 0
    assert found == pytest.approx([loss_of(loaded, factors, [each]) for each in windows], rel=1e-6)
    tolerance = 0.002 * max(abs(by_rescale).max(), abs(by_attention))
    assert tolerance > 1e-4, "or nothing depends on the factors"
    periods = loaded.rope.shape.periods
    for pair in range(1, len(by_rescale)):  # the first turns a radian in a few hundredths of its factor
        turn = 2 * math.pi * LENGTH / (periods[pair] * factors.rescale[pair])
        by = factors.rescale[pair] * min(0.01, 0.02 / turn) * (np.arange(len(by_rescale)) == pair)
        more, less = (factors.with_values(rescale=tuple(factors.vector + sign * by)) for sign in (1, -1))
        slope = (loss_of(loaded, more, windows) - loss_of(loaded, less, windows)) / (2 * by[pair])
        assert by_rescale[pair] == pytest.approx(slope, rel=0.01, abs=tolerance)
    more, less = (factors.with_values(attention_factor=1.1 + sign * 0.002) for sign in (1, -1))
    slope = (loss_of(loaded, more, windows) - loss_of(loaded, less, windows)) / 0.004
    assert by_attention == pytest.approx(slope, rel=0.01, abs=tolerance)

    loaded.checkpoint_from = LENGTH
    with loaded.patch() as patch:
        again = loss_gradient(loaded, patch, factors, windows)
    assert np.array_equal(again[0], found)
    assert np.array_equal(again[1], by_rescale), "activation checkpointing changes no bit"
    assert again[2:] == (by_attention, 2 * LENGTH)


def test_positions_that_are_not_rescaled_give_no_gradient(fresh: LoadedModel) -> None:
    for start, is_zero in ((0, False), (LENGTH // 2, False), (LENGTH, True), (2 * LENGTH, True)):
        with fresh.patch() as patch:
            _, by_rescale, by_attention, _ = loss_gradient(fresh, patch, some_factors(fresh, start), [window(1)])
        assert (abs(by_rescale).max() == 0) == is_zero
        assert abs(by_attention) > 0.1, "of all positions"


def test_only_scored_tokens_count(fresh: LoadedModel) -> None:
    factors, parts = some_factors(fresh), []
    with fresh.patch() as patch:
        for first in (1, 60, LENGTH - 1):
            found, by_rescale, by_attention, _ = loss_gradient(fresh, patch, factors, [window(1, scored_from=first)])
            parts.append(np.concatenate([found, by_rescale, [by_attention]]))
    last = parts[2]
    assert np.isfinite(last).all()
    assert abs(last).min() > 0
    assert abs(parts[0] - parts[1]).min() > 0
    # The gradient of a window's beginning, as a window of its own, is what is missing.
    with fresh.patch() as patch:
        beginning = loss_gradient(fresh, patch, factors, [window(1).__class__("a", "a", 0, window(1).ids[:60])])
    whole = np.concatenate([beginning[0], beginning[1], [beginning[2]]]) + parts[1]
    assert parts[0] == pytest.approx(whole, rel=1e-3, abs=1e-3)


def test_several_windows_are_summed(fresh: LoadedModel) -> None:
    factors, windows = some_factors(fresh), [window(seed) for seed in range(3)]
    with fresh.patch() as patch:
        each = [loss_gradient(fresh, patch, factors, [one]) for one in windows]
        found, by_rescale, by_attention, _ = loss_gradient(fresh, patch, factors, windows)
    assert found.tolist() == [one[0][0] for one in each]
    assert by_rescale == pytest.approx(sum(one[1] for one in each))
    assert by_attention == pytest.approx(sum(one[2] for one in each))


def test_under_autocast_it_is_about_the_same(fresh: LoadedModel, tmp_path: Path) -> None:
    rough = loaded_model("llama", tmp_path, dtype="autocast", rope_precision="float32")
    factors = some_factors(fresh)
    found = []
    for loaded in (fresh, rough):
        with loaded.patch() as patch:
            found.append(loss_gradient(loaded, patch, factors, [window(1)]))
    exact, near = found
    assert near[0] == pytest.approx(exact[0], rel=5e-3)
    assert near[0][0] != exact[0][0], "it ran in bfloat16"
    assert near[1] == pytest.approx(exact[1], abs=0.15 * abs(exact[1]).max())


@pytest.mark.parametrize("checkpoint_from", [1, 10 * LENGTH])
def test_the_model_is_left_as_it_was(fresh: LoadedModel, checkpoint_from: int) -> None:
    model, ids = fresh.model, tokens(20)

    def state() -> dict[str, Any]:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        return {
            "logits": logits.numpy().tobytes(),
            "grad": [(name, each.requires_grad, each.grad is None) for name, each in model.named_parameters()],
            "modules": [(name, type(each), sorted(vars(each))) for name, each in model.named_modules()],
        }

    before, fresh.checkpoint_from = state(), checkpoint_from
    with fresh.patch() as patch:
        loss_gradient(fresh, patch, some_factors(fresh), [window(1)])
        assert not any("forward" in vars(layer) for layer in decoder_layers(fresh.decoder))
        carried = [each.rope for each in model.modules() if isinstance(each, ScaledRotary) and each.rope is not None]
        assert carried
        assert not any(each.rotations.requires_grad or each.attention_factor.requires_grad for each in carried)
        with pytest.raises(RuntimeError, match="of no use"), broken(fresh):
            loss_gradient(fresh, patch, some_factors(fresh), [window(1)])
    assert state() == before


@contextmanager
def broken(loaded: LoadedModel) -> Iterator[None]:
    """A model whose last layer fails, for another reason than memory."""

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("of no use")

    hook = decoder_layers(loaded.decoder)[-1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def memory_for(loaded: LoadedModel, plain: int, checkpointed: int) -> Iterator[list[tuple[int, bool]]]:
    """A device with memory for windows of so many tokens, without and with checkpoints; the passes that were tried."""
    tried: list[tuple[int, bool]] = []
    first = decoder_layers(loaded.decoder)[0]

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "forward" in vars(module):  # the model's tail asks it again for outputs that are there
            return
        tried.append((kwargs["input_ids"].numel(), "forward" in vars(first)))
        if tried[-1][0] > (checkpointed if tried[-1][1] else plain):
            raise torch.OutOfMemoryError("out of memory")

    hook = loaded.decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield tried
    finally:
        hook.remove()


def test_what_does_not_fit_plainly_is_computed_with_checkpoints_from_then_on(fresh: LoadedModel) -> None:
    factors = some_factors(fresh)
    with fresh.patch() as patch:
        wanted = loss_gradient(fresh, patch, factors, [window(1), window(2)])
        assert (wanted[3], fresh.checkpoint_from is not None) == (0, True)
        with memory_for(fresh, LENGTH - 1, LENGTH) as tried:
            found = loss_gradient(fresh, patch, factors, [window(1), window(2)])
            assert tried == [(LENGTH, False), (LENGTH, True), (LENGTH, True)]
            shorter = loss_gradient(fresh, patch, factors, [window(1, LENGTH // 2)])
            assert tried[3:] == [(LENGTH // 2, False)]
    assert np.array_equal(found[0], wanted[0])
    assert np.array_equal(found[1], wanted[1])
    assert found[2:] == (wanted[2], 2 * LENGTH)
    assert shorter[3] == 0


def test_a_window_that_does_not_fit_even_so_is_refused_with_a_length_that_would(fresh: LoadedModel) -> None:
    with fresh.patch() as patch:
        loss_gradient(fresh, patch, some_factors(fresh), [window(1)])
        with memory_for(fresh, 10, 30), pytest.raises(UserError) as caught:
            loss_gradient(fresh, patch, some_factors(fresh), [window(1)])
    message = f"memory: got a window of {LENGTH} tokens; one window must fit into the device's memory; use at most 24 "
    assert str(caught.value).startswith(message)
    assert not any("forward" in vars(layer) for layer in decoder_layers(fresh.decoder))


def test_little_free_memory_asks_for_checkpoints_before_any_runs_out(
    fresh: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longrope.search import backward

    monkeypatch.setattr(backward, "free_memory", lambda device: 2**19)
    with fresh.patch() as patch, memory_for(fresh, 64, LENGTH) as tried:
        found = loss_gradient(fresh, patch, some_factors(fresh), [window(1)])
    assert fresh.checkpoint_from is not None
    assert fresh.checkpoint_from <= LENGTH
    assert tried == [(6, False), (12, False), (24, False), (LENGTH, True)], "probes of a few tokens, and the window"
    assert found[3] == LENGTH


@pytest.mark.parametrize(("attention", "name"), [("sdpa", "llama"), ("eager", "llama"), ("eager", "gemma2")])
@pytest.mark.parametrize("dtype", ["float32", "autocast"])
def test_what_a_window_keeps_is_told_from_a_few_tokens(tmp_path: Path, attention: str, name: str, dtype: str) -> None:
    loaded = loaded_model(name, tmp_path, attention=attention, dtype=dtype, rope_precision="float32")
    with loaded.patch() as patch:
        kept = _measure_kept(loaded, patch, some_factors(loaded), window(1, 2048))
        own = {parameter.untyped_storage().data_ptr() for parameter in loaded.model.parameters()}
        vocabulary = loaded.model.config.get_text_config().vocab_size
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            # The logits of a chunk, which is differentiated at once, are gone before the window's own backward pass.
            if tensor.untyped_storage().data_ptr() not in own and tensor.shape[-1:] != (vocabulary,):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _one(loaded, patch, some_factors(loaded), torch.from_numpy(window(1, 1024).ids)[None], None, False)
    assert kept(1024) == pytest.approx(sum(found.values()), rel=0.05)
    assert (kept.quadratic > 0) == (attention == "eager")
    assert kept(kept.tokens(1e9)) <= 1e9 < kept(kept.tokens(1e9) + 1)


def test_a_model_without_a_derivative_is_refused_before_anything_is_evaluated(
    fresh: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda *given, **more: tuple(each.detach() for each in plain(*given))
    )
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    with pytest.raises(UserError) as caught:
        search(fresh, to=4 * LENGTH, documents=[str(tmp_path)], out=tmp_path / "run", windows=2, gradient_windows=2)
    assert str(caught.value).startswith("--method: got ")
    assert "whose attention passes no derivative on to its RoPE; gradient and hybrid differentiate" in str(caught.value)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    texts, out = [str(tmp_path)], tmp_path / "other"
    assert search(fresh, to=4 * LENGTH, documents=texts, out=out, windows=2, method="evolution", evaluations=2)


def test_the_checks_grid_is_as_fine_as_the_original_length_asks_for() -> None:
    settings = DescentSettings()
    assert fine_enough(RopeShape(500.0, 32, 128), START.vector, settings) == 0.01
    assert fine_enough(SHAPE, START.vector, settings) == 0.001
    long = RopeShape(500_000.0, 128, 8192)
    step = fine_enough(long, baseline("llama3", long, 65536).vector, settings)
    assert 8192 * step / 2 <= settings.radians / 2, "of the fastest pair, which turns by one radian a token"


def test_a_descent_on_a_fine_grid_leaves_it_neither_at_its_end_nor_in_the_polish() -> None:
    """A long original length turns the fast pairs so far that the paper's grid costs more than there is to gain."""
    shape = RopeShape(10_000.0, 64, 4096)
    space, start = LongRope(shape.pairs, 8.0), baseline("yarn+su", shape, 8 * 4096)
    wanted = np.clip(np.sort(start.vector * np.random.default_rng(0).uniform(0.95, 1.05, shape.pairs)), 1.0, space.high)
    turns = 2 * math.pi * shape.original_length / (shape.periods * wanted)

    def loss(factors: RopeFactors) -> float:
        return float(1 + (0.001 * turns**2 * np.log(factors.vector / wanted) ** 2).sum())

    def answer(task: Task) -> Outcome:
        by_rescale = 0.002 * turns**2 * np.log(task.factors.vector / wanted) / task.factors.vector
        count = len(task.windows)
        gradient = Gradient(tuple((100 * count * by_rescale).tolist()), 0.0)
        return losses(*[100 * loss(task.factors)] * count, gradient=gradient if task.gradient else None)

    archive, asked = Archive(COUNTS), Asked()
    problem = Problem(space, [("yarn+su", start)], shape, POOL, search_attention=False)
    follow(hybrid(problem, DescentSettings(), PolishSettings(), archive, 0), archive, answer, asked)
    assert archive.best is not None
    assert loss(archive.best[1]) - 1 < 0.01 * (loss(start) - 1)
    polished = {each.task.factors.key: each.task.factors for each in asked.proposals if each.origin == "polish"}
    descended = min(loss(each.task.factors) for each in asked.proposals if each.origin.endswith(("check", "end")))
    on_the_papers = loss(archive.best[1].with_values(rescale=tuple(space.repair(archive.best[1].vector).tolist())))
    assert on_the_papers - 1 > 10 * (descended - 1), "or this test shows nothing"
    assert min(loss(each) for each in polished.values()) < (descended + on_the_papers) / 2
