"""A converted network as the graph that is exported: torch's own trace, with markers for what was trained."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crcore import CRCoreError
from crcore.deploy import DOMAIN, FAKE_QUANTIZE, INTEGER_WEIGHT, OPSET
from crcore_torch._convert import IntegerWeight
from crcore_torch._fake_quantize import FakeQuantize


def marker_graph(model: nn.Module, arguments: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> Any:
    """Trace a converted network.

    Args:
        model: from `convert`; left as it is.
        arguments, keywords: what the network takes, tensors ``[N, ...]``. Their first elements are traced; ``N`` stays
            free.

    Returns:
        an ``onnx.ModelProto``, see `crcore.deploy`.

    Raises:
        CRCoreError: the network cannot be traced; or what torch says of the operator that has no ONNX form.
    """
    marked = _marked(model)
    free = {0: torch.export.Dim.AUTO}
    shapes: Any = dict.fromkeys(keywords, free) if keywords else (free,) * len(arguments)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                marked,
                tuple(_two(tensor) for tensor in arguments),
                kwargs={name: _two(tensor) for name, tensor in keywords.items()},
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # torch's own kinds are many
        raise CRCoreError(
            f"{type(model).__name__} cannot be traced to ONNX: {_cause(error)}. It must run under torch.export with "
            "a batch of any size; a layer that cannot belongs outside of the exported module"
        ) from error
    assert program is not None
    return program.model_proto


class _MarkedQuantizer(nn.Module):
    """Stands where a `FakeQuantize` stood, and leaves its mark in the trace."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: FakeQuantize, layer: str) -> None:
        super().__init__()
        scale, zero_point = (value.detach().clone().reshape(()) for value in quantizer.affine())
        lowest, highest = quantizer.code_limits(torch.zeros(1, dtype=scale.dtype, device=scale.device))
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", zero_point)
        self.attributes: dict[str, Any] = {"lo": lowest, "hi": highest, "layer": layer}
        if (lowest, highest) == (-1, 1) and quantizer.quantizer.bits == 1:
            self.attributes["binary"] = 1

    def forward(self, x: Tensor) -> Tensor:
        """``x``, marked."""
        return _mark(FAKE_QUANTIZE, (x, self.scale, self.zero_point), self.attributes, x.shape)


class _MarkedWeight(nn.Module):
    """Stands where an `IntegerWeight` stood."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: IntegerWeight, layer: str) -> None:
        super().__init__()
        lowest, highest = weight.limits
        self.attributes: dict[str, Any] = {"lo": lowest, "hi": highest, "layer": layer}
        scale, zero_point = weight.scale.float(), weight.zero_point
        if scale.numel() > 1:
            self.attributes["axis"] = next(axis for axis, size in enumerate(scale.shape) if size > 1)
        flat = () if scale.numel() == 1 else (-1,)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", scale.reshape(flat))
        self.register_buffer("zero_point", zero_point.reshape(flat))

    def forward(self) -> Tensor:
        """The weight, marked."""
        return _mark(INTEGER_WEIGHT, (self.codes, self.scale, self.zero_point), self.attributes, self.codes.shape)


def _mark(kind: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(  # type: ignore[no-any-return]
        f"{DOMAIN}::{kind}", inputs, attributes, dtype=torch.float32, shape=shape, version=1
    )


def _marked(model: nn.Module) -> nn.Module:
    """A copy whose quantizers and integers are markers, by the names of the layers that they belong to."""
    marked = copy.deepcopy(model).cpu().float().eval()
    for name, module in list(marked.named_modules(remove_duplicate=False)):
        parent_name, _, own = name.rpartition(".")
        stand_in: nn.Module
        if isinstance(module, IntegerWeight):
            stand_in = _MarkedWeight(module, parent_name)
        elif isinstance(module, FakeQuantize) and module.role == "activation":
            stand_in = _MarkedQuantizer(module, parent_name if own == "input_quantizer" else name)
        else:
            continue
        setattr(marked.get_submodule(parent_name), own, stand_in)
    return marked


def _two(tensor: Tensor) -> Tensor:
    """Two elements of the batch: torch.export takes sizes of 0 and 1 for constants."""
    return as_float32(torch.cat([tensor, tensor])[:2])


def as_float32(tensor: Tensor) -> Tensor:
    """A tensor as the graph takes it: exported networks compute in float32, whatever they were trained in."""
    return (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).cpu()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of itself: deprecated calls of its own, packages that it can do without."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The first line that says something of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]
