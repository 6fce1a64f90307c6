"""Networks that other people wrote, in the form that `crcore train --model module:function` takes."""

from __future__ import annotations

from typing import Any


def vit(num_classes: int, in_channels: int) -> Any:
    """A vision transformer of `transformers`, for the digits' 8x8 pixels in patches of 2x2."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(torch.nn.Module):
        """The logits alone."""

        def __init__(self) -> None:
            super().__init__()
            size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
            images = {"image_size": 8, "patch_size": 2, "num_channels": in_channels, "num_labels": num_classes}
            self.vit = ViTForImageClassification(ViTConfig(**size, **images))

        def forward(self, x: Any) -> Any:
            return self.vit(x).logits

    return Logits()


def keras_mobilenetv2(num_classes: int, input_shape: tuple[int, int, int]) -> Any:
    """`keras.applications.MobileNetV2`, for images of 32x32 pixels or more."""
    import keras

    return _of_few_steps(
        keras.applications.MobileNetV2(input_shape, weights=None, classes=num_classes, classifier_activation=None)
    )


def keras_efficientnetb0(num_classes: int, input_shape: tuple[int, int, int]) -> Any:
    """`keras.applications.EfficientNetB0`, for images of 32x32 pixels or more."""
    import keras

    return _of_few_steps(
        keras.applications.EfficientNetB0(
            input_shape=input_shape, weights=None, classes=num_classes, classifier_activation=None
        )
    )


def _of_few_steps(model: Any) -> Any:
    """Running statistics that follow within a thousand steps, where the originals take a million."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    return model
