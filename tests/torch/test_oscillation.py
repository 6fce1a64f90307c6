"""The meter, dampening and freezing in PyTorch: a toy where a weight is known to oscillate, and NumPy as the oracle."""

from __future__ import annotations

import copy
from typing import Any

import crcore_torch as crt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import WEIGHTS, assert_same_bits, convnet, images, mlp, sgd, snapshot, vectors
from torch import Tensor, nn

import crcore as cr

LEARNED = sorted(name for name, quantizer in WEIGHTS.items() if quantizer is not None and quantizer.learned)


def recipe(bits: int = 3, **options: Any) -> cr.Recipe:
    return cr.Recipe(cr.LSQ(bits, per_channel=True), cr.LSQ(bits), first_last_bits=None, **options)


def step(student: nn.Module, optimizer: Any, seed: int, loss: Any = None) -> None:
    x, y = images(8, seed=seed)
    value = F.cross_entropy(student(x), y)
    optimizer.zero_grad()
    (value if loss is None else value + loss).backward()
    optimizer.step()


def student_of(net: nn.Module | None = None, chosen: cr.Recipe | None = None) -> nn.Module:
    torch.manual_seed(0)
    student = crt.prepare(net or convnet(), chosen or recipe())
    if net is None:
        student(images()[0])  # the scales of activations
    return student


def weights_of(student: nn.Module) -> dict[str, tuple[Tensor, crt.FakeQuantize]]:
    return {
        name: (layer._parameters["weight"], layer.weight_quantizer)
        for name, layer in student.named_modules()
        if isinstance(getattr(layer, "weight_quantizer", None), crt.FakeQuantize)
    }


# The toy of section 2: one weight, a target between two integers


class Toy:
    """``loss = (target - quantized weight)^2 / 2`` on the grid of whole numbers, by gradient descent."""

    def __init__(self, *, target: float = 0.3, dampening: Any = None, freezing: Any = None, scale: bool = False):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, 0.45)
        self.student = crt.prepare(layer, cr.Recipe(cr.LSQ(3), None, first_last_bits=None))
        nn.init.ones_(self.student.weight_quantizer._parameters["scale"])
        self.latent, self.target = self.student._parameters["weight"], target
        trained = self.student.parameters() if scale else [self.latent]
        self.optimizer = torch.optim.SGD(trained, lr=0.02)
        self.dampening = None if dampening is None else crt.DampeningLoss(dampening)
        self.freezer = None if freezing is None else crt.Freezer(self.student, freezing)
        if self.freezer is not None:
            self.freezer.follow(self.optimizer)
        self.meter = crt.OscillationMeter(self.student)
        self.meter.follow(self.optimizer)
        self.steps = 0

    def run(self, steps: int) -> list[float]:
        codes = []
        for _ in range(steps):
            loss = 0.5 * (self.target - self.student.weight).square().sum()
            if self.dampening is not None:
                loss = loss + self.dampening(self.student, step=self.steps)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            codes.append(self.student.weight_quantizer.codes(self.latent).item())
        return codes


LATE = cr.Freezing(cr.cosine_ramp(0.01, steps=300, start=0.9))  # the average has settled by then


def test_a_weight_between_two_integers_oscillates_for_ever() -> None:
    toy = Toy()
    toy.run(500)
    toy.meter.reset()
    codes = toy.run(200)
    assert set(codes) == {0.0, 1.0}
    assert np.mean(codes) == pytest.approx(toy.target, abs=0.02)  # the gradients cancel on average
    assert toy.meter.total() == cr.OscillationRates(1, flipped=1.0, oscillating=1.0)


def test_dampening_ends_an_oscillation() -> None:
    toy = Toy(dampening=cr.Dampening(cr.cosine_ramp(1.0, steps=200)))
    assert set(toy.run(50)) == {0.0, 1.0}
    toy.run(250)
    toy.meter.reset()
    assert set(toy.run(200)) == {0.0}
    assert toy.meter.total() == cr.OscillationRates(1, flipped=0.0, oscillating=0.0)


@pytest.mark.parametrize(("target", "nearest"), [(0.3, 0.0), (0.8, 1.0)])
def test_freezing_ends_an_oscillation_at_the_nearer_integer(target: float, nearest: float) -> None:
    toy = Toy(target=target, freezing=LATE)
    assert set(toy.run(100)) == {0.0, 1.0}
    assert toy.freezer is not None
    assert toy.freezer.frozen == 0.0
    toy.run(300)
    toy.meter.reset()
    assert set(toy.run(100)) == {nearest}
    assert toy.freezer.frozen == 1.0
    assert toy.latent.item() == nearest
    assert toy.meter.total() == cr.OscillationRates(1, flipped=0.0, oscillating=0.0)


def test_a_frozen_integer_stays_while_the_scale_trains() -> None:
    toy = Toy(target=0.8, freezing=LATE, scale=True)
    toy.run(400)
    assert toy.freezer is not None
    assert toy.freezer.frozen == 1.0
    before = toy.student.weight_quantizer.scale.item()
    nn.init.constant_(toy.student.weight_quantizer._parameters["scale"], 2 * before)
    assert toy.run(1) == [1.0]
    assert toy.latent.item() == toy.student.weight_quantizer.scale.item() != before


