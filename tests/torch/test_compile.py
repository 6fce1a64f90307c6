"""`torch.compile` of the student and of a whole training step: one graph, compiled once, the same numbers."""

from __future__ import annotations

import copy

import crcore_torch as crt
import pytest
import torch
import torch.nn.functional as F
from small_nets import CONSISTENCY, compiles, convnet, images, mlp, recipe, sgd, vectors
from torch import nn

import crcore as cr


@pytest.fixture(autouse=True)
def _forget_earlier_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


RECIPES = {
    "LSQ": recipe(),
    "LSQPlus": cr.Recipe(cr.LSQ(4), cr.LSQPlus(4)),
    "PACT and DoReFa": cr.Recipe(cr.DoReFa(4), cr.PACT(4)),
    "MinMax": cr.Recipe(cr.MinMax(4, per_channel=True), cr.MinMax(4)),
}


@compiles
@pytest.mark.parametrize("name", RECIPES)
def test_a_compiled_student_is_one_graph_with_the_same_outputs_and_gradients(name):
    student = crt.prepare(convnet(), RECIPES[name])
    x, y = images()
    student(x)
    twin = copy.deepcopy(student)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for model, net in ((student, student), (compiled, twin)):
        out = model(x)
        F.cross_entropy(out, y).backward()
        results.append((out.detach(), {n: p.grad for n, p in net.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for key, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)
    for (key, one), two in zip(student.named_buffers(), twin.buffers(), strict=True):  # observers too
        torch.testing.assert_close(one, two, msg=key)


@compiles
def test_inductor_computes_the_same():
    student = crt.prepare(mlp(), recipe())
    x, _ = vectors()
    expected = student(x)
    torch.testing.assert_close(torch.compile(student, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-6)


@compiles
def test_nothing_is_compiled_again_while_lambda_the_step_and_the_scales_move():
    student = crt.prepare(mlp(), recipe())
    student(vectors()[0])
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    teacher = crt.Teacher(compiled, cr.EMA(0.9, warmup=3))
    consistency = crt.ConsistencyLoss(CONSISTENCY)  # its lambda moves during the first four steps
    optimizer = sgd(compiled)
    teacher.follow(optimizer)
    losses = []

    def step(seed):
        x, y = vectors(seed=seed)
        logits = compiled(x)
        term = consistency(logits, teacher(x + 0.1), step=teacher.step)
        optimizer.zero_grad()
        (F.cross_entropy(logits, y) + term).backward()
        optimizer.step()
        losses.append(term.item())

    step(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 7):
            step(seed)
    assert teacher.step == 7
    assert len(set(losses)) == 7


@compiles
def test_a_whole_step_with_the_step_as_a_tensor_is_compiled_once():
    student = crt.prepare(mlp(), recipe())
    student(vectors()[0])
    teacher = crt.Teacher(student)
    consistency = crt.ConsistencyLoss(CONSISTENCY)

    def loss_of(x, target, y, step):
        logits = student(x)
        return F.cross_entropy(logits, y) + consistency(logits, target, step=step)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    optimizer = sgd(student)
    teacher.follow(optimizer)

    def step(seed):
        x, y = vectors(seed=seed)
        target = teacher(x + 0.1)
        expected = loss_of(x, target, y, teacher.step)
        loss = compiled(x, target, y, torch.tensor(teacher.step))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 6):
            step(seed)
    assert teacher.step == 6


@compiles
def test_the_whole_objective_with_the_teacher_inside_is_one_graph():
    student = crt.prepare(mlp(), recipe())
    x, y = vectors()
    student(x)
    teacher = crt.Teacher(student)
    consistency = crt.ConsistencyLoss(CONSISTENCY)

    def loss_of(x, y, step):
        logits = student(x)
        return F.cross_entropy(logits, y) + consistency(logits, teacher(x + 0.1), step=step)

    step = torch.tensor(2)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, step), loss_of(x, y, step), rtol=1e-5, atol=1e-6)


@compiles
def test_compiling_before_the_first_batch_says_to_run_one():
    student = crt.prepare(nn.Sequential(nn.Linear(6, 3)), recipe())
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="run one batch in train mode before the compiled call"):
        compiled(vectors()[0])
    assert not student[0].input_quantizer.initialized
    student(vectors()[0])
    compiled(vectors()[0])
