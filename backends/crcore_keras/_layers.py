"""The layers that can be quantized: a quantized layer *is* the user's layer, its kernel read through a quantizer.

`prepare` gives the layer's class a mixin in front (``Conv2D`` -> ``QuantizedConv2D``). The layer keeps its identity,
its variables and its place in the graph. Each quantized layer's config holds the config of the float layer and the
quantizers, so that Keras saves, loads and clones it like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import keras
from keras import layers, ops

from crcore import LayerQuantizers
from crcore_keras._fake_quantize import FakeQuantize, decode, encode
from crcore_keras._integers import IntegerWeight
from crcore_keras._tree import children, walk

PACKAGE = "crcore"


@dataclass(frozen=True)
class Kernel:
    """One weight of a kind of layer, and the input that it is multiplied with.

    ``attribute``: by which the layer's ``call`` reads it; ``channels``: the axes of its output channels, a function of
    the layer; ``part``: what the recipe calls it where a layer has several.
    """

    attribute: str
    channels: Callable[[Any], tuple[int, ...]]
    part: str = ""

    @property
    def weight_quantizer(self) -> str:
        """The attribute of the layer that holds the quantizer of this weight."""
        return "pointwise_weight_quantizer" if self.part == "pointwise" else "weight_quantizer"

    @property
    def integer_weight(self) -> str:
        """The attribute of a converted layer that holds this weight as integers."""
        return "pointwise_integer_weight" if self.part == "pointwise" else "integer_weight"

    @property
    def input_quantizer(self) -> str:
        """The attribute of the layer that holds the quantizer of what this weight is multiplied with."""
        return "pointwise_input_quantizer" if self.part == "pointwise" else "input_quantizer"

    def variable(self, layer: Any) -> Any:
        """The float weight, a Keras Variable; None if the layer has none."""
        # Where the layer assigned `self.kernel`, the property of the mixin stands in front of it.
        stored = vars(layer)
        return stored.get(f"_{self.attribute}", stored.get(self.attribute))


def _last(layer: Any) -> tuple[int, ...]:
    return (-1,)


def _last_two(layer: Any) -> tuple[int, ...]:
    return (-2, -1)


def _not_contracted(layer: Any) -> tuple[int, ...]:
    """The axes of an EinsumDense kernel that are axes of the output."""
    inputs, output = layer.equation.replace("...", "").replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    return tuple(axis for axis, label in enumerate(kernel) if label in output)


_LAST = (Kernel("kernel", _last),)
_DEPTHWISE = (Kernel("kernel", _last_two),)
_TRANSPOSED = (Kernel("kernel", lambda layer: (-2,)),)
_SEPARABLE = (
    Kernel("depthwise_kernel", _last_two, "depthwise"),
    Kernel("pointwise_kernel", _last, "pointwise"),
)
KINDS: dict[type, tuple[Kernel, ...]] = {
    layers.Dense: _LAST,
    layers.EinsumDense: (Kernel("kernel", _not_contracted),),
    layers.Conv1D: _LAST,
    layers.Conv2D: _LAST,
    layers.Conv3D: _LAST,
    layers.Conv1DTranspose: _TRANSPOSED,
    layers.Conv2DTranspose: _TRANSPOSED,
    layers.Conv3DTranspose: _TRANSPOSED,
    layers.DepthwiseConv1D: _DEPTHWISE,
    layers.DepthwiseConv2D: _DEPTHWISE,
    layers.SeparableConv1D: _SEPARABLE,
    layers.SeparableConv2D: _SEPARABLE,
    layers.Embedding: (Kernel("embeddings", lambda layer: (0,)),),
}

# Layers with variables that are not matrices to multiply with, whatever their number of axes.
FLOAT_LAYERS = (
    layers.BatchNormalization,
    layers.LayerNormalization,
    layers.GroupNormalization,
    layers.RMSNormalization,
    layers.Normalization,
    layers.PReLU,
    FakeQuantize,
)

# Layers of Keras that read their own or their children's weights in ways a quantizer cannot reach.
OPAQUE_LAYERS = (layers.RNN, layers.ReversibleEmbedding, layers.SpectralNormalization)


def kernels_of(layer: Any) -> tuple[Kernel, ...]:
    """The weights of the layer that can be quantized; none if it is of no known kind."""
    return next((kernels for kind, kernels in KINDS.items() if isinstance(layer, kind)), ())


class _Described:
    """What both mixins share: the config of the float layer, and whether quantizers act."""

    if TYPE_CHECKING:
        name: str
        __class__: Any

    _root: ClassVar[type | None] = None
    _bypassed = False
    _converted = False  # whether kernels are integers
    _quantizers: Mapping[str, LayerQuantizers] = MappingProxyType({})

    def get_config(self) -> dict[str, Any]:
        """The config of the float layer, and the quantizers by their place in it."""
        with _in_float(self):
            config = keras.saving.serialize_keras_object(self)
        config.pop("compile_config", None)  # Keras saves it beside this config
        return {
            "name": self.name,
            "layer": config,
            "converted": self._converted,
            "quantizers": {place: encode(quantizers) for place, quantizers in self._quantizers.items()},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
        """The layer or model that `get_config` described, with fresh variables."""
        layer = keras.saving.deserialize_keras_object(config["layer"], custom_objects=custom_objects)
        plan = {place: decode(quantizers) for place, quantizers in config["quantizers"].items()}
        attach(layer, plan, cls._root)
        if config["converted"]:
            to_integers(layer)
        return layer

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes are those of the float layer; finding them needs no initialized quantizer."""
        with bypassed(self):
            return super().compute_output_spec(*args, **kwargs)  # type: ignore[misc]


