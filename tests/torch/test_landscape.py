"""Derivatives of a network's loss against dense Hessians of a surrogate that is written out here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import crcore_torch as crt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import assert_same_bits, convnet, images, mlp, recipe, snapshot, trained
from torch import Tensor, nn

import crcore as cr
from crcore.flatness import corruption_sensitivity, sharpness, top_eigenvalues, trace, weight_sensitivity

QUANTIZERS = {
    "float": (None, None),
    "LSQ": (cr.LSQ(3), cr.LSQ(3)),
    "LSQ, 2 bits per channel": (cr.LSQ(2, per_channel=True), cr.LSQ(2)),
    "LSQ, 1 bit": (cr.LSQ(1), cr.LSQ(2)),
    "LSQ+": (cr.LSQ(3), cr.LSQPlus(3)),
    "DoReFa and PACT": (cr.DoReFa(3), cr.PACT(3)),
    "DoReFa per channel": (cr.DoReFa(3, per_channel=True), cr.DoReFa(3)),
    "MinMax": (cr.MinMax(3), cr.MinMax(3)),
    "MinMax, affine weights": (cr.MinMax(3, symmetric=False), cr.MinMax(4)),
}
EACH = pytest.mark.parametrize("quantizers", QUANTIZERS.values(), ids=QUANTIZERS)


def tiny(quantizers: tuple[Any, Any]) -> tuple[nn.Module, Tensor, Tensor]:
    """Two layers in float64, their scales such that some values are clipped."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(12, 4).double(), torch.randint(0, 3, (12,))
    if quantizers == (None, None):
        return net, x, y
    model = crt.prepare(net, cr.Recipe(*quantizers, first_last_bits=None))
    model.train()(x)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in getattr(module, "_parameters", {}).items():
                if isinstance(module, crt.FakeQuantize) and name != "offset":
                    parameter.mul_(0.7)
    return model.eval(), x, y


