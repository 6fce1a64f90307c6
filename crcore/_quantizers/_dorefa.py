"""DoReFa: fixed ranges, weights squashed by tanh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from crcore._grid import IntGrid
from crcore._quantizers._arithmetic import MIN_SCALE, check_fields, max_to, round_to, sum_to, symmetric_grid_of
from crcore._typing import Array, Role


@dataclass(frozen=True)
class DoReFa:
    """DoReFa-Net (Zhou et al., 2016, arXiv 1606.06160, equations 5 to 11), with ``n = 2**bits - 1``.

    Weights, with ``norm = max(|tanh(x)|)``:

        y = 2 * round(n * (tanh(x) / (2 * norm) + 1/2)) / n - 1
        dy/dx = d/dx (tanh(x) / norm), the maximum included (ties share it evenly)

    A grid of ``2**bits`` levels without zero: the codes are its odd numerators ``-n, -n + 2, ..., n`` and the scale is
    ``1 / n``, so that the integer form is exact (it needs ``bits + 1`` bits as plain integers). The values lie in
    [-1, 1] whatever the size of ``x``, as in the paper. At one bit ``y = sign(x) * mean(|x|)``, ``sign(0) = 1``,
    ``dy/dx = 1``.

    Activations:

        y = round(n * clip(x, 0, 1)) / n,   dy/dx = 1 for 0 <= x <= 1, else 0

    Signed activations (the paper has none) are clipped to [-1, 1] on the narrow signed grid.

    Args:
        bits: 1 to 16.
        per_channel: one norm per output channel (weights only; the paper has one per tensor).
        signed: of activations; None: signed if the data has negative values.
        tanh: whether to normalise by tanh, the rule for weights. None: weights yes, activations no.

    Parameters: for weights ``norm`` (at one bit the mean magnitude), always recomputed from ``x``; else none.
    """

    bits: int
    per_channel: bool = False
    signed: bool | None = None
    tanh: bool | None = None

    learned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def parameters(self) -> tuple[str, ...]:
        """``("norm",)`` for weights, else none."""
        return ("norm",) if self.tanh else ()

    @property
    def grid(self) -> IntGrid:
        """The integers in use for activations; needs ``signed`` to be known."""
        return symmetric_grid_of(self)

    def for_role(self, role: Role) -> Self:
        """tanh-normalised for weights, clipped for activations."""
        tanh = role == "weight" if self.tanh is None else self.tanh
        # One spelling per behaviour: tanh-normalised codes are signed, and clipped activations share one fixed range.
        return replace(self, tanh=tanh, signed=True if tanh else self.signed, per_channel=tanh and self.per_channel)

    def init(self, x: Array, *, axes: tuple[int, ...], xp: Any = np) -> tuple[Array, ...]:
        """``(norm,)`` of the weights ``x``, reduced over ``axes``; ``()`` for activations."""
        if not self.tanh:
            return ()
        if self.bits == 1:
            norm = xp.mean(xp.abs(x), axis=axes, keepdims=True)
        else:
            norm = xp.amax(xp.abs(xp.tanh(x)), axis=axes, keepdims=True)
        # The gradient divides by norm**2, which a channel of denormals would make zero.
        return (xp.where(norm > MIN_SCALE, norm, 1.0),)

    def affine(self, *norm: Array, xp: Any = np) -> tuple[Array, Array]:
        """``(1 / n, 0)`` for weights (``norm`` at one bit), ``(1 / hi, 0)`` for activations."""
        if not self.tanh:
            return 1.0 / self.grid.hi, 0.0
        zero = xp.zeros_like(norm[0])
        return (norm[0] if self.bits == 1 else zero + 1.0 / (2**self.bits - 1)), zero

    def codes(self, x: Array, *norm: Array, xp: Any = np) -> Array:
        """Odd numerators for weights, ``round(hi * clip(x, lo / hi, 1))`` for activations."""
        if not self.tanh:
            return round_to(self.grid, x * self.grid.hi, xp)
        if self.bits == 1:
            return xp.where(x >= 0.0, 1.0 + xp.zeros_like(x), -1.0)
        n = 2**self.bits - 1
        unit = xp.divide(xp.tanh(x), 2.0 * norm[0]) + 0.5
        return 2.0 * xp.round(xp.clip(n * unit, 0, n)) - n

    def forward(self, x: Array, *norm: Array, xp: Any = np) -> Array:
        """``codes * scale``."""
        return self.codes(x, *norm, xp=xp) * self.affine(*norm, xp=xp)[0]

    def vjp(self, cotangent: Array, x: Array, *norm: Array, elements: float, xp: Any = np) -> tuple[Array, ...]:
        """``(dx,)``; nothing is learned, and ``elements`` plays no part."""
        if not self.tanh:
            lowest = -1.0 if self.signed else 0.0
            return (xp.where((x >= lowest) & (x <= 1.0), cotangent, 0.0),)
        if self.bits == 1:
            return (cotangent,)
        t = xp.tanh(x)
        at_norm = xp.abs(t) == norm[0]
        ties = sum_to(norm[0], xp.where(at_norm, 1.0 + xp.zeros_like(t), 0.0), xp)
        # The same number as a function of x, for whoever differentiates this gradient: without it the Hessian would
        # not be symmetric. Without a tie there is no such function (the norm was replaced by 1 for an all-zero tensor).
        size = xp.where(ties > 0.0, max_to(norm[0], xp.where(at_norm, xp.abs(t), 0.0), xp), norm[0])
        dnorm = -sum_to(norm[0], cotangent * t, xp) / (size * size)
        share = dnorm / xp.where(ties > 0.0, ties, 1.0)
        dt = xp.divide(cotangent, size) + xp.where(at_norm, xp.where(t < 0.0, -share, share), 0.0)
        return (dt * (1.0 - t * t),)
