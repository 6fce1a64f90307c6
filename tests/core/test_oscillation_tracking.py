"""Oscillations of quantized weights, and the two remedies, against plain loops over single weights."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crcore as cr

CODES = st.lists(st.lists(st.integers(-4, 3), min_size=3, max_size=3), min_size=1, max_size=30)
LSQ = cr.LSQ(3, signed=True)
SCALE = np.array([0.5])


def tracked_by_a_loop(codes: list[int], momentum: float) -> tuple[float, float, int]:
    """Frequency, average and last direction of one weight, as the paper tells it."""
    frequency, average, last_change = 0.0, float(codes[0]), 0
    for before, now in pairwise(codes):
        oscillated = False
        if now != before:
            change = 1 if now > before else -1
            oscillated = last_change != 0 and change != last_change
            last_change = change
        frequency += momentum * (oscillated - frequency)
        average += momentum * (now - average)
    return frequency, average, last_change


@given(steps=CODES, momentum=st.sampled_from((0.01, 0.3, 1.0)))
@settings(max_examples=200)
def test_tracking_is_a_plain_loop_over_each_weight(steps: list[list[int]], momentum: float) -> None:
    state = cr.Oscillation.start(np.array(steps[0], float))
    for codes in steps[1:]:
        state = cr.oscillation_update(state, np.array(codes, float), momentum)
    for index, codes in enumerate(zip(*steps, strict=True)):
        frequency, average, last_change = tracked_by_a_loop(list(codes), momentum)
        assert state.frequency[index] == pytest.approx(frequency, abs=1e-12)
        assert state.average[index] == pytest.approx(average, abs=1e-12)
        assert state.direction[index] == last_change
        assert state.codes[index] == codes[-1]


def test_a_weight_that_rests_between_two_opposite_changes_oscillates() -> None:
    state = cr.Oscillation.start(np.zeros(1))
    for code in (1, 1, 1, 0):
        state = cr.oscillation_update(state, np.array([float(code)]), 0.5)
    assert state.frequency == 0.5


def test_the_first_oscillation_has_exactly_the_momentum_for_its_frequency() -> None:
    for dtype in (np.float32, np.float64):
        state = cr.Oscillation.start(np.zeros(1, dtype))
        for code in (1, 0):
            state = cr.oscillation_update(state, np.array([code], dtype), 0.01)
        assert state.frequency == dtype(0.01)
        assert not state.frequency > 0.01


def test_codes_that_are_two_apart_oscillate_too() -> None:
    state = cr.Oscillation.start(np.array([-3.0]))  # DoReFa's are odd
    for code in (-1, 1, -1):
        state = cr.oscillation_update(state, np.array([float(code)]), 0.25)
    assert state.frequency == 0.25


@given(steps=CODES)
def test_rates_count_each_weight_once(steps: list[list[int]]) -> None:
    state = cr.Oscillation.start(np.array(steps[0], float))
    for codes in steps[1:]:
        state = cr.oscillation_update(state, np.array(codes, float))
    columns = [list(codes) for codes in zip(*steps, strict=True)]
    rates = cr.OscillationRates.of(state, cr.Oscillation.start(np.zeros((2, 3))))
    assert rates.weights == 9
    assert rates.flipped == sum(len(set(codes)) > 1 for codes in columns) / 9
    assert rates.oscillating == sum(tracked_by_a_loop(codes, 0.01)[0] > 0.005 for codes in columns) / 9


@given(st.lists(st.floats(-4.0, 4.0), min_size=1, max_size=12), st.floats(0.1, 2.0), st.integers(1, 4))
def test_dampening_is_the_squared_distance_of_the_clipped_weight(weights: list[float], scale: float, bits: int) -> None:
    quantizer = cr.LSQ(bits, signed=True)
    lo, hi = cr.code_limits(quantizer)
    x, parameter = np.array(weights), np.array([scale])
    quantized = quantizer.forward(x, parameter)
    found = cr.Dampening(1.0).distance(x, quantized, quantizer, parameter)
    expected = math.fsum((q - min(max(w, lo * scale), hi * scale)) ** 2 for w, q in zip(x, quantized, strict=True))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert np.ndim(found) == 0


def frozen_by_a_loop(steps: list[float], threshold: Any, momentum: float) -> list[float]:
    """What one weight is set to after each step, on the grid of `LSQ` with a scale of a half."""
    found, codes, held = [], [], None
    for step, weight in enumerate(steps):
        code = held if held is not None else float(np.round(np.clip(weight / 0.5, -4, 3)))
        codes.append(code)
        frequency, average, _ = tracked_by_a_loop([0, *codes], momentum)
        if held is None and frequency > threshold(step):
            held = float(np.round(average))
            codes[-1] = held
        found.append(weight if held is None else held * 0.5)
    return found


@given(
    steps=st.lists(st.sampled_from((-0.3, -0.2, 0.1, 0.3, 0.4, 0.9, 9.0)), min_size=1, max_size=25),
    threshold=st.sampled_from((cr.constant(0.0), cr.constant(0.3), cr.cosine_ramp(0.1, 20, start=0.6))),
)
@settings(max_examples=200)
def test_freezing_is_a_plain_loop_over_each_weight(steps: list[float], threshold: Any) -> None:
    freezing = cr.Freezing(threshold, momentum=0.3)
    state = cr.FreezingState.start(LSQ.codes(np.zeros(1), SCALE))
    found = []
    for step, weight in enumerate(steps):
        x = np.array([weight])
        state = freezing.update(state, x, LSQ, SCALE, step=step)
        found.append(float(freezing.apply(state, x, LSQ, SCALE)[0]))
    assert found == frozen_by_a_loop(steps, threshold, 0.3)


def test_what_is_frozen_is_the_integer_and_not_the_value() -> None:
    freezing = cr.Freezing(0.0, momentum=0.5)
    state = cr.FreezingState.start(np.zeros(1))
    for step, weight in enumerate((0.4, 0.1, 0.4, 0.1)):
        state = freezing.update(state, np.array([weight]), LSQ, SCALE, step=step)
    assert state.frozen.all()
    code = state.oscillation.codes
    for scale in (0.3, 1.7):
        weight = freezing.apply(state, np.array([-2.0]), LSQ, np.array([scale]))
        assert weight == code * scale
        assert freezing.update(state, weight, LSQ, np.array([scale]), step=9).oscillation.codes == code


def test_a_one_bit_weight_is_frozen_to_one_of_its_two_integers() -> None:
    binary, freezing = cr.LSQ(1, signed=True), cr.Freezing(0.0, momentum=0.5)
    state = cr.FreezingState.start(np.array([1.0, -1.0]))
    for step, sign in enumerate((-1.0, 1.0)):
        state = freezing.update(state, np.array([sign, -sign]), binary, SCALE, step=step)
    assert state.frozen.all()
    assert abs(state.oscillation.average).max() <= 0.5  # which rounds to 0
    assert set(state.oscillation.codes) <= {-1.0, 1.0}


def test_a_number_is_a_constant_schedule() -> None:
    assert cr.Dampening(1) == cr.Dampening(cr.constant(1.0))
    assert cr.Freezing(0.02) == cr.Freezing(cr.constant(0.02), momentum=0.01)
    assert cr.Freezing(0.5, momentum=1) == cr.Freezing(0.5, momentum=1.0)
    assert cr.Dampening(cr.cosine_ramp(2.0, 10)).weight_at(5) == pytest.approx(1.0)
    assert cr.Freezing(cr.cosine_ramp(0.01, 10, start=0.04)).threshold_at(10) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cr.Dampening(-1.0), "weight must not be negative, got -1.0; 0 turns"),
        (lambda: cr.Dampening(cr.linear_ramp(1.0, 5, start=-0.1)), "weight must not be negative"),
        (lambda: cr.Dampening("much"), "weight must be a finite number or a schedule"),
        (lambda: cr.Dampening(math.inf), "weight must be a finite number or a schedule"),
        (lambda: cr.Freezing(1.0), r"threshold must lie in \[0, 1\), got 1.0; 0.01 to 0.04"),
        (lambda: cr.Freezing(cr.cosine_ramp(0.01, 5, start=-0.1)), r"threshold must lie in \[0, 1\)"),
        (lambda: cr.Freezing(None), "threshold must be a finite number or a schedule"),
        (lambda: cr.Freezing(0.1, momentum=0.0), r"momentum must be a number in \(0, 1\], got 0.0"),
        (lambda: cr.Freezing(0.1, momentum=True), r"momentum must be a number in \(0, 1\]"),
        (lambda: cr.Freezing(0.1, momentum="slow"), r"momentum must be a number in \(0, 1\]"),
        (
            lambda: cr.Dampening(1.0).distance(np.ones(2), np.ones(2), cr.MinMax(4).for_role("weight"), 1.0, 1.0),
            "dampening holds weights to the grid of a learned scale, but MinMax",
        ),
        (
            lambda: cr.Freezing(0.1).update(
                cr.FreezingState.start(np.ones(2)), np.ones(2), cr.DoReFa(4).for_role("weight"), np.ones(1), step=0
            ),
            "freezing holds weights to the grid of a learned scale, but DoReFa",
        ),
    ],
)
def test_what_is_refused_is_named(make: Any, message: str) -> None:
    with pytest.raises(cr.CRCoreError, match=message):
        make()