# The meter


def test_the_meter_counts_what_a_loop_over_the_weights_counts() -> None:
    student = student_of()
    optimizer = sgd(student, lr=0.3)
    meter = crt.OscillationMeter(student)
    handle = meter.follow(optimizer)
    history: dict[str, list[Any]] = {name: [q.codes(w).numpy()] for name, (w, q) in weights_of(student).items()}
    for seed in range(12):
        step(student, optimizer, seed)
        for name, (weight, quantizer) in weights_of(student).items():
            history[name].append(quantizer.codes(weight).numpy())
    states = {}
    for name, codes in history.items():
        states[name] = cr.Oscillation.start(codes[0])
        for each in codes[1:]:
            states[name] = cr.oscillation_update(states[name], each)
        assert meter.layers()[name] == cr.OscillationRates.of(states[name])
        assert meter.layers()[name].flipped == np.mean(np.ptp(codes, axis=0) > 0)
    assert meter.total() == cr.OscillationRates.of(*states.values())
    assert 0.0 < meter.total().oscillating < meter.total().flipped < 1.0
    handle.remove()
    total = meter.total()
    step(student, optimizer, 99)
    assert meter.total() == total


@pytest.mark.parametrize("name", sorted(WEIGHTS.keys() - {"none"}))
def test_the_meter_reads_every_quantizer_and_changes_nothing(name: str) -> None:
    results = []
    for measured in (False, True):
        student = student_of(mlp(), cr.Recipe(WEIGHTS[name], None, first_last_bits=None))
        optimizer = sgd(student)
        if measured:
            crt.OscillationMeter(student).follow(optimizer)
        for seed in range(3):
            x, y = vectors(seed=seed)
            optimizer.zero_grad()
            F.cross_entropy(student(x), y).backward()
            optimizer.step()
        results.append(snapshot(student))
    assert_same_bits(*results)


def test_a_shared_weight_is_counted_once() -> None:
    net = mlp((4, 4, 4))
    net[2].weight = net[0].weight
    student = crt.prepare(net, cr.Recipe(cr.LSQ(4), None))
    assert crt.OscillationMeter(student).total().weights == 16
    assert list(crt.OscillationMeter(student).layers()) == ["0"]


# Dampening


@pytest.mark.parametrize("name", LEARNED)
def test_dampening_is_the_cores_term_and_its_gradient_is_the_closed_form(name: str) -> None:
    student = student_of(mlp(), cr.Recipe(WEIGHTS[name], None, first_last_bits=None))
    loss = crt.DampeningLoss(cr.Dampening(cr.linear_ramp(1.0, steps=4)))(student, step=2)
    loss.backward()
    expected = 0.0
    for weight, quantizer in weights_of(student).values():
        scale = quantizer.scale.detach().double()
        lo, hi = cr.code_limits(quantizer.quantizer)
        clipped = weight.detach().double().clamp(lo * scale, hi * scale)
        distance = clipped - quantizer(weight).detach().double()
        expected += distance.square().sum().item()
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.double(), 0.5 * 2 * distance, rtol=1e-5, atol=1e-6)
        assert all(parameter.grad is None for parameter in quantizer.parameters())
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_a_dampening_of_zero_is_plain_training_to_the_bit() -> None:
    results = []
    for loss in (None, crt.DampeningLoss(cr.Dampening(cr.linear_ramp(1.0, steps=5)))):
        student = student_of()
        step(student, sgd(student), 0, None if loss is None else loss(student, step=0))
        results.append(snapshot(student))
    assert_same_bits(*results)


def test_a_dampening_of_zero_makes_no_graph() -> None:
    loss = crt.DampeningLoss(cr.Dampening(cr.linear_ramp(1.0, steps=5)))
    student = student_of()
    assert not loss(student, step=0).requires_grad
    assert loss(student, step=1).requires_grad


def test_the_step_may_be_a_tensor() -> None:
    student = student_of()
    loss = crt.DampeningLoss(cr.Dampening(cr.cosine_ramp(1.0, steps=4)))
    torch.testing.assert_close(loss(student, step=torch.tensor(3)), loss(student, step=3))


# Freezing


