"""The layers of the command's Keras networks that Keras does not have.

Import this before `keras.models.load_model` reads a `.keras` file of a network with such a layer.
"""

from typing import Any

import keras
from keras import layers


class _PaddedLikeTorch:
    """Mixed into a 3x3 convolution with stride 2: zeros on each side, where Keras' "same" pads the far side alone.

    Within the layer, because its input is quantized where it arrives: a `ZeroPadding2D` in front would have the zeros
    count in the first scale and in the scale's gradient, and QAT would take another course than on torch.
    """

    explicit_padding = ((1, 1), (1, 1))  # what crcore_keras.export_onnx has to know of `call`

    def call(self, inputs: Any, *args: Any) -> Any:
        """The convolution of the padded inputs."""
        padded = keras.ops.pad(inputs, ((0, 0), *self.explicit_padding, (0, 0)))
        return super().call(padded, *args)  # type: ignore[misc]

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Of the padded inputs."""
        n, height, width, channels = input_shape
        return super().compute_output_shape((n, height + 2, width + 2, channels))  # type: ignore[misc]


@keras.saving.register_keras_serializable("crcore")
class PaddedConv2D(_PaddedLikeTorch, layers.Conv2D):
    """A 3x3 convolution with the padding of torch's ``padding=1``, channels last."""


@keras.saving.register_keras_serializable("crcore")
class PaddedDepthwiseConv2D(_PaddedLikeTorch, layers.DepthwiseConv2D):
    """A 3x3 depthwise convolution with the padding of torch's ``padding=1``, channels last."""
