"""LSQ in torch's own functions, in place, on blocks that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from crcore import LSQ
from crcore_torch._kernels._layout import Rows, rows
from crcore_torch._xp import xp

NAME = "blocked"
DTYPES = (torch.float32, torch.float64)
CHEAP_FORWARD = False
layout = rows

# Elements per block on a CPU: five float32 blocks of this size fit the second-level cache of one core. An accelerator
# gets one block, since each would be a kernel launch.
_BLOCK = 1 << 16


def why_not() -> str | None:
    """Nothing: torch has all that it needs."""
    return None


def runs_on(device: torch.device) -> bool:
    """Every device."""
    return True


def forward(quantizer: LSQ, x: Tensor, scale: Tensor, layout: Rows) -> Tensor:
    """``quantizer.forward(x, scale)``, to the bit."""
    grid, y = quantizer.grid, torch.empty_like(x)
    for step, out, block in _blocks(layout, _used(quantizer, scale), y, x):
        torch.div(block, step, out=out).clamp_(grid.lo, grid.hi).round_().mul_(step)
    return y


def vjp(
    quantizer: LSQ, cotangent: Tensor, x: Tensor, scale: Tensor, layout: Rows, *, elements: float
) -> tuple[Tensor, Tensor]:
    """``quantizer.vjp(cotangent, x, scale)``: dx to the bit, dscale up to the order of summation."""
    grid, dx = quantizer.grid, torch.empty_like(x)
    # hardtanh_backward keeps the gradient strictly inside its bounds; ours count as inside.
    below, above = _next_down(grid.lo, x.dtype), -_next_down(-grid.hi, x.dtype)
    sums, buffers = [], None
    for step, out, block, g in _blocks(layout, _used(quantizer, scale), dx, x, cotangent):
        if buffers is None or buffers[0].shape != block.shape:  # the first block, and a shorter last one
            buffers = tuple(torch.empty_like(block) for _ in range(3))
        v, q, outside = buffers
        torch.div(block, step, out=v).clamp_(grid.lo - 1.0, grid.hi + 1.0)  # infinity times zero would be NaN
        torch.ops.aten.hardtanh_backward.grad_input(g, v, below, above, grad_input=out)
        torch.clamp(v, grid.lo, grid.hi, out=q).round_()
        torch.sub(q, v, out=v).mul_(out)  # inside: g * (q - v)
        torch.sub(g, out, out=outside)
        v.addcmul_(outside, q)  # outside: g * q
        sums.append(v.sum(-1, keepdim=True))
    outer, channels, _ = layout
    total = torch.cat(sums).reshape(outer, channels, -1).sum((0, 2))
    return dx, total.mul_((elements * grid.hi) ** -0.5).reshape(scale.shape)


def _used(quantizer: LSQ, scale: Tensor) -> Tensor:
    """The scale in use."""
    return quantizer.affine(scale, xp=xp)[0]  # type: ignore[return-value]


def _blocks(layout: Rows, scale: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """``(scale, *tensors)`` in pieces: flat in memory order for one scale, whole rows for a scale per channel."""
    outer, channels, inner = layout
    if channels == 1:
        length, size = outer * inner, _BLOCK
        walked = [tensor.as_strided((length,), (1,)) for tensor in tensors]
    else:
        length, size = outer * channels, max(_BLOCK // inner, 1)
        walked = [tensor.as_strided((length, inner), (inner, 1)) for tensor in tensors]
    if not tensors[0].is_cpu:
        size = length
    pieces = zip(*(tensor.split(size) for tensor in walked), strict=True)
    if channels == 1:
        step = scale.reshape(())
        return ((step, *piece) for piece in pieces)
    steps = scale.reshape(1, -1, 1).expand(outer, -1, 1).reshape(-1, 1).split(size)
    return ((step, *piece) for step, piece in zip(steps, pieces, strict=True))


def _next_down(value: int, dtype: torch.dtype) -> float:
    return float(torch.nextafter(torch.tensor(float(value), dtype=dtype), torch.tensor(-math.inf, dtype=dtype)))
