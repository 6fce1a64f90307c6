"""The networks that torch_step.py measures, and how quantizers are put around their layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = (nn.Conv2d, nn.Linear)  # what is quantized


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
    """A network for 32x32 images and 10 classes; "resnet-N" has N blocks in each stage, and "tiny" is for tests."""
    from crcore.cli._models import MODELS, ResNet

    torch.manual_seed(0)
    if name in ("vit", "vit-small"):
        return vit() if name == "vit" else vit(16, 2, 2, patch=8)
    if name.startswith("resnet-"):
        return ResNet((16, 32, 64), int(name.removeprefix("resnet-")), num_classes=10, in_channels=3)
    if name == "tiny":
        return ResNet((8,), 1, num_classes=10, in_channels=3)
    return MODELS[name](num_classes=10, in_channels=3)


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
        made: Any = make(layer).to(layer.module.weight.device)
        if layer.module.weight.ndim == 4 and not layer.module.weight.is_contiguous():
            made = made.to(memory_format=torch.channels_last)
        setattr(net.get_submodule(parent), own, made)
    return net
