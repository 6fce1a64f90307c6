"""The module that holds a quantizer's arrays and applies it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crcore import CRCoreError, Quantizer
from crcore_torch._bind import broadcast, fake_quantize
from crcore_torch._kernels import check_kernel, chosen, widened
from crcore_torch._xp import xp

_UNKNOWN_SIGN = -1


class FakeQuantize(nn.Module):
    """Quantize and dequantize a tensor, with the straight-through gradient of ``quantizer``.

    `prepare` puts one on each weight and each input; use it yourself where a model calls ``F.linear`` and the like with
    tensors that `prepare` cannot see.

    Learned arrays are parameters, observed ones buffers, under the names that the quantizer gives them (``scale``;
    ``alpha`` for PACT; ``low``, ``high`` for MinMax). They are set from data once: from the first tensor that arrives
    in train mode, or by `initialize`. ``initialized`` is saved, so that loading or resuming never sets them again.
    Under ``torch.distributed`` that first setting, and each observation (MinMax), is averaged over all replicas.

    Arithmetic is float32 (float64 for float64 tensors), whatever autocast says; the result has the input's dtype.

    Args:
        quantizer: what to apply.
        role: "activation" quantizes per tensor and takes its first axis for the batch; "weight" has no batch.
        kernel: what runs it. "auto" is the fastest that serves the quantizer and the device: for LSQ "cpp" on a CPU
            where a C++ compiler is found, "triton" on CUDA, else "blocked"; "core" for all others. All give the same
            numbers. ``repr`` shows the one in use.
        shape: of the arrays: ``()``, or one per channel as broadcast against the tensor, such as ``(64, 1, 1, 1)``.
        device, dtype: of the arrays.

    Raises:
        CRCoreError: the quantizer does not suit the role; the kernel cannot run here; or, when called, it has not been
            initialized and is in eval mode or being compiled.

    >>> import crcore, torch
    >>> quantize = FakeQuantize(crcore.LSQ(bits=2, signed=True)).initialize(torch.tensor([-1.0, 1.0]))
    >>> quantize(torch.tensor([-9.0, 0.9, 2.2]))
    tensor([-4.,  0.,  2.], grad_fn=<_FakeQuantizeBackward>)
    """

    initialized: Tensor
    signed: Tensor
    frozen: Tensor

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        role: Literal["weight", "activation"] = "activation",
        kernel: str = "auto",
        shape: tuple[int, ...] = (),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.quantizer = self._given = quantizer.for_role(role)
        if self.quantizer.per_channel and not shape:
            raise CRCoreError(
                f"{self.quantizer!r} needs the shape of its scales; give shape=(channels, 1, 1, 1) for a convolution's "
                "weight, or use per_channel=False"
            )
        check_kernel(kernel)
        self.kernel = kernel
        self.role = role
        self.name = ""  # where it sits in the model, for error messages; `prepare` sets it
        self.enabled = True  # a float teacher switches it off
        for name in self.quantizer.parameters:
            array = torch.ones(shape, device=device, dtype=dtype)
            # Written to the dictionaries themselves: `scale` is also a property, the value in use.
            if self.quantizer.learned:
                self._parameters[name] = nn.Parameter(array)
            else:
                self._buffers[name] = array
        sign = _UNKNOWN_SIGN if self.quantizer.signed is None else int(self.quantizer.signed)
        self.register_buffer("signed", torch.tensor(sign, dtype=torch.int8, device=device))
        self.register_buffer("initialized", torch.tensor(not self.quantizer.parameters and sign >= 0, device=device))
        self.register_buffer("frozen", torch.tensor(False, device=device))
        self._read_flags()

    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, of the shape and dtype of ``x``."""
        if not self.enabled:
            return x
        if not self._initialized:
            self._initialize_from_first_batch(x)
        arrays = self._arrays() if self.quantizer.learned else self.arrays_for(x, self.training)
        return fake_quantize(x, self.quantizer, arrays, self._elements(x), self.kernel)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integers of ``x``, as floats: ``forward(x) == (codes(x) - zero_point) * scale``."""
        wide = widened(x)
        return self.quantizer.codes(wide, *self.arrays_for(wide), xp=xp)

    @torch.no_grad()
    def code_limits(self, x: Tensor) -> tuple[int, int]:
        """The lowest and the highest code that a tensor like ``x`` can get, however large its values."""
        wide = widened(x)
        arrays = self.arrays_for(wide)
        far = torch.full_like(wide, torch.finfo(wide.dtype).max)  # the codes of values far outside are the grid's ends
        lowest, highest = (self.quantizer.codes(end, *arrays, xp=xp) for end in (-far, far))
        return int(lowest.min()), int(highest.max())

    def affine(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)`` in use, in the arrays' shape; for ``x`` where they are recomputed from the tensor."""
        if x is not None and self._recomputed:
            arrays = tuple(map(Tensor.reshape_as, self.arrays_for(x), self._arrays()))
        else:
            arrays = tuple(widened(array) for array in self._arrays())
        scale, zero_point = self.quantizer.affine(*arrays, xp=xp)
        scale, zero_point = (torch.as_tensor(value, device=self.initialized.device) for value in (scale, zero_point))
        return (scale if scale.is_floating_point() else scale.float()), zero_point.to(torch.int32)

    @property
    def scale(self) -> Tensor:
        """The step between two codes, > 0: the value in use, which a stored one below zero would not be. Read only."""
        return self.affine()[0]

    @property
    def zero_point(self) -> Tensor:
        """The code of real zero, int32. Read only."""
        return self.affine()[1]

    @torch.no_grad()
    def initialize(self, x: Tensor) -> FakeQuantize:
        """Set the arrays from the data ``x``, now; returns itself.

        Raises:
            CRCoreError: ``x`` is empty, or holds NaN or infinity.
        """
        if x.numel() == 0 or not bool(x.isfinite().all()):
            what = "an empty tensor" if x.numel() == 0 else "a tensor with NaN or infinity"
            raise CRCoreError(f"{self._label()} cannot take its scale from {what}; give it a batch of real data first")
        if self.quantizer.signed is None:
            signed = (x < 0).any().to(torch.float32)
            self.signed.fill_(int(mean_over_replicas(signed) > 0))
            self.quantizer = replace(self.quantizer, signed=bool(self.signed))  # type: ignore[type-var]
        for array, value in zip(self._arrays(), self._fresh(x), strict=True):
            array.copy_((mean_over_replicas(value) if self.role == "activation" else value).reshape(array.shape))
        self.initialized.fill_(True)
        self._read_flags()
        return self

    def freeze(self, frozen: bool = True) -> FakeQuantize:
        """Stop observing (MinMax): the ranges stay as they are, also in training. Saved; returns itself.

        A weight's range stays that of its last forward in train mode.
        """
        self.frozen.fill_(frozen)
        self._read_flags()
        return self

    def adopt(self, source: FakeQuantize) -> None:
        """Take over what ``source`` has got since this was copied from it: its first scale, or being frozen."""
        if source._initialized and not self._initialized:
            self.load_state_dict(source.state_dict())
        elif source._frozen != self._frozen:
            self.freeze(source._frozen)

    def extra_repr(self) -> str:
        """The quantizer, the kernel that runs it, and whether it still waits for its first batch."""
        kernel = chosen(self.kernel, self.quantizer, self.initialized.device)
        return f"{self.quantizer!r}, kernel={kernel!r}" + ("" if self._initialized else ", not initialized")

    def _arrays(self) -> list[Tensor]:
        stored: Mapping[str, Any] = self._parameters if self.quantizer.learned else self._buffers
        return [stored[name] for name in self.quantizer.parameters]

    @property
    def _recomputed(self) -> bool:
        """Whether the arrays are a function of the tensor at hand: weights whose range is not learned."""
        return self.role == "weight" and not self.quantizer.learned and not self._frozen

    def arrays_for(self, x: Tensor, observing: bool = False) -> tuple[Tensor, ...]:
        """The arrays to use for ``x``, broadcast against it. ``observing`` stores what they were found to be."""
        if self._recomputed:
            with torch.no_grad():
                fresh = self._fresh(x)
                if observing:
                    self._store(fresh)
            return fresh
        arrays = broadcast(self._arrays(), x)
        observe = getattr(self.quantizer, "observe", None)
        if observe is None or not observing or self._frozen:
            return arrays
        with torch.no_grad():
            observed = tuple(map(mean_over_replicas, observe(widened(x), *arrays, axes=tuple(range(x.ndim)), xp=xp)))
            self._store(observed)
        return observed

    def _fresh(self, x: Tensor) -> tuple[Tensor, ...]:
        arrays = self._arrays()
        shape = tuple(arrays[0].shape) if arrays else ()
        axes = tuple(axis for axis in range(x.ndim) if not shape or shape[axis] == 1)
        return self.quantizer.init(widened(x), axes=axes, xp=xp)

    def _store(self, values: tuple[Tensor, ...]) -> None:
        for array, value in zip(self._arrays(), values, strict=True):
            array.copy_(value.reshape(array.shape))

    def _elements(self, x: Tensor) -> float:
        if self.role == "activation":
            return math.prod(x.shape[1:]) if x.ndim > 1 else x.numel()
        arrays = self._arrays()
        return x.numel() // arrays[0].numel() if arrays else x.numel()

    def _initialize_from_first_batch(self, x: Tensor) -> None:
        where = self._label()
        if torch.compiler.is_compiling():
            raise CRCoreError(f"{where} is not initialized; run one batch in train mode before the compiled call")
        if not self.training:
            raise CRCoreError(
                f"{where} is not initialized: it takes its scale from the first batch in train mode; call "
                "model.train() and run a batch, or load a state_dict that was saved after training"
            )
        self.initialize(x)

    def _label(self) -> str:
        return f"quantizer {self.name!r}" if self.name else "this FakeQuantize"

    def _read_flags(self) -> None:
        """Mirror the saved flags in Python, where reading them costs no device synchronisation and breaks no graph."""
        self._initialized = bool(self.initialized)
        self._frozen = bool(self.frozen)
        if self._given.signed is None:
            sign = None if int(self.signed) == _UNKNOWN_SIGN else bool(self.signed)
            self.quantizer = replace(self._given, signed=sign)  # type: ignore[type-var]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        signed = state_dict.get(prefix + "signed")
        if signed is not None and self._given.signed not in (None, bool(signed)):
            error_messages = args[-1]
            error_messages.append(f"{prefix}signed: the saved quantizer is another than {self._given!r}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_flags()


def mean_over_replicas(value: Tensor) -> Tensor:
    """The same on every replica of a distributed run; a collective, so that all of them must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
