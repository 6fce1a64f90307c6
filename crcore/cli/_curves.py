"""curves.png: accuracy against epoch, one line for each method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crcore.cli._figures.style import save_png
from crcore.cli._figures.training import draw_accuracy


def draw_curves(path: Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Mean over seeds as a line, one standard deviation as a band; the averaged teacher dashed in the same colour."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, and no display is asked for
    axes = figure.add_subplot()
    draw_accuracy(axes, records)
    axes.set(xlabel="epoch (fp32: of float training; others: of QAT that starts from it)")
    axes.set_title(title, fontsize="medium")
    figure.legend(loc="outside right upper", fontsize="small", title="method (last epoch)")
    save_png(path, figure)
