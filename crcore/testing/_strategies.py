"""Hypothesis strategies: what the method must hold for, drawn at random, with the awkward values always among it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from crcore import (
    EMA,
    LSQ,
    PACT,
    Consistency,
    Dampening,
    DoReFa,
    Freezing,
    IntGrid,
    LSQPlus,
    MinMax,
    Recipe,
    Schedule,
    constant,
    cosine_ramp,
    js_divergence,
    kl_divergence,
    linear_ramp,
    mse_divergence,
    sigmoid_ramp,
)

DIVERGENCES = (kl_divergence, js_divergence, mse_divergence)

# Weights and activations of dense layers, sequences and images; a single element; a channel of one.
SHAPES = ((48,), (6, 8), (1, 40), (3, 5, 4), (4, 3, 2, 3), (2, 2, 3, 2, 3), (1, 1), (5, 1))
DENORMALS = (2.0**-149, 2.0**-130)
# Odd numbers whose reciprocal misses: with the last four, (k + 1/2) * m * (1 / m) is rarely k + 1/2 in float32.
MULTIPLIERS = (1, 3, 15, 61, 63, 115, 119)


def _all_quantizers() -> dict[str, Any]:
    """Every kind, role, sign, grid and granularity at every width, ready to use (no choice is left open)."""
    found: dict[str, Any] = {}
    for bits in range(1, 17):
        narrows = (False, True) if bits > 1 else (False,)
        for per_channel in (False, True):
            channel = "-per_channel" if per_channel else ""
            for narrow in narrows:
                suffix = f"-{bits}{channel}{'-narrow' * narrow}"
                found[f"LSQ-weight{suffix}"] = LSQ(bits, per_channel, narrow=narrow).for_role("weight")
                found[f"MinMax-weight{suffix}"] = MinMax(bits, per_channel, narrow=narrow).for_role("weight")
            if bits > 1:
                affine = MinMax(bits, per_channel, symmetric=False)
                found[f"MinMax-weight-{bits}{channel}-affine"] = affine.for_role("weight")
            found[f"DoReFa-weight-{bits}{channel}"] = DoReFa(bits, per_channel).for_role("weight")
        for signed in (False, True):
            sign = "signed" if signed else "unsigned"
            found[f"LSQ-activation-{bits}-{sign}"] = LSQ(bits, signed=signed).for_role("activation")
            found[f"PACT-activation-{bits}-{sign}"] = PACT(bits, signed=signed).for_role("activation")
            found[f"DoReFa-activation-{bits}-{sign}"] = DoReFa(bits, signed=signed).for_role("activation")
            symmetric = MinMax(bits, signed=signed, symmetric=True)
            found[f"MinMax-activation-{bits}-{sign}-symmetric"] = symmetric.for_role("activation")
            if bits > 1 or not signed:  # one signed bit has no zero point
                for narrow in narrows:
                    suffix = f"{bits}-{sign}{'-narrow' * narrow}"
                    plus = LSQPlus(bits, signed=signed, narrow=narrow)
                    found[f"LSQPlus-activation-{suffix}"] = plus.for_role("activation")
                    minmax = MinMax(bits, signed=signed, narrow=narrow)
                    found[f"MinMax-activation-{suffix}"] = minmax.for_role("activation")
    return found


# By name, such as "LSQ-weight-4-per_channel". A role in the name, a role's choices in the value.
QUANTIZERS: Mapping[str, Any] = MappingProxyType(_all_quantizers())


@dataclass(frozen=True, eq=False)
class QuantizerCase:
    """A quantizer and everything that its forward and vjp are called with, in float32."""

    quantizer: Any
    x: Any
    parameters: tuple[Any, ...]
    cotangent: Any
    axes: tuple[int, ...]  # those that share one parameter
    elements: float  # how many elements share one parameter, within one sample


@dataclass(frozen=True, eq=False)
class LogitsCase:
    """The logits of both networks, a cotangent for each prediction, and which axis holds the classes."""

    student: Any
    teacher: Any
    cotangent: Any
    axis: int


def quantizers() -> st.SearchStrategy[Any]:
    """Any quantizer of `QUANTIZERS`."""
    return st.sampled_from(sorted(QUANTIZERS)).map(QUANTIZERS.__getitem__)


@st.composite
def lattice_inputs(draw: st.DrawFn, given: Any = None) -> QuantizerCase:
    """``x = (k + u) * m * 2**e``, on which every operation of a quantizer is exact: results must agree bit for bit.

    ``m`` is a small odd number, so that ``x * (1 / scale)`` is *not* the same as ``x / scale``. The clip bounds and
    their neighbours, ties, both zeros, denormals and values far outside are always among ``x`` (of a shape with room).
    """
    quantizer = draw(quantizers()) if given is None else given
    shape, axes, share = _layout(draw, quantizer)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    step = rng.choice(MULTIPLIERS if quantizer.bits <= 8 else (1, 3), size=share) * 2.0 ** draw(st.integers(-12, 6))
    is_squashed = isinstance(quantizer, DoReFa) and quantizer.tanh  # by tanh: levels without a grid of their own
    grid = IntGrid(1, signed=True) if is_squashed else quantizer.grid
    zero_point = np.zeros(share)
    parameters: tuple[Any, ...] = ()
    match quantizer:
        case LSQ():
            parameters = (step,)
        case PACT():
            parameters = (step * grid.hi,)
        case LSQPlus():
            # A quarter of a step past the zero point, and zero points that must be clipped to the grid.
            offset = rng.integers(-grid.hi - 2, -grid.lo + 3, size=share) + rng.choice([0.0, 0.25, -0.25], size=share)
            parameters = (step, offset * step)
            zero_point = quantizer.affine(*parameters)[1]
        case MinMax(symmetric=True):
            parameters = (-step * grid.hi * grid.signed, step * grid.hi)
        case MinMax():
            zero_point = rng.integers(grid.lo, grid.hi + 1, size=share).astype(float)
            parameters = ((grid.lo - zero_point) * step, (grid.hi - zero_point) * step)
        case DoReFa(tanh=True):
            parameters = (step,) if quantizer.bits == 1 else (np.ones(share),)
        case _:
            step = np.ones(share)  # the range of DoReFa's activations is fixed
    x: Any
    if is_squashed and quantizer.bits > 1:
        # tanh is exact at 0 and where it saturates, and nowhere else in common.
        x = rng.choice([0.0, -0.0, 32.0, -32.0, 64.0, *DENORMALS], size=shape)
    elif isinstance(quantizer, DoReFa) and not quantizer.tanh:
        fixed = [1.0, -1.0, 0.5, -0.5, *_neighbours(np.array([1.0, -1.0])), 3.0, -3.0]
        x = _placed(rng, rng.integers(-160, 161, size=shape) / 128.0, np.array(fixed, ndmin=2))
    else:
        low, high = grid.lo - zero_point, grid.hi - zero_point
        k = np.floor(rng.uniform(np.broadcast_to(low - 2, shape), np.broadcast_to(high + 3, shape)))
        bulk = (k + rng.choice([0.0, 0.5, 0.25, -0.25, 0.125], size=shape)) * step
        bounds = np.stack([low * step, high * step])
        ties = np.stack([(low + 0.5) * step, (high - 0.5) * step, 0.5 * step, -0.5 * step, 1.5 * step])
        beyond = np.stack([(low - 0.5) * step, (high + 0.5) * step, (low - 9) * step, (high + 9) * step])
        specials = np.concatenate([bounds, _neighbours(bounds), ties, beyond])
        x = _placed(rng, bulk, specials)
    return QuantizerCase(
        quantizer,
        _float32(x),
        tuple(_float32(parameter, exact=True) for parameter in parameters),
        _cotangent(rng, shape),
        axes,
        _elements(shape, share, is_weight=quantizer.per_channel or draw(st.booleans())),
    )


@st.composite
def free_inputs(draw: st.DrawFn, given: Any = None) -> QuantizerCase:
    """Any float32 values of one spread, with the parameters that the quantizer's own ``init`` finds, moved a little."""
    quantizer = draw(quantizers()) if given is None else given
    shape, axes, share = _layout(draw, quantizer)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    is_dorefa = isinstance(quantizer, DoReFa)
    spread = draw(st.floats(0.3, 1.0) if is_dorefa else st.floats(1e-3, 1e3))
    center = 0.0 if is_dorefa else draw(st.sampled_from((0.0, 0.0, 1.0, -3.0)))
    x = _float32(spread * (center + rng.normal(size=shape)))
    if not is_dorefa and draw(st.booleans()):
        x = np.where(rng.random(shape) < 0.3, np.float32(0.0), x)  # what a ReLU leaves
    parameters = quantizer.init(x, axes=axes)
    if not is_dorefa:  # DoReFa's norm is always that of x
        parameters = tuple(_float32(parameter * rng.uniform(0.6, 1.4, size=share)) for parameter in parameters)
    return QuantizerCase(
        quantizer,
        x,
        tuple(parameters),
        _cotangent(rng, shape),
        axes,
        _elements(shape, share, is_weight=quantizer.per_channel or draw(st.booleans())),
    )


