"""One small training, in PyTorch and in Keras: the same weights, batches, views and recipe.

`torch_run` and `keras_run` give the same flat dictionary of NumPy arrays, in PyTorch's names and layouts:

    "log/<name>"                                    one number per step; <name> is one of LOGS
    "<step>/<network>/<group>/<layer>.<tensor>"     after that step; <network> is student, teacher (which that step
                                                    met) or next_teacher; <group> is weights, scales, statistics or
                                                    codes, the integers of the weights

torch and keras are imported by the functions that need them, so that each can run without the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import crcore as cr

LOGS = ("task_loss", "consistency_loss", "lambda", "decay", "loss")
SIZE, CHANNELS, CLASSES, BATCH = 4, 4, 4, 8
# A power of two, which both precisions hold exactly.
LEARNING_RATE, MOMENTUM = 2.0**-6, 0.9
# Keras' momentum is the share that stays, PyTorch's the share that is new; their epsilons differ by default.
NEW_SHARE, EPSILON = 0.1, 1e-5
# Layer, kind, inputs, outputs, in the order of the forward pass.
LAYERS = (
    ("conv1", "conv", 3, CHANNELS),
    ("conv2", "conv", CHANNELS, CHANNELS),
    ("conv3", "conv", CHANNELS, CHANNELS),
    ("dense", "dense", CHANNELS, CLASSES),
)
LSQ_W4A4 = (cr.LSQ(4, per_channel=True), cr.LSQ(4))


@dataclass(frozen=True)
class Training:
    """What is trained how; the same for every framework.

    Args:
        quantizers: of weights and of activations; the first and the last layer get 8 bits.
        batch_norm: BatchNorm after each convolution, which then has no bias.
        dtype: "float32" or "float64", of everything.
        calibrated: set the activations' ranges from a batch that is not trained on. PACT and MinMax start at the
            largest value of the batch that sets them; were that trained on, the last bit of this very element would
            decide whether it lies inside and gets a gradient.
        steps: optimizer steps.
        report: the steps after which the networks are looked at.
    """

    quantizers: tuple[Any, Any] = LSQ_W4A4
    batch_norm: bool = True
    dtype: str = "float32"
    calibrated: bool = False
    steps: int = 50
    report: tuple[int, ...] = (1, 10, 50)

    @property
    def recipe(self) -> cr.Recipe:
        """Consistency by KL with a sigmoid ramp of 30 steps, an average that warms up for 20."""
        return cr.Recipe(
            *self.quantizers,
            first_last_bits=8,
            consistency=cr.Consistency(cr.kl_divergence, weight=cr.sigmoid_ramp(1.0, steps=30)),
            ema=cr.EMA(decay=0.99, warmup=20),
        )

    def initial(self) -> dict[str, np.ndarray]:
        """Every variable of the float network, by PyTorch's names and in PyTorch's layouts."""
        rng = np.random.default_rng(0)
        found: dict[str, np.ndarray] = {}
        for name, kind, inputs, outputs in LAYERS:
            kernel = (outputs, inputs, 3, 3) if kind == "conv" else (outputs, inputs)
            found[f"{name}.weight"] = rng.normal(0.0, (2.0 / np.prod(kernel[1:])) ** 0.5, kernel)
            if kind == "dense" or not self.batch_norm:
                found[f"{name}.bias"] = rng.normal(0.0, 0.1, outputs)
            else:
                norm = name.replace("conv", "bn")
                for tensor, low, high in (("weight", 0.8, 1.2), ("bias", -0.1, 0.1)):
                    found[f"{norm}.{tensor}"] = rng.uniform(low, high, outputs)
                for tensor, low, high in (("running_mean", -0.1, 0.1), ("running_var", 0.8, 1.2)):
                    found[f"{norm}.{tensor}"] = rng.uniform(low, high, outputs)
        return {name: array.astype("float32").astype(self.dtype) for name, array in found.items()}

    def batches(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """``(view, other view, labels)``, one to calibrate with and one per step.

        Images are ``[N, H, W, C]``: a pattern per class, and noise.
        """
        rng = np.random.default_rng(1)
        patterns = rng.normal(size=(CLASSES, SIZE, SIZE, 3))
        found = []
        for _ in range(1 + self.steps):
            labels = rng.integers(CLASSES, size=BATCH)
            images = patterns[labels] + 0.5 * rng.normal(size=(BATCH, SIZE, SIZE, 3))
            views = [images + 0.3 * rng.normal(size=images.shape) for _ in range(2)]
            found.append((*(view.astype("float32").astype(self.dtype) for view in views), labels))
        return found


def torch_run(training: Training) -> dict[str, np.ndarray]:
    """The training in PyTorch: the plain loop of the README."""
    import crcore_torch as crt
    import torch
    import torch.nn.functional as F

    recipe = training.recipe
    (first, _, _), *batches = training.batches()
    student = crt.prepare(_torch_net(training), recipe).train()
    if training.calibrated:
        student(_channels_first(first))
    teacher = crt.Teacher(student, recipe.ema)
    consistency = crt.ConsistencyLoss(recipe.consistency)
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    teacher.follow(optimizer)
    logs: dict[str, list[float]] = {name: [] for name in LOGS}
    found: dict[str, np.ndarray] = {}
    for step, (view, other, labels) in enumerate(batches, start=1):
        logits = student(_channels_first(view))
        task = F.cross_entropy(logits, torch.from_numpy(labels))
        term = consistency(logits, teacher(_channels_first(other)), step=teacher.step)
        loss = task + term
        # The decay of the update that made this step's teacher; Keras logs the first one's at the first step too.
        decay = recipe.ema.decay_at(max(teacher.step - 1, 0))
        weight = recipe.consistency.weight_at(teacher.step)
        for name, value in zip(LOGS, (task.detach(), term.detach(), weight, decay, loss.detach()), strict=True):
            logs[name].append(float(value))
        met = _torch_state(teacher.model) if step in training.report else {}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in training.report:
            found |= _named(step, student=_torch_state(student), teacher=met, next_teacher=_torch_state(teacher.model))
    return found | {f"log/{name}": np.array(values) for name, values in logs.items()}


def keras_run(training: Training) -> dict[str, np.ndarray]:
    """The training in Keras, on the engine that is active: its compiled step, one batch at a time."""
    import crcore_keras as crk
    import keras

    recipe = training.recipe
    (first, _, _), *batches = training.batches()
    student = crk.prepare(_keras_net(training), recipe)
    if training.calibrated:
        student(first, training=True)
    model = crk.ConsistencyModel(student, recipe, augment=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=training.dtype)
    model.compile(keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM), loss)
    logs: dict[str, list[float]] = {name: [] for name in LOGS}
    found: dict[str, np.ndarray] = {}
    for step, (view, other, labels) in enumerate(batches, start=1):
        model.reset_metrics()  # Keras logs means over the epoch, and here each step is one
        values = model.train_on_batch((view, other), labels, return_dict=True)
        for name in LOGS:
            logs[name].append(float(values[name]))
        if step in training.report:
            met = _keras_state(model.teacher)
            model.update_teacher()
            found |= _named(
                step, student=_keras_state(model.student), teacher=met, next_teacher=_keras_state(model.teacher)
            )
    return found | {f"log/{name}": np.array(values) for name, values in logs.items()}


def differences(run: dict[str, np.ndarray], reference: dict[str, np.ndarray], step: int) -> dict[str, float]:
    """How far ``run`` is from ``reference`` after ``step`` steps, by kind.

    Tensors: the largest |difference| over the largest |value| of the tensor, over all tensors of the kind. Losses: the
    largest |difference| over the total loss, of all steps so far. Codes: the share that differs. "teacher" is every
    float tensor of the teacher.

    Raises:
        ValueError: the two do not hold the same tensors.
    """
    if run.keys() != reference.keys():
        raise ValueError(f"only one of the runs has {sorted(run.keys() ^ reference.keys())}")
    total = np.abs(reference["log/loss"][:step])
    found = dict.fromkeys(("loss", "schedules", "weights", "scales", "statistics", "teacher"), 0.0)
    for name in LOGS:
        values, expected = (each[f"log/{name}"][:step] for each in (run, reference))
        kind, size = ("schedules", np.abs(expected)) if name in ("lambda", "decay") else ("loss", total)
        found[kind] = max(found[kind], float(np.max(np.abs(values - expected) / size)))
    codes: list[np.ndarray] = []
    for key in [key for key in reference if key.startswith(f"{step}/")]:
        _, network, group, _ = key.split("/")
        distance = np.abs(run[key] - reference[key])
        if group == "codes":
            codes.append(distance.ravel() != 0)
            continue
        kind = group if network == "student" else "teacher"
        found[kind] = max(found[kind], float(distance.max() / (np.abs(reference[key]).max() or 1.0)))
    return found | {"codes": float(np.mean(np.concatenate(codes)))}


def _named(step: int, **networks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{step}/{network}/{key}": array for network, state in networks.items() for key, array in state.items()}


def _torch_net(training: Training) -> Any:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, kind, inputs, outputs in LAYERS:
                if kind == "dense":
                    setattr(self, name, nn.Linear(inputs, outputs))
                    continue
                setattr(self, name, nn.Conv2d(inputs, outputs, 3, padding=1, bias=not training.batch_norm))
                norm = nn.BatchNorm2d(outputs, EPSILON, NEW_SHARE) if training.batch_norm else nn.Identity()
                setattr(self, name.replace("conv", "bn"), norm)

        def forward(self, x: Any) -> Any:
            x = torch.relu(_normalized(self.bn1, self.conv1(x)))
            y = torch.relu(_normalized(self.bn2, self.conv2(x)))
            y = torch.relu(_normalized(self.bn3, self.conv3(y)) + x)
            return self.dense(y.mean((2, 3)))

    net = Net().to(getattr(torch, training.dtype))
    given = {name: torch.from_numpy(array) for name, array in training.initial().items()}
    missing, unexpected = net.load_state_dict(given, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return net


def _channels_first(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _normalized(norm: Any, x: Any) -> Any:
    """``norm(x)``, with the running variance that Keras keeps.

    Both frameworks normalize by the variance over n; PyTorch averages that over n - 1. This is the one thing in which
    the network is not what a user would write: left alone, a known difference would hide what is looked for.
    """
    variance = getattr(norm, "running_var", None)
    if variance is None or not norm.training:
        return norm(x)
    kept = (1.0 - NEW_SHARE) * variance
    y = norm(x)
    norm.running_var = variance - (variance - kept) / (x.numel() // x.shape[1])  # not in place: autograd holds it
    return y


def _torch_state(model: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, module in model.named_children():
        for tensor, value in _floats(module).items():
            group = "statistics" if tensor.startswith("running") else "weights"
            found[f"{group}/{name}.{tensor}"] = value
        for quantizer, holder in module.named_children():
            for tensor, value in _floats(holder).items():
                found[f"scales/{name}.{quantizer}.{tensor}"] = value
            if quantizer == "weight_quantizer":
                found[f"codes/{name}.weight"] = holder.codes(module._parameters["weight"]).numpy()
    return found


def _floats(module: Any) -> dict[str, np.ndarray]:
    """Copies of the parameters and float buffers that a module itself holds, as stored."""
    stored = {**module._parameters, **module._buffers}
    tensors = {name: tensor for name, tensor in stored.items() if tensor is not None and tensor.is_floating_point()}
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


# Keras' name of a variable, and PyTorch's.
_NAMES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def _keras_net(training: Training) -> Any:
    from keras import Input, Model, layers

    options = {"dtype": training.dtype}

    def block(x: Any, index: int) -> Any:
        use_bias = not training.batch_norm
        x = layers.Conv2D(CHANNELS, 3, padding="same", use_bias=use_bias, name=f"conv{index}", **options)(x)
        if training.batch_norm:
            x = layers.BatchNormalization(momentum=1.0 - NEW_SHARE, epsilon=EPSILON, name=f"bn{index}", **options)(x)
        return x

    def relu(x: Any) -> Any:
        return layers.ReLU(**options)(x)

    inputs = Input((SIZE, SIZE, 3), dtype=training.dtype)
    x = relu(block(inputs, 1))
    y = relu(block(x, 2))
    y = relu(layers.Add(**options)([block(y, 3), x]))
    y = layers.GlobalAveragePooling2D(**options)(y)
    net = Model(inputs, layers.Dense(CLASSES, name="dense", **options)(y))
    given = training.initial()
    for layer in net.layers:
        for variable in layer.variables:
            variable.assign(to_keras(given.pop(f"{layer.name}.{_NAMES[variable.name]}")))
    assert not given
    return net


def _keras_state(model: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for layer in model.layers:
        for variable in [*layer._trainable_variables, *layer._non_trainable_variables]:
            group = "statistics" if variable.name.startswith("moving") else "weights"
            key = f"{layer.name}.{_NAMES[variable.name]}"
            found[f"{group}/{key}"] = to_torch(_numpy(variable))
            if variable.name == "kernel":
                found[f"codes/{key}"] = to_torch(_numpy(layer.weight_quantizer.codes(variable)))
        for quantizer in ("weight_quantizer", "input_quantizer"):
            for array in getattr(getattr(layer, quantizer, None), "arrays", []):
                found[f"scales/{layer.name}.{quantizer}.{array.name}"] = to_torch(_numpy(array))
    return found


def _numpy(tensor: Any) -> np.ndarray:
    from keras import ops

    return np.array(ops.convert_to_numpy(tensor))  # a copy: on torch it is a view of what training goes on to change


def to_keras(array: np.ndarray) -> np.ndarray:
    """A kernel from PyTorch's layout, ``[O, I, ...]``, to Keras', ``[..., I, O]``; a vector stays as it is."""
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array


def to_torch(array: np.ndarray) -> np.ndarray:
    """A kernel, or its scales, from Keras' layout to PyTorch's."""
    return array.transpose(-1, -2, *range(array.ndim - 2)) if array.ndim > 1 else array
