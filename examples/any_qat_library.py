"""Consistency regularization for a student that another library fake-quantized, here Brevitas.

The teacher needs nothing from crcore inside the student: any module with any fake quantizers will do, and the loop is
the same. Needs `pip install crcore[cli] brevitas`.
"""

import brevitas.nn as qnn
import crcore_torch as crt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import crcore as cr

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
order = torch.randperm(len(x))
train, test = order[:1297], order[1297:]

student = nn.Sequential(
    qnn.QuantIdentity(bit_width=4),
    qnn.QuantLinear(64, 64, bias=True, weight_bit_width=4),
    qnn.QuantReLU(bit_width=4),
    qnn.QuantLinear(64, 10, bias=True, weight_bit_width=4),
)
teacher = crt.Teacher(student, cr.EMA(decay=0.95, warmup=60))
consistency = crt.ConsistencyLoss(cr.Consistency(cr.kl_divergence, weight=cr.linear_ramp(1.0, steps=60)))
optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
teacher.follow(optimizer)


def augment(images):
    return (images + 0.1 * torch.randn_like(images)).clamp(0.0, 1.0)


for _ in range(8):
    for batch in train[torch.randperm(len(train))].split(64):
        logits = student(augment(x[batch]))
        loss = F.cross_entropy(logits, y[batch])
        loss = loss + consistency(logits, teacher(augment(x[batch])), step=teacher.step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

with torch.no_grad():
    for name, model in (("student", student.eval()), ("teacher", teacher)):
        accuracy = (model(x[test]).argmax(dim=1) == y[test]).float().mean().item()
        print(f"{name}: {100.0 * accuracy:.1f} % of the test images")
