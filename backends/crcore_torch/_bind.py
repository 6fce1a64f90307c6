"""The core's forward and gradient, handed to torch's autograd. The one file that touches autograd."""

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
        ctx.quantizer, ctx.elements = quantizer, elements
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
    is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, *parameters)):
        # Not only cheaper: where nothing needs a gradient, torch.compile hands forward() a context it does not take.
        arrays = broadcast(parameters, x)
        return _kernels.forward(_kernels.plan(kernel, quantizer, x, arrays), quantizer, x, *arrays)
    if is_traced:
        return _TracedFakeQuantize.apply(quantizer, elements, x, *broadcast(parameters, x))
    return _FakeQuantize.apply(kernel, quantizer, elements, x, *parameters)


def broadcast(arrays: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """As the core takes them: with ``x.ndim`` dimensions, in the dtype of the arithmetic."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
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


class _QuantizedAgain(NamedTuple):
    node: Any  # of the graph: it keeps the quantizer's input, and checks that nobody wrote to it
    view: tuple[Any, ...]


def _pack(tensor: Tensor) -> _Kept | _QuantizedAgain:
    quantized = tensor if tensor._base is None else tensor._base
    node: Any = quantized.grad_fn
    ours: type[Any] = _FakeQuantize._backward_cls  # type: ignore[attr-defined]
    if isinstance(node, ours) and node.made_again:
        return _QuantizedAgain(node, (tensor.size(), tensor.stride(), tensor.storage_offset()))
    # Detached: an operation that keeps its own output would keep itself.
    return _Kept(tensor.detach(), tensor._version)


def _unpack(packed: _Kept | _QuantizedAgain) -> Tensor:
    if isinstance(packed, _QuantizedAgain):
        node, view = packed
        x, *stored = node.saved_tensors
        with torch.no_grad():
            return _kernels.forward(node.plan, node.quantizer, x, *broadcast(stored, x)).as_strided(*view)
    if packed.tensor._version != packed.version:  # torch leaves this check to the hooks
        raise RuntimeError(
            f"a tensor of shape {list(packed.tensor.shape)} that is needed for gradient computation has been modified "
            f"by an inplace operation: it is at version {packed.tensor._version}, expected version {packed.version}"
        )
    return packed.tensor
