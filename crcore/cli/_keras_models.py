"""The networks of `_models.py` as Keras Functional models of images ``[N, H, W, C]``.

Layer for layer the same, with the same names: torch's ``blocks.0.residual.0`` is ``blocks_0_residual_0`` here, since
Keras on torch allows no dots. Padding and initial weights are torch's: see `keras_layers.py` and `_uniform`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import layers

from crcore.cli._errors import CommandError, one_line
from crcore.cli._models import user_function
from crcore.cli.keras_layers import PaddedConv2D, PaddedDepthwiseConv2D

Shape = tuple[int, int, int]  # height, width, channels


def _uniform(fan_in: int) -> Any:
    """The distribution of torch's default initial weights and biases (Keras' own default is Glorot's)."""
    limit = fan_in**-0.5
    return keras.initializers.RandomUniform(-limit, limit)


def _conv_bn(
    x: Any, name: str, index: int, filters: int, kernel: int, stride: int = 1, *, depthwise: bool = False
) -> Any:
    """A convolution without bias and its batch normalization, numbered from `index` as torch's Sequential does."""
    padded = kernel > 1 and stride > 1  # with stride 1, "same" is torch's padding
    common = {
        "strides": stride,
        "padding": "valid" if padded else "same",
        "use_bias": False,
        "data_format": "channels_last",
        "name": f"{name}_{index}",
    }
    if depthwise:
        kind = PaddedDepthwiseConv2D if padded else layers.DepthwiseConv2D
        x = kind(kernel, depthwise_initializer=_uniform(kernel**2), **common)(x)
    else:
        kind = PaddedConv2D if padded else layers.Conv2D
        x = kind(filters, kernel, kernel_initializer=_uniform(kernel**2 * x.shape[-1]), **common)(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_{index + 1}")(x)


def _classify(x: Any, num_classes: int) -> Any:
    x = layers.GlobalAveragePooling2D(data_format="channels_last", name="pool")(x)
    initial = _uniform(x.shape[-1])
    return layers.Dense(num_classes, kernel_initializer=initial, bias_initializer=initial, name="classifier")(x)


def _basic_block(x: Any, name: str, width: int, stride: int) -> Any:
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (option B)."""
    shortcut = x
    if stride > 1 or x.shape[-1] != width:
        shortcut = _conv_bn(x, f"{name}_shortcut", 0, width, 1, stride)
    x = _conv_bn(x, f"{name}_residual", 0, width, 3, stride)
    x = layers.ReLU(name=f"{name}_residual_2")(x)
    x = _conv_bn(x, f"{name}_residual", 3, width, 3)
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, shortcut]))


def resnet(widths: tuple[int, ...], blocks: int, *, num_classes: int, input_shape: Shape) -> Any:
    """He et al. (2016), section 4.2: a 3x3 stem without pooling, then stages that halve the size and widen."""
    image = keras.Input(input_shape, name="image")
    x = layers.ReLU(name="stem_2")(_conv_bn(image, "stem", 0, widths[0], 3))
    strides = [
        (width, 2 if stage > 0 and block == 0 else 1) for stage, width in enumerate(widths) for block in range(blocks)
    ]
    for number, (width, stride) in enumerate(strides):
        x = _basic_block(x, f"blocks_{number}", width, stride)
    return keras.Model(image, _classify(x, num_classes), name="resnet")


def _inverted_residual(x: Any, name: str, width: int, stride: int, expansion: int) -> Any:
    """Expand, filter each channel, project; with a shortcut where the shape stays (Sandler et al., 2018)."""
    inputs, hidden, residual = x, x.shape[-1] * expansion, f"{name}_residual"
    index = 0
    if expansion > 1:
        x = layers.ReLU(6.0, name=f"{residual}_2")(_conv_bn(x, residual, 0, hidden, 1))
        index = 3
    x = _conv_bn(x, residual, index, hidden, 3, stride, depthwise=True)
    x = layers.ReLU(6.0, name=f"{residual}_{index + 2}")(x)
    x = _conv_bn(x, residual, index + 3, width, 1)
    return layers.Add(name=f"{name}_add")([inputs, x]) if stride == 1 and inputs.shape[-1] == width else x


def mobilenetv2(*, num_classes: int, input_shape: Shape) -> Any:
    """MobileNetV2 for 32x32 images: the stem and the second stage keep the size, so the last map is 4x4."""
    from crcore.cli._models import MobileNetV2

    image = keras.Input(input_shape, name="image")
    x = layers.ReLU(6.0, name="stem_2")(_conv_bn(image, "stem", 0, 32, 3))
    rows = [
        (width, stride if block == 0 else 1, expansion)
        for expansion, width, blocks, stride in MobileNetV2.stages
        for block in range(blocks)
    ]
    for number, (width, stride, expansion) in enumerate(rows):
        x = _inverted_residual(x, f"blocks_{number}", width, stride, expansion)
    x = layers.ReLU(6.0, name="head_2")(_conv_bn(x, "head", 0, 1280, 1))
    return keras.Model(image, _classify(x, num_classes), name="mobilenetv2")


MODELS: dict[str, Callable[..., Any]] = {
    "resnet8": partial(resnet, (16, 32, 64), 1),
    "resnet20": partial(resnet, (16, 32, 64), 3),
    "resnet18": partial(resnet, (64, 128, 256, 512), 2),
    "mobilenetv2": mobilenetv2,
}


def build_model(name: str, *, num_classes: int, in_channels: int, size: tuple[int, int]) -> Any:
    """Build a network by name and check that it maps images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
    build = MODELS.get(name) or user_function(name)
    shape = (*size, in_channels)
    try:
        model = build(num_classes=num_classes, input_shape=shape)
    except Exception as error:
        raise CommandError(
            f"--model {name}: calling it with num_classes={num_classes}, input_shape={shape} "
            f"failed with {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(model, keras.Model):
        raise CommandError(f"--model {name} returned {type(model).__name__}; it must return a keras.Model")
    if name in MODELS:  # known to be right; on JAX a first call takes seconds
        return model
    if not model.built:
        raise CommandError(f"--model {name} has no weights yet; call model.build((None, {', '.join(map(str, shape))}))")
    try:
        logits = model.predict_on_batch(np.zeros((2, *shape), "float32"))
    except Exception as error:
        raise CommandError(
            f"--model {name} cannot take images of shape {[2, *shape]}: {type(error).__name__}: {one_line(error)}"
        ) from error
    found = tuple(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
    if found != (2, num_classes):
        raise CommandError(f"--model {name} must return logits of shape (2, {num_classes}) for two images, got {found}")
    if (logits > 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-5):
        raise CommandError(f"--model {name} returns probabilities; it must return logits: leave the softmax out")
    return model
