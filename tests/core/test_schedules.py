"""Schedules and the average."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crcore as cr
from crcore.testing import averages, cotangents, schedules

RAMPS = pytest.mark.parametrize("ramp", [cr.linear_ramp, cr.sigmoid_ramp, cr.cosine_ramp])
BY_HAND = {
    cr.linear_ramp: lambda t: t,
    cr.sigmoid_ramp: lambda t: math.exp(-5 * (1 - t) ** 2),
    cr.cosine_ramp: lambda t: (1 - math.cos(math.pi * t)) / 2,
}
MANY = settings(max_examples=150)
positive_steps = st.integers(1, 5_000)


@RAMPS
@given(peak=st.floats(-9, 9), start=st.floats(-9, 9), steps=positive_steps, at=st.integers(0, 10_000))
@MANY
def test_a_ramp_is_its_formula(ramp: Any, peak: float, start: float, steps: int, at: int) -> None:
    expected = start + (peak - start) * BY_HAND[ramp](min(at / steps, 1.0))
    assert float(ramp(peak, steps, start=start)(at)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@RAMPS
@given(peak=st.floats(0.1, 9), steps=positive_steps)
@MANY
def test_a_ramp_begins_at_its_start_and_stays_at_its_peak(ramp: Any, peak: float, steps: int) -> None:
    schedule = ramp(peak, steps)
    assert float(schedule(0)) == pytest.approx(peak * math.exp(-5) if ramp is cr.sigmoid_ramp else 0.0, abs=1e-15)
    for step in (steps, steps + 1, 10 * steps + 7):
        assert float(schedule(step)) == peak


@RAMPS
@given(peak=st.floats(0.1, 9), start=st.floats(0, 0.09), steps=positive_steps)
@MANY
def test_a_ramp_up_never_falls_and_never_leaves_its_range(ramp: Any, peak: float, start: float, steps: int) -> None:
    values = ramp(peak, steps, start=start)(np.arange(0, 2 * steps, max(1, steps // 50)))
    assert np.all(np.diff(values) >= 0.0)
    assert np.all((values >= start) & (values <= peak * (1 + 1e-15)))


@RAMPS
@given(steps=positive_steps, hold=st.integers(0, 300), down=positive_steps, at=st.integers(0, 10_000))
@MANY
def test_the_way_down_mirrors_the_way_up(ramp: Any, steps: int, hold: int, down: int, at: int) -> None:
    schedule = ramp(2.0, steps, start=0.5, hold=hold, down=down)
    for step in (steps, steps + hold // 2, steps + hold):
        assert float(schedule(step)) == 2.0
    t = 1.0 - min(max((at - steps - hold) / down, 0.0), 1.0)
    factor = BY_HAND[ramp](min(at / steps, 1.0)) * (BY_HAND[ramp](t) if at > steps + hold else 1.0)
    assert float(schedule(at)) == pytest.approx(0.5 + 1.5 * factor, rel=1e-12)
    after = [float(schedule(steps + hold + down + extra)) for extra in (0, 1, 1_000)]
    assert after == [after[0]] * 3


@given(schedule=schedules(), steps=st.lists(st.integers(0, 20_000), min_size=1, max_size=9))
@MANY
def test_a_schedule_is_the_same_on_ints_and_arrays(schedule: Any, steps: list[int]) -> None:
    array = np.broadcast_to(schedule(np.array(steps)), len(steps))
    np.testing.assert_allclose(array, [float(schedule(step)) for step in steps], rtol=1e-12, atol=1e-15)


@given(schedule=schedules())
@MANY
def test_schedules_copy_pickle_and_compare_by_value(schedule: Any) -> None:
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)


@RAMPS
def test_a_ramp_that_goes_nowhere_is_a_constant(ramp: Any) -> None:
    assert ramp(0.5, 100, start=0.5) == cr.constant(0.5)


@RAMPS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peak": math.nan}, "peak must be a finite number or a schedule"),
        ({"peak": True}, "peak must be a finite number or a schedule"),
        ({"start": math.inf}, "start must be a finite number"),
        ({"steps": 0}, "steps must be a whole number of optimizer steps, at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number of optimizer steps, at least 1, got 2.5"),
        ({"steps": True}, "steps must be a whole number of optimizer steps, at least 1, got True"),
        ({"hold": -1, "down": 3}, "hold must be a whole number of optimizer steps, at least 0, got -1"),
        ({"down": 0}, "down must be a whole number of optimizer steps, at least 1, got 0"),
        ({"hold": 5}, "hold=5 has no effect without a way down; give down="),
    ],
)
def test_a_ramp_refuses_what_it_cannot_be(ramp: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(cr.CRCoreError, match=message):
        ramp(**{"peak": 1.0, "steps": 10} | arguments)


@given(decay=st.floats(0, 1), warmup=st.integers(0, 20_000), at=st.integers(0, 30_000))
@MANY
def test_warm_up_caps_the_decay_at_one_plus_t_over_ten_plus_t(decay: float, warmup: int, at: int) -> None:
    expected = min(decay, (1 + at) / (10 + at)) if at < warmup else decay
    assert float(cr.EMA(decay, warmup=warmup).decay_at(at)) == expected


@given(ema=averages(), steps=st.lists(st.integers(0, 30_000), min_size=1, max_size=9))
@MANY
def test_a_decay_lies_in_0_to_1_and_is_the_same_on_arrays(ema: cr.EMA, steps: list[int]) -> None:
    one_by_one = [float(ema.decay_at(step)) for step in steps]
    assert all(0.0 <= decay <= 1.0 for decay in one_by_one)
    array = np.broadcast_to(ema.decay_at(np.array(steps)), len(steps))
    np.testing.assert_allclose(array, one_by_one, rtol=1e-12, atol=1e-15)


def test_a_cosine_decay_to_one_is_byols() -> None:
    ema = cr.EMA(decay=cr.cosine_ramp(1.0, 1_000, start=0.996))
    for step in (0, 1, 500, 999, 1_000, 5_000):
        k = min(step, 1_000)
        expected = 1 - (1 - 0.996) * (math.cos(math.pi * k / 1_000) + 1) / 2
        assert float(ema.decay_at(step)) == pytest.approx(expected, rel=1e-12)


@given(data=st.data(), decay=st.floats(0.0, 1.0))
@MANY
def test_the_average_lies_between_what_it_was_and_the_value(data: st.DataObject, decay: float) -> None:
    average, value = (data.draw(cotangents((5,))).astype(float) for _ in range(2))
    after = cr.ema_update(average, value, decay)
    slack = 1e-15 * (np.abs(average) + np.abs(value))
    assert np.all(after >= np.minimum(average, value) - slack)
    assert np.all(after <= np.maximum(average, value) + slack)
    np.testing.assert_allclose(after, decay * average + (1 - decay) * value, atol=1e-14)
    assert np.array_equal(cr.ema_update(average, average, decay), average)
    assert np.array_equal(cr.ema_update(average, value, 1.0), average)


@given(data=st.data(), decay=st.floats(0.01, 1.0))
@MANY
def test_an_average_of_positive_scales_is_positive(data: st.DataObject, decay: float) -> None:
    average, value = (np.exp2(10 * data.draw(cotangents((5,)))) for _ in range(2))
    assert np.all(cr.ema_update(average, value, np.float32(decay)) > 0.0)


@pytest.mark.parametrize("decay", [1.1, -0.1, math.nan, True, "0.9", cr.constant(2.0), cr.linear_ramp(5.0, 10)])
def test_a_decay_outside_0_to_1_is_refused(decay: Any) -> None:
    with pytest.raises(cr.CRCoreError, match=r"decay must (lie in|be a finite number)"):
        cr.EMA(decay)


@pytest.mark.parametrize("warmup", [-1, 2.5, True, "10"])
def test_a_warm_up_that_is_not_a_number_of_steps_is_refused(warmup: Any) -> None:
    with pytest.raises(cr.CRCoreError, match="warmup must be a whole number of optimizer steps, at least 0, got"):
        cr.EMA(warmup=warmup)


def test_a_constant_decay_is_the_number() -> None:
    assert cr.EMA(cr.constant(0.9)) == cr.EMA(0.9)
    assert cr.EMA(cr.linear_ramp(0.9, 10, start=0.9)) == cr.EMA(0.9)
    assert cr.EMA(0.9) != cr.EMA(0.9, warmup=5)
    assert cr.EMA(0.9) != cr.EMA(0.9, quantized=False)
    assert cr.EMA(0.9) != cr.EMA(0.9, batchnorm="copy")


@pytest.mark.parametrize("decay", [1.0 - 2.0**-53, 1.0 - 1e-12])
def test_a_decay_next_to_one_takes_no_search(decay: float) -> None:
    """The step at which the warm-up's cap would reach it is beyond what floats can count."""
    assert cr.EMA(decay, warmup=100).warmup == 100
