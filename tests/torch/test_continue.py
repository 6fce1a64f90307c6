"""A run that is interrupted, saved, loaded into fresh objects and continued is the run that was not, bit for bit."""

from __future__ import annotations

import crcore_torch as crt
import pytest
import torch
from small_nets import assert_same_bits, convnet, images, recipe, train_step

import crcore as cr

RECIPES = {
    "LSQ": recipe(3),
    "LSQPlus": cr.Recipe(cr.LSQ(4), cr.LSQPlus(4)),
    "PACT and DoReFa": cr.Recipe(cr.DoReFa(4), cr.PACT(4)),
    "MinMax": cr.Recipe(cr.MinMax(4, per_channel=True), cr.MinMax(4)),
}


def fresh(chosen, seed):
    torch.manual_seed(seed)
    student = crt.prepare(convnet(), chosen)
    teacher = crt.Teacher(student, cr.EMA(0.9, warmup=4))
    optimizer = torch.optim.AdamW(crt.parameter_groups(student, lr=0.01, weight_decay=0.1))
    teacher.follow(optimizer)
    return {"student": student, "teacher": teacher, "optimizer": optimizer}


def run(parts, seeds):
    for seed in seeds:
        train_step(parts["student"], parts["teacher"], parts["optimizer"], images(seed=seed))


@pytest.mark.parametrize("name", RECIPES)
def test_six_steps_are_three_steps_and_three_steps(name, tmp_path):
    whole = fresh(RECIPES[name], seed=0)
    run(whole, range(6))

    first = fresh(RECIPES[name], seed=0)
    run(first, range(3))
    torch.save({key: part.state_dict() for key, part in first.items()}, tmp_path / "checkpoint.pt")

    second = fresh(RECIPES[name], seed=1)  # another initialisation, to be overwritten
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for key, part in second.items():
        part.load_state_dict(saved[key])
    assert second["teacher"].step == 3
    run(second, range(3, 6))

    for key in ("student", "teacher"):
        assert_same_bits(whole[key].state_dict(), second[key].state_dict())
    moments = [parts["optimizer"].state_dict()["state"] for parts in (whole, second)]
    assert moments[0].keys() == moments[1].keys()
    for index in moments[0]:
        assert_same_bits(moments[0][index], moments[1][index])
    x = images(seed=9)[0]
    assert torch.equal(whole["teacher"](x), second["teacher"](x))
    assert torch.equal(whole["student"].eval()(x), second["student"].eval()(x))


def test_the_teacher_loaded_before_the_student_keeps_its_own_scales(tmp_path):
    first = fresh(RECIPES["LSQ"], seed=0)
    run(first, range(3))
    second = fresh(RECIPES["LSQ"], seed=1)
    second["teacher"].load_state_dict(first["teacher"].state_dict())
    second["student"].load_state_dict(first["student"].state_dict())
    x = images(seed=9)[0]
    assert torch.equal(first["teacher"](x), second["teacher"](x))
    assert_same_bits(first["teacher"].state_dict(), second["teacher"].state_dict())


def test_loading_with_assign_continues_too():
    first = fresh(RECIPES["LSQ"], seed=0)
    run(first, range(2))
    second = fresh(RECIPES["LSQ"], seed=1)
    for key in ("student", "teacher"):
        second[key].load_state_dict(first[key].state_dict(), assign=True)
    x = images(seed=9)[0]
    assert torch.equal(first["teacher"](x), second["teacher"](x))
    assert torch.equal(first["student"].eval()(x), second["student"].eval()(x))
