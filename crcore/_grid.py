"""The integers that a quantizer may use."""

from __future__ import annotations

from dataclasses import dataclass

from crcore._errors import CRCoreError

MIN_BITS, MAX_BITS = 1, 16


@dataclass(frozen=True)
class IntGrid:
    """The codes ``lo .. hi`` of a ``bits``-wide integer.

    ===================  ==========================  ==================
    grid                 lo                          hi
    ===================  ==========================  ==================
    signed               ``-2**(bits - 1)``          ``2**(bits - 1) - 1``
    signed, narrow       ``-2**(bits - 1) + 1``      ``2**(bits - 1) - 1``
    unsigned             0                           ``2**bits - 1``
    unsigned, narrow     0                           ``2**bits - 2``
    signed, 1 bit        -1                          1 (binary: no zero)
    ===================  ==========================  ==================

    One signed bit has a rule of its own: two's complement would give ``hi = 0``, a grid that cannot hold a positive
    number. Its two codes are -1 and +1, and zero is rounded to +1.

    >>> IntGrid(bits=4, signed=True)
    IntGrid(bits=4, signed=True, narrow=False)
    >>> IntGrid(bits=4, signed=True).lo, IntGrid(bits=4, signed=True).hi
    (-8, 7)
    >>> IntGrid(bits=2, signed=True, narrow=True).lo
    -1

    Raises:
        CRCoreError: ``bits`` is not a whole number from 1 to 16, or ``narrow`` would leave a single code.
    """

    bits: int
    signed: bool
    narrow: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.narrow and self.bits == 1:
            raise CRCoreError("narrow leaves a 1-bit grid with a single code; use narrow=False, or bits=2 (ternary)")

    @property
    def binary(self) -> bool:
        """Whether the codes are -1 and +1 without a zero."""
        return self.signed and self.bits == 1

    @property
    def lo(self) -> int:
        """The smallest code."""
        if self.binary:
            return -1
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def hi(self) -> int:
        """The largest code."""
        if self.binary:
            return 1
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1 - self.narrow


def check_bits(bits: int) -> None:
    """Raise `CRCoreError` unless ``bits`` is a whole number from 1 to 16."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise CRCoreError(
            f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {bits!r}; "
            "to leave a layer in float, name it in Recipe(skip=...)"
        )
