"""`FakeQuantize`: when it takes its scale from data, what it keeps, and the gradient through the real module."""

from __future__ import annotations

import copy
import math

import crcore_torch as crt
import numpy as np
import pytest
import torch
from small_nets import assert_same_bits, convnet, images, mlp, recipe, sgd, snapshot, train_step, vectors
from torch import nn

import crcore as cr

ALL = {
    "LSQ": cr.LSQ(4),
    "LSQPlus": cr.LSQPlus(4),
    "PACT": cr.PACT(4),
    "DoReFa": cr.DoReFa(4),
    "MinMax": cr.MinMax(4),
}


# --- initialisation ---------------------------------------------------------------------------------------------------


def test_the_scale_is_set_from_the_first_batch_and_never_again():
    quantize = crt.FakeQuantize(cr.LSQ(4, signed=True))
    x = torch.randn(64)
    quantize(x)
    expected = 2.0 * x.abs().mean() / math.sqrt(7)
    torch.testing.assert_close(quantize.scale, expected)
    quantize(100.0 * x)
    torch.testing.assert_close(quantize.scale, expected)


@pytest.mark.parametrize("name", ALL)
def test_an_uninitialised_quantizer_in_eval_mode_says_what_to_do(name):
    student = crt.prepare(mlp(), cr.Recipe(None, ALL[name]))
    with pytest.raises(cr.CRCoreError, match=r"quantizer '0.input_quantizer' is not initialized.*model.train\(\)"):
        student.eval()(vectors()[0])
    assert not student[0].input_quantizer.initialized


@pytest.mark.parametrize("name", ALL)
def test_loading_never_initialises_again(name):
    weights = None if name == "PACT" else ALL[name]
    student = crt.prepare(mlp(), cr.Recipe(weights, ALL[name], first_last_bits=None))
    optimizer = sgd(student)
    for seed in range(3):
        train_step(student, None, optimizer, vectors(seed=seed))
    saved = copy.deepcopy(student.state_dict())
    fresh = crt.prepare(mlp(), cr.Recipe(weights, ALL[name], first_last_bits=None))
    fresh.load_state_dict(saved)
    assert_same_bits(saved, snapshot(fresh))
    assert fresh[2].input_quantizer.quantizer == student[2].input_quantizer.quantizer  # the sign that was detected
    x = 50.0 * vectors(seed=9)[0]
    assert torch.equal(fresh.eval()(x), student.eval()(x))
    fresh.train()(x)
    after = snapshot(fresh)
    if name == "MinMax":  # observes, and goes on observing: a tenth of the way, not all of it
        assert 1.0 < after["0.input_quantizer.high"] / saved["0.input_quantizer.high"] < 10.0
        return
    recomputed = {key for key in saved if key.endswith(".norm")}  # DoReFa's weights: a function of the weight
    assert_same_bits(*[{key: state[key] for key in saved.keys() - recomputed} for state in (saved, after)])


def test_evaluation_never_updates_an_observer():
    student = crt.prepare(convnet(), cr.Recipe(cr.MinMax(4), cr.MinMax(4)))
    student(images()[0])
    before = snapshot(student)
    student.eval()
    with torch.no_grad():
        student(100.0 * images(seed=3)[0])
    assert_same_bits(before, snapshot(student))
    student.train()(images(seed=3)[0])
    assert not torch.equal(before["0.input_quantizer.high"], student[0].input_quantizer.high)


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_asking_for_codes_in_train_mode_changes_nothing(role):
    quantize = crt.FakeQuantize(cr.MinMax(bits=4), role=role).initialize(torch.tensor([[-1.0, 1.0]]))
    before = snapshot(quantize)
    for _ in range(2):
        quantize.codes(torch.tensor([[-3.0, 5.0]]))
        quantize.code_limits(torch.tensor([[-3.0, 5.0]]))
        quantize.affine(torch.tensor([[-3.0, 5.0]]))
    assert_same_bits(snapshot(quantize), before)


