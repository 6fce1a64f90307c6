"""The quantizers against their papers, written here a second time: one number at a time, in Python floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crcore as cr
from crcore.testing import QUANTIZERS, QuantizerCase, free_inputs, lattice_inputs

LEARNED = [name for name, q in QUANTIZERS.items() if q.learned and q.bits in (1, 2, 3, 4, 8)]
SOME = [name for name, q in QUANTIZERS.items() if q.bits in (1, 2, 3, 4, 8, 16)]
FEW = settings(max_examples=6)
MANY = settings(max_examples=150)


def every(names: list[str]) -> Any:
    return pytest.mark.parametrize("name", names)


def in_float64(case: QuantizerCase) -> tuple[Any, tuple[Any, ...]]:
    return case.x.astype(np.float64), tuple(parameter.astype(np.float64) for parameter in case.parameters)


def paper_value(quantizer: Any, x: float, parameters: list[float]) -> float:
    """The fake-quantized value of one number; `round` of Python is half to even, as everywhere."""
    bits, is_signed = quantizer.bits, bool(quantizer.signed)
    narrow = getattr(quantizer, "narrow", False)
    if isinstance(quantizer, (cr.PACT, cr.DoReFa)):
        narrow = is_signed
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    if narrow and is_signed:
        lo += 1
    elif narrow:
        hi -= 1
    binary = is_signed and bits == 1
    if isinstance(quantizer, cr.DoReFa) and quantizer.tanh:
        if bits == 1:
            return parameters[0] if x >= 0 else -parameters[0]
        n = 2**bits - 1
        return 2 * (round(n * (math.tanh(x) / (2 * parameters[0]) + 0.5)) / n) - 1
    if isinstance(quantizer, cr.DoReFa):
        if binary:
            return 1.0 if x >= 0 else -1.0
        return round(hi * min(max(x, -1.0 if is_signed else 0.0), 1.0)) / hi
    zero_point = 0
    if isinstance(quantizer, cr.LSQ):
        scale = parameters[0]
    elif isinstance(quantizer, cr.PACT):
        scale = parameters[0] / (1 if binary else hi)
    elif isinstance(quantizer, cr.LSQPlus):
        scale, offset = parameters
        zero_point = round(min(max(-offset / scale, lo), hi))
    else:
        low, high = parameters
        if quantizer.symmetric:
            reach = max(-low, high) if is_signed else high
            scale = (reach if reach > 0 else 1.0) / (1 if binary else hi)
        else:
            scale = (high - low if high > low else 1.0) / (hi - lo)
            zero_point = round(min(max(lo - low / scale, lo), hi))
    if binary:
        return scale if x >= 0 else -scale
    return (min(max(round(x / scale) + zero_point, lo), hi) - zero_point) * scale


@every(SOME)
@given(data=st.data())
@FEW
def test_forward_is_the_papers_formula(name: str, data: st.DataObject) -> None:
    case = data.draw(lattice_inputs(QUANTIZERS[name]))
    x, parameters = in_float64(case)
    spread = [np.broadcast_to(parameter, x.shape) for parameter in parameters]
    expected = [
        paper_value(case.quantizer, float(x[place]), [float(p[place]) for p in spread]) for place in np.ndindex(x.shape)
    ]
    found = case.quantizer.forward(x, *parameters).reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-300)
    if not isinstance(case.quantizer, cr.DoReFa):  # on the lattice float32 is exact, if the division is a division
        single = case.quantizer.forward(case.x, *case.parameters).reshape(-1)
        is_normal = np.abs(case.x.reshape(-1)) >= 2.0**-126  # below, x / scale may be zero, and its sign is lost
        assert np.array_equal(single[is_normal], np.array(expected, np.float32)[is_normal])


@every(SOME)
@given(data=st.data())
@FEW
def test_codes_are_whole_and_on_the_grid(name: str, data: st.DataObject) -> None:
    case = data.draw(free_inputs(QUANTIZERS[name]) | lattice_inputs(QUANTIZERS[name]))
    codes = case.quantizer.codes(case.x, *case.parameters)
    if isinstance(case.quantizer, cr.DoReFa) and case.quantizer.tanh:
        n = 2**case.quantizer.bits - 1
        assert np.all(np.isin(codes, np.arange(-n, n + 1, 2)))
    else:
        grid = case.quantizer.grid
        assert np.all((codes == np.round(codes)) & (codes >= grid.lo) & (codes <= grid.hi))
        assert not (grid.binary and np.any(codes == 0.0))


@every(SOME)
@given(data=st.data())
@FEW
def test_forward_is_codes_minus_zero_point_times_scale_bit_for_bit(name: str, data: st.DataObject) -> None:
    case = data.draw(free_inputs(QUANTIZERS[name]) | lattice_inputs(QUANTIZERS[name]))
    scale, zero_point = case.quantizer.affine(*case.parameters)
    y = case.quantizer.forward(case.x, *case.parameters)
    codes = case.quantizer.codes(case.x, *case.parameters)
    assert np.array_equal(y, (codes - zero_point) * scale)
    assert y.dtype == codes.dtype == np.float32
    assert np.array_equal(zero_point, np.round(zero_point))
    assert np.all(np.asarray(scale) > 0.0)


@every([name for name in SOME if "DoReFa-weight" not in name])
@given(data=st.data())
@FEW
def test_quantizing_twice_changes_nothing(name: str, data: st.DataObject) -> None:
    case = data.draw(free_inputs(QUANTIZERS[name]) | lattice_inputs(QUANTIZERS[name]))
    once = case.quantizer.forward(case.x, *case.parameters)
    assert np.array_equal(case.quantizer.forward(once, *case.parameters), once)


@every([name for name in SOME if "DoReFa-weight" not in name and not ("-1-signed" in name or "weight-1" in name)])
@given(data=st.data())
@FEW
def test_real_zero_is_exactly_representable(name: str, data: st.DataObject) -> None:
    case = data.draw(free_inputs(QUANTIZERS[name]) | lattice_inputs(QUANTIZERS[name]))
    assert not np.any(case.quantizer.forward(np.zeros_like(case.x), *case.parameters))


@every(SOME)
@given(data=st.data())
@FEW
def test_forward_never_falls_as_x_rises(name: str, data: st.DataObject) -> None:
    case = data.draw(free_inputs(QUANTIZERS[name]))
    below = case.x - np.float32(data.draw(st.floats(0.0, 2.0)))
    y, y_below = (case.quantizer.forward(x, *case.parameters) for x in (case.x, below))
    assert np.all(y_below <= y)


@every([name for name in SOME if name.startswith(("LSQ", "MinMax"))])
@given(data=st.data())
@FEW
def test_gradient_is_one_at_the_clip_bounds_and_zero_just_outside(name: str, data: st.DataObject) -> None:
    case = data.draw(lattice_inputs(QUANTIZERS[name]))
    q = case.quantizer
    x, parameters = in_float64(case)
    scale, zero_point = q.affine(*parameters)
    for bound, outwards in ((q.grid.lo, -np.inf), (q.grid.hi, np.inf)):
        at = np.broadcast_to((bound - zero_point) * scale, x.shape)
        # Next to the bound as seen after division: the neighbour of x itself may be divided onto the bound.
        beyond = np.where(at == 0.0, np.copysign(1e-30, outwards), at * (1 + 1e-15 * np.sign(at) * np.sign(outwards)))
        dx_at = q.vjp(case.cotangent, at, *parameters, elements=1.0)[0]
        dx_beyond = q.vjp(case.cotangent, beyond, *parameters, elements=1.0)[0]
        assert np.array_equal(dx_at, case.cotangent)
        assert not np.any(dx_beyond)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 3.3333333, 7.7])
def test_pact_and_dorefa_gradients_are_one_at_the_clip_level_itself(bits: int, signed: bool, alpha: float) -> None:
    level = np.array([alpha], np.float32)
    for q, top, parameters in (
        (cr.PACT(bits, signed=signed), level, (level,)),
        (cr.DoReFa(bits, signed=signed).for_role("activation"), np.ones(1, np.float32), ()),
    ):
        bottom = -top if signed else np.zeros_like(top)
        for bound, outwards in ((top, np.inf), (bottom, -np.inf)):
            beyond = np.nextafter(bound, np.float32(outwards))
            cotangent = np.array([0.7], np.float32)
            assert q.vjp(cotangent, bound, *parameters, elements=1.0)[0] == cotangent
            assert q.vjp(cotangent, beyond, *parameters, elements=1.0)[0] == 0.0


@every([name for name, q in QUANTIZERS.items() if isinstance(q, cr.MinMax) and q.symmetric])
@given(data=st.data())
@FEW
def test_the_observed_extreme_keeps_its_gradient(name: str, data: st.DataObject) -> None:
    q = QUANTIZERS[name]
    x = data.draw(free_inputs(q)).x
    x = x if q.signed else np.abs(x)
    axes = (1,) if q.per_channel else (0, 1)
    x = x.reshape(x.shape[0], -1)
    dx, *_ = q.vjp(np.full_like(x, 0.3), x, *q.init(x, axes=axes), elements=1.0)
    assert np.all(dx == np.float32(0.3))


def surrogate_gradients(case: QuantizerCase) -> tuple[Any, ...]:
    """The straight-through construction in float64, which torch differentiates: v + (round(v) - v).detach()."""
    import torch

    def through(v: Any) -> Any:
        return v + (torch.round(v) - v).detach()

    def clip(v: Any, lo: Any, hi: Any) -> Any:  # gradient one at the bounds, where torch.minimum shares it
        return torch.where(v < lo, lo + 0 * v, torch.where(v > hi, hi + 0 * v, v))

    def sign(v: Any) -> Any:  # the gradient of clip(v, -1, 1)
        c = clip(v, -1.0, 1.0)
        return c + (torch.where(v >= 0, 1.0, -1.0) - c).detach()

    q = case.quantizer
    x, *parameters = (
        torch.tensor(array.astype(np.float64), requires_grad=True) for array in (case.x, *case.parameters)
    )
    if isinstance(q, cr.DoReFa) and q.tanh:
        t = torch.tanh(x)
        norm = torch.amax(torch.abs(t), dim=case.axes, keepdim=True)
        n = 2**q.bits - 1
        y = 2 * through(n * (t / (2 * norm) + 0.5)) / n - 1
        if q.bits == 1:
            y = x + (torch.sign(x) - x).detach()
    elif isinstance(q, cr.DoReFa):
        y = sign(x) if q.grid.binary else through(q.grid.hi * clip(x, q.grid.lo / q.grid.hi, 1.0)) / q.grid.hi
    elif isinstance(q, cr.PACT):
        # The scale is the clip level's, straight-through: y = clip(x, lo * alpha / hi, alpha), then snapped.
        clipped = clip(x, q.grid.lo / q.grid.hi * parameters[0], parameters[0])
        y = clipped + (torch.tensor(q.forward(case.x, *case.parameters)) - clipped).detach()
    elif isinstance(q, cr.LSQ):
        v = x / parameters[0]
        y = (sign(v) if q.grid.binary else through(clip(v, q.grid.lo, q.grid.hi))) * parameters[0]
    elif isinstance(q, cr.LSQPlus):
        scale, offset = parameters
        zero_point = torch.round(clip(-offset / scale, q.grid.lo, q.grid.hi)).detach()
        snapped = offset + (-zero_point * scale - offset).detach()
        y = through(clip((x - snapped) / scale, q.grid.lo, q.grid.hi)) * scale + snapped
    else:
        scale, zero_point = (torch.tensor(a) for a in q.affine(*(p.detach().numpy() for p in parameters)))
        v = x / scale
        y = (sign(v) if q.grid.binary else clip(v, q.grid.lo - zero_point, q.grid.hi - zero_point)) * scale
    y.backward(torch.tensor(case.cotangent.astype(np.float64)))
    dparameters = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters) if q.learned else ()
    return tuple(gradient.numpy() for gradient in (x.grad, *dparameters))


@every(SOME)
@given(data=st.data())
@FEW
def test_vjp_is_the_gradient_of_the_straight_through_construction(name: str, data: st.DataObject) -> None:
    case = data.draw(free_inputs(QUANTIZERS[name]))
    x, parameters = in_float64(case)
    if isinstance(case.quantizer, cr.DoReFa) and case.quantizer.tanh:
        parameters = case.quantizer.init(x, axes=case.axes)  # the norm of just these numbers
    found = case.quantizer.vjp(case.cotangent.astype(np.float64), x, *parameters, elements=case.elements)
    unscaled = 1.0
    if isinstance(case.quantizer, (cr.LSQ, cr.LSQPlus)):
        unscaled = math.sqrt(case.elements * case.quantizer.grid.hi)
    for index, (mine, theirs) in enumerate(zip(found, surrogate_gradients(case), strict=True)):
        np.testing.assert_allclose(mine * (unscaled if index else 1.0), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls", [cr.LSQ, cr.LSQPlus])
def test_gradient_scale_is_one_over_the_root_of_elements_times_hi(cls: Any) -> None:
    q = cls(bits=4, signed=False)
    x = np.linspace(-3.0, 9.0, 24).reshape(4, 6)
    parameters = tuple(np.full((1, 1), value) for value in (0.3, -0.5)[: len(q.parameters)])
    one = q.vjp(x + 0.7, x, *parameters, elements=1.0)
    many = q.vjp(x + 0.7, x, *parameters, elements=600.0)
    assert np.array_equal(one[0], many[0])
    for a, b in zip(one[1:], many[1:], strict=True):
        np.testing.assert_allclose(a / b, math.sqrt(600.0), rtol=1e-12)
    terms = q.vjp(x + 0.7, x, *(np.broadcast_to(p, x.shape) for p in parameters), elements=1 / 15)
    np.testing.assert_allclose(terms[1].sum() / math.sqrt(15), one[1].sum(), rtol=1e-12)


def test_dorefa_shares_the_gradient_of_the_maximum_evenly_among_ties() -> None:
    q = cr.DoReFa(4).for_role("weight")
    x = np.array([[0.9, -0.9, 0.2]])
    cotangent = np.array([[0.3, 0.5, -0.8]])
    (dx,) = q.vjp(cotangent, x, *q.init(x, axes=(0, 1)), elements=3.0)
    t = np.tanh(x)
    norm = t[0, 0]
    share = -np.sum(cotangent * t) / norm**2 / 2
    expected = (cotangent / norm + np.array([[share, -share, 0.0]])) * (1 - t**2)
    np.testing.assert_allclose(dx, expected, rtol=1e-12)


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 1e-25, 1e-13])
def test_a_channel_of_almost_nothing_has_finite_gradients(tiny: float) -> None:
    for name in ("LSQ-weight-4-per_channel", "MinMax-weight-4-per_channel", "DoReFa-weight-4-per_channel"):
        q = QUANTIZERS[name]
        x = np.array([[tiny, -tiny, 0.0], [1.0, -0.5, 0.3]], np.float32)
        parameters = q.init(x, axes=(1,))
        cotangent = np.array([[0.3, -0.4, 0.5]] * 2, np.float32)
        for array in (q.forward(x, *parameters), *q.vjp(cotangent, x, *parameters, elements=3.0)):
            assert np.all(np.isfinite(array))


@given(case=free_inputs())
@MANY
def test_a_stored_scale_at_or_below_zero_still_acts_as_positive(case: QuantizerCase) -> None:
    if not isinstance(case.quantizer, (cr.LSQ, cr.LSQPlus, cr.PACT)):
        return
    for factor in (-1.0, 0.0):
        stored = (np.float32(factor) * case.parameters[0], *case.parameters[1:])
        scale, _ = case.quantizer.affine(*stored)
        assert np.all(scale > 0.0)
        y, gradients = (
            case.quantizer.forward(case.x, *stored),
            case.quantizer.vjp(case.cotangent, case.x, *stored, elements=case.elements),
        )
        assert np.all(np.isfinite(y))
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
        assert np.all((y > 0.0) <= (case.x >= 0.0))  # nothing changes sign


# Initialisation


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_lsq_starts_at_twice_the_mean_magnitude_over_root_hi(bits: int, signed: bool) -> None:
    x = np.random.default_rng(bits).normal(size=(3, 7))
    (scale,) = cr.LSQ(bits, signed=signed).init(x, axes=(1,))
    hi = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    for channel in range(3):
        assert scale[channel, 0] == pytest.approx(2 * sum(abs(v) for v in x[channel]) / 7 / math.sqrt(hi))


def test_one_signed_bit_is_the_sign_times_the_mean_magnitude() -> None:
    x = np.array([[0.5, -1.5, 0.0, -0.0]])
    for q in (cr.LSQ(1, signed=True), cr.DoReFa(1).for_role("weight")):
        parameters = q.init(x, axes=(0, 1))
        assert parameters[0] == 0.5
        assert np.array_equal(q.forward(x, *parameters), [[0.5, -0.5, 0.5, 0.5]])
    assert np.array_equal(cr.LSQ(1, signed=True).codes(x, np.ones((1, 1))), [[1, -1, 1, 1]])


def test_one_unsigned_bit_has_the_codes_zero_and_one() -> None:
    q = cr.LSQ(1, signed=False)
    assert (q.grid.lo, q.grid.hi) == (0, 1)
    assert np.array_equal(q.forward(np.array([[-1.0, 0.4, 0.5, 0.6, 9.0]]), np.ones((1, 1))), [[0, 0, 0, 1, 1]])


@every([name for name in SOME if "per_channel" in name])
def test_an_all_zero_channel_gets_a_usable_scale(name: str) -> None:
    q = QUANTIZERS[name]
    x = np.array([[0.0, -0.0, 0.0], [1.0, -0.5, 0.25]], np.float32)
    parameters = q.init(x, axes=(1,))
    scale, _ = q.affine(*parameters)
    assert np.all((scale > 1e-6) & np.isfinite(scale))
    y = q.forward(x, *parameters)
    assert np.all(np.isfinite(y))
    if q.bits > 1 and not isinstance(q, cr.DoReFa):
        assert not np.any(y[0])
    alone = q.forward(x[1:], *q.init(x[1:], axes=(1,)))
    assert np.array_equal(y[1:], alone)  # a neighbour of zeros changes nothing


def test_pact_starts_at_the_largest_magnitude() -> None:
    q = cr.PACT(4, signed=True)
    assert q.init(np.array([[1.0, -3.0]]), axes=(0, 1))[0] == 3.0
    assert q.init(np.zeros((1, 2)), axes=(0, 1))[0] == 1.0


def test_lsqplus_starts_with_the_range_cut_to_three_standard_deviations_and_holding_zero() -> None:
    q = cr.LSQPlus(4, signed=False)
    x = np.random.default_rng(0).uniform(-0.2, 1.0, size=(1, 1000))
    scale, offset = q.init(x, axes=(0, 1))
    assert scale.item() == pytest.approx((x.max() - x.min()) / 15)
    assert offset.item() == pytest.approx(x.min())
    outlier = np.append(x, 1e3).reshape(1, -1)
    scale, _ = q.init(outlier, axes=(0, 1))
    high, low = outlier.mean() + 3 * outlier.std(), outlier.min()
    assert scale.item() == pytest.approx((high - low) / 15)
    scale, offset = q.init(x + 5.0, axes=(0, 1))  # all positive: the range still reaches down to zero
    assert offset == 0.0
    assert scale.item() == pytest.approx((x.max() + 5.0) / 15)


@given(case=free_inputs(), momentum=st.floats(0.0, 0.99))
@MANY
def test_minmax_observes_a_running_range_that_holds_zero(case: QuantizerCase, momentum: float) -> None:
    q = cr.MinMax(8, momentum=momentum).for_role("activation")
    axes = tuple(range(case.x.ndim))
    x = case.x.astype(np.float64)
    low, high = q.init(x, axes=axes)
    assert (low.item(), high.item()) == (min(0.0, x.min()), max(0.0, x.max()))
    assert all(a == pytest.approx(b) for a, b in zip(q.observe(x, low, high, axes=axes), (low, high), strict=True))
    new_low, new_high = q.observe(2.0 * x, low, high, axes=axes)
    assert new_high.item() == pytest.approx(momentum * high.item() + (1 - momentum) * 2 * high.item())
    assert new_low.item() == pytest.approx(momentum * low.item() + (1 - momentum) * 2 * low.item())


# What is refused


@pytest.mark.parametrize("cls", [cr.LSQ, cr.LSQPlus, cr.PACT, cr.DoReFa, cr.MinMax])
@pytest.mark.parametrize("bits", [0, 17, -1, True, 4.0, "4", None])
def test_bits_outside_1_to_16_are_refused_with_the_way_out(cls: Any, bits: Any) -> None:
    with pytest.raises(cr.CRCoreError, match=r"bits must be a whole number from 1 to 16, got .*Recipe\(skip"):
        cls(bits=bits)


@pytest.mark.parametrize("cls", [cr.LSQ, cr.LSQPlus, cr.MinMax])
def test_one_narrow_bit_is_refused(cls: Any) -> None:
    with pytest.raises(cr.CRCoreError, match="single code; use narrow=False, or bits=2"):
        cls(bits=1, narrow=True)


@pytest.mark.parametrize("cls", [cr.LSQ, cr.LSQPlus, cr.PACT, cr.DoReFa, cr.MinMax])
def test_a_sign_that_is_no_truth_value_is_refused(cls: Any) -> None:
    with pytest.raises(cr.CRCoreError, match="signed must be True or False, got 'yes'"):
        cls(bits=4, signed="yes")


def test_pact_refuses_weights_and_names_its_partner() -> None:
    with pytest.raises(cr.CRCoreError, match=r"activations, not weights.*DoReFa"):
        cr.PACT(4).for_role("weight")


@pytest.mark.parametrize("make", [lambda: cr.LSQPlus(1, signed=True), lambda: cr.MinMax(1, signed=True)])
def test_one_signed_bit_with_a_zero_point_is_refused(make: Any) -> None:
    with pytest.raises(cr.CRCoreError, match="1 signed bit has no zero point; use"):
        make().for_role("activation")


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_a_momentum_outside_0_to_1_is_refused(momentum: float) -> None:
    with pytest.raises(cr.CRCoreError, match=r"momentum must lie in \[0, 1\), got"):
        cr.MinMax(8, momentum=momentum)


@pytest.mark.parametrize("cls", [cr.LSQ, cr.PACT])
def test_an_unknown_sign_is_an_error_that_says_what_to_give(cls: Any) -> None:
    with pytest.raises(cr.CRCoreError, match="give signed=True or signed=False"):
        cls(4).forward(np.ones((1, 1)), np.ones((1, 1)))


@pytest.mark.parametrize("bits", range(1, 17))
def test_grids_hold_the_documented_codes(bits: int) -> None:
    signed, unsigned = cr.IntGrid(bits, signed=True), cr.IntGrid(bits, signed=False)
    assert (unsigned.lo, unsigned.hi) == (0, 2**bits - 1)
    assert (signed.lo, signed.hi) == ((-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    assert signed.binary == (bits == 1)
    assert not unsigned.binary
    if bits > 1:
        assert cr.IntGrid(bits, signed=True, narrow=True).lo == -signed.hi
        assert cr.IntGrid(bits, signed=False, narrow=True).hi == unsigned.hi - 1


@every(sorted(QUANTIZERS))
def test_every_quantizer_meets_the_protocol_and_is_settled_for_its_role(name: str) -> None:
    q = QUANTIZERS[name]
    assert isinstance(q, cr.Quantizer)
    assert q.for_role("weight" if "-weight-" in name else "activation") == q
