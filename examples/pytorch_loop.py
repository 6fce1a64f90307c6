"""Quantization-aware training with consistency regularization, in a plain PyTorch loop.

Trains a small 4-bit network on scikit-learn's handwritten digits with 400 labels, and prints the test accuracy of the
student and of its teacher. Needs `pip install crcore[cli] kornia`; takes seconds on a CPU.
"""

import crcore_torch as crt
import kornia.augmentation as K
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import crcore as cr

EPOCHS = 15

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0  # [N, 1, 8, 8], in [0, 1]
y = torch.tensor(digits.target)
order = torch.randperm(len(x))
train, test = order[:400], order[1000:]
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=50, shuffle=True)

net = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(128, 10),
)
augment = nn.Sequential(K.RandomCrop((8, 8), padding=1), K.RandomRotation(8.0))  # a new draw at every call

recipe = cr.Recipe(
    weights=cr.LSQ(bits=4, per_channel=True),
    activations=cr.LSQ(bits=4),
    consistency=cr.Consistency(cr.kl_divergence, weight=cr.sigmoid_ramp(1.0, steps=60)),
    ema=cr.EMA(decay=0.95, warmup=60),
)
student = crt.prepare(net, recipe)
teacher = crt.Teacher(student, recipe.ema)
consistency = crt.ConsistencyLoss(recipe.consistency)
optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
teacher.follow(optimizer)  # updates after every optimizer.step()
for _ in range(EPOCHS):
    for images, labels in loader:
        logits = student(augment(images))
        loss = F.cross_entropy(logits, labels)
        loss = loss + consistency(logits, teacher(augment(images)), step=teacher.step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

deployed = crt.convert(teacher)  # integers, scales, zero points
with torch.no_grad():
    for name, model in (("student", student.eval()), ("teacher", teacher), ("deployed", deployed)):
        accuracy = (model(x[test]).argmax(dim=1) == y[test]).float().mean().item()
        print(f"{name}: {100.0 * accuracy:.1f} % of the test images")
