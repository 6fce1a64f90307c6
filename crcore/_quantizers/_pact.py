"""PACT: the clipping level is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from crcore._errors import CRCoreError
from crcore._grid import IntGrid
from crcore._quantizers._arithmetic import check_fields, positive, round_to, sum_to, symmetric_grid_of
from crcore._typing import Array, Role


@dataclass(frozen=True)
class PACT:
    """Parameterized clipping activation (Choi et al., 2018, arXiv 1805.06085, equations 1 to 3).

        scale = alpha / hi
        q = round(clip(x / scale, lo, hi)),   y = q * scale
        dy/dx     = 1 for 0 <= x <= alpha, else 0
        dy/dalpha = 1 for x > alpha, else 0
        initial alpha = max(|x|)

    The paper counts ``x = alpha`` as clipped; here the bounds count as inside, as in every quantizer of this library.
    Its weight decay on ``alpha`` is the user's to add. Signed inputs (the paper has none) are clipped to
    [-alpha, alpha] on the narrow grid, and ``dy/dalpha = -1`` below.

    Args:
        bits: 1 to 16.
        signed: None: signed if the data has negative values.

    Parameters: ``alpha``, > 0, learned, the clipping level.
    """

    bits: int
    signed: bool | None = None

    learned: ClassVar[bool] = True
    parameters: ClassVar[tuple[str, ...]] = ("alpha",)
    per_channel: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def grid(self) -> IntGrid:
        """The integers in use, symmetric where signed; needs ``signed`` to be known."""
        return symmetric_grid_of(self)

    def for_role(self, role: Role) -> Self:
        """Itself for activations; an error for weights."""
        if role == "weight":
            raise CRCoreError(
                "PACT quantizes activations, not weights; the paper pairs it with Recipe(weights=DoReFa(bits=...))"
            )
        return self

    def init(self, x: Array, *, axes: tuple[int, ...], xp: Any = np) -> tuple[Array, ...]:
        """``(alpha,)``, the largest magnitude in ``x``; 1 if that is zero."""
        alpha = xp.amax(xp.abs(x), axis=axes, keepdims=True)
        return (xp.where(alpha > 0.0, alpha, 1.0),)

    def affine(self, alpha: Array, *, xp: Any = np) -> tuple[Array, Array]:
        """``(alpha / hi, 0)``."""
        scale = xp.divide(positive(alpha, xp), self.grid.hi)
        return scale, xp.zeros_like(scale)

    def codes(self, x: Array, alpha: Array, *, xp: Any = np) -> Array:
        """``round(clip(x / scale, lo, hi))``."""
        return round_to(self.grid, xp.divide(x, self.affine(alpha, xp=xp)[0]), xp)

    def forward(self, x: Array, alpha: Array, *, xp: Any = np) -> Array:
        """``codes * scale``."""
        return self.codes(x, alpha, xp=xp) * self.affine(alpha, xp=xp)[0]

    def vjp(self, cotangent: Array, x: Array, alpha: Array, *, elements: float, xp: Any = np) -> tuple[Array, ...]:
        """``(dx, dalpha)``; the paper does not scale the gradient, so ``elements`` plays no part."""
        a = positive(alpha, xp)
        # Compared with alpha itself: alpha / scale need not be exactly hi in floating point.
        inside = (x <= a) & (x >= (-a if self.signed else 0.0))
        below = -cotangent if self.signed else 0.0
        dalpha = xp.where(inside, 0.0, xp.where(x > a, cotangent, below))
        return xp.where(inside, cotangent, 0.0), sum_to(alpha, dalpha, xp)
