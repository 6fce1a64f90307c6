"""Layers of other libraries in place of torch's, for torch_step.py.

Where a library has no convolution to put in place (torchao, and NNCF outside its tracing), its quantizer is called on
the weight and the input of torch's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch_layers import Layer, Quantized


def brevitas(layer: Layer) -> nn.Module:
    """Brevitas' layer: weight scales from the weights at each step, trained input scales from the first batches."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    old = layer.module
    options = {
        "bias": old.bias is not None,
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": layer.bits,
        "input_quant": Int8ActPerTensorFloat if layer.signed else Uint8ActPerTensorFloat,
        "input_bit_width": layer.bits,
        "input_collect_stats_steps": 1,  # by default its first 300 steps look for percentiles, and are slower
    }
    if isinstance(old, nn.Linear):
        new: Any = qnn.QuantLinear(old.in_features, old.out_features, **options)
    else:
        shape = {"stride": old.stride, "padding": old.padding, "groups": old.groups}
        new = qnn.QuantConv2d(old.in_channels, old.out_channels, old.kernel_size, **shape, **options)
    new.load_state_dict(old.state_dict(), strict=False)
    return new  # type: ignore[no-any-return]


class Rows(nn.Module):
    """A quantizer that takes matrices: a weight as one row per channel, a convolution's input as one row."""

    def __init__(self, quantizer: nn.Module, *, weight: bool) -> None:
        super().__init__()
        self.quantizer, self.weight = quantizer, weight

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        if not self.weight and x.ndim < 4:
            return self.quantizer(x)  # type: ignore[no-any-return]
        rows = self.quantizer(x.flatten(1) if self.weight else x.reshape(1, -1))
        return rows.reshape(x.shape)  # type: ignore[no-any-return]


def torchao(layer: Layer) -> nn.Module:
    """torchao's quantizers, as its QAT for Linear has them: scales from the data at each step, inputs asymmetric."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    dtype = torch.int8 if layer.bits == 8 else torch.int4
    weight = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True))
    inputs = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False))
    return Quantized(copy.deepcopy(layer.module), Rows(weight, weight=True), Rows(inputs, weight=False))


def nncf(layer: Layer) -> nn.Module:
    """NNCF's symmetric quantizers with trained scales, without its tracing of the network."""
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer

    def quantizer(signed: bool, scale: Tensor) -> nn.Module:
        mode = QuantizationScheme.SYMMETRIC
        made = SymmetricQuantizer(
            PTQuantizerSpec(layer.bits, mode, signed, False, False, tuple(scale.shape), logarithm_scale=False)
        )
        made.scale.data.copy_(scale)
        return made  # type: ignore[no-any-return]

    weight = layer.module.weight.detach()
    largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
    inputs = quantizer(layer.signed, torch.tensor([4 * layer.mean]))
    return Quantized(copy.deepcopy(layer.module), quantizer(True, largest), inputs)


def modelopt(net: nn.Module, layers: list[Layer], x: Tensor) -> nn.Module:
    """NVIDIA's Model Optimizer: ranges from the batch, then fixed; its gradient is one, also outside them."""
    import modelopt.torch.quantization as mtq

    chosen: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in layers:
        of_input = {"num_bits": layer.bits, "axis": None, "unsigned": not layer.signed}
        chosen.append({"quantizer_name": f"{layer.name}.weight_quantizer", "cfg": {"num_bits": layer.bits, "axis": 0}})
        chosen.append({"quantizer_name": f"{layer.name}.input_quantizer", "cfg": of_input})
    return mtq.quantize(  # type: ignore[no-any-return]
        copy.deepcopy(net), {"quant_cfg": chosen, "algorithm": "max"}, lambda model: model(x)
    )
