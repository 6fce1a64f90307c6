"""Figures of what `crcore flatness` and `crcore sensitivity` measured, from the contents of their files.

Each function takes several measurements, to be laid over each other, and gives panels: for `write_png` or a page.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from crcore.cli._figures.style import Panel, colour, label, log_axis

Measured = dict[str, Any]


def flatness_panels(measured: Sequence[Measured]) -> list[Panel]:
    """The largest eigenvalues of the Hessian, and the density of all of them.

    Args:
        measured: contents of ``-flatness.json`` files, ``kind`` "flatness".
    """

    def eigenvalues(axes: Axes) -> None:
        for file, style in zip(measured, _styles(measured), strict=True):
            axes.plot(range(1, len(file["eigenvalues"]) + 1), file["eigenvalues"], marker=".", **style)
        axes.set(xlabel="rank", ylabel="eigenvalue")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()

    dense = [file for file in measured if file["density"]["values"]]

    def density(axes: Axes) -> None:
        for file, style in zip(dense, _styles(dense), strict=True):
            axes.plot(file["density"]["values"], file["density"]["density"], **style)
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
    """Loss against the size of each disturbance, with its band, and the sharpness of the loss around the weights.

    Args:
        measured: contents of ``-sensitivity.json`` files, ``kind`` "sensitivity".
    """
    curves: dict[str, list[tuple[int, Measured]]] = {}
    for number, file in enumerate(measured):
        for curve in file["curves"]:
            curves.setdefault(curve["name"], []).append((number, curve))
    styles = _styles(measured)

    def disturbed(name: str, quantity: str, unit: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for number, curve in curves[name]:
                values, style = curve[quantity], styles[number]
                axes.plot(curve["levels"], values["mean"], marker=".", **style)
                # The interval of few draws is wide, and knows nothing of what an accuracy or a loss can be.
                low, high = np.clip([values["low"], values["high"]], 0, 100 if quantity == "accuracy" else None)
                axes.fill_between(curve["levels"], low, high, color=style["color"], alpha=0.12, linewidth=0)
            axes.set(xlabel=f"{name} ({curves[name][0][1]['unit']})", ylabel=unit)
            axes.grid()

        return draw

    def sharpness(axes: Axes) -> None:
        for file, style in zip(measured, styles, strict=True):
            axes.plot(file["sharpness"]["radius"], file["sharpness"]["increase"], marker=".", **style)
        axes.set(xlabel="radius, relative to the norm of the weights", ylabel="highest increase of the loss")
        axes.grid()

    panels = [
        Panel(f"{what} under {name}", disturbed(name, quantity, unit))
        for name in curves
        for quantity, what, unit in (("accuracy", "Accuracy", "accuracy in %"), ("loss", "Loss", "loss"))
        # Corruptions are many: of them the accuracy alone.
        if quantity == "accuracy" or curves[name][0][1]["group"] != "corruption"
    ]
    if measured and all(file["sharpness"]["radius"] for file in measured):
        panels.append(Panel("Sharpness", sharpness))
    return panels


def name_of(measured: Measured) -> str:
    """The method of a network; where no run says it, the network's file."""
    name: str = measured["method"] or ("fp32" if measured["role"] == "float" else measured["checkpoint"])
    return name


def _styles(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Of each file's line: the method's colour, dashed for an average, named once however many seeds there are."""
    named: set[str] = set()
    found = []
    for file in measured:
        method, average = name_of(file), file["role"] == "teacher"
        name = label(method, average=average)
        style: dict[str, Any] = {"color": colour(method), "linestyle": "--" if average else "-", "linewidth": 1.4}
        found.append(style | {"label": name if name not in named else None})
        named.add(name)
    return found
