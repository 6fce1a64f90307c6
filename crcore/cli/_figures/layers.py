"""Figures of the layers of a quantized network: what its quantizers get, and what they lose."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from crcore.cli._figures.style import INK, Panel, colour
from crcore.cli._quantizer_statistics import QuantizerStatistics

MOST_LINES = 33  # levels of a grid that are drawn one by one


def histogram_panel(found: QuantizerStatistics, title: str, method: str) -> Panel:
    """The values in units of the grid, and the grid: a line for each level, or its two ends where there are many."""

    def draw(axes: Axes) -> None:
        share = found.histogram / max(found.histogram.sum(), 1)
        lowest = max(share[share > 0].min(initial=1.0) / 2, 1e-6)
        steps = np.concatenate([[0.0], share, [0.0]])
        corners = np.flatnonzero(np.diff(steps))  # an outline without the points between equal bins
        places, heights = np.repeat(found.edges[corners], 2), np.ravel([steps[corners], steps[corners + 1]], "F")
        axes.fill(places, np.maximum(heights, lowest), color=colour(method), alpha=0.75, linewidth=0)
        levels = found.levels
        drawn = levels if len(levels) <= MOST_LINES else levels[[0, -1]]
        # One path with gaps, which takes less room in a file than a line for each level.
        axes.plot(
            np.repeat(drawn, 3),
            np.tile([0.0, 1.0, np.nan], len(drawn)),
            color=INK,
            linewidth=0.5,
            alpha=0.6,
            transform=axes.get_xaxis_transform(),
        )
        axes.set(xlim=(found.edges[0], found.edges[-1]), yscale="log", ylim=(lowest, 1))
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(labelsize=8)
        axes.minorticks_off()

    return Panel(title, draw, (2.9, 1.5), edges=(0.2, 0.14, 0.98, 0.95))


def error_panel(names: Sequence[str], methods: Mapping[str, Sequence[float | None]], title: str) -> Panel:
    """The signal-to-quantization-noise ratio over layers, a line for each method.

    Args:
        names: of the layers, in the order of the network.
        methods: for each method a ratio in dB for each layer; None where there is none.
        title: of the panel.
    """

    def draw(axes: Axes) -> None:
        for number, (method, ratios) in enumerate(methods.items()):
            numbers: Any = [np.nan if ratio is None or np.isinf(ratio) else ratio for ratio in ratios]
            places = np.arange(len(names)) + 0.6 * ((number + 0.5) / len(methods) - 0.5)  # beside each other
            axes.plot(places, numbers, marker=".", color=colour(method), label=method, linewidth=0.8, markersize=5)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=max(5, 9 - len(names) // 12))
        axes.set_ylabel("dB")
        axes.grid()

    return Panel(title, draw, (max(4.6, min(0.16 * len(names), 9)), 3.6))
