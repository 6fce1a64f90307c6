"""The training of Keras networks: `ConsistencyModel.fit`, on the batches that the torch loop sees, step for step."""

import threading
import time
from pathlib import Path
from typing import Any

import crcore_keras as crk
import keras
import torch

import crcore as cr
from crcore.cli._batches import Batches
from crcore.cli._history import average_decay, check_finite, consistency_weight, history_entry, oscillation_record
from crcore.cli._keras_checkpoints import load_progress, save_progress
from crcore.cli._keras_evaluation import KerasEvaluation, channels_last
from crcore.cli._methods import Method
from crcore.cli._progress import Progress
from crcore.cli._random import seed_of

SHOW_EVERY = 10  # steps


def train(
    student: Any,
    method: Method,
    *,
    recipe: cr.Recipe | None,
    reference: Any,
    batches: Batches,
    evaluation: KerasEvaluation,
    epochs: int,
    lr: float,
    weight_decay: float,
    evaluate_every: int,
    reestimate_batchnorm: int,
    progress: Progress,
    progress_file: Path,
) -> tuple[Any, dict[str, Any]]:
    """Train `student` in place and return the averaged network, where the method has one, and the record of the run.

    The run continues from `progress_file` where there is one, and ends as it would have ended without the interruption:
    what a step does depends on the seed, the step and the state in that file. The arguments are those of
    `_training.train`.
    """
    per_epoch = batches.steps_per_epoch
    steps = epochs * per_epoch
    if recipe is None:  # around the network, so that its checkpoint holds no optimizer
        model = keras.Sequential([keras.Input(batches_shape(batches)), student])
    else:
        model = crk.ConsistencyModel(student, recipe, teacher=reference if method.distillation else None)
    model.compile(
        SGD(
            keras.optimizers.schedules.CosineDecay(lr, steps),
            momentum=0.9,
            nesterov=True,
            weight_decay=weight_decay,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)
    record: dict[str, Any] = {"epochs": epochs, "steps": steps, "seconds": 0.0, "history": []}
    if progress_file.exists():
        record = load_progress(progress_file, model)
    record.setdefault("seconds_by_part", dict.fromkeys(("data", "network", "evaluation"), 0.0))  # newer than the rest
    done = len(record["history"])
    progress.start(steps, done=done * per_epoch)
    averaged = model.teacher if recipe and recipe.ema else None
    if done < epochs:
        data = Steps(batches, method, first=done * per_epoch, steps=steps)
        recorder = Recorder(
            record,
            data=data,
            student=student,
            averaged=averaged,
            method=method,
            recipe=recipe,
            batches=batches,
            evaluation=evaluation,
            evaluate_every=evaluate_every,
            reestimate_batchnorm=reestimate_batchnorm,
            lr=lr,
            progress=progress,
            progress_file=progress_file,
        )
        model.fit(
            data,
            epochs=epochs,
            initial_epoch=done,
            steps_per_epoch=per_epoch,
            shuffle=False,
            verbose=0,
            callbacks=[recorder],
        )
    if averaged is not None:
        model.update_teacher()
    return averaged, record


class Steps(keras.utils.PyDataset):
    """One item for each optimizer step that is left: a function of the step alone, however often it is asked for."""

    def __init__(self, batches: Batches, method: Method, *, first: int, steps: int) -> None:
        super().__init__()
        self._batches, self._method, self._first, self._steps = batches, method, first, steps
        self._lock = threading.Lock()  # TensorFlow asks from threads of its own, and `Batches` keeps the last order
        self.seconds = 0.0  # spent here since it was set to zero

    def __len__(self) -> int:
        return self._steps - self._first

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        step, method = self._first + index, self._method
        with self._lock:
            began = time.perf_counter()
            views, labels = self._batches.student(step, unlabeled=method.unlabeled)
            x: Any = channels_last(views)
            if method.consistency:
                x = (x, channels_last(self._batches.teacher(step, unlabeled=method.unlabeled)))
            self.seconds += time.perf_counter() - began
        if method.unlabeled:
            count = len(labels)
            x = {"labeled": tuple(view[:count] for view in x), "unlabeled": tuple(view[count:] for view in x)}
        return x, labels.numpy()


class Recorder(keras.callbacks.Callback):
    """Shows the steps; after each epoch tests the networks, writes the history and what a resumed run starts from."""

    def __init__(
        self,
        record: dict[str, Any],
        *,
        data: "Steps",
        student: Any,
        averaged: Any,
        method: Method,
        recipe: cr.Recipe | None,
        batches: Batches,
        evaluation: KerasEvaluation,
        evaluate_every: int,
        reestimate_batchnorm: int,
        lr: float,
        progress: Progress,
        progress_file: Path,
    ) -> None:
        super().__init__()
        self.record, self.data, self.method, self.recipe = record, data, method, recipe
        self.student, self.averaged = student, averaged
        self.batches, self.evaluation, self.evaluate_every, self.lr = batches, evaluation, evaluate_every, lr
        self.reestimate_batchnorm = reestimate_batchnorm
        self.progress, self.progress_file = progress, progress_file
        self._began = time.perf_counter()
        self._epoch = len(record["history"])
        self._meter: crk.OscillationMeter | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Called by Keras."""
        self._epoch = epoch
        if self.recipe is not None and epoch + 1 == self.record["epochs"]:
            self._meter = crk.OscillationMeter(self.student)
            self._meter.set_model(self.model)
            self._meter.reset()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Called by Keras."""
        # For random layers: on torch Keras draws from torch's generator, elsewhere from variables, which are saved.
        step = self._epoch * self.batches.steps_per_epoch + batch
        torch.manual_seed(seed_of(self.batches.seed, "network", step))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Called by Keras; `logs` are means over the epoch so far."""
        if self._meter is not None:
            self._meter.update()
        step = self._epoch * self.batches.steps_per_epoch + batch
        if (step + 1) % SHOW_EVERY:
            self.progress.advance()
            return
        weight, decay = consistency_weight(self.recipe, step), average_decay(self.recipe, step + 1)
        self.progress.step(self._epoch + 1, step + 1, *_losses(logs or {}), weight, decay)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Called by Keras."""
        epochs = self.record["epochs"]
        task, consistency = _losses(logs or {})
        check_finite(task + consistency, self.method, seed=self.batches.seed, epoch=epoch + 1, lr=self.lr)
        trained = time.perf_counter()
        measured = epoch + 1 == epochs or (epoch + 1) % self.evaluate_every == 0
        if measured and self.recipe is not None:
            self.model.update_teacher()
        if epoch + 1 == epochs and self.reestimate_batchnorm:
            steps, unlabeled = epochs * self.batches.steps_per_epoch, self.method.unlabeled
            for network in (self.student, *([] if self.averaged is None else [self.averaged])):
                views = self.batches.further(steps, self.reestimate_batchnorm, unlabeled=unlabeled)
                crk.reestimate_batchnorm(network, map(channels_last, views))
        if self._meter is not None and self.recipe is not None:
            frozen = None if self.recipe.freezing is None else self.model.frozen
            self.record["oscillation"] = oscillation_record(self._meter.total(), frozen=frozen)
        entry = history_entry(
            self.recipe,
            epoch=epoch + 1,
            step=(epoch + 1) * self.batches.steps_per_epoch,
            task=task,
            consistency=consistency,
            accuracy=self.evaluation.accuracy(self.student) if measured else None,
            teacher_accuracy=self.evaluation.accuracy(self.averaged)
            if measured and self.averaged is not None
            else None,
        )
        now = time.perf_counter()
        self.record["history"].append(entry)
        self.record["seconds"] += now - self._began
        # TensorFlow draws the views while the network computes: their seconds count as theirs all the same.
        data, self.data.seconds = self.data.seconds, 0.0
        parts = {"data": data, "network": max(trained - self._began - data, 0.0), "evaluation": now - trained}
        for part, seconds in parts.items():
            self.record["seconds_by_part"][part] += seconds
        self._began = now
        save_progress(self.progress_file, self.model, self.record)
        self.progress.epoch(entry, epochs)


class SGD(keras.optimizers.SGD):
    """SGD with Nesterov momentum to the formula of torch, so that both backends take the same steps.

        g <- g + weight_decay * w;  m <- momentum * m + g;  w <- w - lr * (g + momentum * m)

    Keras multiplies the learning rate into ``m``, where a schedule comes late, and keeps weight decay out of it. Which
    variables decay is Keras' choice still, so that crcore_keras can spare the scales.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Called by Keras for each variable."""
        rate = keras.ops.cast(learning_rate, variable.dtype)
        gradient = keras.ops.cast(gradient, variable.dtype)
        if self.weight_decay and self._use_weight_decay(variable):
            gradient = gradient + self.weight_decay * variable
        average = self.momentums[self._get_variable_index(variable)]
        moved = self.momentum * average + gradient
        self.assign(average, moved)
        self.assign_sub(variable, rate * (gradient + self.momentum * moved))

    def _apply_weight_decay(self, variables: Any) -> None:
        """Called by Keras; done in `update_step`."""


def batches_shape(batches: Batches) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    _, channels, height, width = batches.images.shape
    return height, width, channels


def _losses(logs: dict[str, Any]) -> tuple[float, float]:
    """The task loss and the consistency term; Keras calls the former "loss" where it is all there is."""
    return float(logs.get("task_loss", logs["loss"])), float(logs.get("consistency_loss", 0.0))
