"""`convert`: the deployable integer form of a trained student or teacher."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from crcore import CRCoreError, Quantizer, code_dtype, code_limits
from crcore_torch._fake_quantize import FakeQuantize
from crcore_torch._follow import unwrapped
from crcore_torch._layers import IntegerLayer, QuantizedLayer, mixed
from crcore_torch._teacher import Teacher

Model = TypeVar("Model", bound=nn.Module)


class IntegerWeight(nn.Module):
    """A weight as integers: ``weight = (codes - zero_point) * scale``.

    Attributes:
        codes: int8 where the grid fits, else uint8, int16 or int32; the shape of the weight. The values play no part in
            that choice, so that converted checkpoints load into each other.
        scale: float32 (float64 for float64 models), > 0; 0-d, or one per channel as broadcast against the weight.
        zero_point: int32, of the shape of ``scale``.
        quantizer: what the weight was trained with; ``bits`` is its width.
        limits: the lowest and the highest code that it can give.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, *, quantizer: Quantizer, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.limits = code_limits(quantizer)
        self.dtype = dtype  # of the weight
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @classmethod
    def of(cls, weight: Tensor, quantizer: FakeQuantize) -> IntegerWeight:
        """The integers of a float weight."""
        scale, zero_point = quantizer.affine(weight)
        codes = quantizer.codes(weight).to(getattr(torch, code_dtype(quantizer.quantizer)))
        return cls(codes, scale.detach().clone(), zero_point, quantizer=quantizer.quantizer, dtype=weight.dtype)

    @property
    def bits(self) -> int:
        """The width that was trained."""
        return self.quantizer.bits

    def forward(self) -> Tensor:
        """The weight, in the dtype that it had."""
        wide = self.codes.to(self.scale.dtype)
        return ((wide - self.zero_point) * self.scale).to(self.dtype)

    def extra_repr(self) -> str:
        """Width, shape and storage."""
        return f"bits={self.bits}, shape={tuple(self.codes.shape)}, dtype={self.codes.dtype}"


def convert(model: Model) -> Model:
    """The integer form of a prepared model: integer weights, and scales and zero points for weights and inputs.

    Each quantized layer gets ``integer_weight`` (an `IntegerWeight`) in place of its float weight; ``input_quantizer``
    stays, frozen, with ``scale``, ``zero_point`` and ``codes(x)``. The result computes exactly, bit for bit, what
    ``model.eval()`` computes; its ``state_dict`` holds the integers.

    Args:
        model: a model from `prepare`, trained, wrapped or not; or a `Teacher`, whose average is taken.

    Returns:
        a new module in eval mode, without gradients; ``model`` is left as it is.

    Raises:
        CRCoreError: nothing in ``model`` is quantized, a quantizer has not seen data yet, or it is a float teacher.

    >>> import crcore, torch
    >>> from crcore_torch import prepare
    >>> student = prepare(torch.nn.Sequential(torch.nn.Linear(4, 2)), crcore.Recipe(crcore.LSQ(bits=4), None))
    >>> convert(student)[0].integer_weight
    IntegerWeight(bits=8, shape=(2, 4), dtype=torch.int8)
    """
    if not isinstance(model, (nn.Module, Teacher)):
        raise CRCoreError(f"a model from prepare(...) is needed, got {type(model).__name__}")
    source = unwrapped(model.model if isinstance(model, Teacher) else model)
    quantizers = {name: module for name, module in source.named_modules() if isinstance(module, FakeQuantize)}
    if not any(isinstance(module, QuantizedLayer) for module in source.modules()):
        raise CRCoreError(f"{type(source).__name__} has no quantized layer; convert takes a model from prepare(...)")
    if not all(quantizer.enabled for quantizer in quantizers.values()):
        raise CRCoreError(
            "a float teacher, EMA(quantized=False), computes nothing that integers could reproduce; convert the student"
        )
    waiting = [name for name, quantizer in quantizers.items() if not quantizer.initialized]
    if waiting:
        raise CRCoreError(
            f"{waiting} have not seen data yet; run a batch in train mode, then convert. A layer that is never called, "
            "because the model uses its weight in a function of its own, belongs in Recipe(skip=...)"
        )
    converted = copy.deepcopy(source).eval().requires_grad_(False)
    shared: dict[tuple[int, int], IntegerWeight] = {}
    for layer in [module for module in converted.modules() if isinstance(module, QuantizedLayer)]:
        _to_integers(layer, shared)
    for module in converted.modules():
        if isinstance(module, FakeQuantize) and module.role == "activation":  # a weight's range is its own anyway
            module.freeze()
    return converted.eval()  # type: ignore[return-value]  # once more: the integers are new modules


def _to_integers(layer: QuantizedLayer, shared: dict[tuple[int, int], IntegerWeight]) -> None:
    """Replace the layer's float weight by its integers; layers that shared the weight share them."""
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, FakeQuantize):  # a float weight: only the input is quantized
        return
    assert isinstance(layer, nn.Module)
    weight = layer._parameters["weight"]
    key = id(weight), id(quantizer)
    if key not in shared:
        shared[key] = IntegerWeight.of(weight, quantizer)
    hold(layer, shared[key])


def hold(layer: QuantizedLayer, integers: IntegerWeight) -> None:
    """Put integers in the place of the float weight of a quantized layer."""
    assert isinstance(layer, nn.Module)
    kind = mixed(IntegerLayer, type(layer).__bases__[1])
    del layer.weight_quantizer
    del layer._parameters["weight"]
    layer.add_module("integer_weight", integers)
    layer.__class__ = kind
