"""LSQ and LSQ+: the step size is learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from crcore._errors import CRCoreError
from crcore._grid import IntGrid
from crcore._quantizers._arithmetic import (
    affine_codes,
    check_fields,
    grad_scale,
    grid_of,
    inside_grid,
    positive,
    round_to,
    scale_of_range,
    sum_to,
)
from crcore._typing import Array, Role


@dataclass(frozen=True)
class LSQ:
    """Learned step size quantization (Esser et al., 2020, arXiv 1902.08153, equations 1 to 5).

        q = round(clip(x / scale, lo, hi)),   y = q * scale
        dy/dx     = 1 inside [lo, hi], else 0
        dy/dscale = q - x / scale inside, q outside       (times grad_scale = 1 / sqrt(elements * hi))
        initial scale = 2 * mean(|x|) / sqrt(hi)

    One signed bit: ``q = sign(x)`` with ``sign(0) = 1``, the same gradient with ``lo, hi = -1, 1``, and ``mean(|x|)``
    as initial scale (the least-squares optimum of XNOR-Net, arXiv 1603.05279, equation 6).

    Args:
        bits: 1 to 16.
        per_channel: one scale per output channel (weights only).
        signed: whether codes are signed. None: weights are, activations are if the data has negative values.
        narrow: leave out the lowest code, so that the grid is symmetric.

    Parameters: ``scale``, > 0, learned.

    >>> import numpy as np
    >>> lsq = LSQ(bits=3, signed=True)
    >>> x, scale = np.array([-9.0, -0.6, 0.25, 0.8, 9.0]), np.array([0.5])
    >>> lsq.forward(x, scale)
    array([-2. , -0.5,  0. ,  1. ,  1.5])
    >>> lsq.vjp(np.ones(5), x, scale, elements=3)[0]
    array([0., 1., 1., 1., 0.])
    """

    bits: int
    per_channel: bool = False
    signed: bool | None = None
    narrow: bool = False

    learned: ClassVar[bool] = True
    parameters: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def grid(self) -> IntGrid:
        """The integers in use; needs ``signed`` to be known."""
        return grid_of(self)

    def for_role(self, role: Role) -> Self:
        """Weights are signed; whether activations are is left to the data."""
        return replace(self, signed=True) if role == "weight" and self.signed is None else self

    def init(self, x: Array, *, axes: tuple[int, ...], xp: Any = np) -> tuple[Array, ...]:
        """``(scale,)`` for the data ``x``, reduced over ``axes``; an all-zero channel gets the range [-1, 1]."""
        magnitude = xp.mean(xp.abs(x), axis=axes, keepdims=True)
        if not self.grid.binary:
            magnitude = 2.0 * magnitude / self.grid.hi**0.5
        return (xp.where(magnitude > 0.0, magnitude, 1.0 / self.grid.hi),)

    def codes(self, x: Array, scale: Array, *, xp: Any = np) -> Array:
        """``round(clip(x / scale, lo, hi))``."""
        return round_to(self.grid, xp.divide(x, positive(scale, xp)), xp)

    def affine(self, scale: Array, *, xp: Any = np) -> tuple[Array, Array]:
        """``(scale, 0)``."""
        scale = positive(scale, xp)
        return scale, xp.zeros_like(scale)

    def forward(self, x: Array, scale: Array, *, xp: Any = np) -> Array:
        """``codes * scale``."""
        return self.codes(x, scale, xp=xp) * positive(scale, xp)

    def vjp(self, cotangent: Array, x: Array, scale: Array, *, elements: float, xp: Any = np) -> tuple[Array, ...]:
        """``(dx, dscale)``; ``elements``: how many share one scale (of an activation: within one sample)."""
        v = xp.divide(x, positive(scale, xp))
        q = round_to(self.grid, v, xp)
        inside = (v >= self.grid.lo) & (v <= self.grid.hi)
        dx = xp.where(inside, cotangent, 0.0)
        dscale = sum_to(scale, cotangent * xp.where(inside, q - v, q), xp)
        return dx, dscale * grad_scale(self.grid, elements)


@dataclass(frozen=True)
class LSQPlus:
    """LSQ with a learned offset, for activations (Bhalgat et al., 2020, arXiv 2004.09576, equations 2 to 6).

        zero_point = round(clip(-offset / scale, lo, hi))
        q = clip(round(x / scale) + zero_point, lo, hi),   y = (q - zero_point) * scale
        dy/dx      = 1 inside, else 0       inside: lo <= x / scale + zero_point <= hi
        dy/dscale  = round(x / scale) - x / scale inside, q outside
        dy/doffset = 0 inside, 1 outside    (the last two times grad_scale = 1 / sqrt(elements * hi))

    The paper's ``y = q * scale + offset`` with the offset snapped to ``-zero_point * scale``, straight-through: so the
    exported zero point is an integer, real zero is exactly representable, and the codes are those of ONNX
    QuantizeLinear. Initial range: the data's, cut to mean +- 3 standard deviations, widened to hold zero.

    For weights the paper has no offset; there LSQPlus *is* `LSQ`, and `for_role` returns that.

    Args:
        bits: 1 to 16.
        per_channel: one scale per output channel (weights only).
        signed: whether codes are signed; this moves the zero point, not the values. None: unsigned.
        narrow: leave out one code, as in `IntGrid`.

    Parameters: ``scale``, > 0, and ``offset`` (the real value of code 0), both learned.
    """

    bits: int
    per_channel: bool = False
    signed: bool | None = None
    narrow: bool = False

    learned: ClassVar[bool] = True
    parameters: ClassVar[tuple[str, ...]] = ("scale", "offset")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def grid(self) -> IntGrid:
        """The integers in use."""
        return grid_of(self)

    def for_role(self, role: Role) -> Any:
        """`LSQ` for weights; unsigned codes for activations unless given."""
        if role == "weight":
            return LSQ(self.bits, self.per_channel, self.signed, self.narrow).for_role(role)
        if self.bits == 1 and self.signed:
            raise CRCoreError("LSQPlus with 1 signed bit has no zero point; use signed=False, or LSQ(bits=1)")
        return replace(self, signed=False) if self.signed is None else self

    def init(self, x: Array, *, axes: tuple[int, ...], xp: Any = np) -> tuple[Array, ...]:
        """``(scale, offset)`` for the data ``x``, reduced over ``axes``."""
        mean = xp.mean(x, axis=axes, keepdims=True)
        reach = 3.0 * xp.sqrt(xp.mean((x - mean) * (x - mean), axis=axes, keepdims=True))
        low, high = xp.amin(x, axis=axes, keepdims=True), xp.amax(x, axis=axes, keepdims=True)
        low = xp.where(low > mean - reach, low, mean - reach)
        high = xp.where(high < mean + reach, high, mean + reach)
        scale, low = scale_of_range(self.grid, low, high, xp)
        return scale, low - self.grid.lo * scale

    def affine(self, scale: Array, offset: Array, *, xp: Any = np) -> tuple[Array, Array]:
        """``(scale, zero_point)``, the zero point a whole number within the grid."""
        scale = positive(scale, xp)
        return scale, xp.round(xp.clip(-offset / scale, self.grid.lo, self.grid.hi))

    def codes(self, x: Array, scale: Array, offset: Array, *, xp: Any = np) -> Array:
        """``clip(round(x / scale) + zero_point, lo, hi)``."""
        return affine_codes(self.grid, x, *self.affine(scale, offset, xp=xp), xp)

    def forward(self, x: Array, scale: Array, offset: Array, *, xp: Any = np) -> Array:
        """``(codes - zero_point) * scale``."""
        scale, zero_point = self.affine(scale, offset, xp=xp)
        return (affine_codes(self.grid, x, scale, zero_point, xp) - zero_point) * scale

    def vjp(
        self, cotangent: Array, x: Array, scale: Array, offset: Array, *, elements: float, xp: Any = np
    ) -> tuple[Array, ...]:
        """``(dx, dscale, doffset)``; ``elements``: how many share one scale within one sample."""
        s, zero_point = self.affine(scale, offset, xp=xp)
        v = xp.divide(x, s)
        inside = inside_grid(self.grid, v, zero_point)
        q = affine_codes(self.grid, x, s, zero_point, xp)
        dx = xp.where(inside, cotangent, 0.0)
        dscale = sum_to(scale, cotangent * xp.where(inside, q - zero_point - v, q), xp)
        doffset = sum_to(offset, xp.where(inside, 0.0, cotangent), xp)
        return dx, dscale * grad_scale(self.grid, elements), doffset * grad_scale(self.grid, elements)
