"""Keras 3 backend of crcore: quantization-aware training with consistency regularization through ``fit()``.

It runs on whatever engine Keras runs on: TensorFlow, JAX or torch.

model = crk.ConsistencyModel(crk.prepare(net, recipe), recipe, augment=augment)
model.compile(optimizer, loss, metrics)
model.fit(train, validation_data=test, callbacks=[crk.ConsistencyCallback(evaluate="teacher")])
crk.convert(model.teacher)                         # integers, scales, zero points
"""

from crcore_keras import _engine as _engine  # first, for its error  # isort: skip
from crcore_keras._batchnorm import reestimate_batchnorm as reestimate_batchnorm
from crcore_keras._callback import ConsistencyCallback as ConsistencyCallback
from crcore_keras._consistency_model import ConsistencyModel as ConsistencyModel
from crcore_keras._convert import convert as convert
from crcore_keras._export import export_litert as export_litert
from crcore_keras._export import export_onnx as export_onnx
from crcore_keras._export import verify as verify
from crcore_keras._fake_quantize import FakeQuantize as FakeQuantize
from crcore_keras._integers import IntegerWeight as IntegerWeight
from crcore_keras._landscape import Landscape as Landscape
from crcore_keras._load import load_model as load_model
from crcore_keras._meter import OscillationMeter as OscillationMeter
from crcore_keras._portable import load_portable as load_portable
from crcore_keras._portable import save_portable as save_portable
from crcore_keras._prepare import prepare as prepare
from crcore_keras._quantized import load_quantized as load_quantized
from crcore_keras._quantized import save_quantized as save_quantized

__all__ = [
    "ConsistencyCallback",
    "ConsistencyModel",
    "FakeQuantize",
    "IntegerWeight",
    "Landscape",
    "OscillationMeter",
    "convert",
    "export_litert",
    "export_onnx",
    "load_model",
    "load_portable",
    "load_quantized",
    "prepare",
    "reestimate_batchnorm",
    "save_portable",
    "save_quantized",
    "verify",
]
