"""What the user asked for, as one frozen value that is stored with the results and compared on resume."""

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from crcore.cli._backends import check_options_of_keras
from crcore.cli._errors import CommandError

QUANTIZERS = ("lsq", "lsq+", "pact", "dorefa", "minmax")
BATCHNORM = ("average", "copy")
VIEWS = ("weak", "strong", "none")
STRONG_FROM = 100  # epochs: from here on images are known by heart, and strong views of them gain (docs/results.md)
BACKENDS = ("torch", "keras")
RAMP_SHAPES = ("sigmoid", "linear", "cosine", "constant")


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison. `None` is "decide from the data or the number of epochs", as the help says."""

    data: str
    image_size: int | None
    labels: int | None  # 0: all
    flip: bool | None
    model: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    init: str | None
    quantizer: str
    weight_bits: int
    activation_bits: int
    epochs: int
    float_epochs: int
    batch_size: int
    lr: float
    float_lr: float
    weight_decay: float
    student_view: str | None
    teacher_view: str
    consistency_weight: float
    temperature: float
    threshold: float | None
    ramp: float  # fraction of the optimizer steps
    ema_decay: float | None
    kd_weight: float
    kd_temperature: float
    evaluate_every: int | None
    device: str
    amp: bool
    backend: str = "torch"
    engine: str | None = None  # what the backend computes with; of Keras, the environment decides
    # Newer than the first results: a default is what was done before.
    ramp_shape: str = "sigmoid"
    unlabeled: int | None = None  # 0: all
    teacher_batchnorm: Literal["average", "copy"] = "average"
    reestimate_batchnorm: int = 0  # batches
    dampening: float | None = None
    freezing: float | None = None

    def __post_init__(self) -> None:
        if self.backend == "keras":
            check_options_of_keras(device=self.device, amp=self.amp)
        check_bits(self.weight_bits, self.activation_bits)
        counts = {
            "--epochs": self.epochs,
            "--float-epochs": self.float_epochs,
            "--batch-size": self.batch_size,
            "--image-size": self.image_size,
            "--evaluate-every": self.evaluate_every,
        }
        for option, count in counts.items():
            if count is not None and count < 1:
                raise CommandError(f"{option} must be 1 or more, got {count}")
        if self.reestimate_batchnorm < 0:
            raise CommandError(
                f"--reestimate-batchnorm must be a number of batches, or 0 to leave it out, got "
                f"{self.reestimate_batchnorm}"
            )
        if self.batch_size < 2:
            raise CommandError("--batch-size must be 2 or more, got 1: batch normalization needs more than one image")
        positive = {
            "--lr": self.lr,
            "--float-lr": self.float_lr,
            "--temperature": self.temperature,
            "--kd-temperature": self.kd_temperature,
        }
        for option, number in positive.items():
            if not (math.isfinite(number) and number > 0):
                raise CommandError(f"{option} must be a positive number, got {number}")
        weights = {
            "--weight-decay": self.weight_decay,
            "--consistency-weight": self.consistency_weight,
            "--kd-weight": self.kd_weight,
            "--dampening": self.dampening or 0.0,
        }
        for option, number in weights.items():
            if not (math.isfinite(number) and number >= 0):
                raise CommandError(f"{option} must be zero or a positive number, got {number}")
        if not 0 < self.ramp <= 1:
            raise CommandError(f"--ramp is a fraction of the optimizer steps in (0, 1], got {self.ramp}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise CommandError(f"--ema-decay must be in [0, 1), got {self.ema_decay}; 0.99 is a good start")
        if self.freezing is not None and not 0 <= self.freezing < 0.25:
            raise CommandError(f"--freezing must be in [0, 0.25), got {self.freezing}; 0.01 is a good start")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise CommandError(f"--threshold is a probability in [0, 1), got {self.threshold}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


# What an earlier version may not have known and so not have stored, at the values that stand for what it did.
NEWER = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}


def check_bits(weight_bits: int | None, activation_bits: int | None) -> None:
    """Refuse widths that no quantizer has; None is "not given"."""
    for option, value in (("--weight-bits", weight_bits), ("--activation-bits", activation_bits)):
        if value is not None and not 1 <= value <= 16:
            raise CommandError(f"{option} must be between 1 and 16, got {value}; 4 is a good start")


def check_same_settings(stored: dict[str, Any], asked: dict[str, Any], *, folder: str) -> None:
    """Refuse to continue a run under other settings: its result would be neither the old one nor the new one.

    Methods and seeds may be added, because each (seed, method) is a run of its own.
    """
    for name in ("methods", "seeds"):
        gone = [value for value in stored[name] if value not in asked[name]]
        if gone:
            raise CommandError(
                f"--resume: {folder} was made with --{name} that include {', '.join(map(str, gone))}, which is now "
                "missing; keep it (more may be added), or give another --out"
            )
    for name in sorted(stored.keys() | asked.keys()):
        if name not in ("methods", "seeds") and stored.get(name) != asked.get(name):
            option = "KERAS_BACKEND" if name == "engine" else f"--{name.replace('_', '-')}"
            raise CommandError(
                f"--resume: {folder} was made with {option} {stored.get(name)}, now it is "
                f"{asked.get(name)}; give the same value, or another --out"
            )
