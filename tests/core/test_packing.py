"""Packing is exact for every width, and takes the bits that it should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crcore as cr
from crcore import _packing
from crcore._packing import pack, packed_codes, packed_size, unpack, unpacked_codes
from crcore.testing import QUANTIZERS

WEIGHTS = {
    f"{type(q).__name__} {q.bits} {q.signed} {getattr(q, 'narrow', '')} {getattr(q, 'symmetric', '')}": q
    for bits in range(1, 17)
    for q in (
        cr.LSQ(bits, signed=True),
        cr.LSQ(bits, signed=False),
        cr.DoReFa(bits).for_role("weight"),
        cr.MinMax(bits).for_role("weight"),
        *([cr.LSQ(bits, signed=True, narrow=True), cr.MinMax(bits, signed=True, symmetric=False)] if bits > 1 else []),
        cr.MinMax(bits, signed=False, symmetric=False),
    )
}


@st.composite
def numbers(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 16))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))


@given(numbers(), st.sampled_from([8, 16, 2**19]))
def test_packing_is_one_large_number_in_little_endian_bytes(given: tuple[int, list[int]], block: int) -> None:
    bits, values = given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_packing, "_BLOCK", block)  # also where it takes several blocks
        packed = pack(values, bits)
        large = sum(value << (place * bits) for place, value in enumerate(values))
        assert packed.dtype == np.uint8
        assert packed.tobytes() == large.to_bytes(packed_size(len(values), bits), "little")
        assert unpack(packed, bits, len(values)).tolist() == values


def test_packing_goes_over_the_edges_of_its_blocks() -> None:
    values = np.arange(2**19 + 3, dtype=np.uint16) % 8
    packed = pack(values, 3)
    assert packed.size == packed_size(len(values), 3) == (3 * len(values) + 7) // 8
    np.testing.assert_array_equal(unpack(packed, 3, len(values)), values)


def test_eight_and_sixteen_bits_are_what_numpy_has() -> None:
    values = np.arange(0, 2**16, 251)
    assert pack(values, 16).tobytes() == values.astype("<u2").tobytes()
    assert pack(values % 256, 8).tobytes() == (values % 256).astype("u1").tobytes()
    assert pack([0x1, 0xF, 0xA], 4).tolist() == [0xF1, 0x0A]


@pytest.mark.parametrize("name", WEIGHTS)
def test_all_codes_of_a_quantizer_take_its_bits_and_come_back(name: str) -> None:
    quantizer = WEIGHTS[name]
    x = np.linspace(-1.0, 1.0, 2**14 + 1)
    codes = np.unique(quantizer.codes(256.0 * np.arctanh(0.999 * x), *quantizer.init(x, axes=(0,)))).astype(int)
    lowest, highest = cr.code_limits(quantizer)
    assert (codes.min(), codes.max()) == (lowest, highest)
    packed = packed_codes(codes, quantizer)
    assert packed.size == packed_size(len(codes), quantizer.bits)
    unpacked = unpacked_codes(packed, quantizer, len(codes))
    np.testing.assert_array_equal(unpacked, codes)
    limits = np.iinfo(cr.code_dtype(quantizer))
    assert unpacked.dtype == cr.code_dtype(quantizer)
    assert limits.min <= lowest <= highest <= limits.max


@pytest.mark.parametrize("name", [name for name, each in QUANTIZERS.items() if each.signed is not None])
def test_the_limits_are_the_codes_of_values_far_outside(name: str) -> None:
    quantizer = QUANTIZERS[name]
    x = np.array([-3.0, 1.0, 2.0])
    far = quantizer.codes(np.array([-1e30, 1e30]), *quantizer.init(x, axes=(0,)))
    assert cr.code_limits(quantizer) == tuple(far)


def test_codes_outside_of_the_grid_are_refused_on_both_ways() -> None:
    narrow = cr.LSQ(2, signed=True, narrow=True)
    for codes in ([-2, 0], [0, 2]):
        with pytest.raises(cr.CRCoreError, match=r"cannot give: from .* to"):
            packed_codes(np.array(codes), narrow)
    with pytest.raises(cr.CRCoreError, match="cannot give: from 0 to 0"):
        packed_codes(np.array([0]), cr.DoReFa(2).for_role("weight"))  # which has no zero
    with pytest.raises(cr.CRCoreError, match="cannot give: up to 2, allowed are 1"):
        unpacked_codes(pack([3], 2), narrow, 1)