def test_freezing_stops_the_observer_is_saved_and_can_be_undone():
    quantize = crt.FakeQuantize(cr.MinMax(4))
    x = torch.randn(32)
    quantize(x)
    high = quantize.high.clone()
    quantize.freeze()
    quantize(10.0 * x)
    assert torch.equal(quantize.high, high)
    loaded = crt.FakeQuantize(cr.MinMax(4))
    loaded.load_state_dict(quantize.state_dict())
    loaded(10.0 * x)
    assert torch.equal(loaded.high, high)
    loaded.freeze(False)
    loaded(10.0 * x)
    assert loaded.high > 1.5 * high


def test_a_frozen_weight_range_stays_while_the_weight_grows():
    student = crt.prepare(nn.Sequential(nn.Linear(4, 4)), cr.Recipe(cr.MinMax(4), None))
    quantizer = student[0].weight_quantizer.freeze()
    scale = quantizer.scale.clone()
    with torch.no_grad():
        student[0]._parameters["weight"].mul_(3.0)
    assert student[0].weight.abs().max() <= scale * 128
    assert torch.equal(quantizer.scale, scale)
    quantizer.freeze(False)
    assert student[0].weight.abs().max() > scale * 130


@pytest.mark.parametrize("name", ["LSQ", "PACT", "DoReFa"])
@pytest.mark.parametrize(("activation", "signed"), [(nn.ReLU(), False), (nn.GELU(), True), (nn.Hardswish(), True)])
def test_signedness_is_detected_and_saved(name, activation, signed):
    net = nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3))
    student = crt.prepare(net, cr.Recipe(None, ALL[name], first_last_bits=None))
    student(vectors(32)[0])
    assert student[0].input_quantizer.quantizer.signed is True  # a network's input
    assert student[2].input_quantizer.quantizer.signed is signed
    fresh = crt.prepare(net, cr.Recipe(None, ALL[name], first_last_bits=None))
    fresh.load_state_dict(student.state_dict())
    assert fresh[2].input_quantizer.quantizer.signed is signed
    lowest = fresh[2].input_quantizer.eval().codes(torch.tensor([-1e3])).item()
    assert (lowest < 0) is signed


def test_a_given_sign_is_not_detected():
    quantize = crt.FakeQuantize(cr.LSQ(4, signed=True))
    quantize(torch.rand(9))
    assert quantize.quantizer.signed is True


def test_a_constant_zero_first_batch_gives_a_usable_scale():
    for name, quantizer in ALL.items():
        quantize = crt.FakeQuantize(quantizer)
        assert torch.equal(quantize(torch.zeros(2, 3)), torch.zeros(2, 3)), name
        assert quantize(torch.rand(2, 3)).isfinite().all(), name


def test_a_per_channel_quantizer_asks_for_its_shape():
    with pytest.raises(cr.CRCoreError, match="needs the shape of its scales"):
        crt.FakeQuantize(cr.LSQ(4, per_channel=True), role="weight")


def test_it_serves_tensors_that_prepare_cannot_see():
    quantize = crt.FakeQuantize(cr.LSQ(2, per_channel=True), role="weight", shape=(3, 1))
    table = nn.Parameter(torch.randn(3, 5))
    out = quantize(table)
    assert all(len(set(row.tolist())) <= 4 for row in out)
    out.sum().backward()
    assert table.grad is not None
    assert quantize._parameters["scale"].grad.shape == (3, 1)


