"""PyTorch as the array namespace of the core. The one file that renames array functions.

The core calls each function in one spelling; torch says ``dim`` and ``keepdim`` where the others say ``axis``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _amax(x: Tensor, axis: Any, keepdims: bool = False) -> Tensor:
    return torch.amax(x, dim=axis, keepdim=keepdims)


def _amin(x: Tensor, axis: Any, keepdims: bool = False) -> Tensor:
    return torch.amin(x, dim=axis, keepdim=keepdims)


def _sum(x: Tensor, axis: Any, keepdims: bool = False) -> Tensor:
    return torch.sum(x, dim=axis, keepdim=keepdims)


def _mean(x: Tensor, axis: Any, keepdims: bool = False) -> Tensor:
    return torch.mean(x, dim=axis, keepdim=keepdims)


def _divide(x: Tensor, y: Any) -> Tensor:
    # On CUDA, torch multiplies by the reciprocal of a number, which is another value for some of the quotients.
    return torch.divide(x, torch.full_like(x, y) if x.is_cuda and not isinstance(y, Tensor) else y)


xp = SimpleNamespace(
    abs=torch.abs,
    amax=_amax,
    amin=_amin,
    clip=torch.clamp,
    cos=torch.cos,
    divide=_divide,
    exp=torch.exp,
    log=torch.log,
    logaddexp=torch.logaddexp,
    mean=_mean,
    reshape=torch.reshape,
    round=torch.round,
    sqrt=torch.sqrt,
    sum=_sum,
    tanh=torch.tanh,
    where=torch.where,
    zeros_like=torch.zeros_like,
)
