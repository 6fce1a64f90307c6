"""Weights that oscillate between integers, in training: a meter, and the two remedies of Nagel et al. (2022)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crcore import (
    CRCoreError,
    Dampening,
    Freezing,
    FreezingState,
    Oscillation,
    OscillationRates,
    oscillation_update,
)
from crcore_torch._fake_quantize import FakeQuantize
from crcore_torch._follow import Follower, unwrapped
from crcore_torch._kernels import widened
from crcore_torch._layers import QuantizedLayer
from crcore_torch._xp import xp


class _Weight(NamedTuple):
    name: str  # of the layer
    parameter: nn.Parameter
    quantizer: FakeQuantize

    def arguments(self) -> tuple[Any, ...]:
        """The latent weight, its quantizer and the quantizer's arrays, as the core takes them."""
        x = widened(self.parameter)
        return x, self.quantizer.quantizer, *self.quantizer.arrays_for(x)


class OscillationMeter(Follower):
    """How many integer weights change, and how many oscillate, in a window of training.

    The window begins when the meter is made, and anew with `reset`. Four numbers are kept for each weight, and weights
    are quantized once more after each step: follow for the steps that you want to know of. Where a `Freezer` follows
    the same optimizer, let it follow first.

    Args:
        student: a model from `prepare`, wrapped or not; not changed.

    Raises:
        CRCoreError: the student has no quantized weight.

    >>> import crcore, torch
    >>> from crcore_torch import prepare
    >>> student = prepare(torch.nn.Linear(2, 2), crcore.Recipe(crcore.LSQ(bits=4), None))
    >>> meter = OscillationMeter(student)
    >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    >>> handle = meter.follow(optimizer)
    >>> meter.total()
    OscillationRates(weights=4, flipped=0.0, oscillating=0.0)
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self._states: list[Oscillation] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self._states = [Oscillation.start(w.quantizer.codes(w.parameter), xp=xp) for w in _weights(self._source())]

    @torch.no_grad()
    def update(self) -> None:
        """Look at the integers. `follow` calls it; call it yourself only without an optimizer to follow."""
        self._states = [
            oscillation_update(state, weight.quantizer.codes(weight.parameter), xp=xp)
            for state, weight in zip(self._states, _weights(self._source()), strict=True)
        ]

    def layers(self) -> dict[str, OscillationRates]:
        """The rates of each layer, by its name; where layers share a weight, by that of the first."""
        names = [weight.name for weight in _weights(self._source())]
        return {name: OscillationRates.of(state, xp=xp) for name, state in zip(names, self._states, strict=True)}

    def total(self) -> OscillationRates:
        """The rates of all quantized weights together."""
        return OscillationRates.of(*self._states, xp=xp)


class DampeningLoss(nn.Module):
    """``weight_at(step) * sum of || quantized - clipped weight ||^2``, to be added to the task loss.

    Args:
        dampening: its weight.

    Raises:
        CRCoreError: ``dampening`` is not a `crcore.Dampening`.

    >>> import crcore, torch
    >>> from crcore_torch import prepare
    >>> student = prepare(torch.nn.Linear(2, 2), crcore.Recipe(crcore.LSQ(bits=4), None))
    >>> DampeningLoss(crcore.Dampening(1e-3))(student, step=0).shape
    torch.Size([])
    """

    def __init__(self, dampening: Dampening) -> None:
        super().__init__()
        if not isinstance(dampening, Dampening):
            raise CRCoreError(
                f"DampeningLoss takes a crcore.Dampening, got {dampening!r}; for plain QAT leave the term out, "
                "else give Recipe(dampening=Dampening(...))"
            )
        self.dampening = dampening

    def forward(self, student: nn.Module, *, step: int | Tensor) -> Tensor:
        """The weighted term, 0-d. The gradient reaches the latent weights, and no scale.

        Args:
            student: a model from `prepare`, wrapped or not.
            step: optimizer steps made so far; a 0-d tensor where the step is compiled.

        Raises:
            CRCoreError: the student has no quantized weight, or one without a learned scale.
        """
        traced = isinstance(step, Tensor)
        factor = self.dampening.weight_at(step.float(), xp=xp) if traced else self.dampening.weight_at(step)  # type: ignore[union-attr]
        weights = _weights(unwrapped(student))
        for weight in weights:  # at the first step already, where a ramp has a factor of zero
            self.dampening.check(weight.quantizer.quantizer)
        if not traced and float(factor) == 0.0:  # plain QAT, to the bit
            return weights[0].parameter.new_zeros(())
        return factor * sum(self._distance(weight) for weight in weights)  # type: ignore[no-any-return]

    def _distance(self, weight: _Weight) -> Tensor:
        x, quantizer, *arrays = weight.arguments()
        with torch.no_grad():
            quantized = weight.quantizer(x)
        return self.dampening.distance(x, quantized, quantizer, *arrays, xp=xp)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The remedy."""
        return repr(self.dampening)


