"""Keras on the active engine against NumPy. A missing keras or crcore_keras is an error here, never a skip."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from crcore_keras._bind import fake_quantize
from crcore_keras._loss import consistency_loss, ema_update_
from crcore_keras._xp import xp
from engine_gradients import compiled, gradients_of
from keras import ops

import crcore as cr
from crcore.testing import QUANTIZERS, ConformanceSuite


class KerasAdapter:
    name = f"keras-{keras.backend.backend()}"
    compiled = False
    flushes_denormals = keras.backend.backend() != "torch"  # XLA and Eigen on a CPU

    def initial(self, quantizer: Any, x: Any, axes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(ops.convert_to_numpy(array) for array in quantizer.init(_tensor(x), axes=axes, xp=xp))

    def quantize(
        self, quantizer: Any, x: Any, parameters: tuple[Any, ...], cotangent: Any, elements: float
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        def f(x: Any, *parameters: Any) -> Any:
            return fake_quantize(x, quantizer, parameters, elements)

        y, gradients = gradients_of(f, [x, *parameters], cotangent, compiled=self.compiled)
        return y, gradients[0], tuple(gradients[1:]) if quantizer.learned else ()

    def divergence(
        self, function: Any, student: Any, teacher: Any, cotangent: Any, axis: int, temperature: float
    ) -> tuple[Any, Any]:
        def f(student: Any, teacher: Any) -> Any:
            return function(student, teacher, axis=axis, temperature=temperature, xp=xp)

        values, (dstudent, _) = gradients_of(f, [student, teacher], cotangent)
        return values, dstudent

    def consistency(
        self, consistency: cr.Consistency, student: Any, teacher: Any, step: int, axis: int, sample_weight: Any
    ) -> tuple[Any, Any, Any]:
        weight = None if sample_weight is None else _tensor(sample_weight)

        def f(student: Any, teacher: Any) -> Any:
            return consistency_loss(consistency, student, teacher, step=step, axis=axis, sample_weight=weight)[0]

        loss, (dstudent, dteacher) = gradients_of(f, [student, teacher], np.float32(1.0))
        return loss, dstudent, dteacher

    def schedule(self, schedule: Any, steps: Any) -> Any:
        return ops.convert_to_numpy(schedule(ops.cast(_tensor(steps), "float32"), xp=xp))

    def ema(self, averages: list[Any], values: list[Any], decay: float) -> list[Any]:
        variables = [keras.Variable(average) for average in averages]
        ema_update_(variables, [_tensor(value) for value in values], _tensor(np.float32(decay)))
        return [ops.convert_to_numpy(variable) for variable in variables]


class TestKeras(ConformanceSuite):
    adapter = KerasAdapter()


class CompiledAdapter(KerasAdapter):
    compiled = True

    def initial(self, quantizer: Any, x: Any, axes: tuple[int, ...]) -> tuple[Any, ...]:
        found = compiled(lambda x: quantizer.init(x, axes=axes, xp=xp))(_tensor(x))
        return tuple(ops.convert_to_numpy(array) for array in found)


@pytest.mark.parametrize("name", [name for name, q in QUANTIZERS.items() if q.bits == 3])
def test_the_compiler_changes_nothing(name: str) -> None:
    """XLA turns some divisions into products, for one, which is why the core divides through its namespace."""
    suite = type("Suite", (ConformanceSuite,), {"adapter": CompiledAdapter()})()
    suite.test_forward_and_dx_are_bitwise_equal_on_the_lattice(name=name)
    suite.test_forward_and_gradients_agree_on_free_inputs(name=name)


def _tensor(array: Any) -> Any:
    return ops.convert_to_tensor(np.asarray(array))
