"""Intervals and paired comparisons: edges, invariances and coverage that a notebook demonstration does not fix."""
import math

import numpy as np
import pytest

from tulu_study.core.stats import Interval, bootstrap, minimum_detectable, paired_difference, sign_flip_p


def test_same_seed_same_bytes_and_order_of_examples_is_irrelevant():
    scores = np.random.default_rng(1).random(300)
    order = np.random.default_rng(2).permutation(300)
    names = np.arange(300) % 7
    assert bootstrap(scores) == bootstrap(scores[order])
    first, second = bootstrap(scores, names), bootstrap(scores[order], names[order])
    assert (first.low, first.high) == pytest.approx((second.low, second.high))
    assert bootstrap(scores, seed=1).low != bootstrap(scores, seed=2).low


@pytest.mark.parametrize("values", [[], np.zeros((2, 2)), [0.5, float("nan")], [0.5, float("inf")], [0, 100]])
def test_what_cannot_carry_an_interval_is_refused(values):
    with pytest.raises(ValueError, match="values: found"):
        bootstrap(values)


@pytest.mark.parametrize("options", [{"level": 1}, {"level": 0}, {"n_boot": 1}, {"clusters": ["a"]}, {"clusters": ["a", "b", "b"], "average": "mean"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="found"):
        bootstrap([0, 1, 1], **options)


def test_one_example_says_almost_nothing():
    found = bootstrap([1])
    assert (found.value, found.n, found.high) == (1, 1, 1) and found.low == pytest.approx(0.025)


@pytest.mark.parametrize("n", [1, 5, 40, 200])
def test_all_wrong_has_the_exact_bound(n):
    found = bootstrap([0] * n)
    assert found.low == 0 and found.high == pytest.approx(1 - 0.025 ** (1 / n)) and "agree" in found.method


def test_percent_scale_gives_the_same_interval():
    shares = [0.0] * 30 + [1.0] * 10
    percent = bootstrap([100 * share for share in shares], bounds=(0, 100))
    assert (percent.low, percent.high) == pytest.approx((bootstrap(shares).scaled(100).low, bootstrap(shares).scaled(100).high))


def test_value_lies_within_its_bounds_whatever_the_data():
    rng = np.random.default_rng(3)
    for number in range(60):
        n = int(rng.integers(1, 30))
        values = (rng.random(n) < rng.random()).astype(float)
        names = rng.integers(0, 4, n)
        for found in (bootstrap(values, n_boot=200), bootstrap(values, names, n_boot=200), bootstrap(values, names, n_boot=200, average="macro")):
            assert 0 <= found.low <= found.value <= found.high <= 1
            assert found.high > found.low


def test_micro_and_macro_average():
    values, names = [1, 0, 0, 0, 1], ["law", "law", "law", "law", "art"]
    assert bootstrap(values, names).value == pytest.approx(0.4)
    assert bootstrap(values, names, average="macro").value == pytest.approx((0.25 + 1) / 2)


def test_difference_is_antisymmetric_and_shift_free():
    rng = np.random.default_rng(4)
    first, second = rng.random(80).round(2), rng.random(80).round(2)
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert one.value == pytest.approx(-other.value) and one.p == other.p
    assert one.low == pytest.approx(-other.high, abs=0.02)


def test_difference_wants_the_same_examples():
    with pytest.raises(ValueError, match="same examples"):
        paired_difference([1, 0], [1, 0, 1])


def test_nothing_differs():
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert found.value == 0 and found.p == 1 and not found.outside_noise and found.low < 0 < found.high


def test_p_value_is_mcnemars():
    for gained, lost in ((6, 0), (9, 2), (20, 14)):
        n = gained + lost
        exact = min(1.0, 2 * sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n)
        assert sign_flip_p(np.array([1.0] * gained + [-1.0] * lost + [0.0] * 30)) == pytest.approx(exact, abs=0.015)


def test_few_groups_never_make_a_discovery():
    names = ["law", "art", "sea"] * 20
    found = paired_difference([1] * 60, [0] * 60, clusters=names)
    assert found.p > 0.2 and not found.outside_noise


def test_groups_count_in_the_difference_too():
    rng = np.random.default_rng(5)
    names = np.repeat(np.arange(12), 20)
    lift = np.repeat(rng.random(12) < 0.5, 20)
    base = np.zeros(240)
    assert paired_difference(lift.astype(float), base, names).se > 2 * paired_difference(lift.astype(float), base).se


def test_minimum_detectable_shrinks_with_the_root_of_n():
    assert minimum_detectable(400, 0.5) == pytest.approx(minimum_detectable(100, 0.5) / 2)
    assert minimum_detectable(200, math.sqrt(0.5)) == pytest.approx(0.1401, abs=1e-3)
    for arguments in ((0, 0.5), (10, -1), (10, float("nan"))):
        with pytest.raises(ValueError, match="found"):
            minimum_detectable(*arguments)


def test_outside_noise_wants_both():
    assert Interval(1, 0.2, 2, 10, 0.95, "", p=0.01).outside_noise
    assert not Interval(1, 0.2, 2, 10, 0.95, "", p=0.2).outside_noise
    assert not Interval(1, -0.2, 2, 10, 0.95, "", p=0.01).outside_noise
