"""The core's forward and gradient, handed to torch's autograd. The one file that touches autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crcore import Quantizer
from crcore_torch import _kernels
from crcore_torch._xp import xp


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(quantizer: Quantizer, elements: float, x: Tensor, *parameters: Tensor) -> Tensor:
        return _forward(quantizer, x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.quantizer, ctx.elements, *tensors = inputs
        # Only the inputs: everything else is recomputed, which takes less memory than keeping it.
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        if _kernels.supports(ctx.quantizer, x):
            gradients = _kernels.lsq_vjp(ctx.quantizer, cotangent, x, *parameters, elements=ctx.elements)
        else:
            gradients = ctx.quantizer.vjp(cotangent, x, *parameters, elements=ctx.elements, xp=xp)
        constants = 1 + len(parameters) - len(gradients)
        return None, None, *gradients, *[None] * constants


def fake_quantize(x: Tensor, quantizer: Quantizer, parameters: tuple[Tensor, ...], elements: float) -> Tensor:
    """``quantizer.forward(x, *parameters)``, differentiated by ``quantizer.vjp``.

    Args:
        x: float32 or float64.
        quantizer: any quantizer of the core.
        parameters: its arrays, each with ``x.ndim`` dimensions and the dtype of ``x``.
        elements: how many elements share one scale; of an activation, within one sample.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, *parameters)):
        # Not only cheaper: where nothing needs a gradient, torch.compile hands forward() a context it does not take.
        return _forward(quantizer, x, *parameters)
    return _FakeQuantize.apply(quantizer, elements, x, *parameters)


def _forward(quantizer: Any, x: Tensor, *parameters: Tensor) -> Tensor:
    if _kernels.supports(quantizer, x):
        return _kernels.lsq_forward(quantizer, x, *parameters)
    return quantizer.forward(x, *parameters, xp=xp)
