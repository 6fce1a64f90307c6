"""ResNet-8 at other widths, for `crcore --model evidence_networks:resnet8x2`: how much capacity matters."""

from torch import nn

from crcore.cli._models import ResNet


def _resnet8(factor: float, num_classes: int, in_channels: int) -> nn.Module:
    """The command's resnet8 with `factor` times as many channels: about `factor ** 2` times the parameters."""
    widths = tuple(round(factor * width) for width in (16, 32, 64))
    return ResNet(widths, 1, num_classes=num_classes, in_channels=in_channels)


def resnet8half(num_classes: int, in_channels: int) -> nn.Module:
    """8, 16 and 32 channels."""
    return _resnet8(0.5, num_classes, in_channels)


def resnet8x2(num_classes: int, in_channels: int) -> nn.Module:
    """32, 64 and 128 channels."""
    return _resnet8(2, num_classes, in_channels)


def resnet8x4(num_classes: int, in_channels: int) -> nn.Module:
    """64, 128 and 256 channels."""
    return _resnet8(4, num_classes, in_channels)
