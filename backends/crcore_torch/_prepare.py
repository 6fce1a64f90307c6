"""`prepare`: the user's model, with fake quantization in it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from crcore import CRCoreError, LayerQuantizers, Quantizer, Recipe
from crcore_torch._fake_quantize import FakeQuantize
from crcore_torch._kernels import check_kernel
from crcore_torch._layers import FLOAT_LAYERS, OPAQUE_LAYERS, QuantizedLayer, channel_axis, mixed

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, recipe: Recipe, *, inplace: bool = False, kernel: str = "auto") -> Model:
    """Insert the recipe's fake quantization into ``model``.

    Linear, Conv1-3d, ConvTranspose1-3d and Embedding layers, and subclasses of them, get a ``weight_quantizer`` and an
    ``input_quantizer`` (an Embedding's input is integers, so it has none). Names of parameters stay as they were: a
    float checkpoint loads with ``strict=False``. Weight scales are set here; input scales from the first batch in train
    mode. "First" and "last" layer are meant in the order of registration. Layers that share a weight share its
    quantizer.

    Args:
        model: any module. Moved, cast or loaded before or after, as you like.
        recipe: what is quantized how. ``consistency`` and ``ema`` play no part here.
        inplace: change ``model`` itself instead of a deep copy.
        kernel: what runs the quantizers, as in `FakeQuantize`.

    Returns:
        the prepared model, in the same train/eval mode.

    Raises:
        CRCoreError: the model has parameters that would silently stay in float (recurrent cells, MultiheadAttention,
            tensors used by functional code), is prepared already, or does not fit the recipe; or the kernel cannot run
            here. Nothing is changed then.

    >>> import crcore, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> student = prepare(net, crcore.Recipe(crcore.LSQ(bits=4), crcore.LSQ(bits=4), first_last_bits=None))
    >>> student[0].weight_quantizer.scale.shape, student[0].weight_quantizer.quantizer.bits
    (torch.Size([]), 4)
    """
    if not isinstance(model, nn.Module):
        raise CRCoreError(f"prepare takes a torch.nn.Module, got {type(model).__name__}; build the model first")
    if not isinstance(recipe, Recipe):
        raise CRCoreError(
            f"prepare takes a crcore.Recipe, got {type(recipe).__name__}; for example Recipe(LSQ(4), LSQ(4))"
        )
    check_kernel(kernel)
    plan = _plan(model, recipe)  # raises before anything is copied or changed
    if not inplace:
        model = copy.deepcopy(model)
    tied: dict[int, tuple[Quantizer, FakeQuantize]] = {}
    fitted = [
        (name, *_fit(name, model.get_submodule(name), quantizers, tied, kernel)) for name, quantizers in plan.items()
    ]
    attach(model, fitted)  # which cannot fail
    return model


def attach(model: nn.Module, fitted: Iterable[tuple[str, nn.Module, nn.Module]]) -> None:
    """Give layers of ``model``, by name, a weight quantizer and an input quantizer."""
    for name, weight_quantizer, input_quantizer in fitted:
        layer = model.get_submodule(name)
        layer.add_module("weight_quantizer", weight_quantizer)
        layer.add_module("input_quantizer", input_quantizer)
        kind: Any = type(layer)
        layer.__class__ = mixed(QuantizedLayer, kind)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(m, QuantizedLayer) for m in module.modules()
        ):
            # Its inference fast path hands raw weights to one fused kernel, past the input quantizers; this flag is
            # what that path is conditioned on.
            module.activation_relu_or_gelu = 0


def _plan(model: nn.Module, recipe: Recipe) -> dict[str, LayerQuantizers]:
    layers: list[str] = []
    others: list[str] = []
    problems: list[str] = []
    ways_out: list[str] = []
    for name, module in model.named_modules():
        shown = name or "the model itself"
        if isinstance(module, QuantizedLayer):
            raise CRCoreError(f"layer {shown!r} is prepared already; prepare the float model instead")
        if channel_axis(module) is not None:
            problem = _unfit(module)
            (others if problem else layers).append(name)
            if problem and not recipe.skips(name):
                problems.append(f"{shown!r} ({type(module).__name__}): {problem}")
                ways_out.append(name)
        elif isinstance(module, FLOAT_LAYERS):
            others.append(name)
        else:
            unseen = _unseen_matrices(name, module)
            others += [name, *unseen]
            unseen = {parameter: shape for parameter, shape in unseen.items() if not recipe.skips(parameter)}
            if unseen and isinstance(module, OPAQUE_LAYERS):
                problems.append(f"{shown!r} ({type(module).__name__}): a kind that prepare does not know")
                ways_out.append(name)
            elif unseen:
                listed = ", ".join(f"{parameter!r} {shape}" for parameter, shape in unseen.items())
                problems.append(
                    f"{listed} of {shown!r} ({type(module).__name__}): used by code that prepare cannot see"
                )
                ways_out += unseen
    plan = recipe.assign(layers, [name for name in others if name]) if layers or others else {}
    if problems:
        skip = ", ".join(map(repr, [*recipe.skip, *ways_out]))
        raise CRCoreError(
            "prepare cannot quantize\n  "
            + "\n  ".join(problems)
            + f"\nTo leave them in float, say so: Recipe(..., skip=({skip},)). To quantize a tensor that your own code "
            "multiplies with, apply a crcore_torch.FakeQuantize to it there, and skip it here."
        )
    if not layers:
        raise CRCoreError(
            f"{type(model).__name__} has no layer that prepare can quantize; it knows Linear, Conv1-3d, "
            "ConvTranspose1-3d, Embedding and their subclasses"
        )
    return {name: quantizers for name, quantizers in plan.items() if quantizers is not None}


def _unfit(layer: nn.Module) -> str | None:
    """Why a layer of a known kind cannot be quantized all the same."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm or another parametrization); remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet; run a batch through the lazy model first"
    if weight.is_meta:
        return "its weight has no values yet; load them, or move the model with to_empty(), first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites its weight in forward; use an Embedding without it"
    if getattr(layer, "sparse", False):
        return "sparse=True asks for gradients that a quantizer cannot give; use sparse=False"
    return None


def _unseen_matrices(name: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters that the module itself holds and that look like matrices, by full name."""
    return {
        f"{name}.{own}" if name else own: tuple(parameter.shape)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and sum(size > 1 for size in parameter.shape) >= 2
    }


def _fit(
    name: str,
    layer: nn.Module,
    quantizers: LayerQuantizers,
    tied: dict[int, tuple[Quantizer, FakeQuantize]],
    kernel: str,
) -> tuple[nn.Module, nn.Module]:
    """The layer's weight quantizer, initialized, and its input quantizer, which waits for data."""
    weight: torch.Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    options: dict[str, Any] = {
        "kernel": kernel,
        "device": weight.device,
        "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32,
    }
    input_quantizer: nn.Module = nn.Identity()
    if quantizers.activations is not None and not isinstance(layer, nn.Embedding):
        input_quantizer = FakeQuantize(quantizers.activations, **options)
        input_quantizer.name = f"{name}.input_quantizer".lstrip(".")
    if quantizers.weights is None:
        return nn.Identity(), input_quantizer
    if id(weight) in tied:
        agreed, shared = tied[id(weight)]
        if agreed != quantizers.weights:
            raise CRCoreError(
                f"layers {shared.name.rpartition('.')[0]!r} and {name!r} share one weight, which cannot be quantized "
                f"both by {agreed!r} and by {quantizers.weights!r}; give both the same one with Recipe(overrides=...)"
            )
        return shared, input_quantizer
    axis = channel_axis(layer)
    shape = tuple(size if i == axis else 1 for i, size in enumerate(weight.shape))
    per_channel = quantizers.weights.per_channel
    weight_quantizer = FakeQuantize(quantizers.weights, role="weight", shape=shape if per_channel else (), **options)
    weight_quantizer.name = f"{name}.weight_quantizer".lstrip(".")
    weight_quantizer.initialize(weight).train(layer.training)
    tied[id(weight)] = quantizers.weights, weight_quantizer
    return weight_quantizer, input_quantizer.train(layer.training)
