"""`parameter_groups`: scales have no weight decay and their own learning rate."""

from __future__ import annotations

import crcore_torch as crt
import torch
from small_nets import mlp, recipe, train_step, vectors
from torch import nn

import crcore as cr


def test_each_trained_parameter_is_in_one_group():
    student = crt.prepare(mlp(), recipe())
    student[0]._parameters["bias"].requires_grad_(False)
    net, scales = crt.parameter_groups(student, lr=0.1, weight_decay=1e-3, quantizer_lr_multiplier=0.5)
    everything = [id(p) for group in (net, scales) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    assert (net["lr"], net["weight_decay"]) == (0.1, 1e-3)
    assert (scales["lr"], scales["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in scales["params"]} == {id(p) for n, p in student.named_parameters() if "quantizer" in n}


def test_weight_decay_shrinks_weights_and_leaves_scales():
    student = crt.prepare(mlp(), recipe())
    student(vectors()[0])
    optimizer = torch.optim.SGD(crt.parameter_groups(student, lr=0.1, weight_decay=0.5))
    scale = student[2].weight_quantizer.scale.detach().clone()
    weight = student[2]._parameters["weight"].detach().clone()
    optimizer.zero_grad(set_to_none=False)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(student[2]._parameters["weight"], 0.95 * weight)
    assert torch.equal(student[2].weight_quantizer.scale, scale)


def test_tied_weights_are_in_their_group_once():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    net["head"].weight = net["embed"].weight
    groups = crt.parameter_groups(crt.prepare(net, recipe()), lr=0.1)
    torch.optim.SGD(groups)  # raises on duplicates
    assert [len(group["params"]) for group in groups] == [2, 2]


def test_a_model_without_scales_has_one_group():
    student = crt.prepare(mlp(), cr.Recipe(cr.MinMax(4), cr.MinMax(4)))
    assert len(crt.parameter_groups(student, lr=0.1)) == 1


def test_the_teacher_follows_an_optimizer_with_groups():
    student = crt.prepare(mlp(), recipe())
    teacher = crt.Teacher(student)
    optimizer = torch.optim.AdamW(crt.parameter_groups(student, lr=0.1, weight_decay=0.1, quantizer_lr_multiplier=0.1))
    teacher.follow(optimizer)
    train_step(student, None, optimizer, vectors())
    assert teacher.step == 1