def test_freezing_is_the_cores_to_the_bit() -> None:
    freezing = cr.Freezing(cr.linear_ramp(0.02, steps=8, start=0.1), momentum=0.2)
    student = student_of()
    freezer = crt.Freezer(student, freezing)
    optimizer = sgd(student, lr=0.3)
    before: dict[str, Any] = {}
    moved: dict[str, Any] = {}

    def look(*_: Any) -> None:  # between the step and the freezer
        moved.update({name: w.detach().numpy().copy() for name, (w, _) in weights_of(student).items()})

    states = {name: cr.FreezingState.start(q.codes(w).numpy()) for name, (w, q) in weights_of(student).items()}
    optimizer.register_step_post_hook(look)
    freezer.follow(optimizer)
    for seed in range(12):
        step(student, optimizer, seed)
        for name, (weight, quantizer) in weights_of(student).items():
            scale = quantizer.scale.detach().numpy()
            arguments = moved[name], quantizer.quantizer, scale
            states[name] = freezing.update(states[name], *arguments, step=np.float32(seed))
            np.testing.assert_array_equal(weight.detach(), freezing.apply(states[name], *arguments))
        before = before or snapshot(student)
    assert 0.0 < freezer.frozen < 1.0
    assert freezer.frozen == np.concatenate([state.frozen.ravel() for state in states.values()]).mean()
    assert freezer.step == 12


def test_a_frozen_weight_never_changes_its_integer_again() -> None:
    student = student_of()
    freezer = crt.Freezer(student, cr.Freezing(0.05, momentum=0.2))
    optimizer = sgd(student, lr=0.3)
    freezer.follow(optimizer)
    held: dict[str, tuple[Any, Any]] = {}
    for seed in range(15):
        step(student, optimizer, seed)
        for (name, (weight, quantizer)), state in zip(weights_of(student).items(), freezer.weights, strict=True):
            codes = quantizer.codes(weight)
            if name in held:
                mask, integers = held[name]
                assert state.frozen[mask].all()
                assert codes[mask].equal(integers)
            held[name] = state.frozen.clone(), codes[state.frozen]
    assert freezer.frozen > 0.05
    assert any(quantizer.scale.std() > 0 for _, quantizer in weights_of(student).values())


def test_a_freezer_resumes_to_the_bit() -> None:
    freezing = cr.Freezing(cr.cosine_ramp(0.02, steps=8, start=0.1), momentum=0.2)

    def made() -> tuple[nn.Module, crt.Freezer, Any]:
        student = student_of()
        freezer = crt.Freezer(student, freezing)
        optimizer = sgd(student, lr=0.3)
        freezer.follow(optimizer)
        return student, freezer, optimizer

    whole, first, second = made(), made(), made()
    for seed in range(10):
        step(whole[0], whole[2], seed)
    for seed in range(6):
        step(first[0], first[2], seed)
    for saved, loaded in zip(first, second, strict=True):
        loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for seed in range(6, 10):
        step(second[0], second[2], seed)
    assert 0.0 < whole[1].frozen < 1.0
    assert_same_bits(snapshot(second[0]), snapshot(whole[0]))
    assert_same_bits(snapshot(second[1]), snapshot(whole[1]))


def test_the_teacher_averages_frozen_weights() -> None:
    student = student_of()
    freezer, teacher = crt.Freezer(student, cr.Freezing(0.0, momentum=0.5)), crt.Teacher(student, cr.EMA(0.0))
    optimizer = sgd(student, lr=0.3)
    freezer.follow(optimizer)
    teacher.follow(optimizer)
    for seed in range(6):
        step(student, optimizer, seed)
    assert freezer.frozen > 0.0
    assert_same_bits(snapshot(teacher.model), snapshot(student))


def test_a_copy_follows_no_student() -> None:
    freezer = copy.deepcopy(crt.Freezer(student_of(), cr.Freezing(0.1)))
    assert freezer.frozen == 0.0
    with pytest.raises(cr.CRCoreError, match="this freezer is a copy and follows no student; make a Freezer"):
        freezer.update()


FLOAT = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crt.OscillationMeter(FLOAT), r"Linear has no quantized weight; give a student from prepare"),
        (lambda: crt.OscillationMeter("net"), r"a student from prepare\(model, recipe\) is needed, got str"),
        (lambda: crt.DampeningLoss(0.1), r"DampeningLoss takes a crcore.Dampening, got 0.1"),
        (lambda: crt.DampeningLoss(cr.Dampening(1.0))(FLOAT, step=0), "Linear has no quantized weight"),
        (lambda: crt.Freezer(FLOAT, cr.Freezing(0.1)), "Linear has no quantized weight"),
        (lambda: crt.Freezer(student_of(), 0.1), "Freezer takes a crcore.Freezing, got 0.1"),
        (
            lambda: crt.Freezer(crt.prepare(mlp(), cr.Recipe(cr.MinMax(4), None)), cr.Freezing(0.1)),
            "freezing holds weights to the grid of a learned scale, but MinMax",
        ),
        (
            lambda: crt.DampeningLoss(cr.Dampening(cr.cosine_ramp(1.0, steps=9)))(
                crt.prepare(mlp(), cr.Recipe(cr.DoReFa(4), None)), step=0
            ),
            "dampening holds weights to the grid of a learned scale, but DoReFa",
        ),
        (
            lambda: crt.OscillationMeter(student_of()).follow(torch.optim.SGD(FLOAT.parameters(), lr=0.1)),
            "with the student that this OscillationMeter was made of",
        ),
    ],
)
def test_what_is_refused_is_named(make: Any, message: str) -> None:
    with pytest.raises(cr.CRCoreError, match=message):
        make()
