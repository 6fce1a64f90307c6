"""What the tests of the PyTorch backend share: small networks, a recipe, one training step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import crcore_torch as crt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crcore as cr

CONSISTENCY = cr.Consistency(cr.kl_divergence, weight=cr.linear_ramp(1.0, steps=4, start=0.25))
WEIGHTS = {
    "LSQ": cr.LSQ(4),
    "LSQ per channel": cr.LSQ(4, per_channel=True),
    "LSQ narrow 2 bits": cr.LSQ(2, per_channel=True, narrow=True),
    "LSQ 1 bit": cr.LSQ(1, per_channel=True),
    "LSQ unsigned 8 bits": cr.LSQ(8, signed=False),
    "LSQ 3 bits": cr.LSQ(3),
    "LSQ 16 bits": cr.LSQ(16),
    "DoReFa": cr.DoReFa(3),
    "DoReFa per channel": cr.DoReFa(4, per_channel=True),
    "DoReFa 8 bits": cr.DoReFa(8),
    "DoReFa 1 bit": cr.DoReFa(1),
    "MinMax": cr.MinMax(4),
    "MinMax per channel": cr.MinMax(4, per_channel=True),
    "MinMax affine": cr.MinMax(4, symmetric=False, per_channel=True),
    "MinMax affine unsigned": cr.MinMax(8, symmetric=False, signed=False),
    "none": None,
}
ACTIVATIONS = {
    "LSQ": cr.LSQ(4),
    "LSQPlus": cr.LSQPlus(4),
    "PACT": cr.PACT(4),
    "DoReFa": cr.DoReFa(4),
    "MinMax": cr.MinMax(4),
    "none": None,
}
PAIRS = [(weights, "LSQ") for weights in WEIGHTS] + [("LSQ per channel", name) for name in ACTIVATIONS]


def compiles(test: Any) -> Any:
    """Marks a test that runs torch.compile: these warnings are torch's own, from inside its tracer."""
    for ignored in (
        "ignore:.*should not be instantiated:DeprecationWarning",  # dynamo makes an instance of autograd.Function
        "ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning",  # inductor's own imports
        "ignore:.*torch.jit.script. is deprecated:DeprecationWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # dynamo looks at a frame's inputs
    ):
        test = pytest.mark.filterwarnings(ignored)(test)
    return test


def recipe(bits: int = 4, **options: Any) -> cr.Recipe:
    return cr.Recipe(cr.LSQ(bits, per_channel=True), cr.LSQ(bits), **options)


def mlp(sizes: tuple[int, ...] = (6, 8, 8, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(norm: bool = True) -> nn.Sequential:
    """Images ``[N, 3, 8, 8]`` to three classes; a strided, a grouped and a depthwise convolution."""
    normalise = nn.BatchNorm2d if norm else nn.Identity
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        normalise(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        normalise(8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def images(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def vectors(n: int = 5, seed: int = 0, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def train_step(student: nn.Module, teacher: Any, optimizer: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One step of the method, with a shifted second view; returns the loss."""
    x, y = batch
    logits = student(x)
    loss = F.cross_entropy(logits, y)
    if teacher is not None:
        loss = loss + crt.ConsistencyLoss(CONSISTENCY)(logits, teacher(x + 0.1), step=teacher.step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def sgd(student: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)


def trained(chosen: cr.Recipe, steps: int = 3) -> tuple[nn.Module, crt.Teacher]:
    """Student and teacher after some steps."""
    student = crt.prepare(convnet(), chosen)
    teacher = crt.Teacher(student, cr.EMA(0.5))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    for seed in range(steps):
        train_step(student, teacher, optimizer, images(seed=seed))
    return student, teacher


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    different = [name for name in left if left[name].dtype != right[name].dtype or not left[name].equal(right[name])]
    assert not different, different