@st.composite
def cotangents(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """Random gradients ``dL/dy``, never ones: a dropped or transposed cotangent must show."""
    return _cotangent(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), shape)


@st.composite
def logits(draw: st.DrawFn, largest: float = 1e4) -> LogitsCase:
    """Logits of rank 1 to 5 with the classes on any axis; usual ones, near-equal ones, and some of +-``largest``."""
    # Few shapes: some backends compile each operation for each of them.
    classes = draw(st.sampled_from((2, 5)))
    shape: list[int] = list(draw(st.sampled_from(((), (5,), (3, 4), (2, 1, 2, 3)))))
    axis = draw(st.sampled_from((-1, 1, -2) if shape else (-1, 0)))
    shape.insert(axis % (len(shape) + 1), classes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from((0.1, 1.0, 4.0, 10.0)))
    student: Any = spread * rng.normal(size=shape)
    teacher: Any = student + 0.01 * rng.normal(size=shape) if draw(st.booleans()) else spread * rng.normal(size=shape)
    if largest and draw(st.booleans()):
        extreme = rng.choice([-largest, largest, 0.0], size=(2, *shape))
        student, teacher = (
            np.where(rng.random(shape) < 0.5, e, v) for e, v in zip(extreme, (student, teacher), strict=True)
        )
    predictions = tuple(np.delete(shape, axis))
    return LogitsCase(_float32(student), _float32(teacher), _cotangent(rng, predictions), axis)


