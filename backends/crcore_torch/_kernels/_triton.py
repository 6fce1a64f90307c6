"""LSQ in Triton, for CUDA devices: one launch for the forward, one for the gradient and one to add up its sums."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from crcore import LSQ
from crcore_torch._kernels._layout import Rows, limits, rows

NAME = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHEAP_FORWARD = True


def why_not() -> str | None:
    """What is not installed."""
    return None if importlib.util.find_spec("triton") else "it needs Triton; pip install triton"


def runs_on(device: torch.device) -> bool:
    """CUDA devices, those of ROCm included."""
    return device.type == "cuda"


def layout(x: Tensor, scale: Tensor) -> Rows | None:
    """Dense tensors whose channels lie in rows, as many blocks as a launch can count."""
    found = rows(x, scale)
    return found if found is not None and _launch(found)[0] < 2**31 else None


def forward(quantizer: LSQ, x: Tensor, scale: Tensor, layout: Rows) -> Tensor:
    """``quantizer.forward(x, scale)``, to the bit."""
    y = torch.empty_like(x)
    programs, sizes = _launch(layout)
    with torch.cuda.device_of(x):
        _functions().forward[(programs,)](x, scale.contiguous(), y, *limits(quantizer), *sizes)
    return y


def vjp(
    quantizer: LSQ, cotangent: Tensor, x: Tensor, scale: Tensor, layout: Rows, *, elements: float
) -> tuple[Tensor, Tensor]:
    """``quantizer.vjp(cotangent, x, scale)``: dx to the bit, dscale up to the order of summation."""
    dx = torch.empty_like(x)
    programs, sizes = _launch(layout)
    channels = sizes[0]
    sums = torch.empty(programs, device=x.device)
    grad_scale = (elements * quantizer.grid.hi) ** -0.5
    with torch.cuda.device_of(x):
        _functions().backward[(programs,)](
            x, cotangent, scale.contiguous(), dx, sums, *limits(quantizer), grad_scale, *sizes
        )
    if programs > channels:
        sums = sums.view(-1, channels, sizes[2]).sum((0, 2))
    return dx, sums.view(scale.shape)


def _functions() -> Any:
    """The compiled functions; importing them imports Triton."""
    from crcore_torch._kernels import _triton_lsq

    return _triton_lsq


def _launch(layout: Rows) -> tuple[int, tuple[int, int, int, int]]:
    """How many programs to launch, and ``(channels, inner, blocks per row, block)``."""
    outer, channels, inner = layout
    block = _block(inner)
    per_row = -(-inner // block)
    return outer * channels * per_row, (channels, inner, per_row, block)


def _block(inner: int) -> int:
    """Elements per program: a whole row, if it is short; of 1024 to 8192, measured on an H200, the fastest else."""
    return min(max(1 << (inner - 1).bit_length(), 128), 2048)
