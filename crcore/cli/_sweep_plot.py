"""sweep.png: accuracy against the first axis, a panel for each combination of the other axes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crcore.cli._figures.style import colour, save_png
from crcore.cli._methods import METHODS
from crcore.cli._sweep_report import CONTROL, Grid, Point, shown

COLUMNS = 3  # panels in a row, at most
LOG_FROM = 20  # the span of positive values from which an axis is logarithmic


def draw_sweep(path: Path, grid: Grid) -> None:
    """Mean over seeds as a line, one standard deviation as a band; the averaged teacher dashed in the same colour."""
    panels: dict[tuple[Any, ...], list[Point]] = {}
    for point in grid.points:
        panels.setdefault(tuple(point.values[axis] for axis in grid.axes[1:]), []).append(point)
    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3 + 5 * columns, 1 + 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, and no display is asked for
    every = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    values = list(dict.fromkeys(point.values[grid.axes[0]] for point in grid.points))
    for axes, (others, points) in zip(every, panels.items(), strict=False):
        for method in grid.methods:
            _draw_method(axes, grid, points, method, values, colour=colour(method))
        _scale(axes, values)
        axes.set(xlabel=grid.axes[0])
        axes.set_title(
            ", ".join(f"{a} {shown(v)}" for a, v in zip(grid.axes[1:], others, strict=True)), fontsize="medium"
        )
        axes.grid(alpha=0.3)
    for axes in every[::columns]:
        axes.set_ylabel("test accuracy in %")
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(grid.title, fontsize="medium")
    lines = {line.get_label(): line for axes in every for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize="small")
    save_png(path, figure)


def _draw_method(
    axes: Axes, grid: Grid, points: Sequence[Point], method: str, values: Sequence[Any], *, colour: str
) -> None:
    for column, style, label in (("accuracy", "-", method), ("teacher_accuracy", "--", f"{method}, average")):
        if column == "accuracy" and method == CONTROL and "qat" in grid.methods:
            continue  # its student is qat's
        if column == "teacher_accuracy" and not METHODS[method].average:
            continue
        found = {
            _position(point.values[grid.axes[0]], values): [run[column] for run in grid.runs(point, method).values()]
            for point in points
            if grid.runs(point, method)
        }
        if not found:
            continue
        at = np.array(sorted(found))
        mean = np.array([np.mean(found[x]) for x in at])
        axes.plot(at, mean, style, color=colour, label=label, marker=".")
        if all(len(accuracies) > 1 for accuracies in found.values()):
            std: NDArray[np.float64] = np.array([np.std(found[x], ddof=1) for x in at])
            axes.fill_between(at, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)


def _position(value: Any, values: Sequence[Any]) -> float:
    return float(value) if _numeric(values) else float(values.index(value))


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _scale(axes: Axes, values: Sequence[Any]) -> None:
    if not _numeric(values):
        axes.set_xticks(range(len(values)), [shown(value) for value in values])
        return
    positive = [value for value in values if value > 0]
    if positive and max(positive) > LOG_FROM * min(positive):
        if min(values) > 0:
            axes.set_xscale("log")
        else:  # zero has a place left of the smallest
            axes.set_xscale("symlog", linthresh=min(positive))
    axes.set_xticks(values, [shown(value) for value in values])
    axes.minorticks_off()
