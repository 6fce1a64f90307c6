"""Figures of the history of runs: accuracy, losses, schedules, and what each method gained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from crcore.cli._figures.style import INK, Panel, colour, label, log_axis
from crcore.cli._report import Gain, Row

Record = dict[str, Any]


def draw_accuracy(axes: Axes, records: Sequence[Record]) -> None:
    """Mean over seeds as a line, one standard deviation as a band; the averaged teacher dashed in the same colour."""
    shown: list[float] = []
    methods = by_method(records)
    for method, runs in methods.items():
        for column, average in (("accuracy", False), ("teacher_accuracy", True)):
            if method == "qat+ema" and not average and "qat" in methods:
                continue  # its student is qat's
            found = _curve(runs, "epoch", column)
            if found is None:
                continue
            epochs, curves = found
            last = f" ({curves[:, -1].mean():.2f} %)"
            _line(axes, epochs, curves, method, average=average, suffix=last)
            shown += curves.mean(axis=0)[epochs > epochs[-1] / 3].tolist()
    if not shown:
        return
    # The first third may lie far below and would press the lines that are compared into one.
    margin = max(0.1 * (max(shown) - min(shown)), 0.5)
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xlabel="epoch", ylabel="test accuracy in %")
    _whole_numbers(axes)
    axes.grid()


def history_panels(records: Sequence[Record]) -> list[Panel]:
    """Accuracy, both losses, lambda and the decay of the average; those that there is something to show in."""

    def loss(column: str) -> Any:
        def draw(axes: Axes) -> None:
            for method, runs in trained.items():
                found = _curve(runs, "epoch", column)
                if found is not None and found[1].any():
                    _line(axes, *found, method)
            axes.set(xlabel="epoch", ylabel="mean over the epoch")
            log_axis(axes)
            _whole_numbers(axes)
            axes.grid()

        return draw

    def schedule(column: str, what: str) -> Any:
        def draw(axes: Axes) -> None:
            width = 1.2 + len(methods)
            for method, runs in methods.items():
                width -= 1  # lines that lie on each other stay visible
                found = _curve(runs[:1], "step", column)  # the same for every seed
                if found is not None:
                    axes.plot(found[0], found[1][0], color=colour(method), label=method, linewidth=width)
            axes.set(xlabel="optimizer step", ylabel=what)
            axes.grid()

        return draw

    methods = by_method(records)
    trained = {name: runs for name, runs in methods.items() if not (name == "qat+ema" and "qat" in methods)}
    panels = [Panel("Test accuracy by epoch", lambda axes: draw_accuracy(axes, records))]
    for column, name in (("task", "Task loss"), ("consistency", "Consistency term, lambda included")):
        if any(entry[column] for record in records for entry in record["history"]):
            panels.append(Panel(f"{name}, by epoch", loss(column)))
    for column, name, what in (
        ("weight", "Weight of the consistency term", "lambda"),
        ("decay", "Decay of the average", "EMA decay"),
    ):
        if any(entry[column] is not None for record in records for entry in record["history"]):
            panels.append(Panel(f"{name}, by step", schedule(column, what)))
    return panels


def gains_panel(rows: Sequence[Row]) -> Panel | None:
    """A dot for each gain over qat and its interval; None where nothing is compared."""
    gains: list[tuple[str, str, bool, Gain]] = []
    for row in rows:
        for found, average in ((row.student_gain, False), (row.teacher_gain, True)):
            if found is not None and not (row.method == "qat+ema" and not average):
                gains.append((label(row.method, average=average), row.method, average, found))
    if not gains:
        return None

    def draw(axes: Axes) -> None:
        for place, (_, method, average, found) in enumerate(gains):
            axes.errorbar(
                found.mean,
                place,
                xerr=found.half,
                color=colour(method),
                marker="o",
                markerfacecolor="none" if average else colour(method),
                capsize=3,
            )
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(gains)), [name for name, *_ in gains])
        axes.set(xlabel="difference to qat in points of accuracy", ylim=(len(gains) - 0.4, -0.6))
        axes.grid(axis="x")

    return Panel("Gain over qat, with the 95 % confidence interval", draw, (4.8, 0.8 + 0.3 * len(gains)))


def _whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each method, in the order of the runs."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["method"], []).append(record)
    return found


def _curve(runs: Sequence[Record], x: str, column: str) -> tuple[Any, Any] | None:
    """Places ``[N]`` and one curve for each run ``[runs, N]``; None where it was not measured."""
    measured = [[entry for entry in run["history"] if entry[column] is not None] for run in runs]
    if not measured[0]:
        return None
    places = np.array([entry[x] for entry in measured[0]])
    return places, np.array([[entry[column] for entry in entries] for entries in measured])


def _line(axes: Axes, x: Any, curves: Any, method: str, *, average: bool = False, suffix: str = "") -> None:
    mean, name = curves.mean(axis=0), label(method, average=average)
    style, marker = "--" if average else "-", "." if len(x) <= 30 else ""
    axes.plot(x, mean, style, color=colour(method), label=name + suffix, marker=marker, linewidth=1.4)
    if len(curves) > 1:
        std = curves.std(axis=0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=colour(method), alpha=0.1, linewidth=0)
