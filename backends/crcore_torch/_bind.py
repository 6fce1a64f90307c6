"""The core's forward and gradient, handed to torch's autograd. Beside `_derivatives`, the one file that touches it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crcore import Quantizer
from crcore_torch import _kernels

# Elements of a tensor whose memory is worth more than the call that makes it again.
_WORTH_MAKING_AGAIN = 1 << 16


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: str, quantizer: Quantizer, elements: float, x: Tensor, *stored: Tensor) -> Tensor:
        parameters = broadcast(stored, x)
        # Only the inputs: everything else is recomputed, which takes less memory than keeping it.
        ctx.save_for_backward(x, *stored)
        ctx.kernel, ctx.quantizer, ctx.elements = kernel, quantizer, elements
        ctx.plan = plan = _kernels.plan(kernel, quantizer, x, parameters)
        # Not weights, which are leaves: there is one of each, however large the batch; to make them again takes a small
        # batch longer than their memory is worth.
        is_large = not x.is_leaf and x.numel() >= _WORTH_MAKING_AGAIN
        ctx.made_again = is_large and plan is not None and plan.kernel.CHEAP_FORWARD
        return _kernels.forward(plan, quantizer, x, *parameters)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        x, *stored = ctx.saved_tensors
        parameters = broadcast(stored, x)
        dx, *others = _kernels.vjp(ctx.plan, ctx.quantizer, cotangent, x, *parameters, elements=ctx.elements)
        # What is observed instead of learned has none.
        others = [gradient.reshape(array.shape) for gradient, array in zip(others, stored, strict=False)]
        return None, None, None, dx, *others, *[None] * (len(stored) - len(others))


class _TracedFakeQuantize(torch.autograd.Function):
    """The same in the form that torch.compile and torch.func ask for, and call slowly: by the core's formula."""

    @staticmethod
    def forward(quantizer: Quantizer, elements: float, x: Tensor, *parameters: Tensor) -> Tensor:
        return _kernels.forward(None, quantizer, x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.quantizer, ctx.elements, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        gradients = _kernels.vjp(None, ctx.quantizer, cotangent, x, *parameters, elements=ctx.elements)
        constants = 1 + len(parameters) - len(gradients)
        return None, None, *gradients, *[None] * constants


def fake_quantize(
    x: Tensor, quantizer: Quantizer, parameters: Sequence[Tensor], elements: float, kernel: str = "auto"
) -> Tensor:
    """``quantizer.forward(x, *parameters)``, differentiated by ``quantizer.vjp``.

    Args:
        x: any floating dtype, which the result has too; the arithmetic is float32, or float64 for float64.
        quantizer: any quantizer of the core.
        parameters: its arrays, of any floating dtype: scalars, or with ``x.ndim`` dimensions.
        elements: how many elements share one scale; of an activation, within one sample.
        kernel: one of `_kernels.NAMES`.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, *parameters)):
        # Not only cheaper: where nothing needs a gradient, torch.compile hands forward() a context it does not take.
        arrays = broadcast(parameters, x)
        return _kernels.forward(_kernels.plan(kernel, quantizer, x, arrays), quantizer, x, *arrays)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _TracedFakeQuantize.apply(quantizer, elements, x, *broadcast(parameters, x))
    return _FakeQuantize.apply(kernel, quantizer, elements, x, *parameters)


def broadcast(arrays: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """As the core takes them: with ``x.ndim`` dimensions, in the dtype of the arithmetic."""
    dtype = _kernels.wide(x.dtype)
    arrays = [array if array.dtype == dtype else array.to(dtype) for array in arrays]
    return tuple(array if array.ndim == x.ndim else array.reshape((1,) * x.ndim) for array in arrays)


def quantized_again() -> AbstractContextManager[Any]:
    """Within it, a layer keeps no quantized activation for its backward pass: that is made again from what is kept.

    A quantizer keeps its input, a convolution its own: the same tensor, but for the quantizer. Where the forward of the
    quantizer is one pass, running it again costs less than a tensor for each layer. torch.compile decides this itself;
    other code that decides what is kept (activation checkpointing, offloading) is left to it.
    """
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]  # torch.func
    ):
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


class _Kept(NamedTuple):
    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        """The tensor, if nobody wrote to it: torch leaves this check to the hooks."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {list(self.tensor.shape)} that is needed for gradient computation has been "
                f"modified by an inplace operation: it is at version {self.tensor._version}, "
                f"expected version {self.version}"
            )
        return self.tensor


class _QuantizedAgain(NamedTuple):
    kernel: str
    quantizer: Quantizer
    x: _Kept
    stored: tuple[_Kept, ...]
    view: tuple[Any, ...]

    def get(self) -> Tensor:
        """The quantized tensor, or the view of it that the layer kept."""
        x = self.x.get()
        arrays = broadcast([kept.get() for kept in self.stored], x)
        with torch.no_grad():
            plan = _kernels.plan(self.kernel, self.quantizer, x, arrays)
            return _kernels.forward(plan, self.quantizer, x, *arrays).as_strided(*self.view)


def _keep(tensor: Tensor) -> _Kept:
    # Detached, or an operation that keeps its own output would keep itself.
    return _Kept(tensor if tensor.is_leaf else tensor.detach(), tensor._version)


def _pack(tensor: Tensor) -> _Kept | _QuantizedAgain:
    quantized = tensor if tensor._base is None else tensor._base
    node: Any = quantized.grad_fn
    ours: type[Any] = _FakeQuantize._backward_cls  # type: ignore[attr-defined]
    # A view of another dtype is made of other strides, and what was written to is another tensor.
    if isinstance(node, ours) and node.made_again and tensor.dtype == quantized.dtype and tensor._version == 0:
        x, *stored = node.saved_tensors
        view = tensor.size(), tensor.stride(), tensor.storage_offset()
        return _QuantizedAgain(node.kernel, node.quantizer, _keep(x), tuple(map(_keep, stored)), view)
    return _keep(tensor)


def _unpack(packed: _Kept | _QuantizedAgain) -> Tensor:
    return packed.get()
