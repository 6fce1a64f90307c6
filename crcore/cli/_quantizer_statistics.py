"""What a quantizer does to a tensor, in numbers that a page can show: histogram, grid, used codes, error."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import crcore as cr

_MOST_BINS = 256  # within the grid
_MARGIN = 0.125  # of the grid's width, shown beyond each of its ends


@dataclass(frozen=True)
class Quantized:
    """A tensor, and what a quantizer makes of it: ``(codes - zero_point) * scale``."""

    quantizer: cr.Quantizer
    values: NDArray[np.floating]  # of any shape
    codes: NDArray[np.floating]  # integers, of the same shape
    scale: NDArray[np.floating]  # > 0, broadcast against the values
    zero_point: NDArray[np.integer]
    limits: tuple[int, int]  # the lowest and the highest code

    @property
    def levels(self) -> NDArray[np.integer]:
        """The codes of the grid. DoReFa's weights, and one bit, have every second integer."""
        lowest, highest = self.limits
        step = 2 if highest - lowest == 2 * (2**self.quantizer.bits - 1) else 1
        return np.arange(lowest, highest + 1, step)


# Called for each quantizer that runs, with the name of its layer and its own there: "weight", "input" or another.
Visit = Callable[[str, str, Quantized], None]


@dataclass(frozen=True)
class QuantizerStatistics:
    """One tensor and its grid. Places on it are in units of codes, where all channels have one grid."""

    bits: int
    levels: NDArray[np.integer]  # the codes of the grid
    edges: NDArray[np.floating]  # [B + 1] of the histogram, in codes
    histogram: NDArray[np.integer]  # [B] values; the first and last bin also hold all that lies beyond
    squashed: bool  # DoReFa's weights: what is shown is the codes themselves, and no ratio is defined
    used: int  # how many of the levels occur
    at_lowest: float  # fraction of the values whose code is the lowest
    at_highest: float
    ratio: float | None  # signal to quantization noise in dB; infinite without noise


def statistics_of(tensor: Quantized) -> QuantizerStatistics:
    """Reduce a tensor to what is shown of it."""
    levels, codes = tensor.levels, tensor.codes
    squashed = isinstance(tensor.quantizer, cr.DoReFa) and bool(tensor.quantizer.tanh)
    places = codes if squashed else tensor.values / tensor.scale + tensor.zero_point
    edges = _edges(levels)
    histogram = np.histogram(np.clip(places, edges[0], edges[-1]), edges)[0]
    return QuantizerStatistics(
        bits=tensor.quantizer.bits,
        levels=levels,
        edges=edges,
        histogram=histogram,
        squashed=squashed,
        used=len(np.unique(codes)),
        at_lowest=float((codes == levels[0]).mean()),
        at_highest=float((codes == levels[-1]).mean()),
        ratio=None if squashed else signal_to_noise(tensor.values, (codes - tensor.zero_point) * tensor.scale),
    )


def signal_to_noise(values: NDArray[Any], quantized: NDArray[Any]) -> float | None:
    """``10 log10(sum(values**2) / sum((values - quantized)**2))`` in dB; None for a signal of zeros.

    >>> signal_to_noise(np.array([3.0, 4.0]), np.array([3.0, 3.5]))
    20.0
    """
    wide = values.astype(np.float64)
    signal, noise = float((wide**2).sum()), float(((wide - quantized) ** 2).sum())
    if signal == 0:
        return None
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def _edges(levels: NDArray[np.integer]) -> NDArray[np.floating]:
    """Of bins of a fifth of a level or of whole levels: a threshold of rounding is an edge, no level is one."""
    step = int(levels[1] - levels[0])
    width = step / 5 if len(levels) <= 32 else step * math.ceil(len(levels) / _MOST_BINS)
    bins = math.ceil(len(levels) * step / width)
    beyond = max(math.ceil(_MARGIN * bins), 2)
    return levels[0] - step / 2 + width * np.arange(-beyond, bins + beyond + 1)
