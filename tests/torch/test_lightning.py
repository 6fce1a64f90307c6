"""`TeacherCallback`: per optimizer step, through checkpoints, and gone when the fit is over."""

from __future__ import annotations

import crcore_torch as crt
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from crcore_torch.lightning import TeacherCallback
from small_nets import CONSISTENCY, assert_same_bits, mlp, recipe, snapshot, vectors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import crcore as cr

pytestmark = [
    # Lightning's advice about workers, device and logging intervals, which a test of eight batches does not follow.
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # The teacher is in eval mode, as it must be.
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    # Lightning itself calls what torch has deprecated.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
]


class Module(L.LightningModule):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.student = crt.prepare(mlp(), recipe())
        self.teacher = crt.Teacher(self.student, cr.EMA(0.9, warmup=3))
        self.consistency = crt.ConsistencyLoss(CONSISTENCY)

    def training_step(self, batch, index):
        x, y = batch
        logits = self.student(x)
        return F.cross_entropy(logits, y) + self.consistency(logits, self.teacher(x + 0.1), step=self.teacher.step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)


class Validated(Module):
    def validation_step(self, batch, index):
        self.student(batch[0])


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*vectors(32)), batch_size=4)  # eight batches


def fit(module, epochs, *, callbacks=None, checkpoint=None, validate=None, **options):
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks if callbacks is not None else [TeacherCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"accumulate_grad_batches": 2} | options,
    )
    trainer.fit(module, loader(), validate, ckpt_path=checkpoint)
    return trainer


def test_the_teacher_follows_per_optimizer_step():
    module = Module()
    before = snapshot(module.teacher)
    trainer = fit(module, 2)
    assert module.teacher.step == trainer.global_step == 8  # two epochs of eight batches, two batches a step
    assert not torch.equal(before["model.0.weight"], module.teacher.model[0]._parameters["weight"])
    assert trainer.callback_metrics["teacher_decay"] == pytest.approx(0.9)
    assert not any(m.training for m in module.teacher.modules())


def test_it_is_the_plain_loop():
    module, plain = Module(), Module()
    optimizer = plain.configure_optimizers()
    plain.teacher.follow(optimizer)
    fit(module, 1, accumulate_grad_batches=1)
    for index, batch in enumerate(loader()):
        optimizer.zero_grad()
        plain.training_step(batch, index).backward()
        optimizer.step()
    assert_same_bits(snapshot(plain), snapshot(module))


def test_resuming_continues_to_the_bit(tmp_path):
    whole = Module()
    fit(whole, 2)
    half = Module()
    fit(half, 1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(seed=1)
    fit(resumed, 2, checkpoint=tmp_path / "half.ckpt")
    assert resumed.teacher.step == 8
    assert_same_bits(snapshot(whole), snapshot(resumed))


def test_it_stops_following_when_the_fit_ends_or_fails():
    module = Module()
    trainer = fit(module, 1)
    trainer.optimizers[0].step()
    assert module.teacher.step == 4

    class Failing(Module):
        def training_step(self, batch, index):
            if index == 3:
                raise RuntimeError("no more")
            return super().training_step(batch, index)

    failing, callback = Failing(), TeacherCallback()
    optimizers = []
    configure = failing.configure_optimizers
    failing.configure_optimizers = lambda: optimizers.append(configure()) or optimizers[0]
    with pytest.raises(RuntimeError, match="no more"):
        fit(failing, 1, callbacks=[callback])
    assert failing.teacher.step == 1
    optimizers[0].step()
    assert failing.teacher.step == 1


def test_fitting_again_goes_on():
    module, callback = Module(), TeacherCallback()
    fit(module, 1, callbacks=[callback])
    fit(module, 1, callbacks=[callback])
    assert module.teacher.step == 8


def test_half_precision_works():
    module = Module()
    fit(module, 1, precision="bf16-mixed")
    assert module.teacher.step == 4
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())


def test_with_two_optimizers_a_step_is_complete_with_the_second():
    class Apart(Module):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.teacher = crt.Teacher(self.student, cr.EMA(0.0))

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            net, scales = crt.parameter_groups(self.student, lr=0.05)
            other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
            return torch.optim.SGD([net]), torch.optim.Adam([scales]), other

    module = Apart()
    fit(module, 1, accumulate_grad_batches=1)
    assert module.teacher.step == 8
    assert_same_bits(snapshot(module.student), snapshot(module.teacher.model))  # weights and scales of the last step


def test_a_teacher_elsewhere_is_found_by_its_name():
    class Elsewhere(Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleDict({"average": self.teacher})

    module = Elsewhere()
    trainer = fit(module, 1, callbacks=[TeacherCallback("nets.average")])
    assert module.teacher.step == 4
    assert "nets.average_decay" in trainer.callback_metrics


def test_a_missing_teacher_is_named_before_anything_is_trained():
    class Without(Module):
        def __init__(self):
            super().__init__()
            del self.teacher

    with pytest.raises(cr.CRCoreError, match=r"found nothing at Without.teacher; write self.teacher = crcore"):
        fit(Without(), 1)
    with pytest.raises(cr.CRCoreError, match=r"TeacherCallback\('student'\) found a Sequential at Module.student"):
        fit(Module(), 1, callbacks=[TeacherCallback("student")])


def test_an_optimizer_of_something_else_is_an_error():
    class Wrong(Module):
        def configure_optimizers(self):
            self.other = nn.Linear(2, 2)
            return torch.optim.SGD(self.other.parameters(), lr=0.1)

    with pytest.raises(cr.CRCoreError, match="trains none of the student's parameters"):
        fit(Wrong(), 1)


def test_the_sanity_check_of_a_student_without_scales_says_what_to_do():
    with pytest.raises(cr.CRCoreError, match=r"use Trainer\(num_sanity_val_steps=0\)"):
        fit(Validated(), 1, validate=loader())
    fit(Validated(), 1, validate=loader(), num_sanity_val_steps=0)
    started = Validated()
    started.student(vectors()[0])
    fit(started, 1, validate=loader())
    assert started.teacher.step == 4
