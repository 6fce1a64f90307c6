"""How a tensor and its scales lie in memory, for the kernels that walk through it once."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from crcore import LSQ


def is_dense(x: Tensor) -> bool:
    """Whether the elements lie in memory without gaps, in one of torch's layouts."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


Rows = tuple[int, int, int]
_SHORTEST_ROW = 8  # elements of a vector register; with shorter rows the core's formula is faster


def rows(x: Tensor, scale: Tensor) -> Rows | None:
    """``(outer, channels, inner)``: in memory order, element (o, c, i) has scale c; None if it has no such order."""
    if not is_dense(x) or scale.ndim != x.ndim:
        return None
    axes = [axis for axis, size in enumerate(scale.shape) if size > 1]
    if not axes:
        return 1, 1, x.numel()
    axis = axes[0]
    if len(axes) > 1 or scale.shape[axis] != x.shape[axis]:
        return None
    before, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    if not x.is_contiguous():  # but channels last
        before, inner = (1, x.numel() // x.shape[0]) if axis == 0 else (0, 0)
    return (before, x.shape[axis], inner) if inner >= _SHORTEST_ROW else None


@functools.cache
def limits(quantizer: LSQ) -> tuple[float, float, float, float]:
    """``(lo, hi, lowest scale, highest scale)``: a stored scale is used as clipped to the last two."""
    ends, _ = quantizer.affine(np.array([-np.inf, np.inf]))
    return float(quantizer.grid.lo), float(quantizer.grid.hi), float(ends[0]), float(ends[1])
