"""The functions that Triton compiles. The formulas are those of crcore.LSQ, where they are explained.

The tensor is seen as [outer, channels, inner] in memory order, with one scale per channel. Each program takes a block
of one row; a program's sum has its own place, so that the result does not depend on which is done first.
"""

# mypy: ignore-errors
# Nor annotations of the future: Triton reads these functions as they stand.
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _block_of(scale, lowest_scale, highest_scale, channels, inner, per_row, block: tl.constexpr):
    """``(where the elements are, which of them exist, the scale in use)``."""
    program = tl.program_id(0)
    row = program // per_row
    column = (program % per_row).to(tl.int64) * block + tl.arange(0, block)
    step = tl.load(scale + row % channels)
    return row.to(tl.int64) * inner + column, column < inner, _within(step, lowest_scale, highest_scale)


@triton.jit
def _within(v, lo, hi):
    v = tl.where(v < lo, lo, v)  # NaN passes through, as it does in torch.clamp
    return tl.where(v > hi, hi, v)


@triton.jit
def _quotient(x, step, lo, hi):
    """``x / step`` to the bit where that is near the grid, and something beyond the grid elsewhere.

    From the reciprocal, with two corrections by the exact remainder (Markstein, "Computation of elementary functions on
    the IBM RISC System/6000 processor", 1990): fewer instructions than a division, and those are what half precision
    waits for.
    """
    inverse = tl.div_rn(1.0, step)
    x = _within(x, (lo - 1.0) * step, (hi + 1.0) * step)  # for what would overflow
    v = x * inverse
    v = tl.fma(tl.fma(-v, step, x), inverse, v)
    return tl.fma(tl.fma(-v, step, x), inverse, v)


@triton.jit
def forward(
    x, scale, y, lo, hi, lowest_scale, highest_scale, channels, inner, per_row, block: tl.constexpr
):  # fmt: skip
    """``round(clip(x / scale, lo, hi)) * scale``."""
    at, exists, step = _block_of(scale, lowest_scale, highest_scale, channels, inner, per_row, block)
    v = _quotient(tl.load(x + at, exists, other=0.0).to(tl.float32), step, lo, hi)
    tl.store(y + at, libdevice.rint(_within(v, lo, hi)) * step, exists)


@triton.jit
def backward(
    x, g, scale, dx, sums, lo, hi, lowest_scale, highest_scale, grad_scale, channels, inner, per_row,
    block: tl.constexpr,
):  # fmt: skip
    """``dx``, and each program's part of ``dscale``."""
    at, exists, step = _block_of(scale, lowest_scale, highest_scale, channels, inner, per_row, block)
    v = _quotient(tl.load(x + at, exists, other=0.0).to(tl.float32), step, lo, hi)
    upstream = tl.load(g + at, exists, other=0.0).to(tl.float32)
    q = libdevice.rint(_within(v, lo, hi))
    inside = (v >= lo) & (v <= hi)
    tl.store(dx + at, tl.where(inside, upstream, 0.0), exists)
    tl.store(sums + tl.program_id(0), tl.sum(upstream * tl.where(inside, q - v, q), 0) * grad_scale)
