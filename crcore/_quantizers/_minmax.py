"""MinMax: observed ranges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from crcore._errors import CRCoreError
from crcore._grid import IntGrid
from crcore._quantizers._arithmetic import affine_codes, check_fields, grid_of, inside_grid, positive, scale_of_range
from crcore._typing import Array, Role


@dataclass(frozen=True)
class MinMax:
    """Observed ranges, nothing learned (Jacob et al., 2018, arXiv 1712.05877, sections 3 and 3.1).

        affine:     scale = (high - low) / (hi - lo),  zero_point = round(clip(lo - low / scale, lo, hi))
        symmetric:  scale = max(-low, high) / hi,      zero_point = 0
        q = clip(round(x / scale) + zero_point, lo, hi),   y = (q - zero_point) * scale
        dy/dx = 1 inside, else 0
        running average, activations:  low <- momentum * low + (1 - momentum) * min(x), and high likewise

    The range always holds zero, which is exactly representable. Weights take the range of the tensor itself at every
    forward; activations a running average over training batches. Either is frozen on demand by the backend.

    Args:
        bits: 1 to 16.
        per_channel: one range per output channel (weights only).
        signed: whether codes are signed. None: weights are, activations are not (the zero point shifts them).
        narrow: leave out one code, as in `IntGrid`.
        symmetric: a zero point of 0. None: weights yes, activations no.
        momentum: in [0, 1), how much of the running range is kept at each batch.

    Parameters: ``low`` <= 0 and ``high`` >= 0, observed.
    """

    bits: int
    per_channel: bool = False
    signed: bool | None = None
    narrow: bool = False
    symmetric: bool | None = None
    momentum: float = 0.9

    learned: ClassVar[bool] = False
    parameters: ClassVar[tuple[str, ...]] = ("low", "high")

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.momentum, (int, float)) or not 0.0 <= self.momentum < 1.0:
            raise CRCoreError(f"momentum must lie in [0, 1), got {self.momentum!r}; 0.9 is usual")

    @property
    def grid(self) -> IntGrid:
        """The integers in use."""
        return grid_of(self)

    def for_role(self, role: Role) -> Self:
        """Signed and symmetric for weights, unsigned and affine for activations, unless given."""
        is_weight = role == "weight"
        resolved = replace(
            self,
            signed=is_weight if self.signed is None else self.signed,
            symmetric=is_weight if self.symmetric is None else self.symmetric,
            momentum=MinMax.momentum if is_weight else self.momentum,  # a weight's range is not averaged
        )
        if resolved.grid.binary and not resolved.symmetric:
            raise CRCoreError("MinMax with 1 signed bit has no zero point; use symmetric=True, or signed=False")
        return resolved

    def init(self, x: Array, *, axes: tuple[int, ...], xp: Any = np) -> tuple[Array, ...]:
        """``(low, high)`` of ``x`` over ``axes``, widened to hold zero."""
        low, high = xp.amin(x, axis=axes, keepdims=True), xp.amax(x, axis=axes, keepdims=True)
        return xp.where(low < 0.0, low, 0.0), xp.where(high > 0.0, high, 0.0)

    def observe(self, x: Array, low: Array, high: Array, *, axes: tuple[int, ...], xp: Any = np) -> tuple[Array, ...]:
        """The running average of the range after the batch ``x``."""
        new_low, new_high = self.init(x, axes=axes, xp=xp)
        keep = self.momentum
        return keep * low + (1.0 - keep) * new_low, keep * high + (1.0 - keep) * new_high

    def affine(self, low: Array, high: Array, *, xp: Any = np) -> tuple[Array, Array]:
        """``(scale, zero_point)``, the zero point a whole number within the grid."""
        if self.symmetric:
            # An unsigned grid has no negative codes, so that only the top of the range counts.
            reach = xp.where(-low > high, -low, high) if self.grid.signed else high
            reach = xp.where(reach > 0.0, reach, 1.0)
            scale = positive(xp.divide(reach, self.grid.hi), xp)
            # Rounding may put reach / scale just above hi, and the extreme itself outside: then one float32 step more.
            scale = xp.where(reach / scale > self.grid.hi, scale * (1.0 + 2.0**-23), scale)
            return scale, xp.zeros_like(scale)
        scale, low = scale_of_range(self.grid, low, high, xp)
        return scale, xp.round(xp.clip(self.grid.lo - low / scale, self.grid.lo, self.grid.hi))

    def codes(self, x: Array, low: Array, high: Array, *, xp: Any = np) -> Array:
        """``clip(round(x / scale) + zero_point, lo, hi)``."""
        return affine_codes(self.grid, x, *self.affine(low, high, xp=xp), xp)

    def forward(self, x: Array, low: Array, high: Array, *, xp: Any = np) -> Array:
        """``(codes - zero_point) * scale``."""
        scale, zero_point = self.affine(low, high, xp=xp)
        return (affine_codes(self.grid, x, scale, zero_point, xp) - zero_point) * scale

    def vjp(
        self, cotangent: Array, x: Array, low: Array, high: Array, *, elements: float, xp: Any = np
    ) -> tuple[Array, ...]:
        """``(dx,)``; nothing is learned, and ``elements`` plays no part."""
        scale, zero_point = self.affine(low, high, xp=xp)
        return (xp.where(inside_grid(self.grid, xp.divide(x, scale), zero_point), cotangent, 0.0),)