@keras.saving.register_keras_serializable(PACKAGE)
class QuantizedLayer(_Described):
    """Mixed into a layer's class by `prepare`: quantizes its input and its kernel.

    Attributes:
        weight_quantizer, input_quantizer: a `FakeQuantize`, or None where the recipe leaves that in float. Separable
            convolutions have ``pointwise_weight_quantizer`` and ``pointwise_input_quantizer`` besides.
    """

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own call, on its quantized input."""
        return super().call(_quantized(self, "input_quantizer", inputs), *args, **kwargs)  # type: ignore[misc]

    def save_own_variables(self, store: Any) -> None:
        """Called by Keras: the float kernel, which some layers would read through the quantizer."""
        with _in_float(self):
            self.save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Called by Keras: the float kernel."""
        with _in_float(self):
            self.load_own_variables(store)


@keras.saving.register_keras_serializable(PACKAGE)
class IntegerLayer(QuantizedLayer):
    """Mixed into a layer's class by `convert`: the kernel is computed from integers.

    Attributes:
        integer_weight: an `IntegerWeight`, or None; separable convolutions have a ``pointwise_integer_weight`` besides.
        input_quantizer: a frozen `FakeQuantize`, or None.
    """

    def save_own_variables(self, store: Any) -> None:
        """Called by Keras: what is left in the layer itself; some layers would look for their kernel."""
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Called by Keras."""
        keras.layers.Layer.load_own_variables(self, store)


class _SeparableCall:
    """A separable convolution is two layers to an integer kernel: what lies between them is quantized too."""

    def call(self, inputs: Any) -> Any:
        """Depthwise, then pointwise."""
        layer: Any = self
        if layer._bypassed:
            return super().call(inputs)  # type: ignore[misc]
        between = ops.depthwise_conv(
            inputs,
            layer.depthwise_kernel,
            strides=layer.strides,
            padding=layer.padding,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
        )
        between = _quantized(layer, "pointwise_input_quantizer", between)
        outputs = ops.conv(between, layer.pointwise_kernel, padding="valid", data_format=layer.data_format)
        if layer.use_bias:
            channels_last = layer.data_format == "channels_last"
            shape = (1,) * (layer.rank + 1) + (-1,) if channels_last else (1, -1) + (1,) * layer.rank
            outputs = outputs + ops.reshape(layer.bias, shape)
        return outputs if layer.activation is None else layer.activation(outputs)


@keras.saving.register_keras_serializable(PACKAGE)
class QuantizedComposite(_Described):
    """Mixed into a layer or model that makes layers of its own: its config says which of them are quantized."""


def quantizers_in(layer: Any) -> list[FakeQuantize]:
    """Every `FakeQuantize` in a layer or model, each once."""
    return [each for each in layer._flatten_layers() if isinstance(each, FakeQuantize)]


@contextmanager
def bypassed(layer: Any) -> Iterator[None]:
    """Let a quantized layer, and those in it, compute in float."""
    with ExitStack() as restore:
        for each in layer._flatten_layers():
            if isinstance(each, _Described):
                restore.callback(setattr, each, "_bypassed", each._bypassed)
                each._bypassed = True
        yield


@contextmanager
def _in_float(layer: Any) -> Iterator[None]:
    """Let a quantized layer be of the user's class again."""
    quantized = layer.__class__
    try:
        layer.__class__ = base_class(layer)
        yield
    finally:
        layer.__class__ = quantized


