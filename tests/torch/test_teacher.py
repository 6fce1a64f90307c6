"""`Teacher`: what it averages, when, and what it never does."""

from __future__ import annotations

import copy
import math
import pickle

import crcore_torch as crt
import pytest
import torch
import torch.nn.functional as F
from small_nets import (
    CONSISTENCY,
    assert_same_bits,
    compiles,
    convnet,
    images,
    mlp,
    recipe,
    sgd,
    snapshot,
    train_step,
    vectors,
)
from torch import nn

import crcore as cr


def started(net: nn.Module | None = None, chosen: cr.Recipe | None = None, batch=None) -> nn.Module:
    """A student that has seen a batch."""
    student = crt.prepare(net or mlp(), chosen or recipe())
    student(vectors()[0] if batch is None else batch)
    return student


# --- the average ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ema",
    [cr.EMA(0.9), cr.EMA(0.5, warmup=4), cr.EMA(cr.cosine_ramp(1.0, steps=5, start=0.6)), cr.EMA(0.0), cr.EMA(1.0)],
)
def test_it_is_the_cores_average_of_parameters_scales_and_statistics(ema):
    student = started(convnet(), batch=images()[0])
    teacher = crt.Teacher(student, ema)
    optimizer = sgd(student)
    teacher.follow(optimizer)
    by_hand = {name: tensor.double() for name, tensor in snapshot(teacher.model).items() if tensor.is_floating_point()}
    assert {"1.running_var", "3.weight_quantizer.scale", "3.input_quantizer.scale"} <= by_hand.keys()
    for step in range(6):
        assert teacher.step == step
        assert teacher.decay == float(ema.decay_at(step))
        train_step(student, teacher, optimizer, images(seed=step))
        now = student.state_dict()
        by_hand = {
            name: cr.ema_update(average, now[name].double(), float(ema.decay_at(step)))
            for name, average in by_hand.items()
        }
        for name, average in by_hand.items():
            got = teacher.model.state_dict()[name].double()
            torch.testing.assert_close(got, average, rtol=1e-5, atol=1e-7, msg=f"{name} at step {step}")
    assert torch.equal(teacher.model[1].num_batches_tracked, student[1].num_batches_tracked)


@pytest.mark.parametrize("quantizer", [cr.LSQ(4), cr.MinMax(4)])
def test_batchnorm_statistics_are_copied_where_the_average_says_so(quantizer):
    student = started(convnet(), cr.Recipe(quantizer, quantizer), batch=images()[0])
    averaged, copied = (crt.Teacher(student, cr.EMA(0.9, batchnorm=policy)) for policy in ("average", "copy"))
    optimizer = sgd(student)
    for teacher in (averaged, copied):
        teacher.follow(optimizer)
    for step in range(3):
        train_step(student, copied, optimizer, images(seed=step))
        now, mine, other = student.state_dict(), copied.model.state_dict(), averaged.model.state_dict()
        assert "1.running_var" in now
        for name in now:
            if "running" in name:
                assert torch.equal(mine[name], now[name])
                assert not torch.equal(other[name], now[name])
            else:
                assert torch.equal(mine[name], other[name]), name


def test_the_teacher_of_step_t_includes_the_student_after_step_t_minus_1():
    student = started()
    teacher = crt.Teacher(student, cr.EMA(0.5))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    x, _ = vectors(seed=7)
    weights = [student[2]._parameters["weight"].detach().clone()]
    for step in range(3):
        expected = copy.deepcopy(student).eval()
        average = weights[0]
        for weight in weights[1:]:
            average = 0.5 * average + 0.5 * weight
        torch.testing.assert_close(teacher.model[2]._parameters["weight"], average)
        if step == 0:
            assert torch.equal(teacher(x), expected(x))
        train_step(student, teacher, optimizer, vectors(seed=step))
        weights.append(student[2]._parameters["weight"].detach().clone())
    assert teacher.step == 3


def test_its_forward_is_quantized_with_its_own_scales():
    student = started(chosen=recipe(2, first_last_bits=None))
    teacher = crt.Teacher(student, cr.EMA(0.0))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    train_step(student, teacher, optimizer, vectors())
    layer = teacher.model[2]
    assert not torch.equal(layer.weight, layer._parameters["weight"])
    codes = layer.weight / layer.weight_quantizer.scale
    torch.testing.assert_close(codes, codes.round())
    x = vectors(seed=4)[0]
    assert torch.equal(teacher(x), student.eval()(x))  # decay 0: the student itself


