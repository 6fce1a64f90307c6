"""What a teacher must know about students that another library fake-quantized.

An average of parameters and a copy of buffers is nearly all. What is left: quantizers that take their first values from
a batch, after the teacher was made; and state that is neither parameter nor buffer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# torch.ao and torchao observe in eval mode too, while this buffer is 1. In a teacher it is 0 for good: what the teacher
# meets, validation data among it, must not move its ranges, which are the student's.
OBSERVES = "observer_enabled"


def is_foreign(module: nn.Module) -> bool:
    """Whether the module is neither torch's nor crcore's, so that nothing is known about what it holds."""
    return not type(module).__module__.startswith(("torch.nn.", "crcore_torch."))


def stop_observers(model: nn.Module) -> None:
    """Make the observers of torch.ao and torchao in ``model`` keep the ranges that they are given."""
    for module in model.modules():
        enabled = module._buffers.get(OBSERVES)
        if enabled is not None:
            enabled.zero_()


def take_over(mine: nn.Module, source: nn.Module) -> None:
    """The parameters, buffers and Python state of ``source`` itself, not of its children."""
    for name, parameter in source._parameters.items():
        if parameter is not None:
            mine._parameters[name].copy_(parameter)  # type: ignore[union-attr]
    copy_buffers(mine, source)
    if _counts_batches(source):
        mine.counter = source.counter


def copy_buffers(mine: nn.Module, source: nn.Module) -> None:
    """All buffers of ``source`` itself; observers grow theirs on first use."""
    for name, buffer in source._buffers.items():
        if buffer is None or name == OBSERVES:
            continue
        own: Tensor | None = mine._buffers.get(name)
        if own is None or own.shape != buffer.shape or own.dtype != buffer.dtype:
            mine._buffers[name] = buffer.detach().clone()
        else:
            own.copy_(buffer)


def has_late_scale(mine: Any) -> bool:
    """Whether this is a Brevitas scale or zero point that is not learned yet.

    Brevitas takes it from the statistics of the first ``collect_stats_steps`` batches, counted in a Python number, and
    only then writes the parameter: an average that had followed the parameter's placeholder would be wrong for long.
    """
    return _counts_batches(mine) and mine.counter <= mine.collect_stats_steps


def _counts_batches(module: Any) -> bool:
    state = vars(module)
    return "collect_stats_steps" in state and "counter" in state