@st.composite
def schedules(draw: st.DrawFn, least: float = 0.0, most: float = 10.0) -> Schedule:
    """Constants and ramps, up and up-hold-down, with values in ``[least, most]``."""
    values = st.floats(least, most, allow_nan=False)
    if draw(st.booleans()):
        return constant(draw(values))
    make = draw(st.sampled_from((linear_ramp, sigmoid_ramp, cosine_ramp)))
    down = draw(st.none() | st.integers(1, 5_000))
    hold = 0 if down is None else draw(st.integers(0, 5_000))
    return make(draw(values), draw(st.integers(1, 5_000)), start=draw(values), hold=hold, down=down)


@st.composite
def averages(draw: st.DrawFn) -> EMA:
    """EMA settings with constant and scheduled decay, with and without warm-up."""
    decay = draw(st.sampled_from((0.0, 0.9, 0.999, 1.0)) | schedules(0.0, 1.0))
    return EMA(
        decay=decay,
        warmup=draw(st.sampled_from((0, 1, 50, 20_000))),
        quantized=draw(st.booleans()),
        batchnorm=draw(st.sampled_from(("average", "copy"))),
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of crcore's own parts, which a file can name."""
    narrow = st.booleans() if (bits := draw(st.integers(1, 16))) > 1 else st.just(False)
    weights = st.none() | st.one_of(
        st.builds(LSQ, st.just(bits), st.booleans(), st.sampled_from((None, True, False)), narrow),
        st.builds(MinMax, st.just(bits), st.booleans(), narrow=narrow),
        st.builds(DoReFa, st.just(bits), st.booleans()),
        st.builds(LSQPlus, st.just(bits), st.booleans()),
    )
    sign = st.sampled_from((None, False))
    activations = st.none() | st.one_of(
        st.builds(LSQ, st.just(bits), signed=st.sampled_from((None, True, False))),
        st.builds(LSQPlus, st.just(bits), signed=sign, narrow=narrow),
        st.builds(PACT, st.just(bits), signed=st.sampled_from((None, True, False))),
        st.builds(DoReFa, st.just(bits), signed=sign),
        st.builds(MinMax, st.just(bits), signed=sign, momentum=st.sampled_from((0.0, 0.9, 0.99))),
    )
    names = st.sampled_from(("stem", "head", "blocks.*", "blocks.0.conv", "type", "function", "*.norm?", "[ab].x"))
    override = st.fixed_dictionaries({}, optional={"weights": weights, "activations": activations}).filter(bool)
    term = st.builds(
        Consistency,
        st.sampled_from(DIVERGENCES),
        st.floats(0.0, 5.0) | schedules(),
        st.floats(0.1, 8.0),
        st.none() | st.floats(0.0, 1.0),
    )
    overrides = draw(st.dictionaries(names, override, max_size=3))
    weight = draw(weights)
    quantizers = [weight, *(each.get("weights") for each in overrides.values())]
    learned = any(quantizers) and all(quantizer is None or quantizer.learned for quantizer in quantizers)
    dampening = st.builds(Dampening, schedules()) if learned else st.none()
    freezing = st.builds(Freezing, schedules(0.0, 0.99), st.floats(0.001, 1.0)) if learned else st.none()
    return draw(
        st.builds(
            Recipe,
            st.just(weight),
            activations,
            first_last_bits=st.none() | st.integers(2, 16),
            overrides=st.just(overrides),
            dampening=st.none() | dampening,
            freezing=st.none() | freezing,
            skip=st.lists(names, max_size=3),
            consistency=st.none() | term,
            ema=st.none() | averages(),
        )
    )


def _layout(draw: st.DrawFn, quantizer: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shape of x, the axes that share one parameter, and the parameter's shape."""
    shape = draw(st.sampled_from(SHAPES))
    channel = draw(st.sampled_from((0, len(shape) - 1))) if quantizer.per_channel else None
    axes = tuple(axis for axis in range(len(shape)) if axis != channel)
    if not axes:  # one value per channel: nothing is shared, and reducing over no axis means different things
        shape, axes = (6, 8), (1,)
    return shape, axes, tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _placed(rng: np.random.Generator, bulk: Any, specials: Any) -> Any:
    """``bulk`` with special values, zeros and denormals at random places, as many as find room."""
    universal = np.array([0.0, -0.0, *DENORMALS, *(-d for d in DENORMALS)]).reshape(-1, *[1] * bulk.ndim)
    if specials.shape[0] == 1:
        specials = specials.reshape(-1, *[1] * bulk.ndim)
    pool = np.concatenate(
        [np.broadcast_to(values, (len(values), *bulk.shape)) for values in (specials, universal)]
    ).reshape(-1, bulk.size)
    places = rng.permutation(bulk.size)[: len(pool)]
    x = bulk.reshape(-1).copy()
    x[places] = pool[rng.permutation(len(pool))[: len(places)], places]
    return x.reshape(bulk.shape)


def _neighbours(bounds: Any) -> Any:
    """The float32 numbers on either side."""
    single = bounds.astype(np.float32)
    return np.concatenate([np.nextafter(single, np.float32(side)).astype(float) for side in (-np.inf, np.inf)])


def _cotangent(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return _float32(rng.normal(size=shape))


def _elements(shape: tuple[int, ...], share: tuple[int, ...], *, is_weight: bool) -> float:
    """Of a weight all elements that share one parameter, of an activation those of one sample."""
    count = int(np.prod(shape)) / int(np.prod(share))
    return float(count if is_weight or len(shape) == 1 else count / shape[0])


def _float32(values: Any, *, exact: bool = False) -> Any:
    single = np.asarray(values).astype(np.float32)
    if exact and np.any(single != values):
        raise AssertionError(f"{values} is not a float32")
    return single
