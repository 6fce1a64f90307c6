"""The kernels that run LSQ: which one is chosen, what it leaves as it was, and what is kept for the backward pass."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crcore_torch as crt
import pytest
import torch
import torch.nn.functional as F
from crcore_torch import _bind, _kernels
from crcore_torch._bind import fake_quantize
from crcore_torch._kernels import NAMES, _cpp, chosen
from small_nets import recipe
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import crcore as cr

CPU = [name for name in NAMES if name != "triton"]
LSQ = cr.LSQ(4, signed=True)
EVERY_KERNEL = pytest.mark.parametrize("kernel", CPU)


@EVERY_KERNEL
@pytest.mark.parametrize("shape", [(32, 64, 32, 32), (256, 128, 3, 3)])
def test_gradients_of_large_tensors_keep_to_float64(kernel, shape):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    scale = torch.full((1,) * 4 if shape[0] == 32 else (shape[0], 1, 1, 1), 0.1)
    results = []
    for dtype, name in ((torch.float64, "core"), (torch.float32, kernel)):
        inner, step = x.to(dtype).requires_grad_(), scale.to(dtype).requires_grad_()
        y = fake_quantize(inner, LSQ, (step,), 1000.0, name)
        results.append((y.detach(), *torch.autograd.grad(y, (inner, step), g.to(dtype))))
    (_, _, expected), (y, dx, dscale) = results
    v = x / scale
    assert torch.equal(y, v.clamp(-8, 7).round() * scale)
    assert torch.equal(dx, torch.where((v >= -8) & (v <= 7), g, 0.0))
    terms = (g * torch.where((v >= -8) & (v <= 7), v.clamp(-8, 7).round() - v, v.clamp(-8, 7).round())).double()
    axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
    # The sum's rounding is measured against what is summed: the terms cancel each other.
    assert ((dscale - expected).abs() <= 1e-6 * (1000 * 7) ** -0.5 * terms.abs().sum(axes, keepdim=True)).all()


def made_by(kernel: str, x: torch.Tensor, scale: torch.Tensor) -> str:
    plan = _kernels.plan(kernel, LSQ, x, (scale,))
    return "core" if plan is None else plan.kernel.NAME


@pytest.mark.parametrize("kernel", ["blocked", "cpp"])
def test_what_a_kernel_walks_through_and_what_it_leaves(kernel):
    x, one = torch.randn(5, 6, 7, 8), torch.ones(1, 1, 1, 1)
    first, second = torch.ones(5, 1, 1, 1), torch.ones(1, 6, 1, 1)
    last = x.contiguous(memory_format=torch.channels_last)
    served = [
        (x, one),
        (x, first),
        (x, second),
        (last, one),
        (last, first),
        (x.half(), one),
        (x.double(), one.double()),
    ]
    served += [(torch.randn(9), torch.ones(1)), (torch.randn(9, 8), torch.ones(9, 1)), (torch.ones(()), torch.ones(()))]
    left = [(last, second), (x[..., ::2], one), (x[:1].expand(5, 6, 7, 8), one), (torch.empty(0, 3), torch.ones(1, 1))]
    left += [(x, one.double()), (x, one.half()), (x, one.to("meta")), (x, torch.ones(5, 6, 1, 1))]
    left += [(x, torch.ones(4, 1, 1, 1)), (torch.randn(80, 9), torch.ones(4, 1)), (x[:1], torch.ones(4, 1, 1, 1))]
    left += [(x, torch.ones(1)), (torch.randn(9), torch.ones(9)), (torch.randn(9, 7), torch.ones(9, 1))]
    assert [made_by(kernel, *case) for case in served] == [kernel] * len(served)
    assert [made_by(kernel, *case) for case in left] == ["core"] * len(left)


@EVERY_KERNEL
@pytest.mark.parametrize("scale", [torch.ones(4, 1), torch.ones(1, 1, device="meta")], ids=["shape", "device"])
def test_a_scale_that_does_not_fit_is_an_error(kernel, scale):
    with pytest.raises(RuntimeError):
        fake_quantize(torch.randn(80, 30), LSQ, (scale,), 5.0, kernel).sum().item()


@EVERY_KERNEL
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_may_lie_on_any_axis(kernel, axis, layout):
    x = torch.randn(5, 6, 7, 8).to(memory_format=layout)
    g = torch.randn(5, 6, 7, 8).to(memory_format=layout)
    shape = [size if i == axis else 1 for i, size in enumerate(x.shape)]
    stored = torch.linspace(0.1, 0.4, x.shape[axis]).reshape(shape)
    results = []
    for name in ("core", kernel):
        inner, scale = x.clone().requires_grad_(), stored.clone().requires_grad_()
        y = fake_quantize(inner, LSQ, (scale,), 100.0, name)
        results.append((y, *torch.autograd.grad(y, (inner, scale), g)))
    for expected, found, tolerance in zip(*results, (0.0, 0.0, 1e-5), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert found.stride() == expected.stride()


@EVERY_KERNEL
def test_values_that_are_not_numbers_come_out_as_the_cores_do(kernel):
    numbers = [float("inf"), -float("inf"), 1.0, -0.0, 3e38]
    steps = (0.5, float("nan"), -1.0, 0.0, float("inf"))
    for values, step in itertools.product(([float("nan"), *numbers], numbers), steps):
        x = torch.tensor([values * 20])
        results = []
        for name in ("core", kernel):
            inner, scale = x.clone().requires_grad_(), torch.full((1, 1), step, requires_grad=True)
            y = fake_quantize(inner, LSQ, (scale,), 5.0, name)
            results.append((y, *torch.autograd.grad(y, (inner, scale), torch.ones_like(x))))
        for what, expected, found in zip(("y", "dx", "dscale"), *results, strict=True):
            if what == "dx" and kernel == "blocked":  # torch's hardtanh_backward lets gradients at NaN through
                expected, found = (dx.where(~(x / step).isnan(), 0.0) for dx in (expected, found))
            tolerance = 1e-6 if what == "dscale" else 0.0
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.0, equal_nan=True, msg=f"{what}, {step}")


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_kept_in_half(kernel, dtype):
    x = torch.randn(8, 33).to(dtype)
    scale = torch.full((1, 1), 0.3, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        inner = x.clone().requires_grad_()
        y = fake_quantize(inner, LSQ, (scale,), 33.0, kernel)
    dx, dscale = torch.autograd.grad(y, (inner, scale), x)
    wide = x.float().requires_grad_()
    expected = fake_quantize(wide, LSQ, (scale,), 33.0, "core")
    gradients = torch.autograd.grad(expected, (wide, scale), x.float())
    assert (y.dtype, dx.dtype, dscale.dtype) == (dtype, dtype, torch.float32)
    assert kept == [dtype, torch.float32]
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(dx, gradients[0].to(dtype))
    torch.testing.assert_close(dscale, gradients[1], rtol=1e-5, atol=1e-6)


def test_the_sum_does_not_depend_on_the_number_of_threads():
    x, g, threads = torch.randn(64, 5000), torch.randn(64, 5000), torch.get_num_threads()
    sums = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            scale = torch.full((1, 1), 0.2, requires_grad=True)
            (found,) = torch.autograd.grad(fake_quantize(x, LSQ, (scale,), 5000.0, "cpp"), scale, g)
            sums.append(found.item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums)) == 1


def test_repr_shows_the_kernel_in_use():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert repr(crt.prepare(net, recipe())).count("kernel='cpp'") == 4  # also before the first batch
    named = crt.prepare(net, recipe(), kernel="blocked")
    named(torch.randn(3, 4))
    assert repr(named).count("kernel='blocked'") == 4
    assert repr(crt.FakeQuantize(cr.PACT(4, signed=False))).count("kernel='core'") == 1
    assert copy.deepcopy(named)[0].input_quantizer.kernel == "blocked"
    assert crt.Teacher(named).model[1].weight_quantizer.kernel == "blocked"


def test_kernels_are_chosen_by_device_and_quantizer():
    assert chosen("auto", LSQ, torch.device("cpu")) == "cpp"
    assert chosen("auto", LSQ, torch.device("xpu")) == "blocked"
    assert chosen("triton", LSQ, torch.device("cpu")) == "core"
    for other in (cr.LSQ(1, signed=True), cr.LSQPlus(4), cr.MinMax(4, signed=True)):
        assert chosen("auto", other, torch.device("cpu")) == "core"


def test_an_unknown_kernel_is_refused():
    with pytest.raises(
        cr.CRCoreError, match="kernel must be one of 'auto', 'core', 'blocked', 'cpp', 'triton', got 'c'"
    ):
        crt.prepare(nn.Linear(2, 2), recipe(), kernel="c")
    with pytest.raises(cr.CRCoreError, match="got None"):
        crt.FakeQuantize(LSQ, kernel=None)


def test_a_kernel_that_cannot_run_here_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(_kernels._triton.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cr.CRCoreError, match="kernel='triton' cannot run here: it needs Triton; pip install triton"):
        crt.FakeQuantize(LSQ, kernel="triton")


SHOW = """
import crcore as cr, crcore_torch as crt, torch
torch.manual_seed(0)
quantize = crt.FakeQuantize(cr.LSQ(4, signed=True)).initialize(torch.tensor([1.0]))
x = torch.randn(3, 5, requires_grad=True)
quantize(x).square().sum().backward()
print(quantize, x.grad.sum().item(), round(quantize._parameters["scale"].grad.item(), 5))
try:
    crt.FakeQuantize(cr.LSQ(4), kernel="cpp")
    print("no error")
