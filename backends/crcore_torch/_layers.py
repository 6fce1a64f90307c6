"""The layers that can be quantized: a quantized layer *is* the user's layer, its weight read through a quantizer.

``prepare`` gives the module's class a mixin in front (``Conv2d`` -> ``QuantizedConv2d``). The module keeps its
identity, its parameters and their names: float checkpoints, optimizers, hooks and ``isinstance`` work as before.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from crcore_torch._bind import quantized_again

# Which axis of the weight holds the output channels.
CHANNEL_AXIS: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
    nn.Embedding: 0,
}

# Layers with parameters that are not matrices to multiply with, whatever their number of axes.
FLOAT_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.PReLU,
)

# Layers of torch.nn that use their own and their children's parameters in ways a quantizer cannot reach.
OPAQUE_LAYERS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def channel_axis(layer: nn.Module) -> int | None:
    """The axis of the output channels in the layer's weight; None if the layer is of no known kind.

    A grouped transposed convolution holds ``out_channels / groups`` on that axis: one scale then serves the channels of
    all groups at that place.
    """
    return next((axis for kind, axis in CHANNEL_AXIS.items() if isinstance(layer, kind)), None)


class _InputQuantized:
    """What both mixins share: the input passes a quantizer, and the class can be made again."""

    if TYPE_CHECKING:
        _parameters: dict[str, Any]
        input_quantizer: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on its quantized input: the first argument, or the keyword ``input``."""
        if args:
            args = (self.input_quantizer(args[0]), *args[1:])
        elif kwargs:
            name = "input" if "input" in kwargs else next(iter(kwargs))  # subclasses name it as they like
            kwargs[name] = self.input_quantizer(kwargs[name])
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, type(self).__bases__, *reduced[2:]


class QuantizedLayer(_InputQuantized):
    """Mixed into a layer's class by `prepare`: quantizes its input and its weight.

    Attributes:
        weight_quantizer, input_quantizer: a `FakeQuantize`, or ``nn.Identity`` where the recipe leaves that in float.
    """

    if TYPE_CHECKING:
        weight_quantizer: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on its quantized input: the first argument, or the keyword ``input``."""
        with quantized_again() if self._is_torchs_own else nullcontext():
            return super().forward(*args, **kwargs)

    @property
    def _is_torchs_own(self) -> bool:
        # What a user's own code keeps, writes to or differentiates within a layer is not for us to meddle with.
        base: Any = type(self).__bases__[1]
        return str(base.forward.__module__).startswith("torch.nn.")

    @property
    def weight(self) -> Tensor:
        """The quantized weight; the float one stays in ``_parameters`` under its old name."""
        return self.weight_quantizer(self._parameters["weight"])


class IntegerLayer(_InputQuantized):
    """Mixed into a layer's class by `convert`: the weight is computed from integers.

    Attributes:
        integer_weight: an `IntegerWeight` with ``codes``, ``scale`` and ``zero_point``.
        input_quantizer: a frozen `FakeQuantize`, or ``nn.Identity``.
    """

    if TYPE_CHECKING:
        integer_weight: nn.Module

    @property
    def weight(self) -> Tensor:
        """``(codes - zero_point) * scale``."""
        return self.integer_weight()


@functools.cache
def mixed(mixin: type, base: type) -> type:
    """The class ``base`` with ``mixin`` in front; the same class for the same arguments."""
    name = mixin.__name__.removesuffix("Layer") + base.__name__
    return type(name, (mixin, base), {"__module__": base.__module__, "__doc__": mixin.__doc__})


def _new(mixin: type, base: type) -> nn.Module:
    kind: Any = mixed(mixin, base)
    return kind.__new__(kind)
