"""The teacher: the exponential moving average of the student, itself quantized, never trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from crcore import EMA, CRCoreError
from crcore_torch._fake_quantize import FakeQuantize, mean_over_replicas
from crcore_torch._follow import Follower
from crcore_torch._foreign import copy_buffers, has_late_scale, is_foreign, stop_observers, take_over

# Buffers that are statistics, and so are averaged like the weights they belong to. All other buffers are copied: masks
# and tables may hold infinities, which an average turns into NaN, and other libraries' observers start from them.
_AVERAGED_BUFFERS = (nn.modules.batchnorm._NormBase, FakeQuantize)


class Teacher(Follower):
    """The student's moving average: parameters, quantizer scales, BatchNorm statistics and observed ranges.

    Call it like the student. It is always in eval mode, makes no graph, and is quantized with its own averaged scales.
    After each optimizer step ``teacher <- decay * teacher + (1 - decay) * student``; so the teacher that the student
    meets at step t includes the student after step t - 1. Buffers that are not statistics are copied from the student,
    and BatchNorm's are where ``ema`` says so.

    The student may come from `prepare` or be any module that another library fake-quantized. It may be wrapped by
    ``torch.compile`` or DistributedDataParallel; the teacher is made of what is inside.

    Under ``torch.distributed`` every replica makes a teacher; BatchNorm statistics are averaged over the replicas too,
    so that all have the same one.

    Copies and unpickled teachers can be evaluated, exported and saved, but follow no student. ``state_dict`` holds the
    averaged model under ``model.`` and the step count under ``step``.

    Args:
        student: the network that is trained; not changed, and not registered as a submodule.
        ema: decay, warm-up, and whether the teacher is quantized; None for the default `crcore.EMA`.

    Attributes:
        model: the averaged network, an ordinary module.
        step: optimizer steps followed so far; what the lambda schedule takes.

    Raises:
        CRCoreError: a float teacher is asked for, and the student's quantizers are not crcore's.
    """

    model: nn.Module

    def __init__(self, student: nn.Module, ema: EMA | None = None) -> None:
        super().__init__(student)
        if ema is not None and not isinstance(ema, EMA):
            raise CRCoreError(
                f"ema must be a crcore.EMA or None, got {ema!r}; for example EMA(decay=0.999, warmup=2_000)"
            )
        self.ema = EMA() if ema is None else ema
        self.step = 0
        self.model = copy.deepcopy(self._source()).requires_grad_(False)
        stop_observers(self.model)
        if not self.ema.quantized:
            _switch_off(self.model)
        self.eval()

    @property
    def decay(self) -> float:
        """The decay of the next update."""
        return float(self.ema.decay_at(self.step))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged network's output, without a graph."""
        if self._student:
            _adopt_flags(_pairs(self.model, self._student[0]))
        with torch.no_grad():
            if self.step == 0 and not torch.compiler.is_compiling():
                self._take_over_foreign()
            return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Teacher:
        """Does nothing: a teacher is always in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average. `follow` calls it; call it yourself only without an optimizer to follow.

        Raises:
            CRCoreError: this is a copy, which follows no student.
        """
        pairs = list(_pairs(self.model, self._source()))  # once: walking takes longer than what is done on the way
        _adopt_flags(pairs)
        tensors = list(_statistics(pairs))
        values = _agreed([value for _, value, _ in tensors])
        averages: list[Tensor] = []
        averaged: list[Tensor] = []
        for (mine, _, is_batchnorm), value in zip(tensors, values, strict=True):
            if is_batchnorm and self.ema.batchnorm == "copy":
                mine.copy_(value)
            else:
                averages.append(mine)
                averaged.append(value)
        late = [pair for pair in pairs if has_late_scale(pair[0])]
        if averages:
            ema_update_(averages, averaged, self.decay)
        _copy_other_buffers(pairs)
        for module, source in late:
            take_over(module, source)
        self.step += 1

    def _take_over_foreign(self) -> None:
        """Before its first update the teacher is the student, other libraries' first batch included."""
        if self._student:
            for mine, source in _pairs(self.model, self._student[0]):
                if is_foreign(mine):
                    take_over(mine, source)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "step"] = torch.tensor(self.step)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # The step is a Python number, so that reading it costs no device synchronisation; it is saved as a tensor.
        step = state_dict.pop(prefix + "step", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if step is None:
            missing_keys = args[2]
            missing_keys.append(prefix + "step")
        else:
            self.step = int(step)


def ema_update_(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """`crcore.ema_update` for all tensors at once, in place."""
    torch._foreach_lerp_(averages, values, 1.0 - decay)


Pair = tuple[nn.Module, nn.Module]  # the teacher's and the student's


def _pairs(model: nn.Module, student: nn.Module) -> Iterator[Pair]:
    return zip(model.modules(), student.modules(), strict=True)


def _adopt_flags(pairs: Iterable[Pair]) -> None:
    """Quantizers that the student has initialized (or frozen) since: start averaging from its values."""
    for mine, source in pairs:
        if isinstance(mine, FakeQuantize) and isinstance(source, FakeQuantize):
            mine.adopt(source)


def _statistics(pairs: Iterable[Pair]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """The teacher's tensor, the student's, and whether it is BatchNorm's statistic, for everything that is averaged."""
    seen: set[int] = set()
    for mine, source in pairs:
        tensors = list(_named(mine._parameters))
        if isinstance(mine, _AVERAGED_BUFFERS):
            tensors += _named(mine._buffers)
        for name, average in tensors:
            if average.is_floating_point() and id(average) not in seen:  # a tied weight moves once
                seen.add(id(average))
                yield average, _stored(source, name), name in mine._buffers and not isinstance(mine, FakeQuantize)


def _agreed(values: list[Tensor]) -> list[Tensor]:
    """Buffers as their mean over the replicas of a distributed run.

    DistributedDataParallel keeps parameters equal, and not what BatchNorm has met: without this, every replica would
    have a teacher of its own.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    local = [index for index, value in enumerate(values) if not isinstance(value, nn.Parameter)]
    if local:
        mean = mean_over_replicas(torch.cat([values[index].flatten() for index in local]))
        for index, part in zip(local, mean.split([values[index].numel() for index in local]), strict=True):
            values[index] = part.reshape(values[index].shape).to(values[index].dtype)
    return values


def _copy_other_buffers(pairs: Iterable[Pair]) -> None:
    for mine, source in pairs:
        if isinstance(mine, FakeQuantize):  # its flags are mirrored in Python, see _adopt_flags
            continue
        if not isinstance(mine, _AVERAGED_BUFFERS):
            copy_buffers(mine, source)
            continue
        for name, buffer in _named(source._buffers):
            if not buffer.is_floating_point():
                mine._buffers[name].copy_(buffer)  # type: ignore[union-attr]


def _named(tensors: Any) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def _stored(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer as it is stored (`QuantizedLayer.weight` would quantize it)."""
    stored = module._parameters.get(name)
    return module._buffers[name] if stored is None else stored  # type: ignore[return-value]


def _switch_off(model: nn.Module) -> None:
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    if not quantizers:
        raise CRCoreError(
            "EMA(quantized=False) asks for a float teacher, but the student's quantizers are not crcore's; "
            "use quantized=True, or prepare the student with crcore_torch.prepare"
        )
    for quantizer in quantizers:
        quantizer.enabled = False