def mix(layer: Any, mixin: type) -> None:
    """Put ``mixin`` in front of the user's class of the layer, in place of another one."""
    layer.__class__ = _mixed(mixin, base_class(layer))


def base_class(layer: Any) -> type:
    """The user's class of a layer."""
    return type(layer).__bases__[-1] if isinstance(layer, _Described) else type(layer)


@functools.cache
def _mixed(mixin: type, base: type) -> type:
    kernels: tuple[Kernel, ...] = ()
    if issubclass(mixin, QuantizedLayer):
        kernels = next((kernels for kind, kernels in KINDS.items() if issubclass(base, kind)), ())
    bases = (mixin, _SeparableCall, base) if kernels is _SEPARABLE else (mixin, base)
    properties = {kernel.attribute: property(functools.partial(_read, kernel=kernel)) for kernel in kernels}
    prefix = "Integer" if issubclass(mixin, IntegerLayer) else "Quantized"
    kind = type(f"{prefix}{base.__name__}", bases, {"__module__": __name__, "__doc__": mixin.__doc__} | properties)
    # All of them are saved by the name of the mixin, whose `from_config` makes them again.
    return keras.saving.register_keras_serializable(PACKAGE, mixin.__name__)(kind)  # type: ignore[no-any-return]


def attach(layer: Any, plan: Mapping[str, LayerQuantizers], mixin: type | None = None) -> None:
    """Give a built layer, or those in a model, the quantizers of ``plan``, whose keys are names as `walk` gives them.

    ``mixin``: what to put in front of the class of ``layer`` itself, where it is not a layer to quantize.
    """
    if not isinstance(layer, _Described):
        kernels = [(kernel, plan[kernel.part]) for kernel in kernels_of(layer) if kernel.part in plan]
        for kernel, quantizers in kernels:
            _attach_quantizers(layer, kernel, quantizers)
        for name, child in ({} if kernels else children(layer)).items():
            within = {place[len(name) + 1 :]: q for place, q in plan.items() if f"{place}.".startswith(f"{name}.")}
            if within:
                attach(child, within)
        describes = bool(kernels) or not _describes_children(layer)
        if kernels:
            mix(layer, QuantizedLayer)
        elif mixin is not None or not _describes_children(layer):
            mix(layer, mixin or QuantizedComposite)
        if describes:
            layer._quantizers = dict(plan)
        _track(layer)
        if mixin is not None:
            for name, each in walk(layer):
                if isinstance(each, FakeQuantize):
                    each.where = name


