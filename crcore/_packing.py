"""The integers of a quantized weight: which ones there are, and how they are packed into bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from crcore._errors import CRCoreError
from crcore._typing import Quantizer

_BLOCK = 2**19  # numbers at a time, a multiple of 8: bounds the memory for their bits


def code_limits(quantizer: Quantizer) -> tuple[int, int]:
    """The lowest and the highest code that a quantizer can give, however large the values.

    Args:
        quantizer: its sign known, as ``FakeQuantize.quantizer`` has it.

    >>> from crcore import DoReFa, LSQ
    >>> code_limits(LSQ(bits=4, signed=True)), code_limits(DoReFa(bits=2).for_role("weight"))
    ((-8, 7), (-3, 3))
    """
    data = np.array([-1.0, 1.0])
    lowest, highest = quantizer.codes(1e9 * data, *quantizer.init(data, axes=(0,)))  # far outside are the grid's ends
    return int(lowest), int(highest)


def code_dtype(quantizer: Quantizer) -> str:
    """The type in which `convert` holds the codes of a weight: int8 where the grid fits, else uint8, int16 or int32.

    >>> from crcore import LSQ
    >>> code_dtype(LSQ(bits=4, signed=True)), code_dtype(LSQ(bits=8, signed=False))
    ('int8', 'uint8')
    """
    lowest, highest = code_limits(quantizer)
    for dtype in ("int8", "uint8", "int16"):
        if np.iinfo(dtype).min <= lowest and highest <= np.iinfo(dtype).max:
            return dtype
    return "int32"


def packed_codes(codes: Any, quantizer: Quantizer) -> Any:
    """The codes of a weight in exactly ``quantizer.bits`` bits each.

    A quantizer of ``b`` bits has at most ``2**b`` codes, a constant step apart: 2 where it has no zero (DoReFa's odd
    numerators, and -1 and 1), else 1. What is packed is ``(codes - lowest) / step``, in C order.

    Args:
        codes: whole numbers, of any shape and integer type.
        quantizer: what gave them.

    Returns:
        uint8 ``[ceil(codes.size * bits / 8)]``, see `pack`.

    Raises:
        CRCoreError: a code that the quantizer cannot give.
    """
    lowest, highest, step = _grid(quantizer)
    numbers, rest = np.divmod(np.asarray(codes, np.int64).reshape(-1) - lowest, step)
    if np.any((numbers < 0) | (numbers > (highest - lowest) // step) | (rest != 0)):
        raise CRCoreError(f"has codes that {quantizer!r} cannot give: from {np.min(codes)} to {np.max(codes)}")
    return pack(numbers, quantizer.bits)


def unpacked_codes(packed: Any, quantizer: Quantizer, count: int) -> Any:
    """The inverse of `packed_codes`: ``count`` codes in the type of `code_dtype`.

    Raises:
        CRCoreError: a code that the quantizer cannot give.
    """
    lowest, highest, step = _grid(quantizer)
    codes = lowest + step * unpack(packed, quantizer.bits, count).astype(np.int32)
    if np.any(codes > highest):
        raise CRCoreError(f"has codes that {quantizer!r} cannot give: up to {codes.max()}, allowed are {highest}")
    return codes.astype(code_dtype(quantizer))


def pack(numbers: Any, bits: int) -> Any:
    """Whole numbers as a stream of bits.

    Number ``i`` takes the bits ``i * bits`` to ``(i + 1) * bits - 1`` of the stream, its lowest bit first; bit ``k`` of
    the stream is the one worth ``2**(k % 8)`` of byte ``k // 8``: little-endian throughout, on every machine. So two
    numbers of 4 bits share a byte, the first in the lower half; numbers of 8 bits are bytes; bits left over are 0.

    Args:
        numbers: ``[n]``, each from 0 to ``2**bits - 1``.
        bits: 1 to 16.

    Returns:
        uint8 ``[ceil(n * bits / 8)]``.

    >>> pack([1, 2, 3], bits=4).tolist()
    [33, 3]
    """
    numbers, places = np.asarray(numbers, np.uint16), np.arange(bits, dtype=np.uint16)
    blocks = [numbers[start : start + _BLOCK] for start in range(0, len(numbers), _BLOCK)]
    streams = [((block[:, None] >> places) & 1).astype(np.uint8).reshape(-1) for block in blocks]
    return np.concatenate([np.packbits(stream, bitorder="little") for stream in streams] or [np.zeros(0, np.uint8)])


def unpack(packed: Any, bits: int, count: int) -> Any:
    """The inverse of `pack`: uint16 ``[count]``."""
    numbers, places = np.empty(count, np.uint16), np.arange(bits, dtype=np.uint16)
    for start in range(0, count, _BLOCK):
        n = min(_BLOCK, count - start)
        stream = np.unpackbits(packed[start * bits // 8 :][: packed_size(n, bits)], count=n * bits, bitorder="little")
        numbers[start : start + n] = (stream.reshape(n, bits).astype(np.uint16) << places).sum(1, dtype=np.uint16)
    return numbers


def packed_size(count: int, bits: int) -> int:
    """The bytes that ``count`` numbers take."""
    return -(-count * bits // 8)


def _grid(quantizer: Quantizer) -> tuple[int, int, int]:
    """The lowest and the highest code, and how far one is from the next."""
    lowest, highest = code_limits(quantizer)
    return lowest, highest, -(-(highest - lowest) // (2**quantizer.bits - 1))
