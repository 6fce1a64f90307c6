"""What the quantizers share: rounding to a grid, the clip mask, sums over what shares a scale."""

from __future__ import annotations

from typing import Any

from crcore._errors import CRCoreError
from crcore._grid import IntGrid
from crcore._typing import Array

# A learned scale is used as clip(scale, MIN_SCALE, MAX_SCALE) with a straight-through gradient: it stays positive and
# finite without being written to, and a scale that an optimizer pushed below zero can still come back. Powers of two,
# so that every framework holds exactly these numbers.
MIN_SCALE, MAX_SCALE = 2.0**-40, 2.0**40


def check_fields(quantizer: Any) -> None:
    for name in ("per_channel", "signed", "narrow", "symmetric", "tanh"):
        value = getattr(quantizer, name, None)
        if value is not None and not isinstance(value, bool):
            raise CRCoreError(f"{name} must be True or False, got {value!r}")
    IntGrid(quantizer.bits, signed=bool(quantizer.signed), narrow=getattr(quantizer, "narrow", False))


def grid_of(quantizer: Any) -> IntGrid:
    return IntGrid(quantizer.bits, known_sign(quantizer), quantizer.narrow)


def symmetric_grid_of(quantizer: Any) -> IntGrid:
    signed = known_sign(quantizer)
    return IntGrid(quantizer.bits, signed, narrow=signed and quantizer.bits > 1)


def known_sign(quantizer: Any) -> bool:
    if quantizer.signed is None:
        name = type(quantizer).__name__
        raise CRCoreError(
            f"{name}(bits={quantizer.bits}) does not know yet whether its codes are signed; give signed=True or "
            "signed=False, or call for_role('weight')"
        )
    return bool(quantizer.signed)


def positive(scale: Array, xp: Any) -> Array:
    return xp.clip(scale, MIN_SCALE, MAX_SCALE)


def round_to(grid: IntGrid, v: Array, xp: Any) -> Array:
    if grid.binary:
        return xp.where(v >= 0.0, 1.0 + xp.zeros_like(v), -1.0)
    return xp.round(xp.clip(v, grid.lo, grid.hi))


def affine_codes(grid: IntGrid, x: Array, scale: Array, zero_point: Array, xp: Any) -> Array:
    if grid.binary:
        return round_to(grid, x, xp)
    # Rounded before the shift, as ONNX QuantizeLinear does: after it, ties would fall the other way at odd zero points.
    return xp.clip(xp.round(xp.divide(x, scale)) + zero_point, grid.lo, grid.hi)


def inside_grid(grid: IntGrid, v: Array, zero_point: Array) -> Array:
    return (v >= grid.lo - zero_point) & (v <= grid.hi - zero_point)


def scale_of_range(grid: IntGrid, low: Array, high: Array, xp: Any) -> tuple[Array, Array]:
    """``(scale, low)`` of a range that holds zero; [0, 1] if it is empty."""
    low, high = xp.where(low < 0.0, low, 0.0), xp.where(high > 0.0, high, 0.0)
    width = xp.where(high > low, high - low, 1.0)
    return positive(xp.divide(width, grid.hi - grid.lo), xp), low


def sum_to(parameter: Array, values: Array, xp: Any) -> Array:
    """``values`` summed over the axes that share one parameter."""
    axes = tuple(axis for axis, size in enumerate(parameter.shape) if size == 1)
    return xp.sum(values, axis=axes, keepdims=True) if axes else values


def max_to(parameter: Array, values: Array, xp: Any) -> Array:
    """The largest of ``values`` over the axes that share one parameter."""
    axes = tuple(axis for axis, size in enumerate(parameter.shape) if size == 1)
    return xp.amax(values, axis=axes, keepdims=True) if axes else values


def grad_scale(grid: IntGrid, elements: float) -> float:
    """LSQ's equation for the gradient scale, section 2.2."""
    return (elements * grid.hi) ** -0.5
