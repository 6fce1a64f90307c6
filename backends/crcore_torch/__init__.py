"""PyTorch backend of crcore: quantization-aware training with consistency regularization, in your own training loop.

student = crt.prepare(net, recipe)
teacher = crt.Teacher(student, recipe.ema)
consistency = crt.ConsistencyLoss(recipe.consistency)
optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
teacher.follow(optimizer)                          # updates after every optimizer.step()
for x, y in loader:
    logits = student(augment(x))
    loss = F.cross_entropy(logits, y) + consistency(logits, teacher(augment(x)), step=teacher.step)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
crt.convert(teacher)                               # integers, scales, zero points
"""

from crcore_torch._batchnorm import reestimate_batchnorm as reestimate_batchnorm
from crcore_torch._convert import IntegerWeight as IntegerWeight
from crcore_torch._convert import convert as convert
from crcore_torch._export import export_litert as export_litert
from crcore_torch._export import export_onnx as export_onnx
from crcore_torch._export import verify as verify
from crcore_torch._fake_quantize import FakeQuantize as FakeQuantize
from crcore_torch._landscape import Landscape as Landscape
from crcore_torch._loss import ConsistencyLoss as ConsistencyLoss
from crcore_torch._optim import parameter_groups as parameter_groups
from crcore_torch._oscillation import DampeningLoss as DampeningLoss
from crcore_torch._oscillation import Freezer as Freezer
from crcore_torch._oscillation import OscillationMeter as OscillationMeter
from crcore_torch._portable import load_portable as load_portable
from crcore_torch._portable import save_portable as save_portable
from crcore_torch._prepare import prepare as prepare
from crcore_torch._quantized import load_quantized as load_quantized
from crcore_torch._quantized import save_quantized as save_quantized
from crcore_torch._teacher import Teacher as Teacher

__all__ = [
    "ConsistencyLoss",
    "DampeningLoss",
    "FakeQuantize",
    "Freezer",
    "IntegerWeight",
    "Landscape",
    "OscillationMeter",
    "Teacher",
    "convert",
    "export_litert",
    "export_onnx",
    "load_portable",
    "load_quantized",
    "parameter_groups",
    "prepare",
    "reestimate_batchnorm",
    "save_portable",
    "save_quantized",
    "verify",
]
