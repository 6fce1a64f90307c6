"""The networks of the comparison in their CIFAR form (torch), and the user's own as `module:function`.

Every convolution and non-linearity is a module of its own, so that `crcore_torch.prepare` sees all of them.
"""

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from crcore.cli._errors import CommandError, one_line


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias and its batch normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *conv_bn(outputs, outputs, 3))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.residual(x) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """He et al. (2016), section 4.2: a 3x3 stem without pooling, then stages that halve the size and widen."""

    def __init__(self, widths: tuple[int, ...], blocks: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(in_channels, widths[0], 3), nn.ReLU())
        layers: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(inputs, width, stride=2 if stage > 0 and block == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.flatten(self.pool(self.blocks(self.stem(x)))))
        return out


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with a shortcut where the shape stays (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*conv_bn(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        self.residual = nn.Sequential(
            *expand,
            *conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *conv_bn(hidden, outputs, 1),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x)
        return x + out if self.shortcut else out


class MobileNetV2(nn.Module):
    """MobileNetV2 for 32x32 images: the stem and the second stage keep the size, so the last map is 4x4."""

    # expansion, width, blocks, stride; ImageNet's form has stride 2 in the second row and in the stem
    stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(in_channels, 32, 3), nn.ReLU6())
        layers: list[nn.Module] = []
        inputs = 32
        for expansion, width, blocks, stride in self.stages:
            for block in range(blocks):
                layers.append(InvertedResidual(inputs, width, stride if block == 0 else 1, expansion))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Sequential(*conv_bn(inputs, 1280, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.flatten(self.pool(self.head(self.blocks(self.stem(x))))))
        return out


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(ResNet, (16, 32, 64), 1),
    "resnet20": partial(ResNet, (16, 32, 64), 3),
    "resnet18": partial(ResNet, (64, 128, 256, 512), 2),
    "mobilenetv2": MobileNetV2,
}


def build_model(name: str, *, num_classes: int, in_channels: int, size: tuple[int, int]) -> nn.Module:
    """Build a network by name and check that it maps images [N, C, H, W] to logits [N, num_classes]."""
    build = MODELS.get(name) or user_function(name)
    try:
        model = build(num_classes=num_classes, in_channels=in_channels)
    except Exception as error:
        raise CommandError(
            f"--model {name}: calling it with num_classes={num_classes}, in_channels={in_channels} "
            f"failed with {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {name} returned {type(model).__name__}; it must return a torch.nn.Module")
    try:
        with torch.inference_mode():
            logits = model.eval()(torch.zeros(2, in_channels, *size))
    except Exception as error:
        raise CommandError(
            f"--model {name} cannot take images of shape [2, {in_channels}, {size[0]}, {size[1]}]: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        raise CommandError(f"--model {name} must return logits of shape (2, {num_classes}) for two images, got {shape}")
    return model.train()


def user_function(name: str) -> Callable[..., nn.Module]:
    """Import the function behind `module:function`, looking in the current folder first as `python -m` does."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise CommandError(
            f"unknown model {name!r}; choose from {', '.join(MODELS)}, or name your own as module:function"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise CommandError(
            f"--model {name}: cannot import {function_name} from {module_name} ({type(error).__name__}: "
            f"{one_line(error)}); the module must be importable from the current folder"
        ) from error
    if not callable(function):
        raise CommandError(f"--model {name} is not callable; it must be a function that returns the network")
    return function  # type: ignore[no-any-return]
