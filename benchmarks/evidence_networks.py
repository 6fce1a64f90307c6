"""ResNet-8 with twice the channels, for `crcore --model evidence_networks:resnet8x2`: how much capacity matters."""

from torch import nn

from crcore.cli._models import ResNet


def resnet8x2(num_classes: int, in_channels: int) -> nn.Module:
    """The command's resnet8 with 32, 64 and 128 channels: about four times the parameters, 308 thousand."""
    return ResNet((32, 64, 128), 1, num_classes=num_classes, in_channels=in_channels)