def test_a_float_teacher_averages_quantized_students_and_is_not_quantized():
    student = started(chosen=recipe(2))
    teacher = crt.Teacher(student, cr.EMA(0.5, quantized=False))
    plain = mlp()
    plain.load_state_dict({k: v for k, v in teacher.model.state_dict().items() if "quantizer" not in k})
    x = vectors()[0]
    assert torch.equal(teacher(x), plain(x))
    assert not torch.equal(teacher(x), student(x))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    train_step(student, teacher, optimizer, vectors())
    assert teacher.model[0].weight_quantizer.scale.isfinite().all()
    assert crt.FakeQuantize not in {type(m) for m in plain.modules()}


def test_a_float_teacher_of_another_librarys_student_is_refused():
    with pytest.raises(cr.CRCoreError, match=r"float teacher.*not crcore's"):
        crt.Teacher(mlp(), cr.EMA(quantized=False))


def test_the_default_average_is_the_cores():
    assert crt.Teacher(started()).ema == cr.EMA()
    with pytest.raises(cr.CRCoreError, match=r"ema must be a crcore.EMA or None, got 0.99"):
        crt.Teacher(started(), 0.99)


class Buffered(nn.Module):
    """Buffers of every kind that an average would spoil."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        if self.training:
            self.count += 1
            self.scratch += 1.0
        return self.norm(self.linear(x)) + self.mask[0]


def test_buffers_that_are_not_statistics_are_copied():
    student = started(Buffered())
    teacher = crt.Teacher(student, cr.EMA(0.9))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    for seed in range(3):
        train_step(student, teacher, optimizer, vectors(seed=seed))
    assert torch.equal(teacher.model.mask, student.mask)
    assert teacher.model.count == 4
    assert torch.equal(teacher.model.scratch, student.scratch)
    assert teacher.model.scratch is not student.scratch
    assert teacher.model.nothing is None
    assert not torch.equal(teacher.model.norm.running_mean, student.norm.running_mean)


def test_averaged_scales_stay_positive():
    student = started()
    teacher = crt.Teacher(student, cr.EMA(0.1))
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, crt.FakeQuantize):
                module._parameters["scale"].fill_(-1.0)
    for _ in range(5):
        teacher.update()
    assert teacher.model[2].weight_quantizer._parameters["scale"].max() < 0  # as stored
    assert all(m.scale.min() > 0 for m in teacher.modules() if isinstance(m, crt.FakeQuantize))
    assert teacher(vectors()[0]).isfinite().all()


def test_tied_weights_move_once():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embed"].weight
    student = crt.prepare(net, cr.Recipe(cr.LSQ(4), None))
    teacher = crt.Teacher(student, cr.EMA(0.5))
    before = teacher.model["embed"]._parameters["weight"].clone()
    with torch.no_grad():
        student["embed"]._parameters["weight"].add_(1.0)
    teacher.update()
    assert teacher.model["embed"]._parameters["weight"] is teacher.model["head"]._parameters["weight"]
    torch.testing.assert_close(teacher.model["head"]._parameters["weight"], before + 0.5)


def test_a_teacher_made_before_the_first_batch_adopts_the_first_scales():
    student = crt.prepare(mlp(), recipe())
    teacher = crt.Teacher(student, cr.EMA(0.9))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    x, y = vectors()
    logits = student(x)
    first = [m.scale.clone() for m in student.modules() if isinstance(m, crt.FakeQuantize)]
    assert torch.equal(teacher(x), student.eval()(x))  # not from scales of one
    student.train()
    assert all(map(torch.equal, first, [m.scale for m in teacher.modules() if isinstance(m, crt.FakeQuantize)]))
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    now = student[2].input_quantizer.scale
    torch.testing.assert_close(teacher.model[2].input_quantizer.scale, 0.9 * first[3] + 0.1 * now)


def test_a_student_that_is_frozen_later_freezes_its_teacher():
    student = started(chosen=cr.Recipe(cr.MinMax(4), cr.MinMax(4)))
    teacher = crt.Teacher(student)
    student[2].weight_quantizer.freeze()
    teacher(vectors()[0])
    assert teacher.model[2].weight_quantizer.frozen
    student[2].weight_quantizer.freeze(False)
    teacher.update()
    assert not teacher.model[2].weight_quantizer.frozen


def test_observed_ranges_are_averaged_and_not_observed_by_the_teacher():
    student = started(chosen=cr.Recipe(cr.MinMax(4), cr.MinMax(4)))
    teacher = crt.Teacher(student, cr.EMA(0.5))
    high = teacher.model[0].input_quantizer.high.clone()
    teacher(100.0 * vectors()[0])
    assert torch.equal(teacher.model[0].input_quantizer.high, high)
    student(100.0 * vectors()[0])
    teacher.update()
    torch.testing.assert_close(teacher.model[0].input_quantizer.high, 0.5 * (high + student[0].input_quantizer.high))


# --- what it never does -----------------------------------------------------------------------------------------------


def test_it_is_always_in_eval_mode():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = started(Buffered())
            self.teacher = crt.Teacher(self.student)

    both = Both().train()
    assert both.student.training
    assert not any(module.training for module in both.teacher.modules())
    both.teacher.train()
    assert not any(module.training for module in both.teacher.modules())
    mean = both.teacher.model.norm.running_mean.clone()
    both.teacher(vectors()[0])
    assert torch.equal(both.teacher.model.norm.running_mean, mean)


def test_the_student_is_not_part_of_the_teacher():
    student = started()
    teacher = crt.Teacher(student)
    own = {id(parameter) for parameter in student.parameters()}
    assert not own & {id(parameter) for parameter in teacher.parameters()}
    assert {key.split(".")[0] for key in teacher.state_dict()} == {"model", "step"}


def test_the_consistency_gradient_reaches_the_student_and_never_the_teacher():
    student = started()
    teacher = crt.Teacher(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05)
    x, _ = vectors()
    target = teacher(x + 0.1)
    assert not target.requires_grad
    loss = crt.ConsistencyLoss(CONSISTENCY)(student(x), target, step=3)
    assert loss > 0
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in student.named_parameters() if n.endswith(("weight", "scale")))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_it_makes_no_graph_even_of_inputs_that_have_one():
    x = vectors()[0].requires_grad_()
    assert not crt.Teacher(started())(x).requires_grad


def test_a_teacher_with_a_graph_still_gets_no_gradient():
    """Even where the user evaluates the averaged model itself."""
    student = started()
    teacher = crt.Teacher(student)
    teacher.model.requires_grad_(True)
    logits = teacher.model(vectors()[0])
    assert logits.requires_grad
    crt.ConsistencyLoss(CONSISTENCY)(student(vectors(seed=1)[0]), logits, step=3).backward()
    assert all(p.grad is None for p in teacher.parameters())


# --- following --------------------------------------------------------------------------------------------------------


def test_following_twice_averages_once():
    student = started()
    teacher = crt.Teacher(student)
    optimizer = sgd(student)
    teacher.follow(optimizer)
    teacher.follow(optimizer)
    train_step(student, teacher, optimizer, vectors())
    assert teacher.step == 1


def test_a_removed_handle_ends_it_and_following_can_begin_again():
    student = started()
    teacher = crt.Teacher(student)
    optimizer = sgd(student)
    handle = teacher.follow(optimizer)
    handle.remove()
    before = snapshot(teacher)
    train_step(student, teacher, optimizer, vectors())
    assert_same_bits(before, snapshot(teacher))
    teacher.follow(optimizer)
    train_step(student, teacher, optimizer, vectors())
    assert teacher.step == 1


def test_an_optimizer_of_something_else_is_refused():
    student = started()
    with pytest.raises(cr.CRCoreError, match="trains none of the student's parameters; build it from student"):
        crt.Teacher(student).follow(sgd(mlp()))


def test_gradient_accumulation_updates_per_optimizer_step():
    student = started()
    teacher = crt.Teacher(student)
    optimizer = sgd(student)
    teacher.follow(optimizer)
    for micro in range(6):
        x, y = vectors(seed=micro)
        F.cross_entropy(student(x), y).backward()
        if micro % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert teacher.step == 2


def test_a_closure_counts_as_one_step():
    student = started()
    teacher = crt.Teacher(student)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=3)
    teacher.follow(optimizer)
    x, y = vectors()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(student(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert teacher.step == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_the_grad_scaler_skipped_does_not_move_the_teacher(fused, unscale):
    student = started()
    teacher = crt.Teacher(student, cr.EMA(0.5))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01, fused=fused)
    teacher.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps = []
    for overflow in (False, True, False):
        x, y = vectors(seed=len(steps))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(student(x).float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if overflow:
            student[2]._parameters["weight"].grad[0, 0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        before = snapshot(teacher), snapshot(student)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert_same_bits(before[0], snapshot(teacher))
            assert_same_bits(before[1], snapshot(student))
        steps.append(teacher.step)
    assert steps == [1, 1, 2]


# --- wrapped students -------------------------------------------------------------------------------------------------


@compiles
def test_a_compiled_student_is_averaged_from_what_is_inside():
    student = started()
    wrapped = torch.compile(student, backend="eager")
    teacher = crt.Teacher(wrapped, cr.EMA(0.5))
    assert type(teacher.model) is type(student)
    optimizer = sgd(wrapped)
    teacher.follow(optimizer)
    train_step(wrapped, teacher, optimizer, vectors())
    assert teacher.step == 1
    expected = crt.Teacher(student).state_dict().keys()
    assert teacher.state_dict().keys() == expected


@compiles
def test_a_student_compiled_in_place_is_averaged():
    student = started()
    student.compile(backend="eager")
    teacher = crt.Teacher(student, cr.EMA(0.0))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    train_step(student, teacher, optimizer, vectors())
    x = vectors(seed=3)[0]
    torch.testing.assert_close(teacher(x), student.eval()(x))


def test_a_student_on_another_structure_is_an_error_not_a_wrong_average():
    student = started()
    teacher = crt.Teacher(student)
    student.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="longer"):
        teacher.update()


# --- copies and checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
def test_a_copy_evaluates_and_saves_but_follows_nobody(copied):
    student = started(convnet(), batch=images()[0])
    teacher = crt.Teacher(student, cr.EMA(0.9))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    train_step(student, teacher, optimizer, images())
    twin = copied(teacher)
    assert_same_bits(snapshot(teacher), snapshot(twin))
    assert (twin.step, twin.ema) == (1, teacher.ema)
    x = images(seed=5)[0]
    assert torch.equal(twin(x), teacher(x))
    before = snapshot(twin)
    train_step(student, teacher, optimizer, images())
    assert_same_bits(before, snapshot(twin))
    with pytest.raises(cr.CRCoreError, match="copy and follows no student; make a Teacher"):
        twin.update()
    with pytest.raises(cr.CRCoreError, match="copy and follows no student"):
        twin.follow(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda student: pickle.loads(pickle.dumps(student))])
def test_a_student_can_be_copied_and_trained_on(copied):
    student = started(convnet(), batch=images()[0])
    twin = copied(student)
    assert_same_bits(snapshot(student), snapshot(twin))
    for each in (student, twin):
        train_step(each, None, sgd(each), images())
    assert_same_bits(snapshot(student), snapshot(twin))
    assert type(twin[0]) is type(student[0])


def test_the_state_round_trips_with_the_step():
    student = started()
    teacher = crt.Teacher(student, cr.EMA(0.9))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    for seed in range(3):
        train_step(student, teacher, optimizer, vectors(seed=seed))
    state = teacher.state_dict()
    keys = list(state)
    fresh = crt.Teacher(crt.prepare(mlp(), recipe()))
    fresh.load_state_dict(state)
    assert fresh.step == 3
    assert list(state) == keys  # loading takes nothing out of the caller's dictionary
    assert_same_bits(snapshot(teacher), snapshot(fresh))
    x = vectors(seed=8)[0]
    assert torch.equal(fresh(x), teacher(x))


def test_loading_is_strict_about_the_step_and_about_unknown_keys():
    teacher = crt.Teacher(started())
    state = teacher.state_dict()
    without = {key: value for key, value in state.items() if key != "step"}
    with pytest.raises(RuntimeError, match=r"Missing key.*step"):
        teacher.load_state_dict(without)
    assert teacher.load_state_dict(without, strict=False).missing_keys == ["step"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        teacher.load_state_dict(state | {"other": torch.tensor(0)})


def test_it_loads_as_part_of_a_larger_module():
    student = started()
    both = nn.ModuleDict({"student": student, "teacher": crt.Teacher(student)})
    optimizer = sgd(student)
    both["teacher"].follow(optimizer)
    train_step(student, both["teacher"], optimizer, vectors())
    fresh_student = crt.prepare(mlp(), recipe())
    fresh = nn.ModuleDict({"student": fresh_student, "teacher": crt.Teacher(fresh_student)})
    fresh.load_state_dict(both.state_dict())
    assert_same_bits(snapshot(both), snapshot(fresh))
    assert fresh["teacher"].step == 1
