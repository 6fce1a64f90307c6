"""The networks that torch_step.py measures, and everything that quantizes them: crcore's kernels, and others.

All quantize weights per channel and inputs per tensor to 4 bits in the same layers, to 8 bits in the first and the last.
Where a library has no convolution to put in place (torchao, NNCF's and torch's quantizers), its quantizer is called on
the weight and the input of torch's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CRCORE = {"crcore": "auto"} | {f"crcore-{kernel}": kernel for kernel in ("core", "blocked", "cpp", "triton")}
OTHERS = ("detach", "function", "torch-learnable", "brevitas", "torchao", "nncf", "modelopt")
VARIANTS = ("float", *CRCORE, *OTHERS)
KINDS = (nn.Conv2d, nn.Linear)


class NotMeasured(Exception):
    """Why a variant cannot be measured here."""


# --- networks ---


def vit(hidden: int = 192, depth: int = 12, heads: int = 3, size: int = 32, patch: int = 4) -> nn.Module:
    """A vision transformer of `transformers`, from its configuration."""
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(nn.Module):
        """The logits alone."""

        def __init__(self) -> None:
            super().__init__()
            widths = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads}
            images = {"image_size": size, "patch_size": patch, "num_labels": 10, "num_hidden_layers": depth}
            self.vit = ViTForImageClassification(ViTConfig(**widths, **images))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.vit(x).logits
            return logits

    return Logits()


def network(name: str) -> nn.Module:
    """A network for 32x32 images and 10 classes; "resnet-N" has N blocks in each of its three stages."""
    from crcore.cli._models import MODELS, ResNet

    torch.manual_seed(0)
    if name in ("vit", "vit-small"):
        return vit() if name == "vit" else vit(16, 2, 2, patch=8)
    if name.startswith("resnet-"):
        return ResNet((16, 32, 64), int(name.removeprefix("resnet-")), num_classes=10, in_channels=3)
    return MODELS[name](num_classes=10, in_channels=3)


# --- what each layer gets ---


@dataclass(frozen=True)
class Layer:
    """One layer of the float network, as the quantizers need to know it."""

    name: str
    module: Any
    bits: int
    signed: bool  # whether its input has negative values
    mean: float  # of its input's magnitude


def layers_of(net: nn.Module, x: Tensor, first_last_bits: int = 8) -> list[Layer]:
    """The layers to quantize, in order, with what their inputs look like on the batch ``x``."""
    seen: dict[str, tuple[bool, float]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = bool((inputs[0] < 0).any()), float(inputs[0].abs().mean())

    modules = {name: module for name, module in net.named_modules() if isinstance(module, KINDS)}
    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    with torch.no_grad():
        copy.deepcopy(net)(x)  # with its hooks, and without moving the statistics of BatchNorm
    for handle in handles:
        handle.remove()
    ends = (next(iter(modules)), list(modules)[-1])
    return [
        Layer(name, module, first_last_bits if name in ends else 4, *seen[name]) for name, module in modules.items()
    ]


def grid(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class Quantized(nn.Module):
    """A layer whose weight and input go through quantizers."""

    def __init__(self, layer: Any, weight: nn.Module, inputs: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight_quantizer, self.input_quantizer = layer, weight, inputs

    @property
    def weight(self) -> Tensor:
        """The layer's own, whose dtype others ask for."""
        weight: Tensor = self.layer.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        out: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return out


def replaced(net: nn.Module, layers: list[Layer], make: Callable[[Layer], nn.Module]) -> nn.Module:
    """A copy of the network with other modules in place of its layers."""
    net = copy.deepcopy(net)
    for layer in layers:
        parent, _, own = layer.name.rpartition(".")
        made = make(layer).to(next(net.parameters()).device)
        setattr(net.get_submodule(parent), own, made)
    return net


# --- LSQ as it is usually written ---


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


# --- peers ---


