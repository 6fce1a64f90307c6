"""The kit on NumPy itself, and proof that the kit catches backends that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

import crcore as cr
from crcore.testing import ConformanceSuite


class NumpyAdapter:
    """The core's own vjp, and finite differences where a framework would differentiate."""

    name = "numpy"
    flushes_denormals = False

    def initial(self, quantizer: Any, x: Any, axes: tuple[int, ...]) -> tuple[Any, ...]:
        return quantizer.init(x, axes=axes)

    def quantize(
        self, quantizer: Any, x: Any, parameters: tuple[Any, ...], cotangent: Any, elements: float
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        dx, *dparameters = quantizer.vjp(cotangent, x, *parameters, elements=elements)
        return quantizer.forward(x, *parameters), dx, tuple(dparameters)

    def divergence(
        self, function: Any, student: Any, teacher: Any, cotangent: Any, axis: int, temperature: float
    ) -> tuple[Any, Any]:
        def values(logits: Any) -> Any:
            return function(logits, teacher.astype(np.float64), axis=axis, temperature=temperature)

        student = student.astype(np.float64)
        slope = np.empty_like(student)
        for index in range(student.shape[axis]):  # one class of every prediction at a time: predictions are independent
            place = [slice(None)] * student.ndim
            place[axis] = index
            slope[tuple(place)] = _derivative(values, student, tuple(place)) * cotangent
        return values(student), slope

    def consistency(
        self, consistency: cr.Consistency, student: Any, teacher: Any, step: int, axis: int, sample_weight: Any
    ) -> tuple[Any, Any, Any]:
        def loss(logits: Any) -> Any:
            return consistency(logits, teacher.astype(np.float64), step=step, axis=axis, sample_weight=sample_weight)

        student = student.astype(np.float64)
        slope = np.array([_derivative(loss, student, place) for place in np.ndindex(student.shape)])
        return loss(student), slope.reshape(student.shape), np.zeros_like(teacher)

    def schedule(self, schedule: Any, steps: Any) -> Any:
        return schedule(steps.astype(np.float32))

    def ema(self, averages: list[Any], values: list[Any], decay: float) -> list[Any]:
        return [cr.ema_update(average, value, decay) for average, value in zip(averages, values, strict=True)]


class TestNumpy(ConformanceSuite):
    adapter = NumpyAdapter()


def _derivative(function: Any, x: Any, place: Any) -> Any:
    sides = []
    for side in (1e-4, -1e-4):
        moved = x.copy()
        moved[place] += side
        sides.append(function(moved))
    return (sides[0] - sides[1]) / 2e-4


class WrongAdapter(NumpyAdapter):
    """A backend with one thing wrong, and the test of the kit that must notice."""

    caught_by: ClassVar[str]
    quantizer: ClassVar[str] = "LSQ-weight-3"
    argument: ClassVar[Any] = None  # what the test is parametrized with, else `quantizer`


LATTICE = "test_forward_and_dx_are_bitwise_equal_on_the_lattice"
FREE = "test_forward_and_gradients_agree_on_free_inputs"
DIVERGENCE = "test_divergence_and_its_gradient_match_the_closed_form"
CONSISTENCY = "test_consistency_and_its_gradient_match_the_closed_form"


class Reciprocal(WrongAdapter):
    caught_by = LATTICE

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        _, *gradients = super().quantize(quantizer, x, parameters, cotangent, elements)
        v = x * (np.float32(1.0) / parameters[0])
        return np.round(np.clip(v, quantizer.grid.lo, quantizer.grid.hi)) * parameters[0], *gradients


class RoundsHalfAwayFromZero(WrongAdapter):
    caught_by = LATTICE

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        _, *gradients = super().quantize(quantizer, x, parameters, cotangent, elements)
        v = np.clip(x / parameters[0], quantizer.grid.lo, quantizer.grid.hi)
        return np.trunc(v + np.copysign(np.float32(0.5), v)) * parameters[0], *gradients


class RoundsAfterTheShift(WrongAdapter):
    caught_by, quantizer = LATTICE, "LSQPlus-activation-4-unsigned"

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        _, *gradients = super().quantize(quantizer, x, parameters, cotangent, elements)
        scale, zero_point = quantizer.affine(*parameters)
        codes = np.round(np.clip(x / scale + zero_point, quantizer.grid.lo, quantizer.grid.hi))
        return (codes - zero_point) * scale, *gradients


class FloatZeroPoint(WrongAdapter):
    caught_by, quantizer = FREE, "LSQPlus-activation-4-unsigned"

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        _, *gradients = super().quantize(quantizer, x, parameters, cotangent, elements)
        scale, offset = parameters
        codes = np.round(np.clip((x - offset) / scale, quantizer.grid.lo, quantizer.grid.hi))
        return codes * scale + offset, *gradients


class ChangedGradient(WrongAdapter):
    """Alters dx, given x / scale."""

    caught_by = LATTICE
    mask: ClassVar[Callable[..., Any]]

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        y, dx, dparameters = super().quantize(quantizer, x, parameters, cotangent, elements)
        changed = type(self).mask(quantizer.grid, x / parameters[0], dx, cotangent)
        return y, changed.astype(np.float32), dparameters


class HalfAtTheBound(ChangedGradient):
    @staticmethod
    def mask(grid, v, dx, cotangent):
        return np.where((v == grid.lo) | (v == grid.hi), 0.5 * dx, dx)


class BoundsCountAsOutside(ChangedGradient):
    @staticmethod
    def mask(grid, v, dx, cotangent):
        return np.where((v == grid.lo) | (v == grid.hi), 0.0, dx)


class MaskTestsTheRoundedCode(ChangedGradient):
    @staticmethod
    def mask(grid, v, dx, cotangent):
        return np.where((np.round(v) >= grid.lo) & (np.round(v) <= grid.hi), cotangent, 0.0)


class NoMask(ChangedGradient):
    @staticmethod
    def mask(grid, v, dx, cotangent):
        return cotangent


class DropsTheCotangent(ChangedGradient):
    @staticmethod
    def mask(grid, v, dx, cotangent):
        return (dx != 0.0) * 1.0


class ClipLevelCountsAsClipped(WrongAdapter):
    caught_by, quantizer = LATTICE, "PACT-activation-4-unsigned"

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        y, dx, dparameters = super().quantize(quantizer, x, parameters, cotangent, elements)
        return y, np.where(x == parameters[0], np.float32(0.0), dx), dparameters


class ForgetsTheLargestWeight(WrongAdapter):
    caught_by, quantizer = FREE, "DoReFa-weight-4"

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        y, _, _ = super().quantize(quantizer, x, parameters, cotangent, elements)
        return y, cotangent / parameters[0] * (1.0 - np.tanh(x) ** 2), ()


class ChangedScaleGradient(WrongAdapter):
    caught_by = LATTICE
    factor: ClassVar[Callable[..., float]]

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        y, dx, (dscale, *rest) = super().quantize(quantizer, x, parameters, cotangent, elements)
        return y, dx, (dscale * np.float32(type(self).factor(quantizer, elements)), *rest)


class NoGradScale(ChangedScaleGradient):
    @staticmethod
    def factor(quantizer, elements):
        return (elements * quantizer.grid.hi) ** 0.5


class GradScaleCountsTheBatch(ChangedScaleGradient):
    @staticmethod
    def factor(quantizer, elements):
        return 2.0**-0.5


class ScaleGradientSlightlyOff(ChangedScaleGradient):
    @staticmethod
    def factor(quantizer, elements):
        return 1.0 + 1e-4


class OneGradientForAllChannels(WrongAdapter):
    caught_by, quantizer = LATTICE, "LSQ-weight-3-per_channel"

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        y, dx, (dscale,) = super().quantize(quantizer, x, parameters, cotangent, elements)
        return y, dx, (np.full_like(dscale, np.sum(dscale)),)


class NegativeScale(WrongAdapter):
    caught_by, quantizer = "test_a_negative_stored_scale_acts_as_a_positive_one", "LSQ-weight-4"

    def quantize(self, quantizer, x, parameters, cotangent, elements):
        return super().quantize(quantizer, x, tuple(np.abs(p) for p in parameters), cotangent, elements)


class StartsAtTheMaximum(WrongAdapter):
    caught_by = "test_initial_parameters_agree"

    def initial(self, quantizer, x, axes):
        return (np.max(np.abs(x), axis=axes, keepdims=True) / quantizer.grid.hi,)


class DivergenceOfTheWrongWay(WrongAdapter):
    caught_by, argument = DIVERGENCE, cr.kl_divergence

    def divergence(self, function, student, teacher, cotangent, axis, temperature):
        values, _ = super().divergence(function, teacher, student, cotangent, axis, temperature)
        return values, super().divergence(function, student, teacher, cotangent, axis, temperature)[1]


class DivergenceDropsTheCotangent(WrongAdapter):
    caught_by, argument = DIVERGENCE, cr.js_divergence

    def divergence(self, function, student, teacher, cotangent, axis, temperature):
        return super().divergence(function, student, teacher, np.ones_like(cotangent), axis, temperature)


class ChangedConsistency(WrongAdapter):
    caught_by, argument = CONSISTENCY, cr.kl_divergence
    change: ClassVar[Callable[..., tuple[Any, ...]]]

    def consistency(self, consistency, student, teacher, step, axis, sample_weight):
        term, step, axis, weight = type(self).change(consistency, step, axis, sample_weight)
        return super().consistency(term, student, teacher, step, axis, weight)


class IgnoresTheThreshold(ChangedConsistency):
    @staticmethod
    def change(term, step, axis, weight):
        return replace(term, threshold=None), step, axis, weight


class IgnoresTheTemperature(ChangedConsistency):
    @staticmethod
    def change(term, step, axis, weight):
        return replace(term, temperature=1.0), step, axis, weight


class IgnoresTheSampleWeight(ChangedConsistency):
    @staticmethod
    def change(term, step, axis, weight):
        return term, step, axis, None


class IgnoresTheClassAxis(ChangedConsistency):
    @staticmethod
    def change(term, step, axis, weight):
        return term, step, -1, None if weight is None or weight.ndim != 1 else weight


class StepOffByOne(ChangedConsistency):
    @staticmethod
    def change(term, step, axis, weight):
        return term, step + 1, axis, weight


class MasksTheDenominatorToo(WrongAdapter):
    caught_by, argument = CONSISTENCY, cr.mse_divergence

    def consistency(self, consistency, student, teacher, step, axis, sample_weight):
        loss, dstudent, dteacher = super().consistency(consistency, student, teacher, step, axis, sample_weight)
        kept = np.mean(np.any(dstudent != 0.0, axis=axis)) or 1.0
        return loss / kept, dstudent / kept, dteacher


class TeacherIsTrained(WrongAdapter):
    caught_by, argument = CONSISTENCY, cr.kl_divergence

    def consistency(self, consistency, student, teacher, step, axis, sample_weight):
        loss, dstudent, _ = super().consistency(consistency, student, teacher, step, axis, sample_weight)
        return loss, dstudent, -dstudent


class ScheduleOffByOne(WrongAdapter):
    caught_by = "test_schedules_agree_on_python_ints_arrays_and_traced_tensors"
    quantizer = ""

    def schedule(self, schedule, steps):
        return super().schedule(schedule, steps + 1)


class WarmUpOffByOne(ScheduleOffByOne):
    caught_by = "test_decays_agree_on_python_ints_arrays_and_traced_tensors"


class SwapsTheAverageAndTheValue(WrongAdapter):
    caught_by = "test_average_moves_as_the_reference_does"
    quantizer = ""

    def ema(self, averages, values, decay):
        return super().ema(values, averages, decay)


class SwapsDecayAndItsComplement(SwapsTheAverageAndTheValue):
    def ema(self, averages, values, decay):
        return super(SwapsTheAverageAndTheValue, self).ema(averages, values, 1.0 - decay)


class AveragesOnlyTheFirst(SwapsTheAverageAndTheValue):
    def ema(self, averages, values, decay):
        return super(SwapsTheAverageAndTheValue, self).ema(averages[:1], values[:1], decay) + averages[1:]


class ExtrapolatesScales(SwapsTheAverageAndTheValue):
    caught_by = "test_average_of_positive_scales_is_positive"

    def ema(self, averages, values, decay):
        return super(SwapsTheAverageAndTheValue, self).ema(averages, values, 2.0 - decay)


def _leaves(cls: type) -> list[type]:
    return [
        leaf
        for sub in cls.__subclasses__()
        for leaf in [sub, *_leaves(sub)]
        if "ema" in vars(leaf) or not leaf.__subclasses__()
    ]


@pytest.mark.parametrize("wrong", _leaves(WrongAdapter), ids=lambda cls: cls.__name__)
def test_a_wrong_backend_fails_the_kit(wrong: type[WrongAdapter]) -> None:
    suite = type("Suite", (ConformanceSuite,), {"adapter": wrong()})()
    arguments = [argument for argument in (wrong.argument or wrong.quantizer,) if argument]
    with pytest.raises((AssertionError, BaseExceptionGroup)) as caught:
        getattr(suite, wrong.caught_by)(*arguments)
    # Several failures come in a group; none of them may be an accident of the wrong adapter itself.
    failures = caught.value.exceptions if isinstance(caught.value, BaseExceptionGroup) else [caught.value]
    assert all(isinstance(failure, AssertionError) for failure in failures)
