"""Layers as checkpoint files know them: the names of their tensors, their kinds and settings, their quantizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crcore import CRCoreError
from crcore_torch._fake_quantize import _UNKNOWN_SIGN, FakeQuantize
from crcore_torch._layers import IntegerLayer, QuantizedLayer, channel_axis

PLACES = ("weight_quantizer", "input_quantizer")
# What a layer is called in a file; other layers are of kind "other".
_KINDS: dict[Any, str] = {
    nn.Linear: "linear",
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): "conv",
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): "conv_transpose",
    nn.Embedding: "embedding",
    nn.modules.batchnorm._BatchNorm: "batch_norm",
    nn.modules.instancenorm._InstanceNorm: "instance_norm",
    nn.LayerNorm: "layer_norm",
    nn.GroupNorm: "group_norm",
    nn.RMSNorm: "rms_norm",
    nn.PReLU: "prelu",
}


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What must be the same in the file and the network."""
    if isinstance(module, FakeQuantize):  # one of the user's own, in code that prepare does not see
        return {"kind": "quantizer"}
    settings: dict[str, Any] = {"kind": next((kind for c, kind in _KINDS.items() if isinstance(module, c)), "other")}
    if settings["kind"].endswith("norm"):
        eps: Any = module.eps
        settings["eps"] = torch.finfo(torch.float32).eps if eps is None else eps  # None: what RMSNorm then takes
    if isinstance(module, nn.GroupNorm):
        settings["groups"] = module.num_groups
    return settings


def quantizers_of(module: nn.Module) -> dict[str, FakeQuantize]:
    """The quantizers of a layer by their place; one of the user's own is its own layer."""
    if isinstance(module, FakeQuantize):
        return {"weight_quantizer" if module.role == "weight" else "input_quantizer": module}
    if not isinstance(module, (QuantizedLayer, IntegerLayer)):
        return {}
    found = {place: getattr(module, place, None) for place in PLACES}
    return {place: each for place, each in found.items() if isinstance(each, FakeQuantize)}


def arrays_of(quantizers: Mapping[str, FakeQuantize]) -> dict[str, Tensor]:
    """The quantizers' arrays by their entry in a file."""
    return {
        f"{place}.{name}": array
        for place, quantizer in quantizers.items()
        for name, array in zip(quantizer.quantizer.parameters, quantizer._arrays(), strict=True)
    }


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and the saved buffers that a layer holds itself."""
    saved = {key: b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: each for key, each in {**module._parameters, **saved}.items() if each is not None}


def is_known_weight(entry: str, module: nn.Module) -> bool:
    """Whether it is a weight whose axes have the same meaning in every backend."""
    return entry == "weight" and channel_axis(module) is not None


def is_matrix(tensor: Tensor) -> bool:
    """Whether more than one of its axes counts."""
    return sum(size > 1 for size in tensor.shape) > 1


def flags_of(quantizer: FakeQuantize) -> dict[str, bool | None]:
    """What a quantizer has learned of its data."""
    signed = quantizer.quantizer.signed
    return {"initialized": bool(quantizer.initialized), "signed": signed, "frozen": bool(quantizer.frozen)}


def set_flags(quantizer: FakeQuantize, flags: Mapping[str, Any]) -> None:
    """The inverse of `flags_of`."""
    quantizer.initialized.fill_(flags["initialized"])
    quantizer.frozen.fill_(flags["frozen"])
    quantizer.signed.fill_(_UNKNOWN_SIGN if flags["signed"] is None else flags["signed"])
    quantizer._read_flags()


def check_tied(assigned: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """One tensor that stands in two layers must get one value; ``assigned``: entry, tensor, value."""
    seen: dict[int, tuple[str, Tensor]] = {}
    for entry, tensor, value in assigned:
        other, earlier = seen.setdefault(id(tensor), (entry, value))
        if not torch.equal(earlier, value):
            raise CRCoreError(
                f"{other!r} and {entry!r} are one tensor in this model and have different values in the file; untie "
                "them, or save a model in which they are tied"
            )
