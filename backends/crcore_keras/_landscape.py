"""The loss of a network as a function of its weights, for the instruments of `crcore.flatness`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from crcore import CRCoreError, cross_entropy
from crcore_keras import _derivatives
from crcore_keras._entries import FileArray, file_layers
from crcore_keras._fake_quantize import FakeQuantize
from crcore_keras._integers import IntegerWeight
from crcore_keras._layers import kernels_of
from crcore_keras._logits import logits_function
from crcore_keras._xp import xp

Loss = Callable[[Any, Any], Any]


class Landscape:
    """The mean loss of a network over fixed samples, as a function of its weights: a `crcore.flatness.LossLandscape`.

    It takes the network's variables as they are now, in inference mode; nothing about the network is changed. The
    weights are its trainable variables (where it has none, as a teacher, those that could be trained) but for those of
    quantizers, layer by layer and with the axes that they have in PyTorch: the vectors of the same network in
    `crcore_torch` have the same entries.

    Of a quantized network the derivatives are those it is trained with, of the straight-through surrogate: each
    quantizer passes a change on inside its range and stops it outside, and the Hessian is the derivative of that
    gradient with these masks held. Both are exact for any loss that the engine differentiates twice.

    Args:
        model: a built network of one input and one output, float or prepared, or the ``teacher`` of a
            `ConsistencyModel`.
        x: inputs ``[N, ...]``, normalized as the network takes them.
        y: labels ``[N]``, or whatever ``loss`` takes.
        loss: ``loss(logits, y)``, one value per sample ``[N]``; None for the cross entropy of logits ``[N, classes]``.
            Where the network ends in a softmax, logits are the logarithms of its outputs.
        batch_size: samples that are computed at once.

    Attributes:
        size: the number of weights.
        weights: ``[size]``, float64.
        filters: ``[size]``: the output channel of each weight, numbered through the network; -1 for vectors, which are
            biases and those of normalization layers.
        y: the labels in NumPy.

    Raises:
        CRCoreError: no samples, or another number of inputs than labels; a network without trainable variables, with
            several outputs, or one that was converted to integers.

    >>> net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    >>> landscape = Landscape(net, np.eye(3, dtype="float32"), np.array([0, 1, 0]))
    >>> landscape.hvp(np.ones(landscape.size)).shape, landscape.filters.tolist()
    ((6,), [0, 0, 0, 1, 1, 1])
    """

    def __init__(self, model: Any, x: Any, y: Any, *, loss: Loss | None = None, batch_size: int = 256) -> None:
        if not isinstance(model, keras.Model) or not model.built:
            raise CRCoreError(f"Landscape takes a built keras.Model, got {model!r}; call it on a batch first")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise CRCoreError(f"batch_size must be a whole number from 1, got {batch_size!r}")
        if any(isinstance(layer, IntegerWeight) for layer in model._flatten_layers()):
            raise CRCoreError("a converted network has integers for weights; give the one that was handed to convert")
        if len(getattr(model, "output_names", None) or [""]) > 1:
            raise CRCoreError(
                f"{model.name!r} has the outputs {model.output_names}; make a keras.Model with the one that counts"
            )
        found = _weights_of(model)
        trainable = {id(variable) for variable in model.trainable_variables}
        self._entries = [each for each in found if id(each[0].variable) in trainable] or found
        if not self._entries:
            raise CRCoreError(f"{model.name!r} has no trainable variables, so there is nothing to differentiate by")
        self._x, self.y = _numpy(x), _numpy(y)
        if len(self._x) == 0 or len(self._x) != len(self.y):
            raise CRCoreError(
                f"x and y must be of the same samples, at least one; got {len(self._x)} and {len(self.y)}"
            )
        self._model, self._loss, self._batch_size = model, loss, batch_size
        self._logits = logits_function(model, None)
        chosen = {id(array.variable) for array, _ in self._entries}
        # In NumPy between: a copy on torch would stay in the graph of the variable.
        self._constants = [
            (variable, ops.convert_to_tensor(_numpy(variable), variable.dtype))
            for variable in model.variables
            if id(variable) not in chosen
        ]
        self.weights: NDArray[np.float64] = self._vector([array.variable for array, _ in self._entries])
        self.filters: NDArray[np.int64] = _numbered([filters for _, filters in self._entries])
        self._evaluate = _derivatives.compiled(self._outputs)
        self._gradient, self._product = _derivatives.gradient(self._total), _derivatives.product(self._total)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.weights.size

    def evaluate(self, x: Any = None, weights: NDArray[Any] | None = None) -> tuple[NDArray[np.float64], NDArray[Any]]:
        """The loss ``[N]`` of each sample and the logits ``[N, ...]``, for other inputs or weights where given.

        Raises:
            CRCoreError: inputs or weights of another shape; a loss of another shape than ``[N]``.
        """
        inputs = self._x if x is None else _numpy(x).astype(self._x.dtype)  # NumPy computes in float64 unasked
        if inputs.shape != self._x.shape:
            raise CRCoreError(f"x must have the shape {list(self._x.shape)}, got {list(inputs.shape)}")
        tensors = self._split(self.weights if weights is None else weights)
        found = [self._evaluate(tensors, *batch) for batch in self._batches(inputs)]
        losses, logits = (np.concatenate([_numpy(part) for part in parts]) for parts in zip(*found, strict=True))
        return losses.astype(np.float64), logits

    def gradient(self, weights: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """``[size]``: of the mean loss, at ``weights`` where given.

        Raises:
            CRCoreError: weights of another shape; a loss of another shape than ``[N]``.
        """
        tensors = self._split(self.weights if weights is None else weights)
        found = [self._vector(self._gradient(tensors, *batch)) for batch in self._batches(self._x)]
        return np.sum(found, axis=0) / len(self._x)

    def hvp(self, vector: NDArray[Any]) -> NDArray[np.float64]:
        """``[size]``: the Hessian of the mean loss times ``vector``.

        Raises:
            CRCoreError: a vector of another shape; a loss of another shape than ``[N]``.
        """
        tensors, parts = self._split(self.weights), self._split(vector)
        found = [self._vector(self._product(tensors, parts, *batch)) for batch in self._batches(self._x)]
        return np.sum(found, axis=0) / len(self._x)

    def _batches(self, x: NDArray[Any]) -> Iterator[tuple[Any, Any]]:
        for start in range(0, len(x), self._batch_size):
            samples = slice(start, start + self._batch_size)
            yield ops.convert_to_tensor(x[samples]), ops.convert_to_tensor(self.y[samples])

    def _outputs(self, tensors: Sequence[Any], x: Any, y: Any) -> tuple[Any, Any]:
        """The losses ``[n]`` and the logits of a batch."""
        own = [(array.variable, tensor) for (array, _), tensor in zip(self._entries, tensors, strict=True)]
        with keras.StatelessScope(state_mapping=[*self._constants, *own]):
            logits = self._logits(self._model(x, training=False))
        losses = _cross_entropy(logits, y) if self._loss is None else self._loss(logits, y)
        shape = tuple(getattr(losses, "shape", ()))
        if shape != tuple(x.shape[:1]):
            raise CRCoreError(
                f"loss must give one value per sample, {list(x.shape[:1])}, got {list(shape)}; the functions in "
                "keras.losses do, their classes with reduction=None"
            )
        return losses, logits

    def _total(self, tensors: Sequence[Any], x: Any, y: Any) -> Any:
        return ops.sum(self._outputs(tensors, x, y)[0])

    def _vector(self, values: Sequence[Any]) -> NDArray[np.float64]:
        parts = [array.to_file(_numpy(v)).ravel() for (array, _), v in zip(self._entries, values, strict=True)]
        return np.concatenate(parts).astype(np.float64)

    def _split(self, vector: NDArray[Any]) -> list[Any]:
        """One tensor for each variable."""
        values = np.asarray(vector)
        if values.shape != (self.size,):
            raise CRCoreError(f"weights and vectors must have the shape [{self.size}], got {list(values.shape)}")
        ends = np.cumsum([filters.size for _, filters in self._entries])
        return [
            ops.convert_to_tensor(array.from_file(part), array.variable.dtype)
            for (array, _), part in zip(self._entries, np.split(values, ends[:-1]), strict=True)
        ]


def _weights_of(model: Any) -> list[tuple[FileArray, NDArray[np.int64]]]:
    """What can be trained but for what quantizers learn, in the order and with the axes of files, and its filters."""
    channels: dict[int, tuple[int, ...]] = {}
    for layer in model._flatten_layers():
        if not isinstance(layer, FakeQuantize):
            channels |= {id(variable): (-1,) for variable in layer._trainable_variables}
            channels |= {id(kernel.variable(layer)): kernel.channels(layer) for kernel in kernels_of(layer)}
    arrays = [array for layer in file_layers(model).values() for array in layer.arrays.values()]
    unique: Mapping[int, FileArray] = {id(array.variable): array for array in arrays}
    return [
        (array, array.to_file(_filters(array.variable.shape, channels[key])))
        for key, array in unique.items()
        if key in channels and "float" in array.variable.dtype
    ]


def _filters(shape: tuple[int, ...], axes: tuple[int, ...]) -> NDArray[np.int64]:
    """The filter of each entry of one variable; -1 for vectors."""
    if len(shape) < 2:
        return np.full(shape, -1)
    of_channel = [axis % len(shape) for axis in axes]
    counted = np.arange(np.prod([shape[axis] for axis in of_channel]))
    sizes = [size if axis in of_channel else 1 for axis, size in enumerate(shape)]
    return np.broadcast_to(counted.reshape(sizes), shape).astype(np.int64)


def _numbered(filters: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Numbers of filters that are unique in the network."""
    found, n = [], 0
    for each in filters:
        found.append(np.where(each < 0, each, each + n).ravel())
        n += int(each.max()) + 1
    return np.concatenate(found)


def _numpy(value: Any) -> NDArray[Any]:
    return np.asarray(ops.convert_to_numpy(value))


def _cross_entropy(logits: Any, y: Any) -> Any:
    dtypes = [keras.backend.standardize_dtype(each.dtype) for each in (logits, y)]
    if len(logits.shape) != 2 or tuple(y.shape) != tuple(logits.shape[:1]) or "int" not in dtypes[1]:
        raise CRCoreError(
            f"the cross entropy takes logits [N, classes] and labels [N], got {list(logits.shape)} and {dtypes[1]} "
            f"{list(y.shape)}; give another loss=, one value per sample"
        )
    dtype = "float64" if dtypes[0] == "float64" else "float32"
    return cross_entropy(ops.cast(logits, dtype), ops.one_hot(y, logits.shape[1], dtype=dtype), xp=xp)
