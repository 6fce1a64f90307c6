"""LSQ in torch's own functions, in place, on blocks that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from crcore import LSQ
from crcore_torch._kernels._layout import is_dense
from crcore_torch._xp import xp

NAME = "blocked"
DTYPES = (torch.float32, torch.float64)
CHEAP_FORWARD = False

# Elements per block on a CPU: five float32 blocks of this size fit the second-level cache of one core. An accelerator
# gets one block, since each would be a kernel launch.
_BLOCK = 1 << 16


def why_not() -> str | None:
    """Nothing: torch has all that it needs."""
    return None


def runs_on(device: torch.device) -> bool:
    """Every device."""
    return True


def layout(x: Tensor, scale: Tensor) -> tuple[int, ...] | None:
    """Nothing to know of dense tensors."""
    return () if is_dense(x) else None


def forward(quantizer: LSQ, x: Tensor, scale: Tensor, layout: tuple[int, ...]) -> Tensor:
    """``quantizer.forward(x, scale)``, to the bit."""
    grid, used = quantizer.grid, _used(quantizer, scale)
    y = torch.empty_like(x)
    for out, block in zip(_blocks(y, scale), _blocks(x, scale), strict=True):
        torch.div(block, used, out=out).clamp_(grid.lo, grid.hi).round_().mul_(used)
    return y


def vjp(
    quantizer: LSQ, cotangent: Tensor, x: Tensor, scale: Tensor, layout: tuple[int, ...], *, elements: float
) -> tuple[Tensor, Tensor]:
    """``quantizer.vjp(cotangent, x, scale)``: dx to the bit, dscale up to the order of summation."""
    grid, used = quantizer.grid, _used(quantizer, scale)
    # hardtanh_backward keeps the gradient strictly inside its bounds; ours count as inside.
    below, above = _next_down(grid.lo, x.dtype), -_next_down(-grid.hi, x.dtype)
    axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
    dx, dscale = torch.empty_like(x), torch.zeros_like(scale)
    v, q, outside = (torch.empty_like(next(_blocks(x, scale))) for _ in range(3))
    for block, g, out in zip(_blocks(x, scale), _blocks(cotangent, scale), _blocks(dx, scale), strict=True):
        if block.shape != v.shape:  # the last block
            v, q, outside = (buffer[: block.numel()] for buffer in (v, q, outside))
        torch.div(block, used, out=v)
        torch.ops.aten.hardtanh_backward.grad_input(g, v, below, above, grad_input=out)
        torch.clamp(v, grid.lo, grid.hi, out=q).round_()
        torch.sub(q, v, out=v).mul_(out)  # inside: g * (q - v)
        torch.sub(g, out, out=outside)
        v.addcmul_(outside, q)  # outside: g * q
        dscale += v.sum(dim=axes, keepdim=True) if scale.numel() > 1 else v.sum()
    return dx, dscale.mul_((elements * grid.hi) ** -0.5)


def _used(quantizer: LSQ, scale: Tensor) -> Tensor:
    """The scale in use, shaped to broadcast against what `_blocks` yields."""
    used, _ = quantizer.affine(scale, xp=xp)
    return used if scale.numel() > 1 else used.reshape(())


def _blocks(tensor: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """The tensor in pieces: flat blocks in memory order for one scale, the whole for a scale per channel."""
    if scale.numel() > 1:
        return iter((tensor,))
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return iter(flat.split(_BLOCK) if tensor.is_cpu else (flat,))


def _next_down(value: int, dtype: torch.dtype) -> float:
    return float(torch.nextafter(torch.tensor(float(value), dtype=dtype), torch.tensor(-math.inf, dtype=dtype)))
