"""Students that another library fake-quantized: the teacher needs nothing from crcore inside them."""

from __future__ import annotations

import copy

import crcore_torch as crt
import pytest
import torch
from small_nets import assert_same_bits, images, sgd, snapshot, train_step, vectors
from torch import nn

import crcore as cr


def brevitas_net() -> nn.Module:
    import brevitas.nn as qnn

    return nn.Sequential(
        qnn.QuantConv2d(3, 8, 3, padding=1, weight_bit_width=4),
        nn.BatchNorm2d(8),
        qnn.QuantReLU(bit_width=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        qnn.QuantLinear(8, 3, bias=True, weight_bit_width=4),
    )


def torchao_net() -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    activation = IntxFakeQuantizeConfig(torch.int8, granularity="per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=2)
    quantize_(net, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return net


def torch_ao_net() -> nn.Module:
    """Eager mode: modules swapped for QAT modules whose observers grow their buffers."""
    from torch.ao.quantization import QConfig, QuantStub, prepare_qat
    from torch.ao.quantization.fake_quantize import FakeQuantize
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver, PerChannelMinMaxObserver

    net = nn.Sequential(
        QuantStub(),
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    net.qconfig = QConfig(
        activation=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=15),
        weight=FakeQuantize.with_args(
            observer=PerChannelMinMaxObserver,
            quant_min=-8,
            quant_max=7,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        ),
    )
    return prepare_qat(net.train())


LIBRARIES = {
    "brevitas": (brevitas_net, images),
    "torchao": (torchao_net, vectors),
    "torch.ao": (torch_ao_net, images),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    # Brevitas computes on torch's named tensors, which torch calls experimental.
    pytest.mark.filterwarnings("ignore:Named tensors and all their associated APIs:UserWarning"),
    # torchao and Brevitas import what torch has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def distance(one: nn.Module, two: nn.Module) -> float:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return sum(float((a.detach() - b.detach()).square().sum()) for a, b in pairs)


def followed(student: nn.Module, decay: float = 0.9) -> tuple[crt.Teacher, torch.optim.Optimizer]:
    teacher = crt.Teacher(student, cr.EMA(decay))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    return teacher, optimizer


@pytest.mark.parametrize("name", LIBRARIES)
def test_their_student_trains_with_a_teacher_that_moves_towards_it(name):
    make, batch = LIBRARIES[name]
    student = make()
    teacher, optimizer = followed(student)
    for seed in range(4):
        earlier = copy.deepcopy(teacher.model)
        loss = train_step(student, teacher, optimizer, batch(seed=seed))
        assert loss.isfinite()
        assert distance(teacher.model, student) < distance(earlier, student)
        assert teacher(batch(seed=seed)[0]).isfinite().all()
    assert teacher.step == 4
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", LIBRARIES)
def test_before_the_first_update_the_teacher_is_the_student_whose_scales_the_first_batch_set(name):
    make, batch = LIBRARIES[name]
    student = make()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # its statistics are an average, here one that stays
    teacher, _ = followed(student)
    student(batch(32)[0])
    x = batch(seed=3)[0]
    got = teacher(x)
    for module in student.modules():  # torch.ao observes in eval mode too
        if hasattr(module, "disable_observer"):
            module.disable_observer()
    assert torch.equal(got, student.eval()(x))


@pytest.mark.parametrize("name", LIBRARIES)
def test_evaluating_the_teacher_leaves_it_as_it_is(name):
    make, batch = LIBRARIES[name]
    student = make()
    teacher, optimizer = followed(student)
    for seed in range(2):
        train_step(student, teacher, optimizer, batch(seed=seed))
    before = snapshot(teacher)
    teacher(100.0 * batch(seed=5)[0])
    assert_same_bits(before, snapshot(teacher))


@pytest.mark.parametrize("name", LIBRARIES)
def test_copies_and_checkpoints_of_the_teacher_compute_the_same(name):
    make, batch = LIBRARIES[name]
    student = make()
    teacher, optimizer = followed(student)
    for seed in range(3):
        train_step(student, teacher, optimizer, batch(seed=seed))
    x = batch(seed=9)[0]
    twin = copy.deepcopy(teacher)
    assert torch.equal(twin(x), teacher(x))
    loaded = crt.Teacher(make())
    loaded.load_state_dict(teacher.state_dict())
    assert loaded.step == 3
    assert torch.equal(loaded(x), teacher(x))


@pytest.mark.parametrize("name", LIBRARIES)
def test_lambda_zero_is_their_plain_qat_to_the_bit(name):
    make, batch = LIBRARIES[name]
    torch.manual_seed(1)
    plain = make()
    torch.manual_seed(1)
    student = make()
    teacher, optimizer = followed(student)
    other = sgd(plain)
    loss_of = crt.ConsistencyLoss(cr.Consistency(weight=0.0))
    for seed in range(3):
        x, y = batch(seed=seed)
        logits = student(x)
        loss = nn.functional.cross_entropy(logits, y) + loss_of(logits, teacher(x + 0.1), step=teacher.step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        train_step(plain, None, other, (x, y))
    assert_same_bits(snapshot(plain), snapshot(student))


def test_a_brevitas_scale_that_starts_late_is_averaged_from_where_it_starts():
    """Brevitas learns an activation scale after `collect_stats_steps` batches; until then it has a placeholder."""
    import brevitas.nn as qnn

    student = nn.Sequential(qnn.QuantReLU(bit_width=4, collect_stats_steps=2), nn.Linear(6, 3))
    teacher, optimizer = followed(student, decay=0.9)
    scales = []
    for seed in range(6):
        x, y = vectors(seed=seed)
        train_step(student, teacher, optimizer, (20.0 * x, y))
        scales.append([net[0].act_quant.scale().item() for net in (student.eval(), teacher.model)])
        student.train()
    for mine, average in scales:
        assert average == pytest.approx(mine, rel=0.2)  # not on its way from the placeholder 1.0
    learned = [next(m for m in net.modules() if hasattr(m, "collect_stats_steps")) for net in (student, teacher.model)]
    assert [scale.counter for scale in learned] == [3, 3]
    assert not torch.equal(learned[0].value, learned[1].value)  # and averaged since
