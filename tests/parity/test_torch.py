"""PyTorch against NumPy. A missing torch or crcore_torch is an error here, never a skip."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from crcore_torch import ConsistencyLoss, _kernels
from crcore_torch._bind import fake_quantize
from crcore_torch._teacher import ema_update_
from crcore_torch._xp import xp

import crcore as cr
from crcore.testing import QUANTIZERS, ConformanceSuite


class TorchAdapter:
    name = "torch"
    flushes_denormals = False

    def initial(self, quantizer: Any, x: Any, axes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(array.numpy() for array in quantizer.init(_tensor(x), axes=axes, xp=xp))

    def quantize(
        self, quantizer: Any, x: Any, parameters: tuple[Any, ...], cotangent: Any, elements: float
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        inner = _tensor(x, grad=True)
        stored = tuple(_tensor(parameter, grad=quantizer.learned) for parameter in parameters)
        y = fake_quantize(inner, quantizer, stored, elements)
        y.backward(_tensor(cotangent))
        gradients = tuple(_gradient(parameter) for parameter in stored) if quantizer.learned else ()
        return y.detach().numpy(), _gradient(inner), gradients

    def divergence(
        self, function: Any, student: Any, teacher: Any, cotangent: Any, axis: int, temperature: float
    ) -> tuple[Any, Any]:
        inner = _tensor(student, grad=True)
        values = function(inner, _tensor(teacher), axis=axis, temperature=temperature, xp=xp)
        values.backward(_tensor(cotangent))
        return values.detach().numpy(), _gradient(inner)

    def consistency(
        self, consistency: cr.Consistency, student: Any, teacher: Any, step: int, axis: int, sample_weight: Any
    ) -> tuple[Any, Any, Any]:
        inner, other = _tensor(student, grad=True), _tensor(teacher, grad=True)
        weight = None if sample_weight is None else _tensor(sample_weight)
        loss = ConsistencyLoss(consistency)(inner, other, step=step, axis=axis, sample_weight=weight)
        if loss.requires_grad:
            loss.backward()
        return loss.detach().numpy(), _gradient(inner), _gradient(other)

    def schedule(self, schedule: Any, steps: Any) -> Any:
        return np.asarray(schedule(torch.from_numpy(steps), xp=xp))

    def ema(self, averages: list[Any], values: list[Any], decay: float) -> list[Any]:
        tensors = [_tensor(average) for average in averages]
        ema_update_(tensors, [_tensor(value) for value in values], decay)
        return [tensor.numpy() for tensor in tensors]


class TestTorch(ConformanceSuite):
    adapter = TorchAdapter()


class BlockedAdapter(TorchAdapter):
    """The fused kernel walks in blocks; these are short enough for the suite's small tensors to fill several."""

    def quantize(self, *arguments: Any) -> Any:
        with mock.patch.object(_kernels, "_BLOCK", 5):
            return super().quantize(*arguments)


class StridedAdapter(TorchAdapter):
    """A cotangent that lies in memory in another order than the input."""

    def quantize(self, quantizer: Any, x: Any, parameters: Any, cotangent: Any, elements: float) -> Any:
        inner = self.input(_tensor(x)).requires_grad_()
        stored = tuple(_tensor(parameter, grad=quantizer.learned) for parameter in parameters)
        y = fake_quantize(inner, quantizer, stored, elements)
        reordered = torch.empty(cotangent.shape[::-1]).permute(*range(cotangent.ndim)[::-1])
        gradients = torch.autograd.grad(
            y, (inner, *stored) if quantizer.learned else (inner,), reordered.copy_(_tensor(cotangent))
        )
        return y.detach().numpy(), gradients[0].numpy(), tuple(gradient.numpy() for gradient in gradients[1:])

    def input(self, x: torch.Tensor) -> torch.Tensor:
        return x


class GappedAdapter(StridedAdapter):
    """An input with gaps besides."""

    def input(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x], dim=-1)[..., 0]


class ChannelsLastAdapter(TorchAdapter):
    def quantize(self, quantizer: Any, x: Any, parameters: Any, cotangent: Any, elements: float) -> Any:
        if x.ndim != 4:
            return super().quantize(quantizer, x, parameters, cotangent, elements)
        inner, upstream = (_tensor(array).contiguous(memory_format=torch.channels_last) for array in (x, cotangent))
        inner.requires_grad_()
        stored = tuple(_tensor(parameter, grad=quantizer.learned) for parameter in parameters)
        with mock.patch.object(_kernels, "_BLOCK", 5):
            y = fake_quantize(inner, quantizer, stored, elements)
            gradients = torch.autograd.grad(y, (inner, *stored) if quantizer.learned else (inner,), upstream)
        return y.detach().numpy(), gradients[0].numpy(), tuple(gradient.numpy() for gradient in gradients[1:])


@pytest.mark.parametrize(
    "adapter",
    [BlockedAdapter(), StridedAdapter(), GappedAdapter(), ChannelsLastAdapter()],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize("name", [name for name, q in QUANTIZERS.items() if q.bits == 3])
def test_memory_layout_changes_nothing(adapter: Any, name: str) -> None:
    suite = type("Suite", (ConformanceSuite,), {"adapter": adapter})()
    suite.test_forward_and_dx_are_bitwise_equal_on_the_lattice(name=name)
    suite.test_forward_and_gradients_agree_on_free_inputs(name=name)


def _tensor(array: Any, *, grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.asarray(array), requires_grad=grad)


def _gradient(tensor: torch.Tensor) -> Any:
    return (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).numpy()
