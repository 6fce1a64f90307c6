"""curves.png: accuracy against epoch, one line for each method."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crcore.cli._files import put_in_place


def draw_curves(path: Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Mean over seeds as a line, one standard deviation as a band; the averaged teacher dashed in the same colour."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, and no display is asked for
    axes = figure.add_subplot()
    shown: list[float] = []
    methods = list(dict.fromkeys(record["method"] for record in records))
    for number, method in enumerate(methods):
        runs = [record for record in records if record["method"] == method]
        for column, style, label in (("accuracy", "-", method), ("teacher_accuracy", "--", f"{method}, average")):
            measured = [entry["epoch"] for entry in runs[0]["history"] if entry[column] is not None]
            hidden = method == "qat+ema" and column == "accuracy" and "qat" in methods  # its student is qat's
            if hidden or not measured:
                continue
            epochs = np.array(measured)
            curves = np.array([[e[column] for e in run["history"] if e[column] is not None] for run in runs])
            mean = curves.mean(axis=0)
            axes.plot(epochs, mean, style, color=f"C{number}", label=f"{label} ({mean[-1]:.2f} %)", marker=".")
            shown += mean[epochs > epochs[-1] / 3].tolist()
            if len(runs) > 1:
                std = curves.std(axis=0, ddof=1)
                axes.fill_between(epochs, mean - std, mean + std, color=f"C{number}", alpha=0.08, linewidth=0)
    # The first third may lie far below and would press the lines that are compared into one.
    margin = max(0.1 * (max(shown) - min(shown)), 0.5)
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xlabel="epoch (fp32: of float training; others: of QAT that starts from it)", ylabel="test accuracy in %")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", title="method (last epoch)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with put_in_place(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