def brevitas(layer: Layer) -> nn.Module:
    """Brevitas' layer: weight scales from the weights at each step, trained input scales from the first batches."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    old = layer.module
    options = {
        "bias": old.bias is not None,
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": layer.bits,
        "input_quant": Int8ActPerTensorFloat if layer.signed else Uint8ActPerTensorFloat,
        "input_bit_width": layer.bits,
        "input_collect_stats_steps": 1,  # by default its first 300 steps look for percentiles, and are slower
    }
    if isinstance(old, nn.Linear):
        new: Any = qnn.QuantLinear(old.in_features, old.out_features, **options)
    else:
        shape = {"stride": old.stride, "padding": old.padding, "groups": old.groups}
        new = qnn.QuantConv2d(old.in_channels, old.out_channels, old.kernel_size, **shape, **options)
    new.load_state_dict(old.state_dict(), strict=False)
    return new  # type: ignore[no-any-return]


class Rows(nn.Module):
    """A quantizer that takes matrices: a weight as one row per channel, a convolution's input as one row."""

    def __init__(self, quantizer: nn.Module, *, weight: bool) -> None:
        super().__init__()
        self.quantizer, self.weight = quantizer, weight

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        if not self.weight and x.ndim < 4:
            return self.quantizer(x)  # type: ignore[no-any-return]
        rows = self.quantizer(x.flatten(1) if self.weight else x.reshape(1, -1))
        return rows.reshape(x.shape)  # type: ignore[no-any-return]


def torchao(layer: Layer) -> nn.Module:
    """torchao's quantizers, as its QAT for Linear has them: scales from the data at each step, inputs asymmetric."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    dtype = torch.int8 if layer.bits == 8 else torch.int4
    weight = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True))
    inputs = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False))
    return Quantized(copy.deepcopy(layer.module), Rows(weight, weight=True), Rows(inputs, weight=False))


def nncf(layer: Layer) -> nn.Module:
    """NNCF's symmetric quantizers with trained scales, without its tracing of the network."""
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer

    def quantizer(signed: bool, scale: Tensor) -> nn.Module:
        mode = QuantizationScheme.SYMMETRIC
        made = SymmetricQuantizer(
            PTQuantizerSpec(layer.bits, mode, signed, False, False, tuple(scale.shape), logarithm_scale=False)
        )
        made.scale.data.copy_(scale)
        return made  # type: ignore[no-any-return]

    weight = layer.module.weight.detach()
    largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
    inputs = quantizer(layer.signed, torch.tensor([4 * layer.mean]))
    return Quantized(copy.deepcopy(layer.module), quantizer(True, largest), inputs)


def modelopt(net: nn.Module, layers: list[Layer], x: Tensor) -> nn.Module:
    """NVIDIA's Model Optimizer: ranges from the batch, then fixed."""
    import modelopt.torch.quantization as mtq

    chosen: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in layers:
        of_input = {"num_bits": layer.bits, "axis": None, "unsigned": not layer.signed}
        chosen.append({"quantizer_name": f"{layer.name}.weight_quantizer", "cfg": {"num_bits": layer.bits, "axis": 0}})
        chosen.append({"quantizer_name": f"{layer.name}.input_quantizer", "cfg": of_input})
    return mtq.quantize(  # type: ignore[no-any-return]
        copy.deepcopy(net), {"quant_cfg": chosen, "algorithm": "max"}, lambda model: model(x)
    )


# --- all of them ---


def crcore(net: nn.Module, kernel: str, skip: tuple[str, ...] = (), first_last_bits: int | None = 8) -> nn.Module:
    """`crcore_torch.prepare` with one of its kernels; where it has no such choice yet, only "auto" is there."""
    import crcore_torch as crt

    import crcore as cr

    device = next(net.parameters()).device.type
    if (kernel == "cpp" and device != "cpu") or (kernel == "triton" and device != "cuda"):
        raise NotMeasured(f"kernel {kernel!r} does not run on {device}")
    options: dict[str, Any] = {"kernel": kernel}
    if "kernel" not in inspect.signature(crt.prepare).parameters:
        if kernel != "auto":
            raise NotMeasured("this crcore_torch.prepare has no keyword 'kernel'")
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
        NotMeasured: it is not installed, or cannot do it.
    """
    try:
        made = _student(variant, net, x, first_last_bits).train()
        with torch.no_grad():
            made(x)  # the first batch sets scales
    except NotMeasured:
        raise
    except Exception as error:
        if variant in ("float", "crcore"):
            raise
        raise NotMeasured(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return made


def _student(variant: str, net: nn.Module, x: Tensor, first_last_bits: int) -> nn.Module:
    if variant == "float":
        return copy.deepcopy(net)
    if variant in CRCORE:
        return crcore(net, CRCORE[variant], first_last_bits=first_last_bits)
    layers = layers_of(net, x, first_last_bits)
    if variant == "modelopt":
        return modelopt(net, layers, x)
    makers: dict[str, Callable[[Layer], nn.Module]] = {
        "detach": partial(written, Detach),
        "function": partial(written, Function),
        "torch-learnable": partial(written, Learnable),
        "brevitas": brevitas,
        "torchao": torchao,
        "nncf": nncf,
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
