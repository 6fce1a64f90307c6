"""The loss of a network as a function of its weights, for the instruments of `crcore.flatness`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crcore import CRCoreError, cross_entropy
from crcore_torch import _derivatives
from crcore_torch._convert import IntegerWeight
from crcore_torch._fake_quantize import FakeQuantize
from crcore_torch._follow import unwrapped
from crcore_torch._layers import channel_axis
from crcore_torch._teacher import Teacher
from crcore_torch._xp import xp

Loss = Callable[[Tensor, Tensor], Tensor]


class Landscape:
    """The mean loss of a network over fixed samples, as a function of its weights: a `crcore.flatness.LossLandscape`.

    It takes a copy of the network as it is now, in eval mode; the network itself is not touched. The weights are its
    trainable parameters (all parameters where none is trainable, as in a `Teacher`) but for those of quantizers, in
    the order of ``model.parameters()``.

    Of a quantized network the derivatives are those it is trained with, of the straight-through surrogate: each
    quantizer passes a change on inside its range and stops it outside, and the Hessian is the derivative of that
    gradient with these masks held. Both are exact for any loss that torch differentiates twice.

    Args:
        model: a network of one input, float, prepared, or a `Teacher`.
        x: inputs ``[N, ...]``, normalized as the network takes them.
        y: labels ``[N]``, or whatever ``loss`` takes.
        loss: ``loss(logits, y)``, one value per sample ``[N]``; None for the cross entropy of logits ``[N, classes]``.
        batch_size: samples that are computed at once. Where all are one batch, the graph of the gradient is kept from
            one product to the next, which saves half the time and takes memory: for a ResNet-20 some 10 MB per image.

    Attributes:
        size: the number of weights.
        weights: ``[size]``, float64.
        filters: ``[size]``: the output channel of each weight, numbered through the network; -1 for vectors, which
            are biases and those of normalization layers.
        y: the labels in NumPy.

    Raises:
        CRCoreError: no samples, or another number of inputs than labels; a network without parameters, or one that was
            converted to integers.

    >>> import torch
    >>> net, x, y = torch.nn.Linear(3, 2, bias=False), torch.eye(3), torch.tensor([0, 1, 0])
    >>> landscape = Landscape(net, x, y)
    >>> landscape.hvp(np.ones(landscape.size)).shape, landscape.filters.tolist()
    ((6,), [0, 0, 0, 1, 1, 1])
    """

    def __init__(self, model: nn.Module, x: Any, y: Any, *, loss: Loss | None = None, batch_size: int = 256) -> None:
        if not isinstance(model, nn.Module):
            raise CRCoreError(f"Landscape takes a torch.nn.Module, got {type(model).__name__}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise CRCoreError(f"batch_size must be a whole number from 1, got {batch_size!r}")
        model = model.model if isinstance(model, Teacher) else unwrapped(model)
        if any(isinstance(module, IntegerWeight) for module in model.modules()):
            raise CRCoreError("a converted network has integers for weights; give the one that was handed to convert")
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        parameters = _weights_of(self._model)
        names = [name for name in parameters if name in trained] or list(parameters)
        if not names:
            raise CRCoreError(f"{type(model).__name__} has no parameters, so there is nothing to differentiate by")
        self._names = names
        self._tensors = [parameters[name].detach() for name in names]
        self._device, self._loss, self._batch_size = self._tensors[0].device, loss, batch_size
        self._x, self._y = self._tensor(x), torch.as_tensor(y, device=self._device)
        if len(self._x) == 0 or len(self._x) != len(self._y):
            raise CRCoreError(
                f"x and y must be of the same samples, at least one; got {len(self._x)} and {len(self._y)}"
            )
        self._kept: tuple[list[Tensor], tuple[Tensor, ...]] | None = None
        self.y: NDArray[Any] = self._y.cpu().numpy()
        self.weights: NDArray[np.float64] = _vector(self._tensors)
        self.filters: NDArray[np.int64] = _filters(self._model, names)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.weights.size

    def evaluate(self, x: Any = None, weights: NDArray[Any] | None = None) -> tuple[NDArray[np.float64], NDArray[Any]]:
        """The loss ``[N]`` of each sample and the logits ``[N, ...]``, for other inputs or weights where given.

        Raises:
            CRCoreError: inputs or weights of another shape; a loss of another shape than ``[N]``.
        """
        inputs = self._x if x is None else self._tensor(x).to(self._x.dtype)  # NumPy computes in float64 unasked
        if inputs.shape != self._x.shape:
            raise CRCoreError(f"x must have the shape {list(self._x.shape)}, got {list(inputs.shape)}")
        tensors = self._tensors if weights is None else self._split(weights)
        with torch.no_grad():
            found = [self._outputs(tensors, *batch) for batch in self._batches(inputs)]
        losses, logits = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return losses.double().numpy(), logits.numpy()

    def gradient(self, weights: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """``[size]``: of the mean loss, at ``weights`` where given.

        Raises:
            CRCoreError: weights of another shape; a loss of another shape than ``[N]``.
        """
        tensors = _leaves(self._tensors if weights is None else self._split(weights))
        total = np.zeros(self.size)
        for batch in self._batches(self._x):
            total += _vector(_derivatives.gradient(self._share(tensors, *batch), tensors))
        return total

    def hvp(self, vector: NDArray[Any]) -> NDArray[np.float64]:
        """``[size]``: the Hessian of the mean loss times ``vector``.

        Raises:
            CRCoreError: a vector of another shape; a loss of another shape than ``[N]``.
        """
        parts = self._split(vector)
        is_one_batch = len(self._x) <= self._batch_size
        if is_one_batch and self._kept is not None:
            tensors, gradient = self._kept
            return _vector(_derivatives.product(gradient, tensors, parts, keep_graph=True))
        tensors, total = _leaves(self._tensors), np.zeros(self.size)
        for batch in self._batches(self._x):
            gradient = _derivatives.gradient(self._share(tensors, *batch), tensors, differentiable=True)
            total += _vector(_derivatives.product(gradient, tensors, parts, keep_graph=is_one_batch))
            if is_one_batch:
                self._kept = tensors, gradient
        return total

    def _batches(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(x.split(self._batch_size), self._y.split(self._batch_size), strict=True)

    def _outputs(self, tensors: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The losses ``[n]`` and the logits of a batch."""
        with torch.enable_grad() if any(tensor.requires_grad for tensor in tensors) else nullcontext():
            logits = torch.func.functional_call(self._model, dict(zip(self._names, tensors, strict=True)), (x,))
            losses = _cross_entropy(logits, y) if self._loss is None else self._loss(logits, y)
        if not isinstance(losses, Tensor) or losses.shape != (len(x),):
            shown = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise CRCoreError(
                f"loss must give one value per sample, [{len(x)}], got {shown}; for torch's own losses, "
                "reduction='none' keeps them apart"
            )
        return losses, logits

    def _share(self, tensors: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """What a batch adds to the mean loss."""
        return self._outputs(tensors, x, y)[0].sum() / len(self._x)

    def _tensor(self, x: Any) -> Tensor:
        return torch.as_tensor(x, device=self._device)

    def _split(self, vector: NDArray[Any]) -> list[Tensor]:
        """One tensor for each weight tensor."""
        values = np.asarray(vector)
        if values.shape != (self.size,):
            raise CRCoreError(f"weights and vectors must have the shape [{self.size}], got {list(values.shape)}")
        flat = torch.from_numpy(values.astype(np.float64)).split([tensor.numel() for tensor in self._tensors])
        return [part.to(t.device, t.dtype).reshape(t.shape) for part, t in zip(flat, self._tensors, strict=True)]


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters by name, each once, but for those of quantizers."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    learned = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in learned and parameter.is_floating_point()
    }


def _filters(model: nn.Module, names: Sequence[str]) -> NDArray[np.int64]:
    found: list[NDArray[np.int64]] = []
    n = 0
    for name in names:
        owner, _, own = name.rpartition(".")
        layer = model.get_submodule(owner)
        shape = layer._parameters[own].shape  # type: ignore[union-attr]
        if len(shape) < 2:
            found.append(np.full(shape.numel(), -1))
            continue
        axis = channel_axis(layer) or 0
        channel = np.expand_dims(np.arange(shape[axis]), [other for other in range(len(shape)) if other != axis])
        found.append(n + np.broadcast_to(channel, tuple(shape)).ravel())
        n += shape[axis]
    return np.concatenate(found)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _vector(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = torch.cat([tensor.detach().double().flatten().cpu() for tensor in tensors]).numpy()
    return found


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or y.shape != logits.shape[:1] or y.is_floating_point():
        shown = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CRCoreError(
            f"the cross entropy takes logits [N, classes] and labels [N], got {shown} and {y.dtype} {list(y.shape)}; "
            "give another loss=, one value per sample"
        )
    targets = torch.nn.functional.one_hot(y.long(), logits.shape[1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(wide, targets.to(wide.dtype), xp=xp)  # type: ignore[no-any-return]
