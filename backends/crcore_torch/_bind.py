"""The core's forward and gradient, handed to torch's autograd. The one file that touches autograd."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crcore import Quantizer
from crcore_torch import _kernels


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(kernel: str, quantizer: Quantizer, elements: float, x: Tensor, *parameters: Tensor) -> Tensor:
        return _kernels.forward(kernel, quantizer, x, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.kernel, ctx.quantizer, ctx.elements, *tensors = inputs
        # Only the inputs: everything else is recomputed, which takes less memory than keeping it.
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        gradients = _kernels.vjp(ctx.kernel, ctx.quantizer, cotangent, x, *parameters, elements=ctx.elements)
        constants = 1 + len(parameters) - len(gradients)
        return None, None, None, *gradients, *[None] * constants


class _EagerFakeQuantize(torch.autograd.Function):
    """The same in the form that torch calls faster, by as much as a small layer takes; torch.func needs the other."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _FakeQuantize.setup_context(ctx, inputs, output=inputs[3])
        return _FakeQuantize.forward(*inputs)

    backward = _FakeQuantize.backward


def fake_quantize(
    x: Tensor, quantizer: Quantizer, parameters: tuple[Tensor, ...], elements: float, kernel: str = "auto"
) -> Tensor:
    """``quantizer.forward(x, *parameters)``, differentiated by ``quantizer.vjp``.

    Args:
        x: any floating dtype, which the result has too; the arithmetic is float32, or float64 for float64.
        quantizer: any quantizer of the core.
        parameters: its arrays, each with ``x.ndim`` dimensions; float32, or float64 for float64.
        elements: how many elements share one scale; of an activation, within one sample.
        kernel: one of `_kernels.NAMES`.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (x, *parameters)):
        # Not only cheaper: where nothing needs a gradient, torch.compile hands forward() a context it does not take.
        return _kernels.forward(kernel, quantizer, x, *parameters)
    is_transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    function = _FakeQuantize if is_transformed else _EagerFakeQuantize
    return function.apply(kernel, quantizer, elements, x, *parameters)


def quantized_again() -> AbstractContextManager[Any]:
    """Within it, a layer keeps no quantized tensor for its backward pass: that is made again from what is kept anyway.

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
    ours: type[Any] = _EagerFakeQuantize._backward_cls  # type: ignore[attr-defined]
    if isinstance(node, ours) and _kernels.has_cheap_forward(node.kernel, node.quantizer, *node.saved_tensors):
        return _QuantizedAgain(node, (tensor.size(), tensor.stride(), tensor.storage_offset()))
    # Detached: an operation that keeps its own output would keep itself.
    return _Kept(tensor.detach(), tensor._version)


def _unpack(packed: _Kept | _QuantizedAgain) -> Tensor:
    if isinstance(packed, _QuantizedAgain):
        node, view = packed
        with torch.no_grad():
            return _kernels.forward(node.kernel, node.quantizer, *node.saved_tensors).as_strided(*view)
    if packed.tensor._version != packed.version:  # torch leaves this check to the hooks
        raise RuntimeError(
            f"a tensor of shape {list(packed.tensor.shape)} that is needed for gradient computation has been modified "
            f"by an inplace operation: it is at version {packed.tensor._version}, expected version {packed.version}"
        )
    return packed.tensor
