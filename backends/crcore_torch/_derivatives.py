"""Derivatives of a network's loss by its weights, through autograd: beside `_bind`, the one file that touches it.

Where a second derivative is wanted, a quantizer's backward is the core's formula in torch's functions (`_kernels.vjp`):
differentiating twice gives the Hessian of the straight-through surrogate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient(loss: Tensor, weights: Sequence[Tensor], *, differentiable: bool = False) -> tuple[Tensor, ...]:
    """``d loss / d weights``; zeros where the loss does not depend on one."""
    if not loss.requires_grad:
        return tuple(map(torch.zeros_like, weights))
    return torch.autograd.grad(loss, weights, create_graph=differentiable, materialize_grads=True)


def product(
    gradient: Sequence[Tensor], weights: Sequence[Tensor], vector: Sequence[Tensor], *, keep_graph: bool
) -> tuple[Tensor, ...]:
    """The Hessian times ``vector``, from a differentiable `gradient`."""
    pairs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]  # not of what is linear
    if not pairs:
        return tuple(map(torch.zeros_like, weights))
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, weights, cotangents, retain_graph=keep_graph, materialize_grads=True)
