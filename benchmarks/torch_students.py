"""Everything that torch_step.py measures: crcore's kernels, LSQ as others write it, and peers.

All quantize weights per channel and inputs per tensor to 4 bits in the same layers, to 8 in the first and the last.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch_peers as peers
from torch import Tensor, nn
from torch_layers import Layer, Quantized, grid, layers_of, replaced

CRCORE = {"crcore": "auto"} | {f"crcore-{kernel}": kernel for kernel in ("core", "blocked", "cpp", "triton")}
OTHERS = ("detach", "function", "torch-learnable", "brevitas", "torchao", "nncf", "modelopt")
VARIANTS = ("float", *CRCORE, *OTHERS)


class NotMeasuredError(Exception):
    """Why a variant cannot be measured here."""


class _LSQ(nn.Module):
    """Scale and grid of LSQ; Esser et al. (2020)."""

    def __init__(self, init: Tensor, lo: int, hi: int, elements: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(init * 2 / hi**0.5)
        self.lo, self.hi, self.g = lo, hi, (elements * hi) ** -0.5


def grad_scale(x: Tensor, factor: float) -> Tensor:
    """``x``, whose gradient is multiplied by ``factor``."""
    y = x * factor
    return (x - y).detach() + y


def round_pass(x: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return (x.round() - x).detach() + x


class Detach(_LSQ):
    """Straight through by detach, the pseudocode of the paper's appendix, as public implementations write it."""

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        scale = grad_scale(self.scale, self.g)
        return round_pass((x / scale).clamp(self.lo, self.hi)) * scale


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int, g: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.constants = lo, hi, g
        return (x / scale).clamp(lo, hi).round() * scale

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        lo, hi, g = ctx.constants
        v = x / scale
        inside = (v >= lo) & (v <= hi)
        dscale = torch.where(inside, v.round() - v, v.clamp(lo, hi)) * cotangent * g
        return cotangent * inside, dscale.sum_to_size(scale.shape), None, None, None


class Function(_LSQ):
    """An autograd.Function that saves x and scale and computes on whole tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        y: Tensor = _Function.apply(x, self.scale, self.lo, self.hi, self.g)
        return y


class Learnable(_LSQ):
    """torch's own operator with trained scale and zero point. Its gradient is not LSQ's."""

    def __init__(self, init: Tensor, lo: int, hi: int, elements: int) -> None:
        super().__init__(init.flatten(), lo, hi, elements)
        self.zero_point = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        arguments = (x, self.scale, self.zero_point)
        if self.scale.numel() == 1:
            return torch._fake_quantize_learnable_per_tensor_affine(*arguments, self.lo, self.hi, self.g)
        return torch._fake_quantize_learnable_per_channel_affine(*arguments, 0, self.lo, self.hi, self.g)


def written(kind: type[_LSQ], layer: Layer) -> nn.Module:
    """A layer with two of the quantizers above."""
    weight = layer.module.weight.detach()
    mean = weight.abs().mean(tuple(range(1, weight.ndim)), keepdim=True)
    return Quantized(
        copy.deepcopy(layer.module),
        kind(mean, *grid(layer.bits, True), weight[0].numel()),
        # LSQ counts the elements of one sample; what they are does not matter for the time
        kind(torch.tensor(layer.mean), *grid(layer.bits, layer.signed), weight[0].numel()),
    )


def crcore(net: nn.Module, kernel: str, skip: tuple[str, ...] = (), first_last_bits: int | None = 8) -> nn.Module:
    """`crcore_torch.prepare` with one of its kernels; where it has no such choice yet, only "auto" is there."""
    import crcore_torch as crt

    import crcore as cr

    device = next(net.parameters()).device.type
    if (kernel == "cpp" and device != "cpu") or (kernel == "triton" and device != "cuda"):
        raise NotMeasuredError(f"kernel {kernel!r} does not run on {device}")
    options: dict[str, Any] = {"kernel": kernel}
    if "kernel" not in inspect.signature(crt.prepare).parameters:
        if kernel != "auto":
            raise NotMeasuredError("this crcore_torch.prepare has no keyword 'kernel'")
        options = {}
    # Embeddings that a vision transformer's own code adds: nobody quantizes them
    own = tuple(
        name
        for name, value in net.named_parameters()
        if name.endswith(("position_embeddings", "cls_token")) and sum(size > 1 for size in value.shape) > 1
    )
    recipe = cr.Recipe(cr.LSQ(4, per_channel=True), cr.LSQ(4), skip=skip + own, first_last_bits=first_last_bits)
    return crt.prepare(net, recipe, **options)


def student(variant: str, net: nn.Module, x: Tensor, first_last_bits: int = 8) -> nn.Module:
    """The variant of a float network, in train mode; ``x`` is a batch for those that look at data first.

    Raises:
        NotMeasuredError: it is not installed, or cannot do it.
    """
    try:
        made = _student(variant, net, x, first_last_bits).train()
        with torch.no_grad():
            made(x)  # the first batch sets scales
    except NotMeasuredError:
        raise
    except Exception as error:
        if variant == "float":
            raise
        raise NotMeasuredError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return made


def _student(variant: str, net: nn.Module, x: Tensor, first_last_bits: int) -> nn.Module:
    if variant == "float":
        return copy.deepcopy(net)
    if variant in CRCORE:
        return crcore(net, CRCORE[variant], first_last_bits=first_last_bits)
    layers = layers_of(net, x, first_last_bits)
    if variant == "modelopt":
        return peers.modelopt(net, layers, x)
    makers: dict[str, Callable[[Layer], nn.Module]] = {
        "detach": partial(written, Detach),
        "function": partial(written, Function),
        "torch-learnable": partial(written, Learnable),
        "brevitas": peers.brevitas,
        "torchao": peers.torchao,
        "nncf": peers.nncf,
    }
    return replaced(net, layers, makers[variant])


def quantizer_of(variant: str, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The variant's input quantizer alone, at 4 bits, with its scale set from ``x`` ``[N, C, H, W]``."""
    net = nn.Sequential(nn.Conv2d(x.shape[1], 1, 1)).to(x.device)
    layer: Any = student(variant, net, x.float(), first_last_bits=4)[0]  # type: ignore[index]
    if variant != "brevitas":
        return layer.input_quantizer  # type: ignore[no-any-return]
    # a tuple, of which the first is the values
    return lambda x: layer.input_quant(x)[0]
