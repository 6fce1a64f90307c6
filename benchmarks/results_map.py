"""Draw docs/results/map.png, the gain of consistency against how well plain QAT learned its labeled images.

examples:
  python benchmarks/results_map.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from evidence import RESULTS
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from crcore.cli._figures.style import COLOURS, Panel, write_png

SWEEPS = (
    "digits-30",
    "confirmed-30",
    "digits-labels",
    "quantizers",
    "labels-250",
    "confirmed-250",
    "labels-1000",
    "confirmed-1000",
    "labels-1000-weak",
    "steps",
    "capacity",
    "labels-4000",
    "labels-4000-weak",
    "labels-50000",
    "labels-50000-weak",
)
METHODS = {"qat+cr": "Consistency on labeled images", "qat+cr+unlabeled": "Consistency with unlabeled images"}


def main() -> None:
    """Draw it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    points = [point for name in SWEEPS for point in points_of(RESULTS / name / "sweep.json")]
    panels = [Panel(title, drawing(points, method)) for method, title in METHODS.items()]
    write_png(RESULTS / "map.png", panels, "each point a setting, with its 95 % interval over seeds; ResNet-8")


def points_of(file: Path) -> list[dict[str, Any]]:
    """Of each point: settings, the mean loss that plain QAT's training ended with, and the gains."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return [
        found["settings"]
        | point["settings"]
        | {
            "loss": np.mean(list(point["methods"]["qat"]["task_loss"].values())),
            "gains": {
                name: point["methods"][name]["gain_over_qat"]["student"] for name in METHODS if name in point["methods"]
            },
        }
        for point in found["points"]
    ]


def drawing(points: list[dict[str, Any]], method: str) -> Any:
    """Gains of one method over the loss; hollow where the student's views are weak."""

    def draw(axes: Axes) -> None:
        for data, colour in (("digits", COLOURS["qat"]), ("CIFAR-10, 16x16", COLOURS["qat+cr"])):
            for view in ("strong", "weak"):
                chosen = [
                    (point["loss"], gain["mean"], gain["interval"])
                    for point in points
                    if (gain := point["gains"].get(method))
                    and gain["interval"]
                    and (point["data"] == "digits") == (data == "digits")
                    and point["student_view"] == view
                ]
                if not chosen:
                    continue
                x, y, ends = (np.array(each) for each in zip(*chosen, strict=True))
                axes.errorbar(
                    x,
                    y,
                    yerr=np.abs(ends.T - y),
                    fmt="o",
                    color=colour,
                    markerfacecolor=colour if view == "strong" else "white",
                    elinewidth=0.8,
                    label=f"{data}, {view} views",
                )
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set(
            xscale="log", ylim=(-6, 10), xlabel="training loss of plain QAT, last epoch", ylabel="gain over qat, points"
        )
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid()

    return draw


if __name__ == "__main__":
    main()
