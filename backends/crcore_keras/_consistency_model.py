"""`ConsistencyModel`: the method through ``fit()``. Everything it does in a step lives inside the compiled step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from crcore import EMA, CRCoreError, Recipe
from crcore_keras._augment import apply, check_savable, seeds_of
from crcore_keras._checks import check_arguments
from crcore_keras._data import LABELED, UNLABELED, check_alike, has_unlabeled, labeled, with_unlabeled
from crcore_keras._fake_quantize import FakeQuantize
from crcore_keras._layers import PACKAGE, quantizers_in
from crcore_keras._logged import fresh, logs_of
from crcore_keras._logits import logits_function
from crcore_keras._loss import consistency_loss, ema_update_
from crcore_keras._model import calibrate, first_batch, is_calibrated, recompile, spare_scales
from crcore_keras._oscillation import Freezer, dampening_loss
from crcore_keras._prepare import copied
from crcore_keras._xp import xp

SEED = "seed_"  # in files, before the number of a seed generator
Network = Literal["student", "teacher", "both"]


@keras.saving.register_keras_serializable(PACKAGE)
class ConsistencyModel(keras.Model):
    """Train a quantized student to agree with its own moving average on another view of each input.

        loss = task(student(a(x)), y) + lambda(t) * D(student(a(x)) || teacher(b(x)))

    In training the model is the student on one view; in ``evaluate`` and ``predict`` it is the student on the input
    itself, at no cost for the teacher. ``compile`` and ``fit`` are Keras', with one more argument, ``unlabeled``.

    Step t's teacher includes the student after step t - 1; BatchNorm statistics (unless ``ema`` says that they are
    copied) and observed ranges are averaged like the weights, other state is copied. The teacher is in inference mode
    and quantized with its own averaged scales. A step is an optimizer step, however many batches
    ``gradient_accumulation_steps`` gathers for it (one that loss scaling skips counts too). ``sample_weight`` and
    ``class_weight`` act on the task loss alone.

    Args:
        student: a model from `prepare`. Its output is taken for logits, or, where its last layer is a softmax, for
            probabilities.
        recipe: whose ``consistency``, ``ema``, ``dampening`` and ``freezing`` are used. Without ``consistency`` this is
            QAT, with an average where ``ema`` is given.
        augment: a layer, or a function of a batch, applied twice with independent draws. None: the training data yield
            both views, ``((view, other_view), y)``.
        output: the name of the output that is held to the teacher, of a model with several.
        teacher: a float network to distill from, in place of the average: a frozen copy of it sees the student's own
            view.

    Attributes:
        student: the trained network.
        teacher: the averaged network, an ordinary model, compiled like this one; None where there is none.
        step: optimizer steps that the average includes, all where there is none; what the lambda schedule takes.

    Raises:
        CRCoreError: the student is not prepared, the recipe asks for what cannot be, or ``output`` is no output.

    >>> import crcore as cr, keras
    >>> from crcore_keras import prepare
    >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])
    >>> recipe = cr.Recipe(cr.LSQ(4), cr.LSQ(4), consistency=cr.Consistency(), ema=cr.EMA(0.9))
    >>> model = ConsistencyModel(prepare(net, recipe), recipe, augment=keras.layers.GaussianNoise(0.1))
    >>> model.step
    0
    """

    def __init__(
        self,
        student: Any,
        recipe: Recipe,
        augment: Any = None,
        *,
        output: str | None = None,
        teacher: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        check_arguments(student, recipe, augment, teacher)
        self.student = student
        self.recipe = recipe
        self.augment = augment
        self._output = output
        self._distills = teacher is not None
        self._ema = None if self._distills else recipe.ema or (EMA() if recipe.consistency else None)
        self.teacher: Any = copied(teacher) if self._distills else None  # the user's model stays trainable
        if self._ema is not None:
            self.teacher = copied(student)
            for quantizer in quantizers_in(self.teacher):
                quantizer.enabled = self._ema.quantized
        if self.teacher is not None:
            self.teacher.trainable = False
        self._seeds = seeds_of(augment)  # so that Keras carries their state through a compiled step, and saves it
        self._logits = logits_function(student, output)
        self._teacher_logits: Any = logits_function(self.teacher, output) if self.teacher is not None else None
        if hasattr(student, "output_names"):  # by which Keras finds losses and metrics of several outputs
            self.output_names = student.output_names
        # Counted here, because an optimizer's own counter cannot be read inside of a compiled step on JAX.
        # An update is due where fewer were made than optimizer steps, whatever optimizer comes next.
        self._updates, self._steps, self._batches = (
            self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name=counter)
            for counter in ("updates", "optimizer_steps", "batches_since_step")
        )
        self._batches_per_step = 1
        self._freezer = None if recipe.freezing is None else Freezer(self, student, recipe.freezing)
        self._logged = logs_of(recipe, has_average=self._ema is not None)
        self._in_training = False
        self.validates: Network = "student"  # what fit() evaluates; set by ConsistencyCallback
        self._views = _Scratch()
        self.built = True

    @property
    def step(self) -> int:
        """Optimizer steps that the average includes; all of them, where there is no average."""
        return int(ops.convert_to_numpy(self._steps if self._ema is None else self._updates))

    @property
    def has_average(self) -> bool:
        """Whether the teacher is the student's moving average."""
        return self._ema is not None

    @property
    def frozen(self) -> float:
        """The fraction of the quantized weights that `crcore.Freezing` has frozen."""
        return 0.0 if self._freezer is None else self._freezer.frozen

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, **options: Any) -> None:
        """As `keras.Model.compile`; keeps weight decay away from scales, and compiles the teacher for evaluation."""
        super().compile(optimizer, loss, **options)
        spare_scales(self, self.optimizer)
        if self._ema is not None:
            for_networks = {key: keras.tree.map_structure(fresh, options[key]) for key in options if "metrics" in key}
            self.teacher.compile("sgd", loss, **(options | for_networks))
        self.update_teacher()  # what an earlier optimizer did
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)  # of a LossScaleOptimizer
        self._batches_per_step = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        self._batches.assign(0)

    def compile_from_config(self, config: Any) -> None:
        """Called by Keras on loading."""
        recompile(self, config)

    def fit(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, *, unlabeled: Any = None, **options: Any
    ) -> Any:
        """As `keras.Model.fit`, with one argument more.

        Args:
            x, y, batch_size, options: as there.
            unlabeled: inputs without labels that take part in the consistency term: an array, or anything that ``x``
                may be, whose batches are inputs (labels in it are not used). It is repeated for as long as ``x`` lasts.

        Raises:
            CRCoreError: one view where two are needed; unlabeled data without a consistency term.
        """
        if unlabeled is not None:
            if self.recipe.consistency is None:
                raise CRCoreError("unlabeled data take part in the consistency term; give Recipe(consistency=...)")
            x, options = with_unlabeled(x, y, unlabeled, batch_size, options)
            y = batch_size = None
        batch, x = first_batch(x, batch_size)
        self._prepare_for(batch)
        self.validates = "student"  # until a callback of this run says otherwise
        self._in_training = True
        history = super().fit(x, y, batch_size, **options)
        self.update_teacher()
        return history

    def train_on_batch(self, x: Any, *args: Any, **options: Any) -> Any:
        """As `keras.Model.train_on_batch`."""
        self._prepare_for(x)
        return super().train_on_batch(x, *args, **options)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **options: Any) -> Any:
        """As `keras.Model.evaluate`, of the student; `ConsistencyCallback` says what ``fit`` evaluates."""
        self.update_teacher()
        in_training, self._in_training = self._in_training, False
        try:
            return self._evaluate(x, y, *args, **options)
        finally:
            self._in_training = in_training

    def _evaluate(self, x: Any, y: Any, *args: Any, **options: Any) -> Any:
        if not options.get("_use_cached_eval_dataset"):
            return super().evaluate(x, y, *args, **options)
        logs: dict[str, Any] = {}
        if self.validates != "teacher":
            logs |= super().evaluate(x, y, *args, **options)
        if self.validates != "student":
            options["_use_cached_eval_dataset"] = False
            found = self.teacher.evaluate(x, y, *args, **options | {"callbacks": None, "verbose": 0})
            logs |= {f"teacher_{name}": value for name, value in found.items()}
        return logs

    def call(self, x: Any, training: bool = False) -> Any:
        """The student: on one view in training, on the input itself otherwise."""
        if not training:
            x = x[LABELED] if has_unlabeled(x) else x
            return self.student(x[0] if self._is_pair(x) else x, training=False)
        self._follow()  # before the student's statistics and observed ranges include this step
        x = self._joined(x)
        view = self._augmented(x, 0)
        dampening = None
        if self.recipe.dampening is not None:
            # Here, because on JAX `compute_loss` sees weights as they were before some were frozen. A copy of the step:
            # TensorFlow may read the variable itself only after this batch was counted.
            dampening = dampening_loss(self.recipe.dampening, self.student, step=ops.copy(self._steps))
        self._views.value = x, view, dampening
        return self.student(view, training=True)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The task loss; in training the consistency term besides."""
        self._in_training = training
        task = super().compute_loss(x, y, labeled(x, y_pred), sample_weight, training)
        given, self._views.value = self._views.value, None
        if not training:
            return task
        if self._ema is not None:  # not logged in `call`, from which JAX takes no metrics
            self._record("decay", self._decay_at(ops.maximum(self._updates - 1, 0)))
        step = self._count_batch()
        inputs, view, dampening = given  # as `call` had them: in the dtype of the policy, of the engine's kind
        self._record("task_loss", task)
        total = task
        if dampening is not None:
            self._record("dampening_loss", dampening)
            total = total + ops.cast(dampening, task.dtype)
        if self.recipe.consistency is None:
            return total
        if not self._distills:
            view = self._augmented(inputs, 1)
        target = self._teacher_logits(self.teacher(view, training=False))
        term, weight = consistency_loss(self.recipe.consistency, self._logits(y_pred), target, step=step)
        self._record("consistency_loss", term)
        self._record("lambda", weight)
        return total + ops.cast(term, task.dtype)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Of the labeled inputs."""
        return super().compute_metrics(x, y, labeled(x, y_pred), sample_weight)  # type: ignore[no-any-return]

    def get_metrics_result(self) -> dict[str, Any]:
        """What is logged: lambda and the like in training only."""
        logs = super().get_metrics_result()
        return {name: value for name, value in logs.items() if self._in_training or name not in self._logged}

    def update_teacher(self) -> None:
        """Let the average, and what is frozen, include the last optimizer step.

        Done before evaluation and at the end of ``fit``.
        """
        is_due = int(ops.convert_to_numpy(self._updates)) < int(ops.convert_to_numpy(self._steps))
        if is_due or self._freezer is not None:  # on JAX, the last batch may have left frozen weights elsewhere
            self._follow()

    def save_own_variables(self, store: Any) -> None:
        """Called by Keras; saves the state of random layers besides, so that a resumed run draws as it would have."""
        if self._freezer is not None:  # the student is saved after its owner
            self.update_teacher()
        super().save_own_variables(store)
        for index, seed in enumerate(self._seed_states()):
            store[f"{SEED}{index}"] = ops.convert_to_numpy(seed)

    def load_own_variables(self, store: Any) -> None:
        """Called by Keras. A model with other random layers than the saved one keeps its own seeds."""
        keys = list(store.keys())
        seeds = [key for key in keys if key.startswith(SEED)]
        super().load_own_variables({key: store[key] for key in keys if key not in seeds})
        if len(seeds) == len(self._seed_states()):
            for index, seed in enumerate(self._seed_states()):
                seed.assign(np.asarray(store[f"{SEED}{index}"]))

    def _seed_states(self) -> list[Any]:
        return [generator.state for layer in self._flatten_layers() for generator in layer._seed_generators]

    def get_config(self) -> dict[str, Any]:
        """For `from_config`."""
        serialize = keras.saving.serialize_keras_object
        check_savable(self.augment)
        return {
            "name": self.name,
            "student": serialize(self.student),
            "recipe": self.recipe.to_dict(),
            "augment": serialize(self.augment),
            "output": self._output,
            "teacher": serialize(self.teacher) if self._distills else None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> ConsistencyModel:
        """The model that `get_config` described, with fresh variables."""
        given = dict(config)
        for key in ("student", "augment", "teacher"):
            given[key] = keras.saving.deserialize_keras_object(given[key], custom_objects=custom_objects)
        given["recipe"] = Recipe.from_dict(given["recipe"])
        return cls(**given)

    def _prepare_for(self, batch: Any) -> None:
        """Check the views, and set the scales that are missing; the average then starts from the student."""
        if has_unlabeled(batch):
            check_alike(batch)
        if self.recipe.consistency is not None and self.augment is None:
            for part in batch.values() if has_unlabeled(batch) else [batch]:
                if not self._is_pair(part) and not self._distills:
                    shape = keras.tree.map_structure(lambda array: tuple(array.shape), part)
                    raise CRCoreError(
                        f"the consistency term needs two views of each input, the data give one, of shape {shape}; "
                        "give ConsistencyModel(..., augment=layer), or data that yield ((view, other_view), y)"
                    )
        if not is_calibrated(self.student):
            calibrate(self, batch)
            self._views.value = None
        if self._freezer is not None and not int(ops.convert_to_numpy(self._steps)):
            self._freezer.start()
        if self._ema is not None and not is_calibrated(self.teacher):
            for mine, source in zip(quantizers_in(self.teacher), quantizers_in(self.student), strict=True):
                if not mine.initialized:
                    mine.adopt(source)

    def _joined(self, x: Any) -> Any:
        if not has_unlabeled(x):
            return x
        return keras.tree.map_structure(lambda *parts: ops.concatenate(parts, axis=0), x[LABELED], x[UNLABELED])

    def _augmented(self, x: Any, which: int) -> Any:
        if self.augment is None:
            return x[which] if self._is_pair(x) else x
        return apply(self.augment, x)

    def _is_pair(self, x: Any) -> bool:
        """Whether these are two views, and not the inputs of a network with two."""
        if self.augment is not None or not isinstance(x, (tuple, list)) or len(x) != 2:
            return False
        inputs = getattr(self.student, "inputs", None)
        return inputs is None or len(inputs) == 1 or isinstance(x[0], (tuple, list, dict))

    def _count_batch(self) -> Any:
        """Count the batch at hand; returns the optimizer steps made before it."""
        steps, batches = ops.copy(self._steps), ops.copy(self._batches) + 1
        is_step = batches >= self._batches_per_step
        self._steps.assign(steps + ops.cast(is_step, "int32"))
        self._batches.assign(ops.where(is_step, 0, batches))
        return steps

    def _follow(self) -> None:
        """What follows an optimizer step: weights are frozen, then averaged; traced or not."""
        if self._freezer is not None:
            updates = ops.copy(self._updates)
            self._freezer.update(updates, is_due=ops.copy(self._steps) > updates)
            if self._ema is None:
                self._updates.assign(ops.copy(self._steps))
        if self._ema is not None:
            self._move_average()

    def _move_average(self) -> None:
        """One step of the average, where an optimizer step was made since the last one; traced or not."""
        updates = ops.copy(self._updates)
        is_due = ops.copy(self._steps) > updates
        averaged, copied_ = _state_pairs(self.teacher, self.student, batchnorm=self._ema.batchnorm)  # type: ignore[union-attr]
        moves = ops.where(is_due, self._decay_at(updates), 1.0)
        ema_update_([mine for mine, _ in averaged], [source for _, source in averaged], moves)
        for mine, source in copied_:
            mine.assign(ops.where(is_due, ops.copy(source), ops.copy(mine)))
        self._updates.assign(updates + ops.cast(is_due, "int32"))

    def _decay_at(self, updates: Any) -> Any:
        return self._ema.decay_at(ops.cast(updates, "float32"), xp=xp)  # type: ignore[union-attr]

    def _record(self, name: str, value: Any) -> None:
        if name in self._logged:
            self._logged[name].update_state(value)


class _Scratch:
    """Carries inputs, the student's view and the dampening term from ``call`` to ``compute_loss``, within one trace."""

    value: Any = None


def _state_pairs(teacher: Any, student: Any, *, batchnorm: str) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """The teacher's variable and the student's: those that are averaged, and those that are copied."""
    kinds = (FakeQuantize, keras.layers.BatchNormalization) if batchnorm == "average" else (FakeQuantize,)
    averaged: list[tuple[Any, Any]] = []
    copies: list[tuple[Any, Any]] = []
    for mine, source in zip(teacher._flatten_layers(), student._flatten_layers(), strict=True):
        has_statistics = isinstance(mine, kinds)
        averaged += zip(mine._trainable_variables, source._trainable_variables, strict=True)
        for pair in zip(mine._non_trainable_variables, source._non_trainable_variables, strict=True):
            is_statistic = has_statistics and keras.backend.is_float_dtype(pair[0].dtype)
            (averaged if is_statistic else copies).append(pair)
    return averaged, copies
