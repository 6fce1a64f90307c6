"""`ConsistencyLoss`: nothing at lambda = 0, the same for every kind of step, clear about what it cannot take."""

from __future__ import annotations

import copy

import crcore_torch as crt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import assert_same_bits, convnet, images, recipe, sgd, snapshot

import crcore as cr


@pytest.mark.parametrize(
    "weight", [0.0, cr.linear_ramp(1.0, steps=1000, start=0.0)], ids=["constant", "a ramp before its first step"]
)
def test_lambda_zero_is_plain_qat_to_the_bit(weight):
    plain = crt.prepare(convnet(), recipe(2))
    with_term = copy.deepcopy(plain)
    teacher = crt.Teacher(with_term)
    loss_of = crt.ConsistencyLoss(cr.Consistency(weight=weight))
    optimizers = sgd(plain), sgd(with_term)
    teacher.follow(optimizers[1])
    for seed in range(5):
        x, y = images(seed=seed)
        for student, optimizer in zip((plain, with_term), optimizers, strict=True):
            logits = student(x)
            loss = F.cross_entropy(logits, y)
            if student is with_term:
                loss = loss + loss_of(logits, teacher(x.flip(-1)), step=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_bits(snapshot(plain), snapshot(with_term))


def test_lambda_above_zero_is_not_plain_qat():
    """So that the test above can fail."""
    student = torch.randn(4, 3, requires_grad=True)
    crt.ConsistencyLoss(cr.Consistency(weight=1e-3))(student, torch.randn(4, 3), step=0).backward()
    assert student.grad.abs().max() > 0


def test_the_term_at_lambda_zero_is_finite_for_logits_that_are_not():
    logits = torch.full((2, 3), float("inf"), requires_grad=True)
    assert crt.ConsistencyLoss(cr.Consistency(weight=0.0))(logits, torch.zeros(2, 3), step=0) == 0


@pytest.mark.parametrize(
    "weight",
    [
        0.7,
        cr.linear_ramp(2.0, steps=10),
        cr.sigmoid_ramp(1.0, steps=10),
        cr.cosine_ramp(1.0, steps=4, start=0.1, hold=2, down=4),
    ],
)
@pytest.mark.parametrize("step", [0, 1, 5, 9, 10, 100])
def test_a_step_as_number_and_as_tensor_agree(weight, step):
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    loss = crt.ConsistencyLoss(cr.Consistency(weight=weight))
    expected = loss(student, teacher, step=step)
    torch.testing.assert_close(loss(student, teacher, step=torch.tensor(step)), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss(student, teacher, step=torch.tensor(float(step))), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", [cr.kl_divergence, cr.js_divergence, cr.mse_divergence])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(divergence, dtype):
    student = (3 * torch.randn(4, 3)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(4, 3)).to(dtype)
    loss = crt.ConsistencyLoss(cr.Consistency(divergence))(student, teacher, step=0)
    assert loss.dtype == torch.float32
    oracle = cr.Consistency(divergence)(
        student.detach().double().numpy(), teacher.double().numpy(), step=0, sample_weight=np.ones(4)
    )
    np.testing.assert_allclose(loss.item(), oracle, rtol=1e-5)
    loss.backward()
    assert student.grad.dtype == dtype
    assert student.grad.abs().max() > 0


def test_huge_half_precision_logits_give_finite_gradients():
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.float16, requires_grad=True)
    crt.ConsistencyLoss(cr.Consistency())(student, -student.detach(), step=0).backward()
    assert student.grad.isfinite().all()


def test_a_sample_weight_leaves_samples_out():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    crt.ConsistencyLoss(cr.Consistency())(student, teacher, step=0, sample_weight=torch.tensor([1, 0, 1, 0])).backward()
    assert (student.grad.abs().sum(dim=1) > 0).tolist() == [True, False, True, False]


def test_dense_predictions_have_their_classes_on_axis_1():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    loss = crt.ConsistencyLoss(cr.Consistency())
    flat = [logits.permute(0, 2, 3, 1).reshape(-1, 3) for logits in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher, step=0, axis=1), loss(*flat, step=0))


def test_the_same_tensor_twice_is_refused():
    logits = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(cr.CRCoreError, match=r"same tensor.*zero for ever"):
        crt.ConsistencyLoss(cr.Consistency())(logits, logits, step=0)


@pytest.mark.parametrize("view", [lambda t: t.detach(), lambda t: t.view(4, 3), lambda t: t.data])
def test_the_students_logits_detached_are_refused_too(view):
    """The peers' defect: a term that is identically zero."""
    logits = torch.randn(4, 3, requires_grad=True) * 1.0
    with pytest.raises(cr.CRCoreError, match=r"same tensor.*zero for ever"):
        crt.ConsistencyLoss(cr.Consistency())(logits, view(logits), step=0)


def test_swapped_arguments_are_refused():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    with pytest.raises(cr.CRCoreError, match="swap the arguments"):
        crt.ConsistencyLoss(cr.Consistency())(teacher, student, step=0)
    with torch.no_grad():
        crt.ConsistencyLoss(cr.Consistency())(teacher, student, step=0)  # evaluating: no gradient to lose


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_shapes_that_differ_are_refused_at_any_lambda(weight):
    loss = crt.ConsistencyLoss(cr.Consistency(weight=weight))
    with pytest.raises(cr.CRCoreError, match=r"one shape, got \(4, 3\) and \(2, 3\)"):
        loss(torch.randn(4, 3, requires_grad=True), torch.randn(2, 3), step=0)


def test_an_output_object_is_refused_with_the_way_to_its_logits():
    class Output:
        logits = torch.zeros(4, 3)

    loss = crt.ConsistencyLoss(cr.Consistency())
    with pytest.raises(cr.CRCoreError, match=r"teacher must be a tensor of logits, got Output.*output.logits"):
        loss(torch.zeros(4, 3), Output(), step=0)
    with pytest.raises(cr.CRCoreError, match="student must be a tensor of logits, got Output"):
        loss(Output(), torch.zeros(4, 3), step=0)


@pytest.mark.parametrize("given", [None, 0.5, cr.Recipe(cr.LSQ(4), None)])
def test_it_takes_a_consistency(given):
    with pytest.raises(cr.CRCoreError, match=r"takes a crcore.Consistency"):
        crt.ConsistencyLoss(given)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(("logits", "expected"), [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_the_term_has_one_dtype_whatever_lambda_is(weight, logits, expected):
    loss = crt.ConsistencyLoss(cr.Consistency(weight=weight))
    student, teacher = torch.randn(2, 4, 3).to(logits)
    assert loss(student, teacher, step=0).dtype == expected