# --- scales stay usable -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSQ", "LSQPlus", "PACT"])
def test_a_scale_that_was_pushed_below_zero_still_acts_positive_and_recovers(name):
    quantize = crt.FakeQuantize(ALL[name])
    x = torch.rand(256)
    quantize(x)
    stored = next(iter(quantize.parameters()))
    with torch.no_grad():
        stored.fill_(-0.05)
    assert quantize.scale > 0
    assert quantize(x).isfinite().all()
    optimizer = torch.optim.Adam([stored], lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (quantize(x) - x).square().mean().backward()
        optimizer.step()
    assert stored > 0.01
    assert (quantize(x) - x).square().mean() < 0.01


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_autocast_leaves_the_arithmetic_in_float32(name, dtype):
    x = torch.randn(4, 33) * 3
    reference = crt.FakeQuantize(ALL[name])
    expected = reference(x)
    quantize = crt.FakeQuantize(ALL[name])
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(quantize(x), expected)
        half = quantize(x.to(dtype))
    assert half.dtype == dtype
    assert torch.equal(half, reference.eval()(x.to(dtype).float()).to(dtype)) or name == "MinMax"
    assert quantize.scale.dtype == torch.float32


def test_autocast_quantizes_the_weight_in_float32():
    student = crt.prepare(mlp(), recipe())
    expected = student[2].weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(student[2].weight, expected)
        out = student(vectors()[0])
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_input(dtype):
    for quantizer in ALL.values():
        assert crt.FakeQuantize(quantizer)(torch.randn(3, 4, dtype=dtype)).dtype == dtype


# --- the gradient through the module ---------------------------------------------------------------------------------


def dscale(x: np.ndarray, scale: float, lo: int, hi: int, cotangent: np.ndarray) -> np.ndarray:
    """LSQ's equation 3, before the sum."""
    v = x / scale
    inside = (v >= lo) & (v <= hi)
    return cotangent * np.where(inside, np.round(v) - v, np.clip(v, lo, hi))


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_weights_scale_has_the_gradient_of_the_paper(per_channel):
    """grad_scale = 1 / sqrt(n * hi), n the weights that share the scale."""
    student = crt.prepare(
        nn.Sequential(nn.Conv2d(3, 4, 3)), cr.Recipe(cr.LSQ(3, per_channel=per_channel), None, first_last_bits=None)
    ).double()
    layer, x = student[0], torch.randn(2, 3, 6, 6, dtype=torch.float64)
    cotangent = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    layer(x).backward(cotangent)
    weight = layer._parameters["weight"].detach().clone()
    free = layer.weight.detach().clone().requires_grad_()
    nn.functional.conv2d(x, free, layer.bias.detach()).backward(cotangent)
    scale = layer.weight_quantizer.scale.detach().numpy()
    values = dscale(weight.numpy(), scale, -4, 3, free.grad.numpy())
    n = 27 if per_channel else 108
    summed = values.sum(axis=(1, 2, 3), keepdims=True) if per_channel else values.sum()
    np.testing.assert_allclose(layer.weight_quantizer._parameters["scale"].grad.numpy(), summed / math.sqrt(n * 3))


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 4, 4)])
def test_an_activations_scale_counts_the_features_of_one_sample(batch, shape):
    quantize = crt.FakeQuantize(cr.LSQ(3, signed=True)).double()
    quantize.initialize(torch.randn(64, dtype=torch.float64))
    x = torch.randn(batch, *shape, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    quantize(x).backward(cotangent)
    summed = dscale(x.numpy(), quantize.scale.item(), -4, 3, cotangent.numpy()).sum()
    expected = summed / math.sqrt(math.prod(shape) * 3)
    np.testing.assert_allclose(quantize._parameters["scale"].grad.item(), expected, rtol=1e-10)


def test_repeating_the_batch_repeats_the_gradient_of_an_activations_scale():
    """With a mean loss the scale's gradient does not depend on the batch size."""
    student = crt.prepare(mlp(), recipe())
    x, y = vectors(4)
    gradients = []
    for times in (1, 8):
        student(x)
        student.zero_grad()
        nn.functional.cross_entropy(student(x.repeat(times, 1)), y.repeat(times)).backward()
        gradients.append(student[2].input_quantizer._parameters["scale"].grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.full((2, 4), torch.nan), torch.tensor([[1.0, torch.inf]])])
def test_no_scale_is_taken_from_nothing_or_from_infinity(x):
    quantize = crt.FakeQuantize(cr.LSQ(4))
    with pytest.raises(cr.CRCoreError, match="cannot take its scale"):
        quantize(x)
    assert not quantize.initialized


def test_a_saved_sign_that_contradicts_the_quantizer_is_refused():
    saved = crt.FakeQuantize(cr.LSQ(2)).initialize(torch.randn(8, 4)).state_dict()
    with pytest.raises(RuntimeError, match="another than"):
        crt.FakeQuantize(cr.LSQ(2, signed=False)).load_state_dict(saved)


def test_loading_an_uninitialized_state_forgets_the_sign():
    quantize = crt.FakeQuantize(cr.LSQ(2)).initialize(torch.rand(8, 4))
    quantize.load_state_dict(crt.FakeQuantize(cr.LSQ(2)).state_dict())
    quantize(torch.tensor([[-1.0, 1.0]]))
    assert quantize.quantizer.signed