def _track(layer: Any) -> None:
    """Tell torch, on that engine, which variables a layer has now: ``parameters()``, ``zero_grad()``."""
    if hasattr(layer, "_track_variables"):
        layer._track_variables()


def _describes_children(layer: Any) -> bool:
    """Whether the layer's config holds those of its children, which then speak for themselves."""
    if not isinstance(layer, keras.Model):
        return False
    try:
        return isinstance(layer, keras.Sequential) or "input_layers" in layer.get_config()
    except NotImplementedError:  # a model that cannot be saved can still be prepared in place
        return False


def _attach_quantizers(layer: Any, kernel: Kernel, quantizers: LayerQuantizers) -> None:
    variable = kernel.variable(layer)
    variable._autocast = False  # quantizers see the float32 weight, also under mixed precision
    dtype = "float64" if layer.variable_dtype == "float64" else "float32"
    axes = {axis % len(variable.shape) for axis in kernel.channels(layer)}
    shape = tuple(size if axis in axes else 1 for axis, size in enumerate(variable.shape))
    made: dict[str, FakeQuantize | None] = {kernel.weight_quantizer: None, kernel.input_quantizer: None}
    with keras.name_scope(layer.name):
        if quantizers.weights is not None:
            made[kernel.weight_quantizer] = FakeQuantize(
                quantizers.weights,
                role="weight",
                shape=shape if quantizers.weights.per_channel else (),
                dtype=dtype,
                name=kernel.weight_quantizer,
            ).initialize(variable)
        if quantizers.activations is not None and not isinstance(layer, layers.Embedding):  # whose input is integers
            made[kernel.input_quantizer] = FakeQuantize(
                quantizers.activations, dtype=dtype, name=kernel.input_quantizer
            )
    layer._tracker.unlock()  # as Keras does for a layer that gets LoRA weights after it was built
    try:
        for name, quantizer in made.items():
            if quantizer is not None and not layer.trainable:
                quantizer.trainable = False
            setattr(layer, name, quantizer)
    finally:
        layer._tracker.lock()


def to_integers(model: Any) -> None:
    """Replace the kernels of a quantized layer, or of those in a model, by integers."""
    for layer in model._flatten_layers():
        if isinstance(layer, QuantizedLayer) and not isinstance(layer, IntegerLayer):
            _to_integers(layer)
        if isinstance(layer, _Described):
            layer._converted = True
    for layer in model._flatten_layers():
        _track(layer)


def _to_integers(layer: Any) -> None:
    layer._tracker.unlock()
    try:
        for kernel in kernels_of(layer):
            variable, quantizer = kernel.variable(layer), getattr(layer, kernel.weight_quantizer)
            integers = None if quantizer is None else IntegerWeight.of(variable, quantizer)
            setattr(layer, kernel.integer_weight, integers)
            if integers is not None:
                layer._tracker.untrack(quantizer)  # setting the attribute alone leaves its variables in the layer
                setattr(layer, kernel.weight_quantizer, None)
                layer._untrack_variable(variable)
                del vars(layer)[f"_{kernel.attribute}" if f"_{kernel.attribute}" in vars(layer) else kernel.attribute]
    finally:
        layer._tracker.lock()
    mix(layer, IntegerLayer)


def _read(layer: Any, *, kernel: Kernel) -> Any:
    """The kernel as ``call`` sees it."""
    integers = getattr(layer, kernel.integer_weight, None)
    found = (
        _quantized(layer, kernel.weight_quantizer, kernel.variable(layer)) if integers is None else integers.values()
    )
    return ops.cast(found, layer.compute_dtype)


def _quantized(layer: Any, quantizer: str, x: Any) -> Any:
    fake_quantize = getattr(layer, quantizer)
    if fake_quantize is None or layer._bypassed:
        return x
    # A variable is no positional argument of a layer.
    return fake_quantize(ops.copy(x) if hasattr(x, "assign") else x)
