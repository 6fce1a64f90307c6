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
            # Left at their initial values: a parameter that only the module's own code reads, prepare refuses.
            embeddings = self.vit.vit.embeddings
            positions = embeddings.position_embeddings.detach()
            del embeddings.position_embeddings
            embeddings.register_buffer("position_embeddings", positions)

        def forward(self, x: Any) -> Any:
            return self.vit(x).logits

    return Logits()


def keras_mobilenetv2(num_classes: int, input_shape: tuple[int, int, int]) -> Any:
    """`keras.applications.MobileNetV2`, for small images."""
    return _padded("MobileNetV2", num_classes, input_shape)


def keras_efficientnetb0(num_classes: int, input_shape: tuple[int, int, int]) -> Any:
    """`keras.applications.EfficientNetB0`, for small images."""
    return _padded("EfficientNetB0", num_classes, input_shape)


def _padded(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> Any:
    """The network, with zeros around the image up to the 32x32 pixels that it takes at least."""
    import keras

    image = keras.Input(input_shape)
    padded = keras.layers.ZeroPadding2D(max(0, -(-(32 - input_shape[0]) // 2)))(image)
    make = getattr(keras.applications, name)
    model = make(input_tensor=padded, weights=None, classes=num_classes, classifier_activation=None)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # statistics that follow within a thousand steps
    return model
