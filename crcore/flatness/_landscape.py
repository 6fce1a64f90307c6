"""What the instruments ask of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crcore import CRCoreError

# Called with the number of Hessian-vector products, or of evaluations, that have been made.
Progress = Callable[[int], None]


class Hessian(Protocol):
    """A symmetric matrix that is known by its products with vectors."""

    @property
    def size(self) -> int:
        """The number of its rows."""
        ...

    def hvp(self, vector: NDArray[Any]) -> NDArray[Any]:
        """The product with a vector ``[size]``."""
        ...


class LossLandscape(Hessian, Protocol):
    """The mean loss of a network over a fixed set of samples, as a function of its weights.

    The network is in eval mode (BatchNorm with its running statistics, no dropout) and as it was when the landscape was
    made; the instruments change nothing about it. Weights are all that is trained, but for what quantizers learn, as
    one vector ``[size]`` in float64.

    The loss of a quantized network is piecewise constant in its weights. Its derivatives here are those that it is
    trained with, of the straight-through surrogate: a quantizer passes a change on where it is inside its range, as
    it does in the gradient, and its second derivative is that of the surrogate: zero where ``dy/dx`` is 0 or 1.
    """

    @property
    def weights(self) -> NDArray[np.float64]:
        """``[size]``."""
        ...

    @property
    def filters(self) -> NDArray[np.int64]:
        """``[size]``: the filter (the weights of one output channel) of each weight, -1 for biases and norms."""
        ...

    @property
    def y(self) -> NDArray[Any]:
        """``[N, ...]``: the samples' labels or targets."""
        ...

    def evaluate(
        self, x: NDArray[Any] | None = None, weights: NDArray[Any] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[Any]]:
        """The loss ``[N]`` of each sample and the logits ``[N, ...]``, for other inputs or weights where given."""
        ...

    def gradient(self, weights: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """``[size]``: of the mean loss, at ``weights`` where given."""
        ...


def counted(hessian: Hessian, progress: Progress | None) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """The product in float64, checked and counted."""
    done = 0

    def product(vector: NDArray[Any]) -> NDArray[np.float64]:
        nonlocal done
        found = np.asarray(hessian.hvp(np.ravel(vector)), np.float64)
        check_finite("a Hessian-vector product", found)
        done += 1
        if progress is not None:
            progress(done)
        return found

    return product


def check_finite(what: str, values: Any) -> None:
    """Raise where the loss, or a derivative, has overflown."""
    if not np.isfinite(values).all():
        raise CRCoreError(
            f"{what} has NaN or infinity: the loss overflows at these weights; check that the network's outputs are "
            "finite on these samples, and that no level or radius is too large"
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless it is a whole number from ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise CRCoreError(f"{name} must be a whole number from {least}, got {value!r}")
