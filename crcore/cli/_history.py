"""The entry of one epoch in a run's history, whatever the backend."""

import math
from typing import Any

import crcore as cr
from crcore.cli._errors import CommandError
from crcore.cli._methods import Method


def consistency_weight(recipe: cr.Recipe | None, step: int) -> float | None:
    """Lambda at a step, None where there is no consistency term."""
    return float(recipe.consistency.weight_at(step)) if recipe and recipe.consistency else None


def average_decay(recipe: cr.Recipe | None, steps: int) -> float | None:
    """The decay of the average's next update after `steps` of them, None where there is no average."""
    return float(recipe.ema.decay_at(steps)) if recipe and recipe.ema else None


def history_entry(
    recipe: cr.Recipe | None,
    *,
    epoch: int,
    step: int,
    task: float,
    consistency: float,
    accuracy: float | None,
    teacher_accuracy: float | None,
) -> dict[str, Any]:
    """What is kept of an epoch that ended after `step` optimizer steps; accuracies are None where not measured."""
    return {
        "epoch": epoch,
        "step": step,
        "task": task,
        "consistency": consistency,
        "weight": consistency_weight(recipe, step - 1),
        "decay": average_decay(recipe, step),
        "accuracy": accuracy,
        "teacher_accuracy": teacher_accuracy,
    }


def oscillation_record(rates: cr.OscillationRates, *, frozen: float | None) -> dict[str, float]:
    """What is kept of the integer weights' movements in the last epoch, as fractions of them."""
    found = {"flipped": rates.flipped, "oscillating": rates.oscillating}
    return found if frozen is None else found | {"frozen": frozen}


def check_finite(loss: float, method: Method, *, seed: int, epoch: int, lr: float) -> None:
    """Stop a run whose loss is no number any more."""
    if not math.isfinite(loss):
        raise CommandError(
            f"{method.name}, seed {seed}: the loss is not a finite number in epoch {epoch}; "
            f"give a learning rate below {lr} ({'--lr' if method.quantized else '--float-lr'}) and another --out"
        )
