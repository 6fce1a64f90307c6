"""The parity suite that every backend must pass: NumPy is the oracle."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crcore import Consistency, DoReFa, Schedule, ema_update
from crcore.testing._references import confidences, reference_consistency, reference_divergence
from crcore.testing._strategies import (
    DIVERGENCES,
    QUANTIZERS,
    LogitsCase,
    averages,
    cotangents,
    free_inputs,
    lattice_inputs,
    logits,
    schedules,
)

# Every width up to 8 bits, where networks are trained, and the widest.
EVERY_QUANTIZER = pytest.mark.parametrize("name", [name for name, q in QUANTIZERS.items() if q.bits in (*range(9), 16)])
EVERY_DIVERGENCE = pytest.mark.parametrize("function", DIVERGENCES)

# Inherited tests run once per backend, each with an adapter of its own: that is what the first check is about.
FEW = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow]
)
MANY = settings(FEW, max_examples=60)


class Adapter(Protocol):
    """How the suite reaches a backend. Arrays are float32 NumPy at this border, going in and coming out."""

    name: str
    # Whether numbers below 2**-126 count as zero in the backend's arithmetic; the suite then draws none.
    flushes_denormals: bool

    def initial(self, quantizer: Any, x: Any, axes: tuple[int, ...]) -> tuple[Any, ...]:
        """``quantizer.init`` over the backend's namespace."""
        ...

    def quantize(
        self, quantizer: Any, x: Any, parameters: tuple[Any, ...], cotangent: Any, elements: float
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """``(y, dx, dparameters)`` through the operation that users' layers call, differentiated by the framework.

        ``dparameters``: one gradient per parameter, in its shape; ``()`` where ``quantizer.learned`` is false.
        """
        ...

    def divergence(
        self, function: Any, student: Any, teacher: Any, cotangent: Any, axis: int, temperature: float
    ) -> tuple[Any, Any]:
        """``(values, dstudent)``; ``cotangent = dL/dvalues``."""
        ...

    def consistency(
        self, consistency: Consistency, student: Any, teacher: Any, step: int, axis: int, sample_weight: Any
    ) -> tuple[Any, Any, Any]:
        """``(loss, dstudent, dteacher)`` through the backend's consistency loss.

        The backend is handed a teacher that *could* take a gradient; ``dteacher`` is what arrived there, in zeros if
        nothing did.
        """
        ...

    def schedule(self, schedule: Schedule, steps: Any) -> Any:
        """``schedule(step)`` of each int in the 1-d array ``steps``, with the step a tensor (traced, where one can)."""
        ...

    def ema(self, averages: list[Any], values: list[Any], decay: float) -> list[Any]:
        """The averages after one update by the operation that the backend's teacher runs."""
        ...


class ConformanceSuite:
    """Subclass it as ``TestMine`` with an ``adapter``; pytest finds the inherited tests.

    On lattice inputs the forward and dy/dx must equal NumPy's in every bit but the sign of zero, on free inputs within
    the rounding of ``x``. Gradients of parameters are held to 1e-6 of the sum of their terms' magnitudes on lattices up
    to 8 bits, 1e-5 elsewhere; losses and their gradients to 1e-6 of one plus the largest logit over the temperature.
    """

    adapter: ClassVar[Adapter]

    @EVERY_QUANTIZER
    @given(data=st.data())
    @FEW
    def test_forward_and_dx_are_bitwise_equal_on_the_lattice(self, name: str, data: st.DataObject) -> None:
        case = self._flushed(data.draw(lattice_inputs(QUANTIZERS[name])))
        y, dx, dparameters = self._quantized(case)
        expected = case.quantizer.forward(case.x, *case.parameters)
        _assert_equal(y, expected, "y", x=case.x)
        core = case.quantizer.vjp(case.cotangent, case.x, *case.parameters, elements=case.elements)
        _assert_equal(dx, core[0], "dx", x=case.x, cotangent=case.cotangent)
        self._check_dparameters(case, dparameters, is_lattice=True)

    @EVERY_QUANTIZER
    @given(data=st.data())
    @FEW
    def test_forward_and_gradients_agree_on_free_inputs(self, name: str, data: st.DataObject) -> None:
        case = self._flushed(data.draw(free_inputs(QUANTIZERS[name])))
        quantizer, x = case.quantizer, case.x
        y, dx, dparameters = self._quantized(case)
        # Rounding is a staircase that climbs, so the value at x lies between the values at its neighbours.
        is_squashed = isinstance(quantizer, DoReFa) and quantizer.tanh
        blur = np.float32(1e-6) * (np.abs(x) + case.parameters[0] if is_squashed else np.abs(x)) + np.float32(1e-12)
        below, above = x - blur, x + blur
        lowest, highest = (quantizer.forward(side, *case.parameters) for side in (below, above))
        slack = 1e-6 * np.abs(y) + 1e-12
        _assert_all((y >= lowest - slack) & (y <= highest + slack), "y", y, lowest, highest, x=x)
        core = quantizer.vjp(case.cotangent, x, *case.parameters, elements=case.elements)
        if is_squashed:
            weight = np.sum(np.abs(case.cotangent), axis=case.axes, keepdims=True) / case.parameters[0]
            _assert_close(dx, core[0], 2e-5 * (1.0 + weight), "dx", x=x)
        else:
            sides = [quantizer.vjp(case.cotangent, side, *case.parameters, elements=1.0)[0] for side in (below, above)]
            _assert_all((dx == sides[0]) | (dx == sides[1]), "dx", dx, *sides, x=x)
        self._check_dparameters(case, dparameters, is_lattice=False)

    @EVERY_QUANTIZER
    @given(data=st.data())
    @FEW
    def test_initial_parameters_agree(self, name: str, data: st.DataObject) -> None:
        case = self._flushed(data.draw(free_inputs(QUANTIZERS[name])))
        expected = case.quantizer.init(case.x, axes=case.axes)
        found = self.adapter.initial(case.quantizer, case.x, case.axes)
        assert len(found) == len(expected)
        for parameter, there, here in zip(case.quantizer.parameters, found, expected, strict=True):
            _assert_close(there, here, 2e-6 * (np.abs(here) + np.max(np.abs(case.x))), parameter)

    @pytest.mark.parametrize("name", ["LSQ-weight-4", "LSQPlus-activation-4-unsigned", "MinMax-weight-4-per_channel"])
    def test_all_zero_input_stays_zero_and_finite(self, name: str) -> None:
        quantizer, x = QUANTIZERS[name], np.zeros((3, 4), np.float32)
        axes = (1,) if quantizer.per_channel else (0, 1)
        parameters = self.adapter.initial(quantizer, x, axes)
        y, dx, dparameters = self.adapter.quantize(quantizer, x, parameters, np.full_like(x, 0.5), 12.0)
        _assert_equal(y, x, "y")
        _assert_equal(dx, np.full_like(x, 0.5), "dx")
        assert all(np.all(np.isfinite(gradient)) for gradient in dparameters)

    @pytest.mark.parametrize("name", ["LSQ-weight-4", "PACT-activation-4-unsigned", "LSQPlus-activation-4-unsigned"])
    def test_a_negative_stored_scale_acts_as_a_positive_one(self, name: str) -> None:
        quantizer, x = QUANTIZERS[name], np.array([[1.0, -2.0, 0.0, 3.0]], np.float32)
        parameters = tuple(np.full((1, 1), -0.5, np.float32) for _ in quantizer.parameters)
        y, dx, dparameters = self.adapter.quantize(quantizer, x, parameters, x + 0.5, 4.0)
        _assert_equal(y, quantizer.forward(x, *parameters), "y")
        core = quantizer.vjp(x + 0.5, x, *parameters, elements=4.0)
        for name_, there, here in zip(("dx", *quantizer.parameters), (dx, *dparameters), core, strict=True):
            _assert_close(there, here, 1e-5 * np.abs(here) + 1e-6, name_)

    @EVERY_DIVERGENCE
    @given(case=logits(), temperature=st.sampled_from((1.0, 0.5, 2.0, 3.7)))
    @MANY
    def test_divergence_and_its_gradient_match_the_closed_form(
        self, function: Any, case: LogitsCase, temperature: float
    ) -> None:
        case = self._flushed(case)
        values, dstudent = self.adapter.divergence(
            function, case.student, case.teacher, case.cotangent, case.axis, temperature
        )
        expected, slope = reference_divergence(
            function, case.student, case.teacher, case.cotangent, axis=case.axis, temperature=temperature
        )
        unit = _logit_unit(case, temperature)
        _assert_close(values, expected, temperature**2 * unit, "values")
        largest = np.max(np.abs(case.cotangent), initial=0.0)
        _assert_close(dstudent, slope, max(1.0, temperature) * unit * largest, "dstudent")

    @EVERY_DIVERGENCE
    @given(data=st.data())
    @MANY
    def test_consistency_and_its_gradient_match_the_closed_form(self, function: Any, data: st.DataObject) -> None:
        case = self._flushed(data.draw(logits(largest=0.0)))
        temperature = data.draw(st.sampled_from((1.0, 0.5, 4.0)))
        term = Consistency(
            function, data.draw(schedules()), temperature, data.draw(st.none() | _thresholds(case.teacher, case.axis))
        )
        step = data.draw(st.integers(0, 12_000))
        shapes = [case.cotangent.shape, case.cotangent.shape[:1]] if case.cotangent.ndim else [()]
        shape = data.draw(st.none() | st.sampled_from(shapes))
        sample_weight = None if shape is None else np.abs(data.draw(cotangents(shape)))
        loss, dstudent, dteacher = self.adapter.consistency(
            term, case.student, case.teacher, step, case.axis, sample_weight
        )
        expected, slope = reference_consistency(
            term, case.student, case.teacher, step=step, axis=case.axis, sample_weight=sample_weight
        )
        size = 1.0 if sample_weight is None else 1.0 + float(np.max(sample_weight))
        unit = float(term.weight_at(step)) * size * _logit_unit(case, temperature) * max(1.0, temperature) ** 2
        _assert_close(loss, expected, unit + 1e-12, "loss")
        _assert_close(dstudent, slope, unit + 1e-12, "dstudent")
        assert not np.any(dteacher), f"the gradient reached the teacher: {dteacher}"

    @EVERY_DIVERGENCE
    def test_lambda_of_zero_gives_exactly_zero(self, function: Any) -> None:
        rng = np.random.default_rng(0)
        student, teacher = rng.normal(size=(2, 4, 3)).astype(np.float32)
        loss, dstudent, _ = self.adapter.consistency(Consistency(function, 0.0), student, teacher, 7, -1, None)
        assert loss == 0.0
        assert not np.any(dstudent)

    @given(schedule=schedules(), steps=st.lists(st.integers(0, 20_000), min_size=1, max_size=8))
    @MANY
    def test_schedules_agree_on_python_ints_arrays_and_traced_tensors(
        self, schedule: Schedule, steps: list[int]
    ) -> None:
        self._check_schedule(schedule, steps)

    @given(ema=averages(), steps=st.lists(st.integers(0, 20_000), min_size=1, max_size=8))
    @MANY
    def test_decays_agree_on_python_ints_arrays_and_traced_tensors(self, ema: Any, steps: list[int]) -> None:
        self._check_schedule(ema.decay_at, [*steps, max(0, ema.warmup - 1), ema.warmup])

    @given(data=st.data(), decay=st.sampled_from((0.0, 1.0, 0.1, 0.5, 0.999, 0.9999)))
    @MANY
    def test_average_moves_as_the_reference_does(self, data: st.DataObject, decay: float) -> None:
        shapes = data.draw(st.lists(st.sampled_from(((), (1,), (5,), (3, 1, 2))), min_size=1, max_size=4))
        before = [data.draw(cotangents(shape)) for shape in shapes]
        values = [data.draw(cotangents(shape)) for shape in shapes]
        after = self.adapter.ema([a.copy() for a in before], [v.copy() for v in values], decay)
        for there, average, value in zip(after, before, values, strict=True):
            expected = ema_update(average.astype(np.float64), value.astype(np.float64), decay)
            _assert_close(there, expected, 1e-6 * (np.abs(average) + np.abs(value)), "average")
            if decay == 1.0:
                _assert_equal(there, average, "average")

    # Below, average + (value - average) may round to zero where the average is 2**24 times the value.
    @given(data=st.data(), decay=st.floats(0.01, 1.0))
    @MANY
    def test_average_of_positive_scales_is_positive(self, data: st.DataObject, decay: float) -> None:
        exponents = [10.0 * data.draw(cotangents((6,))) for _ in range(2)]
        before, value = (np.exp2(np.clip(e, -40, 40)).astype(np.float32) for e in exponents)
        (after,) = self.adapter.ema([before.copy()], [value.copy()], decay)
        assert np.all(after > 0.0)
        assert np.all(np.isfinite(after))

    def _quantized(self, case: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        # DoReFa finds its largest tanh again by comparing, so norm and tanh must come from one implementation.
        is_recomputed = isinstance(case.quantizer, DoReFa) and case.quantizer.bits > 1
        parameters = self.adapter.initial(case.quantizer, case.x, case.axes) if is_recomputed else case.parameters
        y, dx, dparameters = self.adapter.quantize(case.quantizer, case.x, parameters, case.cotangent, case.elements)
        for array, name in ((y, "y"), (dx, "dx")):
            assert array.dtype == np.float32, f"{name} has dtype {array.dtype}"
            assert array.shape == case.x.shape, f"{name} has shape {array.shape}, x has {case.x.shape}"
        return y, dx, dparameters

    def _check_dparameters(self, case: Any, found: tuple[Any, ...], *, is_lattice: bool) -> None:
        quantizer = case.quantizer
        assert len(found) == (len(quantizer.parameters) if quantizer.learned else 0)
        if not found:
            return
        # With a parameter of its own for each element, nothing is summed: what comes back are the terms.
        spread = [np.broadcast_to(parameter, case.x.shape) for parameter in case.parameters]
        terms = quantizer.vjp(case.cotangent, case.x, *spread, elements=case.elements)[1:]
        tolerance = 1e-6 if is_lattice and quantizer.bits <= 8 else 1e-5
        # A backend may sum <g, y> - <dx, x> over the scale (a fused pass does): that cancels what is inside the grid,
        # so each term also gets the float32 rounding of its two halves.
        scale = quantizer.affine(*case.parameters)[0].astype(np.float64)
        reach = np.minimum(np.abs(case.x) / scale, 2.0 * quantizer.grid.hi - quantizer.grid.lo + 1.0)
        rounding = 2.0**-22 * reach * np.abs(case.cotangent) * (quantizer.grid.hi * case.elements) ** -0.5
        for name, there, term, parameter in zip(quantizer.parameters, found, terms, case.parameters, strict=True):
            assert there.shape == parameter.shape, f"d{name} has shape {there.shape}, {name} has {parameter.shape}"
            magnitude = tolerance * np.abs(term.astype(np.float64)) + (rounding if name == "scale" else 0.0)
            allowed = np.sum(magnitude, axis=case.axes, keepdims=True) + 1e-30
            expected = np.sum(term.astype(np.float64), axis=case.axes, keepdims=True)
            _assert_close(there, expected, allowed, f"d{name}")

    def _check_schedule(self, schedule: Any, steps: list[int]) -> None:
        array = np.array(steps)
        one_by_one = np.array([float(schedule(step)) for step in steps])
        at_once = np.broadcast_to(schedule(array), array.shape)
        _assert_close(at_once, one_by_one, 1e-12 * (1.0 + np.abs(one_by_one)), "the value on an array")
        traced = np.broadcast_to(self.adapter.schedule(schedule, array), array.shape)
        _assert_close(traced, one_by_one, 2e-5 * (1.0 + np.abs(one_by_one)), "the value on a tensor")

    def _flushed(self, case: Any) -> Any:
        if self.adapter.flushes_denormals:
            for name in ("x", "student", "teacher"):
                if hasattr(case, name):
                    array = getattr(case, name)
                    object.__setattr__(case, name, np.where(np.abs(array) < 2.0**-126, np.float32(0.0), array))
        return case


@st.composite
def _thresholds(draw: st.DrawFn, teacher: Any, axis: int) -> float:
    """A threshold that no confidence is so near to that rounding decides."""
    marks = np.sort(np.append(confidences(teacher, axis).reshape(-1), (0.0, 1.0)))
    gaps = [(low + high) / 2.0 for low, high in pairwise(marks) if high - low > 1e-3]
    return float(draw(st.sampled_from(gaps)))


def _logit_unit(case: LogitsCase, temperature: float) -> float:
    largest = max(np.max(np.abs(case.student)), np.max(np.abs(case.teacher)))
    return 1e-6 * (1.0 + float(largest) / temperature)


def _assert_equal(found: Any, expected: Any, what: str, **context: Any) -> None:
    _assert_all(np.asarray(found) == expected, what, found, expected, **context)


def _assert_close(found: Any, expected: Any, tolerance: Any, what: str, **context: Any) -> None:
    error = np.abs(np.asarray(found, np.float64) - expected)
    _assert_all(error <= tolerance, what, found, expected, **context)


def _assert_all(holds: Any, what: str, found: Any, *expected: Any, **context: Any) -> None:
    """Report the first element that differs, with what stands at its place elsewhere."""
    holds = np.asarray(holds)
    if np.all(holds):
        return
    place = np.unravel_index(int(np.argmin(holds)), holds.shape)
    shown = {name: np.broadcast_to(array, holds.shape)[place] for name, array in context.items()}
    wanted = " .. ".join(repr(np.broadcast_to(e, holds.shape)[place]) for e in expected)
    raise AssertionError(
        f"{what} differs in {int(np.sum(~holds))} of {holds.size} places; at {tuple(map(int, place))}: "
        f"got {np.broadcast_to(found, holds.shape)[place]!r}, want {wanted}; {shown}"
    )
