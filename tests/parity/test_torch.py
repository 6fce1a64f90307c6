"""PyTorch against NumPy. A missing torch or crcore_torch is an error here, never a skip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from crcore_torch import ConsistencyLoss, _kernels
from crcore_torch._bind import fake_quantize
from crcore_torch._kernels import NAMES, _blocked, chosen
from crcore_torch._teacher import ema_update_
from crcore_torch._xp import xp

import crcore as cr
from crcore.testing import QUANTIZERS, ConformanceSuite


class TorchAdapter:
    name = "torch"
    flushes_denormals = False

    def __init__(self, kernel: str = "auto", layout: str = "contiguous", device: str = "cpu") -> None:
        self.kernel, self.layout, self.device = kernel, layout, device

    def initial(self, quantizer: Any, x: Any, axes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(array.numpy() for array in quantizer.init(_tensor(x), axes=axes, xp=xp))

    def quantize(
        self, quantizer: Any, x: Any, parameters: tuple[Any, ...], cotangent: Any, elements: float
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        lay_x, lay_cotangent = LAYOUTS[self.layout]
        inner = lay_x(_tensor(x).to(self.device)).requires_grad_()
        stored = tuple(_tensor(p).to(self.device).requires_grad_(quantizer.learned) for p in parameters)
        with mock.patch.object(_blocked, "_BLOCK", 5):  # short enough for small tensors to fill several
            y = fake_quantize(inner, quantizer, stored, elements, self.kernel)
            upstream = lay_cotangent(_tensor(cotangent).to(self.device))
            wanted = (inner, *stored) if quantizer.learned else (inner,)
            dx, *gradients = torch.autograd.grad(y, wanted, upstream, allow_unused=True, materialize_grads=True)
        return y.detach().cpu().numpy(), dx.cpu().numpy(), tuple(gradient.cpu().numpy() for gradient in gradients)

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


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _reordered(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[::-1], device=x.device).permute(*range(x.ndim)[::-1]).copy_(x)


# How x and its cotangent lie in memory.
LAYOUTS: dict[str, tuple[Any, Any]] = {
    "contiguous": (lambda x: x, lambda g: g),
    "channels last": (_channels_last, _channels_last),
    "in another order": (lambda x: x, _reordered),
    "with gaps": (lambda x: torch.stack([x, x], dim=-1)[..., 0], _reordered),
}
# Each kernel on the devices of this machine that it is made for.
KERNELS = [(kernel, "cpu") for kernel in NAMES if kernel != "triton"]
if torch.cuda.is_available():
    KERNELS += [(kernel, "cuda") for kernel in NAMES if kernel != "cpp"]
LSQS = [name for name, q in QUANTIZERS.items() if isinstance(q, cr.LSQ) and q.bits in (1, 2, 3, 4, 8, 16)]


@pytest.mark.parametrize("name", LSQS)
@pytest.mark.parametrize(("kernel", "device"), KERNELS)
def test_every_kernel_keeps_to_the_core(kernel: str, device: str, name: str) -> None:
    suite = type("Suite", (ConformanceSuite,), {"adapter": TorchAdapter(kernel, device=device)})()
    with runs(kernel if QUANTIZERS[name].bits > 1 else "core"):
        suite.test_forward_and_dx_are_bitwise_equal_on_the_lattice(name=name)
        suite.test_forward_and_gradients_agree_on_free_inputs(name=name)


@contextmanager
def runs(kernel: str) -> Iterator[None]:
    """Fails where the kernel has not run: the core's formula, which takes over, would be compared with itself."""
    if kernel in ("auto", "core"):
        yield
        return
    module = _kernels._KERNELS[kernel]
    with (
        mock.patch.object(module, "forward", wraps=module.forward) as forward,
        mock.patch.object(module, "vjp", wraps=module.vjp) as vjp,
    ):
        yield
    assert forward.called
    assert vjp.called


LAID_OUT = [
    (kernel, device, name)
    for kernel, device in KERNELS
    for name, q in QUANTIZERS.items()
    if q.bits == 3
    and (isinstance(q, cr.LSQ) or kernel == "core")
    # CUDA's tanh is another one, and DoReFa's largest weight lies at the bound of its grid.
    and not (isinstance(q, cr.DoReFa) and device == "cuda")
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "device", "name"), LAID_OUT)
def test_memory_layout_changes_nothing(kernel: str, device: str, name: str, layout: str) -> None:
    suite = type("Suite", (ConformanceSuite,), {"adapter": TorchAdapter(kernel, layout, device)})()
    with runs(kernel if layout != "with gaps" else "core"):
        suite.test_forward_and_dx_are_bitwise_equal_on_the_lattice(name=name)
        suite.test_forward_and_gradients_agree_on_free_inputs(name=name)


def test_the_kernels_that_are_tested_are_those_that_run() -> None:
    for kernel, device in KERNELS:
        if kernel != "auto":
            assert chosen(kernel, cr.LSQ(4, signed=True), torch.device(device)) == kernel


def _tensor(array: Any, *, grad: bool = False) -> torch.Tensor:
    return torch.tensor(np.asarray(array), requires_grad=grad)


def _gradient(tensor: torch.Tensor) -> Any:
    return (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).numpy()