class Surrogate:
    """The loss of `tiny` as a function of its weights, by hand: ``Q(x0) + z(x) - z(x0)`` in the place of ``Q(x)``.

    Q in NumPy; x0 what x is at the network's own weights; z what the paper passes gradients through: what lay inside
    the range, or DoReFa's ``tanh(x) / max(|tanh(x)|)``.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.shapes = [layer._parameters[name].shape for layer in (model[0], model[2]) for name in ("weight", "bias")]
        self.base: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}

    def __call__(self, weights: Tensor) -> Tensor:
        parts = weights.split([shape.numel() for shape in self.shapes])
        w1, b1, w2, b2 = (part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True))
        hidden = torch.tanh(self.q("0.input_quantizer", self.x) @ self.q("0.weight_quantizer", w1).T + b1)
        logits = self.q("2.input_quantizer", hidden) @ self.q("2.weight_quantizer", w2).T + b2
        return -logits.log_softmax(1)[torch.arange(len(self.y)), self.y].mean()

    def q(self, name: str, x: Tensor) -> Tensor:
        try:
            quantize = self.model.get_submodule(name)
        except AttributeError:
            return x
        if name not in self.base:
            arrays = [broadcast(array, x).detach().numpy() for array in quantize.arrays_for(x.detach())]
            value = torch.from_numpy(quantize.quantizer.forward(x.detach().numpy(), *arrays))
            z = through(quantize, x.detach())
            self.base[name] = value - z(x).detach(), z
        value, z = self.base[name]
        return value + z(x)


def through(quantize: Any, x0: Tensor) -> Callable[[Tensor], Tensor]:
    """What gradients pass, as a function that is smooth around ``x0``."""
    quantizer = quantize.quantizer
    if getattr(quantizer, "tanh", None):
        norm = functools.partial(torch.amax, dim=1, keepdim=True) if quantizer.per_channel else torch.max
        return lambda x: x.tanh() / norm(x.tanh().abs())
    if isinstance(quantizer, cr.PACT):
        alpha = quantize.alpha.detach()
        inside = (x0 >= (-alpha if quantizer.signed else 0.0)) & (x0 <= alpha)
    else:
        scale, zero_point = (each.detach() for each in quantize.affine(x0))
        inside = (x0 / scale >= quantizer.grid.lo - zero_point) & (x0 / scale <= quantizer.grid.hi - zero_point)
    return lambda x: torch.where(inside, x, 0.0)


def broadcast(array: Tensor, x: Tensor) -> Tensor:
    return array if array.ndim else array.reshape((1,) * x.ndim)


def dense(landscape: Any) -> np.ndarray:
    return np.array([landscape.hvp(row) for row in np.eye(landscape.size)])


@EACH
def test_the_hessian_is_that_of_the_straight_through_surrogate(quantizers: Any) -> None:
    model, x, y = tiny(quantizers)
    landscape, surrogate = crt.Landscape(model, x, y), Surrogate(model, x, y)
    weights = torch.from_numpy(landscape.weights)
    np.testing.assert_allclose(landscape.evaluate()[0].mean(), surrogate(weights).item(), rtol=1e-12)
    expected = torch.autograd.functional.hessian(surrogate, weights).numpy()
    np.testing.assert_allclose(dense(landscape), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    slope = torch.autograd.functional.jacobian(surrogate, weights).numpy()
    np.testing.assert_allclose(landscape.gradient(), slope, rtol=0, atol=1e-12 * np.abs(slope).max())


@EACH
def test_the_hessian_is_the_difference_of_the_surrogate_s_gradients(quantizers: Any) -> None:
    model, x, y = tiny(quantizers)
    landscape, surrogate = crt.Landscape(model, x, y), Surrogate(model, x, y)
    weights = torch.from_numpy(landscape.weights)
    surrogate(weights)  # from here on, x0 is held
    slope = functools.partial(torch.autograd.functional.jacobian, surrogate)
    vector = np.random.default_rng(0).normal(size=landscape.size)
    step = 1e-6 * torch.from_numpy(vector)
    difference = (slope(weights + step) - slope(weights - step)).numpy() / 2e-6
    np.testing.assert_allclose(landscape.hvp(vector), difference, rtol=0, atol=1e-7 * np.abs(difference).max())


@EACH
def test_eigenvalues_and_trace_are_those_of_the_dense_hessian(quantizers: Any) -> None:
    landscape = crt.Landscape(*tiny(quantizers))
    values = np.linalg.eigvalsh(dense(landscape))[::-1]
    found = top_eigenvalues(landscape, 10, tolerance=1e-8)
    np.testing.assert_allclose(found, values[:10], rtol=0, atol=1e-8 * values[0])
    estimated = trace(landscape, probes=300)
    assert abs(estimated.mean - values.sum()) < 2 * estimated.half_width


def nets() -> dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]]:
    return {
        "prepared": lambda: (trained(recipe())[0], *images(9)),
        "teacher": lambda: (trained(recipe())[1], *images(9)),
        "float": lambda: (convnet(), *images(9)),
    }


NET = pytest.mark.parametrize("net", nets().values(), ids=nets())


@NET
def test_the_gradient_is_that_of_backward(net: Any) -> None:
    model, x, y = net()
    landscape = crt.Landscape(model, x, y)
    own = copy.deepcopy(getattr(model, "model", model)).eval().requires_grad_()
    F.cross_entropy(own(x), y).backward()
    learned = {id(p) for module in own.modules() if isinstance(module, crt.FakeQuantize) for p in module.parameters()}
    expected = torch.cat([p.grad.flatten() for p in own.parameters() if id(p) not in learned]).double().numpy()
    np.testing.assert_allclose(landscape.gradient(), expected, rtol=1e-4, atol=1e-6)
    weights = [p.flatten() for p in own.parameters() if id(p) not in learned]
    np.testing.assert_array_equal(landscape.weights, torch.cat(weights).detach().double().numpy())


@NET
def test_batches_make_no_difference(net: Any) -> None:
    model, x, y = net()
    whole, parts = (crt.Landscape(model, x, y, batch_size=size) for size in (9, 4))
    vector = np.random.default_rng(0).normal(size=whole.size)
    np.testing.assert_allclose(whole.evaluate()[1], parts.evaluate()[1], atol=1e-6)
    np.testing.assert_allclose(whole.gradient(), parts.gradient(), atol=1e-6)
    expected = whole.hvp(vector)
    np.testing.assert_allclose(parts.hvp(vector), expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(whole.hvp(vector), expected)  # by the graph that was kept


@NET
def test_nothing_about_the_network_is_changed(net: Any) -> None:
    model, x, y = net()
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, random = snapshot(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]

    def use(loss: Any = None) -> None:
        landscape = crt.Landscape(model, x, y, loss=loss, batch_size=5)
        top_eigenvalues(landscape, 3, tolerance=1e-1)
        sharpness(landscape, steps=2)
        weight_sensitivity(landscape, draws=2)

    use()
    with pytest.raises(ZeroDivisionError):
        use(lambda logits, y: 1 / 0)
    assert_same_bits(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in model.modules()]
    assert needs == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad.eq(1).all() for parameter in model.parameters())


def test_a_landscape_is_of_the_network_as_it_was() -> None:
    model, x, y = nets()["prepared"]()
    landscape = crt.Landscape(model, x, y)
    vector = np.random.default_rng(0).normal(size=landscape.size)
    before = landscape.evaluate()[0], landscape.gradient(), landscape.hvp(vector)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1) if tensor.is_floating_point() else None
    landscape.evaluate(weights=landscape.weights + 1)
    landscape.gradient(landscape.weights + 1)
    for old, new in zip(before, (landscape.evaluate()[0], landscape.gradient(), landscape.hvp(vector)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_weights_and_inputs_can_be_replaced() -> None:
    model, x, y = nets()["float"]()
    landscape, random = crt.Landscape(model, x, y), np.random.default_rng(0)
    weights, other = random.normal(size=landscape.size), torch.randn_like(x)
    own = copy.deepcopy(model).eval()
    nn.utils.vector_to_parameters(torch.from_numpy(weights).float(), own.parameters())
    losses, logits = landscape.evaluate(other.numpy(), weights)
    expected = own(other)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses, F.cross_entropy(expected, y, reduction="none").detach().numpy(), rtol=1e-4)
    np.testing.assert_array_equal(landscape.evaluate(x.numpy(), landscape.weights)[0], landscape.evaluate()[0])
    np.testing.assert_array_equal(landscape.evaluate(other.numpy().astype("float64"), weights)[0], losses)


def test_filters_are_output_channels() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 2, 2), nn.Flatten(), nn.Linear(2 * 9, 2)
    )
    landscape = crt.Landscape(net, torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 0, 1]))
    conv, up = np.repeat([0, 1, 2], 8), 3 + np.tile(np.repeat([0, 1], 4), 3)
    vectors = np.full(9, -1), np.full(2, -1)
    expected = np.concatenate([conv, vectors[0], up, vectors[1], np.repeat([5, 6], 18), [-1, -1]])
    np.testing.assert_array_equal(landscape.filters, expected)


def test_what_is_frozen_is_no_weight() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    assert crt.Landscape(net, x, y).size == sum(p.numel() for p in net.parameters() if p.requires_grad)
    net.requires_grad_(False)
    assert crt.Landscape(net, x, y).size == sum(p.numel() for p in net.parameters())


def test_tied_weights_count_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    landscape = crt.Landscape(net, x, y)
    assert landscape.size == 9

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(torch.tanh(x @ w.reshape(3, 3).T) @ w.reshape(3, 3).T, y)

    expected = torch.autograd.functional.hessian(loss, net[0].weight.detach().flatten())
    np.testing.assert_allclose(dense(landscape), expected.numpy(), atol=1e-6)


def test_a_loss_of_ones_own() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 1, bias=False).double(), torch.randn(20, 3).double(), torch.randn(20).double()
    landscape = crt.Landscape(net, x, y, loss=lambda out, y: (out[:, 0] - y) ** 2, batch_size=7)
    np.testing.assert_allclose(dense(landscape), (2 * x.T @ x / 20).numpy(), rtol=1e-12)
    assert weight_sensitivity(landscape, draws=2).accuracy is None
    linear = crt.Landscape(net, x, y, loss=lambda out, y: out[:, 0])
    np.testing.assert_array_equal(linear.hvp(np.ones(3)), np.zeros(3))
    constant = crt.Landscape(net, x, y, loss=lambda out, y: y)
    np.testing.assert_array_equal(constant.gradient(), np.zeros(3))
    np.testing.assert_array_equal(constant.hvp(np.ones(3)), np.zeros(3))


def test_what_cannot_be_a_landscape_is_refused() -> None:
    model, x, y = nets()["prepared"]()
    cases = [
        ((object(), x, y), {}, "takes a torch.nn.Module"),
        ((model, x, y[:3]), {}, "of the same samples, at least one; got 9 and 3"),
        ((model, x[:0], y[:0]), {}, "at least one"),
        ((model, x, y), {"batch_size": 0}, "batch_size must"),
        ((nn.ReLU(), x, y), {}, "no parameters"),
        ((crt.convert(model), x, y), {}, "integers for weights"),
    ]
    for given, options, message in cases:
        with pytest.raises(cr.CRCoreError, match=message):
            crt.Landscape(*given, **options)
    for loss, message in ((F.cross_entropy, "one value per sample"), (lambda out, y: 1.0, "got float")):
        with pytest.raises(cr.CRCoreError, match=message):
            crt.Landscape(model, x, y, loss=loss).gradient()
    with pytest.raises(cr.CRCoreError, match=r"labels \[N\], got \[9, 3\] and torch.float32 \[9\]"):
        crt.Landscape(model, x, y.float()).evaluate()
    landscape = crt.Landscape(model, x, y)
    for call in (landscape.hvp, landscape.gradient, lambda v: landscape.evaluate(weights=v)):
        with pytest.raises(cr.CRCoreError, match="must have the shape"):
            call(np.ones(3))
    with pytest.raises(cr.CRCoreError, match=r"x must have the shape \[9, 3, 8, 8\]"):
        landscape.evaluate(x[:2])


def test_corruptions_run_through_the_network() -> None:
    model, _, y = nets()["prepared"]()
    x = torch.rand(9, 3, 8, 8)
    curves = corruption_sensitivity(crt.Landscape(model, x, y), x.numpy(), draws=2)
    assert all(0 <= curve.accuracy.mean.min() <= curve.accuracy.mean.max() <= 100 for curve in curves.values())


# Second derivatives in users' own code: gradient penalties, and eager kernels that have a first derivative only


@pytest.mark.parametrize("kernel", ["auto", "blocked"])
@pytest.mark.parametrize("batch", [2, 40], ids=["small", "made again in backward"])
@pytest.mark.parametrize("quantizers", [QUANTIZERS["LSQ"], QUANTIZERS["LSQ, 2 bits per channel"]], ids=["3", "2"])
def test_double_backward_is_the_core_s_whatever_runs_the_quantizer(kernel: str, batch: int, quantizers: Any) -> None:
    x, y = torch.randn(batch, 3, 16, 16), torch.randint(0, 3, (batch,))
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Tanh(),
        nn.Conv2d(8, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    found = []
    for each in ("core", kernel):
        model = crt.prepare(net, cr.Recipe(*quantizers), kernel=each).train()
        model(x)
        parameters = list(model.parameters())  # scales included
        first = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        penalty = sum((gradient**2).sum() for gradient in first)
        second = torch.autograd.grad(penalty, parameters)
        found.append((first, second))
        assert any(gradient.abs().max() > 0 for gradient in second)
    for one, other in zip(*found, strict=True):
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * left.abs().max().item())
