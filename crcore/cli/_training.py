"""The training loop (torch): one loop for the float network and for every QAT method."""

import math
import time
from pathlib import Path
from typing import Any

import crcore_torch as crt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crcore as cr
from crcore.cli._batches import Batches
from crcore.cli._checkpoints import load_progress, save_progress
from crcore.cli._clock import Clock
from crcore.cli._evaluation import Evaluation
from crcore.cli._history import average_decay, check_finite, consistency_weight, history_entry, oscillation_record
from crcore.cli._methods import Method
from crcore.cli._progress import Progress
from crcore.cli._random import seed_of

SHOW_EVERY = 10  # steps; showing a loss waits for the device


def train(
    student: nn.Module,
    method: Method,
    *,
    recipe: cr.Recipe | None,
    reference: nn.Module | None,
    batches: Batches,
    evaluation: Evaluation,
    epochs: int,
    lr: float,
    weight_decay: float,
    evaluate_every: int,
    reestimate_batchnorm: int,
    amp: bool,
    progress: Progress,
    progress_file: Path,
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Train `student` in place and return the averaged network, where the method has one, and the record of the run.

    The run continues from `progress_file` where there is one, and ends as it would have ended without the interruption:
    what a step does depends on the seed, the step and the state in that file.

    Args:
        student: the network, prepared with `recipe`; in float where the method is "fp32".
        reference: the frozen float network for distillation.
        epochs: passes over the labeled images.
        lr: the peak of a cosine schedule that ends at zero.
        reestimate_batchnorm: batches after the last step on which BatchNorm of student and average is measured anew.
    """
    device = batches.images.device
    teacher = crt.Teacher(student, recipe.ema) if recipe and recipe.ema else None
    consistency = crt.ConsistencyLoss(recipe.consistency) if recipe and recipe.consistency else None
    groups = crt.parameter_groups(student, lr=lr, weight_decay=weight_decay)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    freezer = crt.Freezer(student, recipe.freezing) if recipe and recipe.freezing else None
    dampening = crt.DampeningLoss(recipe.dampening) if recipe and recipe.dampening else None
    for follower in (freezer, teacher):  # in this order, so that the teacher averages frozen weights
        if follower is not None:
            follower.follow(optimizer)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    parts = {"student": student, "teacher": teacher, "freezer": freezer}
    modules = {name: module for name, module in parts.items() if module is not None}
    steps = epochs * batches.steps_per_epoch
    record: dict[str, Any] = {"epochs": epochs, "steps": steps, "seconds": 0.0, "history": []}
    if progress_file.exists():
        record = load_progress(progress_file, modules, optimizer)
    clock = Clock(device, record.setdefault("seconds_by_part", {}))  # earlier versions did not write it
    progress.start(steps, done=len(record["history"]) * batches.steps_per_epoch)

    for epoch in range(len(record["history"]), epochs):
        began = time.perf_counter()
        clock.start()
        student.train()
        last = epoch + 1 == epochs
        meter = crt.OscillationMeter(student) if recipe and last else None
        if meter is not None:
            meter.follow(optimizer)
        task_sum = torch.zeros((), device=device)
        consistency_sum = torch.zeros((), device=device)
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
            torch.manual_seed(seed_of(batches.seed, "network", step))  # for random layers such as dropout
            x, y = batches.student(step, unlabeled=method.unlabeled)
            clock.lap("data")
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                logits = student(x)
                clock.lap("student")
                target = _target(method, teacher, reference, x, batches, step, clock)
            logits = logits.float()
            task = F.cross_entropy(logits[: len(y)], y)
            term = consistency(logits, target, step=step) if consistency is not None else torch.zeros_like(task)
            loss = task + term
            if dampening is not None:
                loss = loss + dampening(student, step=step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
            clock.lap("student")
            optimizer.step()
            task_sum += task.detach()
            consistency_sum += term.detach()
            if (step + 1) % SHOW_EVERY == 0:
                weight, decay = consistency_weight(recipe, step), average_decay(recipe, step + 1)
                progress.step(epoch + 1, step + 1, task.item(), term.item(), weight, decay)
                clock.lap("update")
                clock.settle()
            else:
                progress.advance()
                clock.lap("update")

        if meter is not None:
            frozen = None if freezer is None else freezer.frozen
            record["oscillation"] = oscillation_record(meter.total(), frozen=frozen)
        measured = last or (epoch + 1) % evaluate_every == 0
        task_mean = task_sum.item() / batches.steps_per_epoch
        consistency_mean = consistency_sum.item() / batches.steps_per_epoch
        clock.lap("update")
        check_finite(task_mean + consistency_mean, method, seed=batches.seed, epoch=epoch + 1, lr=lr)
        if last and reestimate_batchnorm:
            for network in (student, *([] if teacher is None else [teacher.model])):
                views = batches.further(steps, reestimate_batchnorm, unlabeled=method.unlabeled)
                crt.reestimate_batchnorm(network, views)
            clock.lap("update")
        entry = history_entry(
            recipe,
            epoch=epoch + 1,
            step=(epoch + 1) * batches.steps_per_epoch,
            task=task_mean,
            consistency=consistency_mean,
            accuracy=evaluation.accuracy(student) if measured else None,
            teacher_accuracy=evaluation.accuracy(teacher.model) if measured and teacher is not None else None,
        )
        clock.lap("evaluation")
        clock.settle()
        record["history"].append(entry)
        record["seconds"] += time.perf_counter() - began
        save_progress(progress_file, modules, optimizer, record)
        progress.epoch(entry, epochs)
    optimizer.zero_grad()  # a copy of the network would carry its gradients along
    if teacher is not None:
        teacher.eval()
    student.eval()
    return None if teacher is None else teacher.model, record


def _target(
    method: Method,
    teacher: crt.Teacher | None,
    reference: nn.Module | None,
    x: Tensor,
    batches: Batches,
    step: int,
    clock: Clock,
) -> Tensor | None:
    """The logits that the student is asked to agree with, without a graph."""
    if method.distillation and reference is not None:
        with torch.no_grad():
            logits: Tensor = reference(x)
        clock.lap("teacher")
        return logits.float()
    if method.consistency and teacher is not None:
        view = batches.teacher(step, unlabeled=method.unlabeled)
        clock.lap("data")
        averaged: Tensor = teacher(view)
        clock.lap("teacher")
        return averaged.float()
    return None
