"""Figures of what `crcore flatness` and `crcore sensitivity` measured, from the contents of their files.

Each takes several measurements, those of several seeds as one line, and gives panels: for `write_png` or a page.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from crcore.cli._figures.style import Panel, colour, label, log_axis

Measured = dict[str, Any]
MARKERS = ("o", "s", "^", "D", "v", "x")  # of the recipes of a method


@dataclass(frozen=True)
class _Line:
    """Networks that differ in their seed alone: one line."""

    networks: list[Measured]
    style: dict[str, Any]  # of matplotlib


def flatness_panels(measured: Sequence[Measured]) -> list[Panel]:
    """The largest eigenvalues of the Hessian, mean and deviation over seeds, and the density of all of them.

    Args:
        measured: contents of ``-flatness.json`` files, ``kind`` "flatness".
    """

    def eigenvalues(axes: Axes) -> None:
        for line in _lines(measured, lambda file: len(file["eigenvalues"])):
            values = [file["eigenvalues"] for file in line.networks]
            _draw(axes, range(1, len(values[0]) + 1), values, line.style, _deviation(values))
        axes.set(xlabel="rank", ylabel="eigenvalue")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()

    dense = [file for file in measured if file["density"]["values"]]

    def density(axes: Axes) -> None:
        for line in _lines(dense):
            for number, file in enumerate(line.networks):  # each on its own abscissa: there is no mean of them
                style = line.style if number == 0 else line.style | {"label": None}
                axes.plot(file["density"]["values"], file["density"]["density"], markevery=0.1, **style)
        axes.set(xlabel="eigenvalue", ylabel="density")
        # What a smoothed density falls to between its peaks is nothing that was measured.
        highest = max(max(file["density"]["density"]) for file in dense)
        axes.set_ylim(highest * 1e-6, highest * 2)
        log_axis(axes)
        axes.grid()

    panels = [Panel("Largest eigenvalues of the Hessian", eigenvalues)]
    if dense:
        panels.append(Panel("Density of the eigenvalues", density))
    return panels


def sensitivity_panels(measured: Sequence[Measured]) -> list[Panel]:
    """Loss against the size of each disturbance, and the sharpness of the loss around the weights.

    Lines are means over seeds, bands one standard deviation; of a single network, the 95 % interval of its draws.

    Args:
        measured: contents of ``-sensitivity.json`` files, ``kind`` "sensitivity".
    """
    some = {curve["name"]: curve for file in measured for curve in file["curves"]}

    def of(file: Measured, name: str) -> Measured | None:
        return next((curve for curve in file["curves"] if curve["name"] == name), None)

    def disturbed(name: str, quantity: str, unit: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            measured_so = [file | {"curve": of(file, name)} for file in measured if of(file, name)]
            for line in _lines(measured_so, lambda file: file["curve"]["levels"]):
                found = [file["curve"][quantity] for file in line.networks]
                values = [each["mean"] for each in found]
                # The interval of few draws is wide, and knows nothing of what an accuracy or a loss can be.
                band = _deviation(values) or (found[0]["low"], found[0]["high"])
                low, high = np.clip(band, 0, 100 if quantity == "accuracy" else None)
                _draw(axes, line.networks[0]["curve"]["levels"], values, line.style, (low, high))
            axes.set(xlabel=f"{name} ({some[name]['unit']})", ylabel=unit)
            axes.grid()

        return draw

    def sharpness(axes: Axes) -> None:
        for line in _lines(measured, lambda file: file["sharpness"]["radius"]):
            values = [file["sharpness"]["increase"] for file in line.networks]
            _draw(axes, line.networks[0]["sharpness"]["radius"], values, line.style, _deviation(values))
        axes.set(xlabel="radius, relative to the norm of the weights", ylabel="highest increase of the loss")
        axes.grid()

    panels = [
        Panel(f"{what} under {name}", disturbed(name, quantity, unit))
        for name in some
        for quantity, what, unit in (("accuracy", "Accuracy", "accuracy in %"), ("loss", "Loss", "loss"))
        # Corruptions are many: of them the accuracy alone.
        if quantity == "accuracy" or some[name]["group"] != "corruption"
    ]
    if measured and all(file["sharpness"]["radius"] for file in measured):
        panels.append(Panel("Sharpness", sharpness))
    return panels


def name_of(measured: Measured) -> str:
    """The method of a network; where no run says it, the network's file."""
    name: str = measured["method"] or ("fp32" if measured["role"] == "float" else measured["checkpoint"])
    return name


def _lines(measured: Sequence[Measured], where: Callable[[Measured], Any] = lambda _: None) -> list[_Line]:
    """The networks of each line. They have the method, model, recipe and abscissae (`where`) in common.

    The colour is the method's, dashed for an average; a further recipe of a method is numbered and has its own marker.
    """
    networks: dict[str, list[Measured]] = {}
    for file in measured:
        of = [name_of(file), file["role"], file["model"], file.get("recipe"), where(file)]
        networks.setdefault(json.dumps(of), []).append(file)
    lines, before = [], Counter[str]()
    for files in networks.values():
        method, average = name_of(files[0]), files[0]["role"] == "teacher"
        name = label(method, average=average)
        number, before[name] = before[name], before[name] + 1
        style = {
            "color": colour(method),
            "linestyle": "--" if average else "-",
            "linewidth": 1.4,
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 4,
            "label": f"{name} ({number + 1})" if number else name,
        }
        lines.append(_Line(files, style))
    return lines


def _deviation(values: Sequence[Sequence[float]]) -> tuple[Any, Any] | None:
    """One standard deviation around the mean over networks; None for a single one."""
    if len(values) == 1:
        return None
    mean, std = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
    return mean - std, mean + std


def _draw(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Sequence[float]],
    style: dict[str, Any],
    band: tuple[Any, Any] | None,
) -> None:
    axes.plot(x, np.mean(values, axis=0), **style)
    if band is not None:
        axes.fill_between(x, *band, color=style["color"], alpha=0.12, linewidth=0)
