"""`reestimate_batchnorm`: the cumulative mean of each batch's statistics, and nothing else."""

from __future__ import annotations

import copy

import crcore_torch as crt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_nets import assert_same_bits, convnet, images, sgd, snapshot
from torch import nn

import crcore as cr

VALUES = arrays(np.float32, (6, 3), elements=st.floats(-8.0, 8.0, width=32))


@given(batches=st.lists(VALUES, min_size=1, max_size=5))
def test_statistics_are_the_means_over_batches(batches):
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(torch.inf)
    norm.running_var.fill_(torch.nan)
    crt.reestimate_batchnorm(norm, [torch.from_numpy(batch) for batch in batches])
    mean = np.mean([batch.astype(float).mean(axis=0) for batch in batches], axis=0)
    variance = np.mean([batch.astype(float).var(axis=0, ddof=1) for batch in batches], axis=0)
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm.running_var, variance, rtol=1e-5, atol=1e-5)


def net():
    return nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.3)
    )


def inputs(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


def test_layers_behind_see_what_batch_statistics_normalize_and_no_dropout():
    torch.manual_seed(0)
    network = net().double()
    batches = [batch.double() for batch in inputs()]
    crt.reestimate_batchnorm(network, batches)
    first, second = network[0], network[4]
    means = []
    for batch in batches:
        hidden = batch.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy()
        hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
        means.append((np.maximum(hidden, 0) @ second.weight.detach().numpy().T + second.bias.detach().numpy()).mean(0))
    np.testing.assert_allclose(network[5].running_mean, np.mean(means, axis=0), rtol=1e-12)


def test_it_is_torchs_update_bn_of_a_network_without_dropout():
    torch.manual_seed(0)
    ours = nn.Sequential(*(layer for layer in net() if not isinstance(layer, nn.Dropout)))
    theirs = copy.deepcopy(ours)
    crt.reestimate_batchnorm(ours, inputs())
    torch.optim.swa_utils.update_bn(inputs(), theirs)
    assert_same_bits(snapshot(ours), snapshot(theirs))


def trained(quantizer=cr.LSQ):
    """A student and its teacher after three steps."""
    chosen = cr.Recipe(quantizer(4), quantizer(4))
    student = crt.prepare(convnet(), chosen)
    teacher = crt.Teacher(student, cr.EMA(0.5))
    optimizer = sgd(student)
    teacher.follow(optimizer)
    for step in range(3):
        student(images(seed=step)[0]).sum().backward()
        optimizer.step()
    return student, teacher


@pytest.mark.parametrize("quantizer", [cr.LSQ, cr.MinMax])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(quantizer, training):
    student, _ = trained(quantizer)
    student.train(training)
    student[0].eval()  # modes of modules are kept one by one
    before, modes = snapshot(student), [module.training for module in student.modules()]
    momenta = [module.momentum for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    random = torch.get_rng_state()
    crt.reestimate_batchnorm(student, [images(seed=step)[0] for step in range(2)])
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in student.modules()] == modes
    assert [module.momentum for module in student.modules() if isinstance(module, nn.BatchNorm2d)] == momenta
    after = snapshot(student)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "running" in name or "num_batches" in name}
    assert all(after[name] == 2 for name in after if "num_batches" in name)
    assert not any(parameter.grad is None for parameter in student.parameters() if parameter.requires_grad)


def test_a_teacher_is_measured_with_its_own_weights_and_goes_on():
    student, teacher = trained()
    batches = [images(seed=step) for step in range(3)]  # with labels, as a loader yields
    before = snapshot(student)
    own = copy.deepcopy(teacher.model)
    crt.reestimate_batchnorm(own, batches)
    crt.reestimate_batchnorm(teacher, batches)
    assert_same_bits(snapshot(teacher.model), snapshot(own))
    assert not any(module.training for module in teacher.modules())
    assert_same_bits(snapshot(student), before)
    crt.reestimate_batchnorm(student, batches)
    assert not torch.equal(student[1].running_mean, teacher.model[1].running_mean)
    expected = cr.ema_update(teacher.model[1].running_mean.clone(), student[1].running_mean, 0.5)
    teacher.update()
    torch.testing.assert_close(teacher.model[1].running_mean, expected)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.untracked(self.used(x))


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    network = Halves()
    network.idle.running_mean.fill_(5.0)
    network.idle.num_batches_tracked.fill_(7)
    crt.reestimate_batchnorm(network, inputs())
    assert torch.equal(network.idle.running_mean, torch.full((4,), 5.0))
    assert network.idle.num_batches_tracked == 7
    assert network.used.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], cr.CRCoreError, "there is no batch; give one at least"),
        (iter(()), cr.CRCoreError, "there is no batch"),
        (torch.zeros(8, 4), cr.CRCoreError, r"takes batches, got one tensor of shape \(8, 4\)"),
        ([torch.zeros(8, 4), torch.zeros(8, 5)], RuntimeError, "shape"),
    ],
)
def test_after_an_error_the_network_is_as_it_was(batches, error, message):
    network = net().train()
    network(inputs()[0])
    before = snapshot(network)
    with pytest.raises(error, match=message):
        crt.reestimate_batchnorm(network, batches)
    assert_same_bits(snapshot(network), before)
    assert all(module.training for module in network.modules())
    assert network[5].momentum == 0.3


def test_without_batchnorm_there_is_nothing_to_measure():
    with pytest.raises(cr.CRCoreError, match="Linear has no BatchNorm with running statistics; leave the call out"):
        crt.reestimate_batchnorm(nn.Linear(4, 2), inputs())
    with pytest.raises(cr.CRCoreError, match="no BatchNorm"):
        crt.reestimate_batchnorm(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), inputs())