except cr.CRCoreError as error:
    print(error)
"""


def run(folder: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHOW],
        env=os.environ | {"XDG_CACHE_HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_without_a_compiler_the_blocked_kernel_takes_its_place_silently(tmp_path):
    (tmp_path / "a file").touch()
    built = run(tmp_path / "cache")
    assert "kernel='cpp'" in built[0]
    assert built[1] == "no error"
    for folder, compiler, reason in (
        ("none", "no-such-compiler", "it needs a C++ compiler, and found none of no-such-compiler"),
        ("none", "false", "false"),
        ("a file", "c++", "Not a directory"),
    ):
        shown, error = run(tmp_path / folder, CXX=compiler)
        assert shown == built[0].replace("'cpp'", "'blocked'")
        assert error.startswith("kernel='cpp' cannot run here: ")
        assert reason in error
        assert error.endswith("; or let kernel='auto' choose")


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path):
    (tmp_path / "crcore").mkdir(mode=0o700)
    (tmp_path / "crcore").chmod(0o777)
    shown, error = run(tmp_path)
    assert "kernel='blocked'" in shown
    assert f"others can write to {tmp_path / 'crcore'}; make it yours alone" in error


def test_a_compiler_may_have_arguments_and_its_cache_be_damaged(tmp_path):
    built = run(tmp_path, CXX="c++ -pipe")[0]
    assert "kernel='cpp'" in built
    (library,) = (tmp_path / "crcore").iterdir()
    library.write_bytes(b"damaged")
    assert run(tmp_path, CXX="c++ -pipe")[0] == built


def test_a_compiler_that_does_not_answer_is_given_up(monkeypatch, tmp_path):
    (tmp_path / "slow").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "slow").chmod(0o700)
    monkeypatch.setenv("CXX", str(tmp_path / "slow"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_cpp, "_PATIENCE", 0.2)
    assert _cpp._built.__wrapped__() == f"{tmp_path / 'slow'} took longer than 0.2 s"


def test_processes_may_build_it_at_the_same_time(tmp_path):
    with ThreadPoolExecutor() as pool:
        shown = list(pool.map(lambda _: run(tmp_path)[0], range(3)))
    assert len(set(shown)) == 1
    assert "kernel='cpp'" in shown[0]
    assert [file.suffix for file in (tmp_path / "crcore").iterdir()] == [".so"]


def test_what_is_built_for_one_processor_is_not_used_on_another(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for processor in ("one", "other"):
        monkeypatch.setattr(_cpp, "_processor", lambda processor=processor: processor)
        _cpp._built.__wrapped__()
    assert len(list((tmp_path / "crcore").iterdir())) == 2


# What is kept for the backward pass


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Flatten(), nn.Linear(8 * 36, 10))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 10


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(autouse=True)
def _small_tensors_count_too(monkeypatch):
    monkeypatch.setattr(_bind, "_WORTH_MAKING_AGAIN", 1)


@pytest.fixture
def quantized_tensors(monkeypatch):
    """References to every tensor that a quantizer has made."""
    made = []
    forward = _kernels.forward

    def watched(*arguments):
        y = forward(*arguments)
        made.append(StorageWeakRef(y.untyped_storage()))
        return y

    monkeypatch.setattr(_kernels, "forward", watched)
    return made


# Five layers: their weights and the network's input are kept, the four activations between them are not.
@pytest.mark.parametrize(("kernel", "kept"), [("cpp", 6), ("blocked", 10), ("core", 10)])
def test_quantized_activations_are_not_kept_where_a_forward_is_cheap(kernel, kept, quantized_tensors):
    student = crt.prepare(network(), recipe(), kernel=kernel)
    x, y = batch()
    loss = F.cross_entropy(student(x), y)
    assert len(quantized_tensors) == 10
    assert sum(not storage.expired() for storage in quantized_tensors) == kept
    loss.backward()
    assert len(quantized_tensors) == 10 + 10 - kept
    assert all(storage.expired() for storage in quantized_tensors)


@pytest.mark.parametrize("kernel", ["cpp", "blocked"])
def test_a_step_has_the_same_gradients_with_every_kernel(kernel):
    students = [crt.prepare(network(), recipe(), kernel=name) for name in ("core", kernel)]
    found = [gradients(student, *batch()) for student in students]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_kept_dies_with_the_graph():
    x = torch.randn(4, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with _bind.quantized_again():
            out = x.exp()  # the exponential keeps its output for its gradient
        made = weakref.ref(out)
        del out
        assert made() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["input", "weight"])
def test_writing_to_what_the_gradient_needs_is_an_error(what):
    student = crt.prepare(network(), recipe())
    x, _ = batch()
    hidden = student[0](x)
    loss = student[1:](hidden).sum()
    with torch.no_grad():
        (hidden if what == "input" else student[4]._parameters["weight"]).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_writing_to_what_is_kept_besides_is_an_error():
    x = torch.randn(3, 4, requires_grad=True)
    with _bind.quantized_again():
        out = x.exp()
        loss = out.sum()
    with torch.no_grad():
        out.add_(1.0)
    with pytest.raises(RuntimeError, match=r"shape \[3, 4\].*modified by an inplace operation.*at version 1"):
        loss.backward()


def quantized(x: torch.Tensor, kernel: str = "cpp") -> torch.Tensor:
    return fake_quantize(x * 1.0, LSQ, (torch.full((1, 1), 0.1),), 4.0, kernel)


def test_a_quantized_tensor_that_was_written_to_is_not_made_again():
    found = []
    for kernel in ("core", "cpp"):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weight = torch.ones(4, requires_grad=True)
        with _bind.quantized_again():
            y = quantized(x, kernel)
            with torch.no_grad():
                y.mul_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
            loss = (y * weight).sum()
        found.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_view_of_another_dtype_is_not_made_again():
    found = []
    for kernel in ("core", "cpp"):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with _bind.quantized_again():
            z = torch.view_as_complex(quantized(x, kernel).reshape(3, 2, 2))
            loss = torch.view_as_real(z * z).sum()
        found.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_part_of_the_graph_may_be_freed_before_another():
    x, weights = torch.randn(3, 4, requires_grad=True), [torch.randn(4, requires_grad=True) for _ in range(2)]
    with _bind.quantized_again():
        y = quantized(x)
        one, other = ((y * weight).sum() for weight in weights)
    torch.autograd.grad(one, x)
    assert torch.autograd.grad(other, weights[1])[0].isfinite().all()


class DifferentiatesWithin(nn.Linear):
    def forward(self, x):
        return super().forward(torch.func.grad(lambda v: v.square().sum())(x))


def test_layers_with_code_of_their_own_are_left_alone(quantized_tensors):
    student = crt.prepare(nn.Sequential(nn.Linear(4, 4), DifferentiatesWithin(4, 4)), recipe(), kernel="cpp")
    loss = student(torch.randn(3, 4)).sum()
    loss.backward()
    assert len(quantized_tensors) == 4


def test_a_graph_can_be_walked_twice_and_differentiated_twice():
    students = [crt.prepare(network(), recipe(), kernel=name) for name in ("core", "auto")]
    x, y = batch()
    results = []
    for student in students:
        loss = F.cross_entropy(student(x), y)
        parameters = list(student.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        again = torch.autograd.grad(loss, parameters, create_graph=True)
        assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-6) for one, two in zip(first, again, strict=True))
        squares = sum(gradient.square().sum() for gradient in again)
        results.append(torch.autograd.grad(squares, parameters, materialize_grads=True))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_and_offloading_decide_themselves(quantized_tensors):
    x, y = batch()
    student = crt.prepare(network(), recipe())
    expected = gradients(student, x, y)
    quantized_tensors.clear()
    loss = F.cross_entropy(checkpoint(student, x, use_reentrant=False), y)
    assert not any(not storage.expired() for storage in quantized_tensors)
    student.zero_grad()
    loss.backward()
    found = [parameter.grad for parameter in student.parameters()]
    for (name, gradient), other in zip(expected.items(), found, strict=True):
        torch.testing.assert_close(other, gradient, msg=name)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        student(x)
    assert packed.count((8, 8, 3, 3)) == 6  # of each of three layers, the weight and its quantized form


def test_function_transforms_pass_through():
    student = crt.prepare(network(), recipe())
    x, _ = batch()
    student(x)
    student.eval()
    expected = student(x)
    parameters = {name: parameter.detach() for name, parameter in student.named_parameters()}
    with torch.no_grad():
        batched = torch.func.vmap(lambda one: torch.func.functional_call(student, parameters, (one[None],))[0])(x)
    torch.testing.assert_close(batched, expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(student(x), expected)


def test_function_transforms_differentiate():
    student = crt.prepare(network(), recipe())
    x, y = batch()
    student(x)
    student.eval()  # statistics cannot be written to within a transform
    expected = gradients(student, x, y)

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(student, parameters, (x,)), y)

    found = torch.func.grad(loss)({name: parameter.detach() for name, parameter in student.named_parameters()})
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_an_ensemble_is_batched_over_its_parameters():
    students = [crt.prepare(nn.Sequential(nn.Linear(4, 4)), recipe()) for _ in range(3)]
    x = torch.randn(5, 4)
    for student in students:
        student(x)
        student.eval()
    parameters, buffers = torch.func.stack_module_state(students)
    with torch.no_grad():
        expected = torch.stack([student(x) for student in students])
        found = torch.func.vmap(lambda p, b: torch.func.functional_call(students[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_the_operations():
    from torch.fx.experimental.proxy_tensor import make_fx

    student = crt.prepare(network(), recipe())
    x, _ = batch()
    student(x)
    student.eval()
    with torch.no_grad():
        expected = student(x)
        traced, written = torch.jit.trace(student, x), make_fx(student)(x)
        for found in (traced(x), written(x)):
            torch.testing.assert_close(found, expected)


def test_a_batch_of_gradients_is_left_to_the_core():
    x, scale = torch.randn(3, 4, requires_grad=True), torch.full((1, 1), 0.3)
    y = fake_quantize(x, LSQ, (scale,), 4.0)
    upstream = torch.randn(5, 3, 4)
    (found,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for one, gradient in zip(upstream, found, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(y, x, one, retain_graph=True)[0])


def test_tensors_without_memory_are_left_to_the_core():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        made = fake_quantize(torch.empty(3, 4), LSQ, (torch.ones(1, 1),), 4.0)
        assert made.shape == (3, 4)
    assert fake_quantize(torch.empty(3, 4, device="meta"), LSQ, (torch.ones(1, 1, device="meta"),), 4.0).is_meta
    assert fake_quantize(torch.empty(0, 4), LSQ, (torch.ones(1, 1),), 4.0).shape == (0, 4)
