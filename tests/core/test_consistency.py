"""Divergences and the consistency objective."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crcore as cr
from crcore.testing import (
    DIVERGENCES,
    LogitsCase,
    cotangents,
    logits,
    reference_consistency,
    reference_divergence,
)

EVERY = pytest.mark.parametrize("divergence", DIVERGENCES)
MANY = settings(max_examples=120)


@EVERY
@given(case=logits(), temperature=st.floats(0.2, 9.0))
@MANY
def test_a_divergence_is_its_closed_form_on_any_rank_and_axis(
    divergence: Any, case: LogitsCase, temperature: float
) -> None:
    student, teacher = case.student.astype(float), case.teacher.astype(float)
    found = divergence(student, teacher, axis=case.axis, temperature=temperature)
    expected, _ = reference_divergence(
        divergence, student, teacher, case.cotangent, axis=case.axis, temperature=temperature
    )
    assert found.shape == tuple(np.delete(student.shape, case.axis))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@EVERY
def test_a_divergence_is_its_definition_summed_by_hand(divergence: Any) -> None:
    p, q = [0.5, 0.3, 0.2], [0.1, 0.7, 0.2]
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    expected = {
        cr.kl_divergence: kl(p, q),
        cr.js_divergence: (kl(p, m) + kl(q, m)) / 2,
        cr.mse_divergence: sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 3,
    }[divergence]
    assert float(divergence(np.log(q), np.log(p))) == pytest.approx(expected, rel=1e-12)
    # softmax(T * log p / T) = p, so only the factor T**2 remains
    assert float(divergence(3 * np.log(q), 3 * np.log(p), temperature=3.0)) == pytest.approx(9 * expected, rel=1e-12)


@EVERY
@given(case=logits(largest=0.0))
@MANY
def test_a_divergence_is_zero_if_and_only_if_the_predictions_are_equal(divergence: Any, case: LogitsCase) -> None:
    student = np.clip(case.student.astype(float), -4.0, 4.0)
    shift = np.expand_dims(case.cotangent.astype(float), case.axis)  # softmax does not see it
    np.testing.assert_allclose(divergence(student + shift, student, axis=case.axis), 0.0, atol=1e-14)
    place = [slice(None)] * student.ndim
    place[case.axis] = 0
    other = student.copy()
    other[tuple(place)] += 1.0
    assert np.all(divergence(other, student, axis=case.axis) > 0.0)


@given(case=logits())
@MANY
def test_jensen_shannon_is_symmetric_and_at_most_log_2(case: LogitsCase) -> None:
    student, teacher = case.student.astype(float), case.teacher.astype(float)
    forth = cr.js_divergence(student, teacher, axis=case.axis)
    back = cr.js_divergence(teacher, student, axis=case.axis)
    np.testing.assert_allclose(forth, back, rtol=1e-9, atol=1e-14)
    assert np.all((forth >= -1e-15) & (forth <= math.log(2.0) + 1e-12))


def test_kl_is_weighted_by_the_teacher() -> None:
    sure, unsure = np.array([5.0, 0.0]), np.array([0.0, 0.0])
    assert float(cr.kl_divergence(unsure, sure)) != pytest.approx(float(cr.kl_divergence(sure, unsure)))
    p = math.exp(5) / (1 + math.exp(5))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert float(cr.kl_divergence(unsure, sure)) == pytest.approx(expected)


@EVERY
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@given(case=logits(), temperature=st.sampled_from((0.5, 1.0, 4.0)))
@MANY
def test_a_divergence_is_finite_at_1e4_without_a_warning(
    divergence: Any, dtype: Any, case: LogitsCase, temperature: float
) -> None:
    if dtype == np.float16 and temperature > 3.0:
        temperature = 3.0  # the value itself, temperature * 2e4, must fit
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        values = divergence(
            case.student.astype(dtype), case.teacher.astype(dtype), axis=case.axis, temperature=temperature
        )
    assert np.all(np.isfinite(values))
    assert values.dtype == dtype


@EVERY
def test_logits_of_different_shapes_are_refused(divergence: Any) -> None:
    with pytest.raises(cr.CRCoreError, match=r"one shape, got \(4, 3\) and \(2, 3\); give both networks views"):
        divergence(np.zeros((4, 3)), np.zeros((2, 3)))


@EVERY
@given(data=st.data())
@MANY
def test_consistency_is_its_closed_form(divergence: Any, data: st.DataObject) -> None:
    case = data.draw(logits(largest=0.0))
    student, teacher = case.student.astype(float), case.teacher.astype(float)
    threshold = data.draw(st.none() | st.floats(0.0, 1.0))
    term = cr.Consistency(divergence, cr.linear_ramp(2.0, 100), data.draw(st.floats(0.2, 9.0)), threshold)
    shapes = [case.cotangent.shape, case.cotangent.shape[:1]] if case.cotangent.ndim else [()]
    shape = data.draw(st.none() | st.sampled_from(shapes))
    weight = None if shape is None else np.abs(data.draw(cotangents(shape))).astype(float)
    found = term(student, teacher, step=40, axis=case.axis, sample_weight=weight)
    expected, _ = reference_consistency(term, student, teacher, step=40, axis=case.axis, sample_weight=weight)
    assert np.ndim(found) == 0
    assert float(found) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


def test_an_unsure_teacher_counts_in_the_denominator_only() -> None:
    teacher = np.log(np.array([[0.9, 0.1], [0.6, 0.4]]))
    student = np.zeros((2, 2))
    values = cr.kl_divergence(student, teacher)
    term = cr.Consistency(weight=1.0, threshold=0.8)
    assert float(term(student, teacher, step=0)) == pytest.approx(values[0] / 2)
    # the confidence is that at temperature 1, whatever the temperature
    hot = cr.Consistency(weight=1.0, threshold=0.8, temperature=10.0)
    alone = cr.kl_divergence(student, teacher, temperature=10.0)
    assert float(hot(student, teacher, step=0)) == pytest.approx(alone[0] / 2)


def test_a_confidence_equal_to_the_threshold_is_kept() -> None:
    teacher, student = np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]])
    assert float(cr.Consistency(threshold=0.5)(student, teacher, step=0)) > 0.0


def test_a_weight_per_sample_covers_every_pixel_of_the_sample() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 5, 4, 6))  # N, C, H, W
    weight = np.array([1.0, 0.0, 2.0])
    values = cr.kl_divergence(student, teacher, axis=1)
    found = cr.Consistency()(student, teacher, step=0, axis=1, sample_weight=weight)
    assert float(found) == pytest.approx((values[0].sum() + 2 * values[2].sum()) / (3 * 4 * 6))


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,), (3, 4)])
def test_a_sample_weight_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    student = np.zeros((3, 5, 7))
    with pytest.raises(cr.CRCoreError, match="sample_weight must have one entry per sample"):
        cr.Consistency()(student, student, step=0, sample_weight=np.ones(shape))


@EVERY
def test_lambda_of_zero_gives_exactly_zero(divergence: Any) -> None:
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    for weight in (0.0, cr.linear_ramp(1.0, 10)):
        assert cr.Consistency(divergence, weight)(student, teacher, step=0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "kl"}, "divergence must be a function such as kl_divergence, got 'kl'"),
        ({"weight": -1.0}, "weight must not be negative, got -1.0; 0 turns the term off"),
        ({"weight": cr.linear_ramp(-1.0, 5)}, "weight must not be negative"),
        ({"weight": "1"}, "weight must be a finite number or a schedule"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0"),
        ({"temperature": True}, "temperature must be a finite number above 0"),
        ({"threshold": 1.5}, r"threshold must be None or lie in \[0, 1\], got 1.5"),
        ({"threshold": -0.1}, "threshold must be None or lie in"),
        ({"threshold": math.nan}, "threshold must be None or lie in"),
    ],
)
def test_consistency_refuses_what_it_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(cr.CRCoreError, match=message):
        cr.Consistency(**arguments)


def test_consistencies_are_equal_if_and_only_if_they_behave_the_same() -> None:
    term = cr.Consistency(cr.kl_divergence, 1.0)
    assert term == cr.Consistency() == cr.Consistency(weight=cr.constant(1.0)) == cr.Consistency(threshold=0.0)
    assert term == cr.Consistency(weight=1, temperature=1)
    for other in (
        cr.Consistency(cr.js_divergence),
        cr.Consistency(weight=2.0),
        cr.Consistency(weight=cr.linear_ramp(1.0, 5)),
        cr.Consistency(temperature=2.0),
        cr.Consistency(threshold=0.5),
    ):
        assert term != other
        assert other == copy.deepcopy(other) == pickle.loads(pickle.dumps(other))
