from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope import baselines
from longrope.baselines import METHODS, RopeShape, baseline
from longrope.errors import UserError

LLAMA2 = RopeShape(10000.0, 128, 4096)
LLAMA3 = RopeShape(500000.0, 128, 8192)
PHI3 = RopeShape(10000.0, 96, 2048)
TINY = RopeShape(200.0, 64, 256)
SHAPES = [LLAMA2, LLAMA3, PHI3, TINY]


@pytest.mark.parametrize("shape", SHAPES)
def test_pi_divides_every_frequency_by_the_ratio(shape: RopeShape) -> None:
    np.testing.assert_array_equal(baselines.position_interpolation(shape, 8), np.full(shape.rotary_dim // 2, 8.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_ntk_is_a_larger_base(shape: RopeShape) -> None:
    ratio, d, i = 8.0, shape.rotary_dim, shape.index
    larger = shape.rope_theta * ratio ** (d / (d - 2))
    np.testing.assert_allclose(baselines.ntk(shape, ratio), (larger / shape.rope_theta) ** (2 * i / d), rtol=1e-12)
    assert baselines.ntk(shape, ratio)[0] == 1.0
    assert baselines.ntk(shape, ratio)[-1] == pytest.approx(ratio)


@pytest.mark.parametrize(("ratio", "alpha"), [(2, 3), (4, 13), (8, 57)])
def test_dynamic_ntk_reaches_the_alpha_of_the_paper(ratio: float, alpha: float) -> None:
    np.testing.assert_allclose(baselines.dynamic_ntk(LLAMA2, ratio), baselines.ntk(LLAMA2, alpha), rtol=1e-12)


def test_ntk_by_critical_dimension_interpolates_that_pair_exactly() -> None:
    ratio, shape = 8.0, LLAMA2
    base = shape.rope_theta ** (math.log(ratio * 4096 / (2 * math.pi)) / math.log(4096 / (2 * math.pi)))
    expected = (base / shape.rope_theta) ** (2 * shape.index / shape.rotary_dim)
    np.testing.assert_allclose(baselines.ntk_critical(shape, ratio), expected, rtol=1e-12)


def test_yarn_has_the_values_computed_for_llama2_at_8x() -> None:
    code, paper = baselines.yarn(LLAMA2, 8), baselines.yarn_published(LLAMA2, 8)
    assert [round(float(code[i]), 3) for i in (32, 40)] == [1.677, 3.059]
    assert [round(float(paper[i]), 3) for i in (32, 40)] == [3.562, 6.453]


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [
        (LLAMA2, 20, 46),
        (LLAMA3, 18, 35),
        (PHI3, 12, 31),
        (RopeShape(10000.0, 128, 2048), 16, 41),
        (RopeShape(10000.0, 128, 8192), 25, 50),
    ],
)
def test_yarn_keeps_the_pairs_below_its_band_and_interpolates_those_above(
    shape: RopeShape, low: int, high: int
) -> None:
    vector = baselines.yarn(shape, 16)
    assert np.flatnonzero(vector == 1.0).max() == low
    assert np.flatnonzero(np.isclose(vector, 16.0, rtol=1e-12)).min() == high
    assert np.all(np.diff(vector[low : high + 1]) > 0)


def test_yarn_as_published_is_linear_in_the_turns() -> None:
    for i, value in enumerate(baselines.yarn_published(LLAMA2, 4)):
        turns = 4096 / (2 * math.pi * 10000 ** (i / 64))
        gamma = min(1.0, max(0.0, (turns - 1) / 31))
        assert value == pytest.approx(1 / ((1 - gamma) / 4 + gamma))


def test_yarn_by_critical_dimension_interpolates_from_that_pair_on() -> None:
    given_pair = baselines.yarn_critical(LLAMA3, 16, 30)
    assert np.flatnonzero(np.isclose(given_pair, 16.0, rtol=1e-12)).min() == 30
    theoretical = baselines.yarn_critical(LLAMA3, 16)
    assert np.flatnonzero(np.isclose(theoretical, 16.0, rtol=1e-12)).min() == 35


def test_llama3_has_the_values_computed_for_llama3() -> None:
    vector = baselines.llama3(LLAMA3, 8)
    np.testing.assert_array_equal(vector[:29], 1.0)
    assert [round(float(value), 3) for value in vector[29:35]] == [1.207, 1.553, 2.026, 2.695, 3.684, 5.257]
    np.testing.assert_allclose(vector[35:], 8.0)


@pytest.mark.parametrize(
    ("shape", "exact", "whole", "ten_periods"),
    [
        (PHI3, 30.16, 31, 19),
        (LLAMA3, 34.98, 35, 24),
        (LLAMA2, 45.03, 46, 30),
        (RopeShape(10000.0, 128, 2048), 40.21, 41, 25),
        (RopeShape(10000.0, 128, 8192), 49.84, 50, 34),
    ],
)
def test_the_critical_dimension_is_that_of_the_papers(
    shape: RopeShape, exact: float, whole: int, ten_periods: int
) -> None:
    assert round(baselines.critical_dimension(shape), 2) == exact
    assert math.ceil(baselines.critical_dimension(shape)) == whole
    assert math.ceil(baselines.critical_dimension(shape, 10)) == ten_periods


def test_the_embedded_model_has_its_critical_dimension_where_llama2_has_it() -> None:
    tiny, llama2 = (baselines.critical_dimension(shape) / shape.pairs for shape in (TINY, LLAMA2))
    assert (round(tiny, 2), round(llama2, 2)) == (0.70, 0.70)


@pytest.mark.parametrize(
    ("ratio", "yarn", "su_2k", "su_4k", "su_8k"),
    [
        (2, 1.0693, 1.0445, 1.0408, 1.0377),
        (4, 1.1386, 1.0871, 1.0801, 1.0742),
        (8, 1.2079, 1.1282, 1.1180, 1.1094),
        (16, 1.2773, 1.1677, 1.1547, 1.1435),
        (32, 1.3466, 1.2060, 1.1902, 1.1767),
        (64, 1.4159, 1.2432, 1.2247, 1.2089),
        (512, 1.6238, 1.3484, 1.3229, 1.3009),
    ],
)
def test_attention_factors_are_those_of_the_published_table(
    ratio: float, yarn: float, su_2k: float, su_4k: float, su_8k: float
) -> None:
    assert round(baselines.yarn_attention_factor(ratio), 4) == yarn
    assert [round(baselines.su_attention_factor(ratio, n), 4) for n in (2048, 4096, 8192)] == [su_2k, su_4k, su_8k]


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_nothing_extended_means_an_attention_factor_of_one(ratio: float) -> None:
    assert baselines.su_attention_factor(ratio, 4096) == 1.0
    assert baselines.yarn_attention_factor(ratio) == 1.0


def test_an_attention_rule_is_a_name_or_a_number() -> None:
    chosen = [baselines.attention_factor(rule, 8.0, 4096) for rule in ("su", "yarn", "none", "1.25")]
    assert chosen == [baselines.su_attention_factor(8, 4096), baselines.yarn_attention_factor(8), 1.0, 1.25]


@pytest.mark.parametrize("rule", ["Su", "", "0", "-1", "nan", "inf", "search"])
def test_another_attention_rule_is_refused(rule: str) -> None:
    message = f"--attention-factor: got {rule!r}; it is su, yarn, none or a positive number; choose one of them"
    with pytest.raises(UserError, match=re.escape(message)):
        baselines.attention_factor(rule, 8.0, 4096)


OWN = {"yarn": "yarn", "yarn-paper": "yarn", "yarn-rcd": "yarn"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_comes_with_its_own_attention_factor_or_su(name: str) -> None:
    own, su = baseline(name, LLAMA2, 32768), baseline(f"{name}+su", LLAMA2, 32768)
    assert own.attention_factor == (baselines.yarn_attention_factor(8) if name in OWN else 1.0)
    assert su.attention_factor == baselines.su_attention_factor(8, 4096)
    assert own.rescale == su.rescale
    assert (own.up_to, own.start_tokens) == (32768, 0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("target", [1000, 4096])
def test_every_method_is_the_base_model_where_nothing_is_extended(name: str, target: int) -> None:
    factors = baseline(name, LLAMA2, target)
    np.testing.assert_allclose(factors.vector, 1.0, rtol=1e-15)
    assert factors.attention_factor == 1.0


@pytest.mark.parametrize("name", ["ntk2", "", "yarn+x", "yarn+", "+su", "yarn+su+su"])
def test_an_unknown_method_is_refused_with_the_known_ones(name: str) -> None:
    message = f"method: got {name!r}; known are none, pi, ntk, ntk-cd, dynamic-ntk, yarn, yarn-paper, yarn-rcd, llama3"
    with pytest.raises(UserError, match=re.escape(message)):
        baseline(name, LLAMA2, 32768)


@pytest.mark.parametrize("theta", [1.0, 0.5, -3.0, math.inf, math.nan])
def test_a_base_of_one_or_less_is_refused(theta: float) -> None:
    with pytest.raises(UserError, match=f"rope_theta: got {theta}; a RoPE base is a finite number above 1"):
        RopeShape(theta, 64, 256)


@settings(max_examples=60, deadline=None, database=None)
@given(
    theta=st.floats(1.5, 1e8),
    pairs=st.integers(1, 64),
    original=st.integers(1, 2**20),
    ratio=st.floats(1.0, 512.0),
    name=st.sampled_from(list(METHODS)),
)
def test_every_method_gives_factors_that_start_low_and_never_fall(
    theta: float, pairs: int, original: int, ratio: float, name: str
) -> None:
    shape = RopeShape(theta, 2 * pairs, original)
    vector = baseline(name, shape, max(1, round(original * ratio))).vector
    assert vector.min() > 1 - 1e-12
    assert np.all(np.diff(vector) > -1e-9 * vector[:-1])
