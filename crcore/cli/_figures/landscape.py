"""Figures of what `crcore flatness` and `crcore sensitivity` measured, from the contents of their files.

Each takes several measurements, those of several seeds as one line, and gives panels: for `write_png` or a page.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from crcore.cli._figures.style import Panel, colour, label, log_axis

Measured = dict[str, Any]
MARKERS = ("o", "s", "^", "D", "v", "x")  # of the runs of a method


def flatness_panels(measured: Sequence[Measured]) -> list[Panel]:
    """The largest eigenvalues of the Hessian, mean and deviation over seeds, and the density of all of them.

    Args:
        measured: contents of ``-flatness.json`` files, ``kind`` "flatness".
    """
    styled = _styled(measured)

    def eigenvalues(axes: Axes) -> None:
        for files, style in _lines(styled, lambda file: len(file["eigenvalues"])):
            values = [file["eigenvalues"] for file in files]
            _draw(axes, range(1, len(values[0]) + 1), values, style, _deviation(values))
        axes.set(xlabel="rank", ylabel="eigenvalue")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()

    dense = [(file, style) for file, style in styled if file["density"]["values"]]

    def density(axes: Axes) -> None:
        for files, style in _lines(dense):
            for file in files:  # each on its own abscissa: there is no mean of them
                axes.plot(file["density"]["values"], file["density"]["density"], markevery=0.1, **style)
                style = style | {"label": None}
        axes.set(xlabel="eigenvalue", ylabel="density")
        # What a smoothed density falls to between its peaks is nothing that was measured.
        highest = max(max(file["density"]["density"]) for file, _ in dense)
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
    styled = _styled(measured)
    some = {curve["name"]: curve for file in measured for curve in file["curves"]}

    def disturbed(name: str, quantity: str, unit: str) -> Callable[[Axes], None]:
        found = [(curve, style) for file, style in styled for curve in file["curves"] if curve["name"] == name]

        def draw(axes: Axes) -> None:
            for curves, style in _lines(found, lambda curve: curve["levels"]):
                values = [curve[quantity]["mean"] for curve in curves]
                # The interval of few draws is wide, and knows nothing of what an accuracy or a loss can be.
                band = _deviation(values) or (curves[0][quantity]["low"], curves[0][quantity]["high"])
                low, high = np.clip(band, 0, 100 if quantity == "accuracy" else None)
                _draw(axes, curves[0]["levels"], values, style, (low, high))
            axes.set(xlabel=f"{name} ({some[name]['unit']})", ylabel=unit)
            axes.grid()

        return draw

    def sharpness(axes: Axes) -> None:
        for files, style in _lines(styled, lambda file: file["sharpness"]["radius"]):
            values = [file["sharpness"]["increase"] for file in files]
            _draw(axes, files[0]["sharpness"]["radius"], values, style, _deviation(values))
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


def _styled(measured: Sequence[Measured]) -> list[tuple[Measured, dict[str, Any]]]:
    """Each file with the style of its line. Those of a line are in the folders of different seeds of one run.

    The colour is the method's, dashed for an average. Of several runs of a method, the further ones are numbered, in
    the order of the files, and have a marker of their own.
    """
    networks, lines, runs = Counter[str](), dict[tuple[str, int], dict[str, Any]](), Counter[str]()
    styled = []
    for file in measured:
        # The same seed again is that of another run, whose folder may have the same name.
        run = re.sub(r"\bseed\d+\b", "seed", file["checkpoint"])
        line = run, networks[file["checkpoint"]]
        networks[file["checkpoint"]] += 1
        if line not in lines:
            method, average = name_of(file), file["role"] == "teacher"
            name = label(method, average=average)
            number = runs[name]
            runs[name] += 1
            lines[line] = {
                "color": colour(method),
                "linestyle": "--" if average else "-",
                "linewidth": 1.4,
                "marker": MARKERS[number % len(MARKERS)],
                "markersize": 4,
                "label": f"{name} ({number + 1})" if number else name,
            }
        styled.append((file, lines[line]))
    return styled


def _lines(
    styled: Sequence[tuple[Measured, dict[str, Any]]], where: Callable[[Measured], Any] = lambda _: None
) -> list[tuple[list[Measured], dict[str, Any]]]:
    """What is drawn as one: what has a style and abscissae (`where`) in common."""
    found: dict[str, tuple[list[Measured], dict[str, Any]]] = {}
    for file, style in styled:
        found.setdefault(f"{style['label']} {where(file)}", ([], style))[0].append(file)
    return list(found.values())


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
