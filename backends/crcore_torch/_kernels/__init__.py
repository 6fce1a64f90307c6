"""The ways to run a quantizer on a torch tensor, and which one is chosen.

    core      the core's formula, function by function: every quantizer, every device; what torch.compile traces
    blocked   LSQ in place, on blocks that stay in the cache
    cpp       LSQ in one pass of C++ over the tensor, built where a compiler is found
    triton    LSQ in one pass of a CUDA device over the tensor

Nearly all of what quantization adds to a training step is this one operation, and its time is that of moving memory:
the core's formula makes a new tensor per array function. The conformance kit holds every kernel to the core's numbers.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from crcore import LSQ, CRCoreError, Quantizer
from crcore_torch._kernels import _blocked, _cpp, _triton
from crcore_torch._xp import xp

Layout = tuple[int, ...]


class Kernel(Protocol):
    """A module of this package. Tensors have one of its ``DTYPES``, on its device, x and cotangent alike in memory."""

    NAME: str
    DTYPES: tuple[torch.dtype, ...]
    # Whether a second forward costs less than keeping its result from the forward to the backward pass.
    CHEAP_FORWARD: bool

    def why_not(self) -> str | None:
        """What is missing on this machine, and what to do about it."""

    def runs_on(self, device: torch.device) -> bool:
        """Whether it is made for such a device."""

    def layout(self, x: Tensor, scale: Tensor) -> Layout | None:
        """How it walks through the two; None if it cannot."""

    def forward(self, quantizer: LSQ, x: Tensor, scale: Tensor, layout: Any) -> Tensor:
        """``quantizer.forward(x, scale)``, to the bit."""

    def vjp(
        self, quantizer: LSQ, cotangent: Tensor, x: Tensor, scale: Tensor, layout: Any, *, elements: float
    ) -> tuple[Tensor, Tensor]:
        """``quantizer.vjp(cotangent, x, scale)``: dx to the bit, dscale up to the order of summation."""


class Plan(NamedTuple):
    """How a case is run."""

    kernel: Kernel
    dtype: torch.dtype  # in which the kernel takes x
    layout: Layout


_KERNELS: dict[str, Kernel] = {kernel.NAME: kernel for kernel in (_cpp, _triton, _blocked)}  # the fastest first
NAMES = ("auto", "core", *sorted(_KERNELS))


def check_kernel(name: str) -> None:
    """Raise what a user needs to know about a kernel that cannot be had."""
    if name not in NAMES:
        raise CRCoreError(f"kernel must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name in _KERNELS and (reason := _KERNELS[name].why_not()):
        raise CRCoreError(f"kernel={name!r} cannot run here: {reason}; or let kernel='auto' choose")


def chosen(name: str, quantizer: Quantizer, device: torch.device) -> str:
    """The kernel that ``name`` stands for with such a quantizer on such a device."""
    if type(quantizer) is not LSQ:
        return "core"
    if quantizer.signed is None:  # the first batch decides, and not about this
        quantizer = replace(quantizer, signed=False)
    return next((kernel.NAME for kernel in _candidates(name, quantizer, device)), "core")


def plan(name: str, quantizer: Quantizer, x: Tensor, parameters: tuple[Tensor, ...]) -> Plan | None:
    """How ``name`` runs this case; None: by the core's formula."""
    if type(quantizer) is not LSQ or name == "core" or _is_traced() or not _plain(x):
        return None
    (scale,) = parameters
    if scale.device != x.device or scale.dtype != wide(x.dtype) or not _plain(scale):
        return None
    for kernel in _candidates(name, quantizer, x.device):
        dtype = x.dtype if x.dtype in kernel.DTYPES else wide(x.dtype)
        if dtype in kernel.DTYPES and (layout := kernel.layout(x, scale)) is not None:
            return Plan(kernel, dtype, layout)
    return None


def forward(plan: Plan | None, quantizer: Any, x: Tensor, *parameters: Tensor) -> Tensor:
    """``quantizer.forward(x, *parameters)`` in float32 or wider, in the dtype of ``x``."""
    if plan is None:
        return quantizer.forward(widened(x), *parameters, xp=xp).to(x.dtype)  # type: ignore[no-any-return]
    y = plan.kernel.forward(quantizer, _as(plan.dtype, x), parameters[0], plan.layout)
    return _as(x.dtype, y)


def vjp(
    plan: Plan | None, quantizer: Any, cotangent: Tensor, x: Tensor, *parameters: Tensor, elements: float
) -> tuple[Tensor, ...]:
    """``quantizer.vjp(cotangent, x, *parameters)`` in float32 or wider; dx in the dtype of ``x``."""
    # Where gradients are enabled a second derivative is wanted, which the kernels have not.
    if plan is None or torch.is_grad_enabled() or _is_traced() or not (_plain(x) and _plain(cotangent)):
        dx, *others = quantizer.vjp(widened(cotangent), widened(x), *parameters, elements=elements, xp=xp)
        return dx.to(x.dtype), *others
    given = _as(plan.dtype, x)
    if cotangent.stride() != given.stride() or cotangent.dtype != given.dtype:
        cotangent = torch.empty_like(given).copy_(cotangent)
    dx, dscale = plan.kernel.vjp(quantizer, cotangent, given, parameters[0], plan.layout, elements=elements)
    return _as(x.dtype, dx), dscale


def widened(x: Tensor) -> Tensor:
    """In the dtype that quantizers compute in."""
    return _as(wide(x.dtype), x)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that quantizers compute in, for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


@functools.lru_cache(maxsize=1024)
def _candidates(name: str, quantizer: LSQ, device: torch.device) -> tuple[Kernel, ...]:
    if quantizer.signed is None or quantizer.grid.binary:
        return ()
    named = [kernel for kernel in _KERNELS.values() if name in (kernel.NAME, "auto") and kernel.runs_on(device)]
    return tuple(kernel for kernel in named if not kernel.why_not())


def _is_traced() -> bool:
    """Whether operations are written down, which those of a kernel would not be: torch.compile, jit.trace, make_fx."""
    proxy = torch._C._TorchDispatchModeKey.PROXY  # type: ignore[attr-defined]
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return torch._C._get_dispatch_mode(proxy) is not None


def _plain(x: Tensor) -> bool:
    """Whether the values lie in memory as they are."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.is_neg():
        return False
    try:
        return x.data_ptr() != 0
    except RuntimeError:  # torch.func's wrappers have no address
        return False
