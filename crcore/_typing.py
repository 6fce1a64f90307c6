"""The protocols of the seam: what the core asks of an array library, and what a backend may ask of the core.

Every formula in the core is written once, over a *namespace* of array functions that is given as the keyword ``xp``
(NumPy by default). A backend binds the core by handing in its own namespace. `Namespace` lists every function that the
core calls and the one spelling in which it calls it; the spellings are those on which NumPy, PyTorch and Keras agree:

* ``clip``: positional, both bounds Python numbers (Keras rejects ``min=``, torch rejects a tensor with a float);
* ``sum``, ``mean``, ``amax``, ``amin``: an explicit, non-empty tuple of axes and ``keepdims=True`` unless a single axis
  is reduced (``axis=()`` reduces everything in torch, ``axis=None`` drops ``keepdims`` in Keras on torch);
* masks are combined with ``&`` and consumed by ``where``: multiplying a mask with floats returns a mask in TensorFlow;
* ``divide`` stands where a tensor is divided by what its elements share, or by a number: the quotient must be the
  correctly rounded one, and a compiler may be tempted to multiply by the reciprocal, which is not;
* ``round`` is half to even everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

Role = Literal["weight", "activation"]

# An array of the namespace in use: numpy.ndarray, torch.Tensor, a Keras tensor. Arithmetic, comparison, ``.shape`` and
# ``.ndim`` are used. It is `Any` because a structural type for the operators of all of them would reject each of them.
Array = Any


class Namespace(Protocol):
    """The array functions that the core uses. NumPy is one; a backend supplies its own."""

    abs: Callable[..., Any]
    amax: Callable[..., Any]
    amin: Callable[..., Any]
    clip: Callable[..., Any]
    cos: Callable[..., Any]
    divide: Callable[..., Any]
    exp: Callable[..., Any]
    log: Callable[..., Any]
    logaddexp: Callable[..., Any]
    mean: Callable[..., Any]
    reshape: Callable[..., Any]
    round: Callable[..., Any]
    sqrt: Callable[..., Any]
    sum: Callable[..., Any]
    tanh: Callable[..., Any]
    where: Callable[..., Any]
    zeros_like: Callable[..., Any]


@runtime_checkable
class Schedule(Protocol):
    """A number that changes with the optimizer step: ``schedule(step) -> value``.

    ``step`` is a Python int, a NumPy array or a traced tensor; for a tensor the backend passes its namespace as ``xp``
    and makes it float32 first (an integer divided by an integer is float64 in TensorFlow).
    """

    def __call__(self, step: Any, *, xp: Any = ...) -> Any: ...


@runtime_checkable
class Divergence(Protocol):
    """How far the student's prediction is from the teacher's, per prediction: the class axis is reduced away."""

    def __call__(
        self, student: Array, teacher: Array, *, axis: int = ..., temperature: float = ..., xp: Any = ...
    ) -> Array: ...


@runtime_checkable
class Quantizer(Protocol):
    """A fake quantizer: the value ``(codes - zero_point) * scale``, and its gradient.

    A quantizer is an immutable description. The arrays it works with (a learned scale, an observed range) are handed in
    as ``*parameters``, in the order of the names in `parameters`; a backend stores them where its users expect them.
    Each has as many dimensions as ``x``, with size 1 along every axis that shares it. Every method takes the array
    namespace as the keyword ``xp`` (in ``options`` here, because only then may an implementation name its parameters).
    A quantizer that follows the data has one more method, ``observe(x, *parameters, axes, xp) -> parameters``, which
    backends call for each activation in training, before they quantize it.
    """

    if TYPE_CHECKING:  # read-only members: the implementations are frozen dataclasses
        learned: ClassVar[bool]

        @property
        def bits(self) -> int: ...
        @property
        def signed(self) -> bool | None: ...
        @property
        def per_channel(self) -> bool: ...

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arrays it works with. `learned` says whether they are trained or observed."""
        ...

    def for_role(self, role: Role) -> Self:
        """The same quantizer with every choice filled in that depends on what it quantizes."""
        ...

    def init(self, x: Array, *, axes: tuple[int, ...], xp: Any = ...) -> tuple[Array, ...]:
        """The parameters that suit the data ``x``, reduced over ``axes``."""
        ...

    def codes(self, x: Array, *parameters: Any, **options: Any) -> Array:
        """The integers, as floats."""
        ...

    def affine(self, *parameters: Any, **options: Any) -> tuple[Array, Array]:
        """``(scale, zero_point)`` such that ``forward == (codes - zero_point) * scale``, bit for bit.

        Numbers instead of arrays where there are no parameters to give them a shape.
        """
        ...

    def forward(self, x: Array, *parameters: Any, **options: Any) -> Array:
        """The fake-quantized value."""
        ...

    def vjp(self, cotangent: Array, x: Array, *parameters: Any, **options: Any) -> tuple[Array, ...]:
        """Gradients ``(dx, *dparameters)`` for ``cotangent = dL/dy``; only ``(dx,)`` where nothing is learned.

        Takes the keyword ``elements``: how many elements share one scale; of a weight all of them, of an activation
        those of one sample.
        """
        ...
