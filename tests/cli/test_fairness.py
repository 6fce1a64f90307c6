"""What makes the rows of the table comparable."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from crcore.cli._batches import Batches
from crcore.cli._data import load_data
from crcore.cli._split import stratified
from crcore.cli._torch_backend import TorchBackend

SHORT = ("--seeds", 1, "--epochs", 3)


def batches(**changes: Any) -> Batches:
    options: dict[str, Any] = {"seed": 0, "labels": 100, "batch_size": 16, "student_view": "strong"}
    options |= {"teacher_view": "weak", "flip": True, "device": torch.device("cpu")}
    return Batches(load_data("digits"), **(options | changes))


def test_every_method_gives_its_student_the_same_bits(
    crcore: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = defaultdict(list)
    methods = ("qat", "qat+ema", "qat+kd", "qat+cr", "qat+cr+unlabeled")
    names = iter(("a check before the first run",) * len(methods) + methods)
    prepare = TorchBackend.prepare

    def prepare_and_watch(self: TorchBackend, network: nn.Module, recipe: Any, *, seed: int = 0) -> nn.Module:
        student, name = prepare(self, network, recipe, seed=seed), next(names)

        def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                seen[name].append(inputs[0].clone())

        student.register_forward_pre_hook(watch)
        return student

    monkeypatch.setattr(TorchBackend, "prepare", prepare_and_watch)
    options = ("--methods", ",".join(methods), "--student-view", "strong", "--batch-size", 50, *SHORT)
    outcome = crcore("compare", *options, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert len(seen["qat"]) == 12
    assert not torch.equal(seen["qat"][0], seen["qat"][1])
    for name in methods[1:]:
        assert len(seen[name]) == 12
        for plain, other in zip(seen["qat"], seen[name], strict=True):
            assert torch.equal(plain, other[:50])
    assert all(len(views) == 100 for views in seen["qat+cr+unlabeled"])


@pytest.mark.parametrize(("method", "option"), [("qat+cr", "--consistency-weight"), ("qat+kd", "--kd-weight")])
def test_weight_zero_is_plain_qat_bit_for_bit(crcore, tmp_path, method, option) -> None:
    outcome = crcore("compare", "--methods", f"qat,{method}", option, 0, *SHORT, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    plain = load_file(tmp_path / "out/seed0/qat/student.safetensors")
    other = load_file(tmp_path / f"out/seed0/{method}/student.safetensors")
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_the_two_views_of_a_step_are_independent_draws() -> None:
    both_weak = batches(student_view="weak")
    student, _ = both_weak.student(0)
    teacher = both_weak.teacher(0)
    assert student.shape == teacher.shape
    different = [not torch.equal(a, b) for a, b in zip(student, teacher, strict=True)]
    assert np.mean(different) > 0.5  # a crop of an 8x8 image has nine places, so some agree


def test_teacher_and_student_see_the_same_images_in_the_same_order() -> None:
    plain = batches(student_view="none", teacher_view="none")
    for step in (0, 7):
        student, labels = plain.student(step, unlabeled=True)
        assert len(labels) == 16
        assert len(student) == 32
        assert torch.equal(student, plain.teacher(step, unlabeled=True))


def test_views_depend_on_seed_and_step_only() -> None:
    forward, backward = batches(), batches()
    steps = range(2 * forward.steps_per_epoch)
    there = [forward.student(step, unlabeled=True)[0] for step in steps]
    torch.manual_seed(5)
    back = [backward.student(step, unlabeled=True)[0] for step in reversed(steps)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(there, back, strict=True))
    assert not torch.equal(there[0], batches(seed=1).student(0, unlabeled=True)[0])


def test_drawing_a_view_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches().student(0)
    assert torch.equal(torch.rand(3), expected)


def test_labeled_and_unlabeled_images_are_disjoint() -> None:
    found = batches()
    labeled, unlabeled = set(found.labeled.index.tolist()), set(found.unlabeled.index.tolist())
    assert len(labeled) == 100
    assert not labeled & unlabeled
    assert len(labeled | unlabeled) == len(found.images)


def test_fewer_unlabeled_images_are_some_of_more_and_chosen_by_the_seed() -> None:
    every, some, few = (batches(unlabeled=count).unlabeled.index.tolist() for count in (None, 500, 20))
    assert (len(some), len(few)) == (500, 20)
    assert set(few) < set(some) < set(every)
    assert every == sorted(every)
    other = {count: batches(unlabeled=count, seed=1).unlabeled.index for count in (None, 20)}
    assert np.searchsorted(every, few).tolist() != np.searchsorted(other[None], other[20]).tolist()
    assert batches(unlabeled=20).labeled.index.tolist() == batches().labeled.index.tolist()
    assert batches(unlabeled=5).unlabeled.size == 5  # less than a batch


def test_an_epoch_shows_each_image_at_most_once_and_in_a_new_order() -> None:
    found = batches(batch_size=10)
    first = torch.cat([found.labeled.at(step) for step in range(10)])
    second = torch.cat([found.labeled.at(step) for step in range(10, 20)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(found.labeled.index.tolist())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("count", [3, 10, 50, 119, 120])
def test_labels_are_kept_in_proportion(count: int) -> None:
    labels = np.repeat([0, 1, 2], [60, 40, 20])
    chosen = stratified(labels, count, seed=0, stream="labels")
    assert len(chosen) == count == len(set(chosen.tolist()))
    for name, size in ((0, 60), (1, 40), (2, 20)):
        kept = int((labels[chosen] == name).sum())
        assert kept >= 1
        assert abs(kept - count * size / 120) <= 1
    assert not np.array_equal(chosen, stratified(labels, count, seed=1, stream="labels")) or count in (3, 120)


def test_a_rare_class_keeps_an_image() -> None:
    labels = np.repeat([0, 1], [999, 1])
    assert labels[stratified(labels, 2, seed=0, stream="labels")].tolist() == [0, 1]