class Freezer(Follower):
    """Iterative weight freezing: after each optimizer step, weights that oscillate too often keep their integer.

    What is frozen is the integer: the latent weight is set to ``(integer - zero point) * scale`` after every step, and
    the scale goes on training. ``state_dict`` holds all that a resumed run needs. A `Teacher` averages what it meets:
    let the freezer follow the optimizer first.

    Args:
        student: a model from `prepare`, wrapped or not, with the weights from which training starts.
        freezing: threshold and momentum.

    Attributes:
        step: optimizer steps followed so far, a 0-d tensor; what the threshold's schedule takes.

    Raises:
        CRCoreError: ``freezing`` is not a `crcore.Freezing`; the student has no quantized weight, or one without a
            learned scale.

    >>> import crcore, torch
    >>> from crcore_torch import prepare
    >>> student = prepare(torch.nn.Linear(2, 2), crcore.Recipe(crcore.LSQ(bits=4), None))
    >>> freezer = Freezer(student, crcore.Freezing(threshold=0.02))
    >>> handle = freezer.follow(torch.optim.SGD(student.parameters(), lr=0.1))
    >>> freezer.frozen
    0.0
    """

    step: Tensor

    def __init__(self, student: nn.Module, freezing: Freezing) -> None:
        super().__init__(student)
        if not isinstance(freezing, Freezing):
            raise CRCoreError(
                f"Freezer takes a crcore.Freezing, got {freezing!r}; for plain QAT leave the freezer out, else give "
                "Recipe(freezing=Freezing(...))"
            )
        self.freezing = freezing
        weights = _weights(self._source())
        for weight in weights:
            freezing.check(weight.quantizer.quantizer)
        self.weights = nn.ModuleList(_Held(weight) for weight in weights)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=weights[0].parameter.device))

    @property
    def frozen(self) -> float:
        """The fraction of the quantized weights that are frozen."""
        masks = [buffer for name, buffer in self.named_buffers() if name.endswith(".frozen")]
        return sum(int(mask.sum()) for mask in masks) / max(sum(mask.numel() for mask in masks), 1)

    @torch.no_grad()
    def update(self) -> None:
        """Track, freeze, and set frozen weights. `follow` calls it; else call it after each optimizer step.

        Raises:
            CRCoreError: this is a copy, which follows no student.
        """
        for held, weight in zip(self.weights, _weights(self._source()), strict=True):
            assert isinstance(held, _Held)
            arguments = weight.arguments()
            step = self.step.to(arguments[0].dtype)  # a tensor: reading its number would wait for the device
            state = self.freezing.update(held.state, *arguments, step=step, xp=xp)
            weight.parameter.copy_(self.freezing.apply(state, *arguments, xp=xp))
            held.state = state
        self.step += 1

    def extra_repr(self) -> str:
        """The remedy."""
        return repr(self.freezing)


class _Held(nn.Module):
    """The `FreezingState` of one weight, as buffers."""

    def __init__(self, weight: _Weight) -> None:
        super().__init__()
        oscillation, frozen = FreezingState.start(weight.quantizer.codes(weight.parameter), xp=xp)
        for name, array in (oscillation._asdict() | {"frozen": frozen}).items():
            self.register_buffer(name, array.clone())

    @property
    def state(self) -> FreezingState:
        *oscillation, frozen = self.buffers()
        return FreezingState(Oscillation(*oscillation), frozen)

    @state.setter
    def state(self, state: FreezingState) -> None:
        for buffer, array in zip(self.buffers(), [*state.oscillation, state.frozen], strict=True):
            buffer.copy_(array)


def _weights(student: nn.Module) -> list[_Weight]:
    """The quantized weights, each once, in the order in which their layers are registered."""
    found: dict[int, _Weight] = {}
    if not isinstance(student, nn.Module):
        raise CRCoreError(f"a student from prepare(model, recipe) is needed, got {type(student).__name__}")
    for name, layer in student.named_modules():
        if isinstance(layer, QuantizedLayer) and isinstance(layer.weight_quantizer, FakeQuantize):
            parameter = layer._parameters["weight"]
            found.setdefault(id(parameter), _Weight(name, parameter, layer.weight_quantizer))
    if not found:
        raise CRCoreError(
            f"{type(student).__name__} has no quantized weight; give a student from prepare(model, recipe)"
        )
    return list(found.values())
