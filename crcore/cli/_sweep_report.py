"""The results of a sweep as numbers, for sweep.json and for table.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crcore.cli._data import ImageData
from crcore.cli._methods import METHODS
from crcore.cli._report import Gain, Record, gain, spread

CONTROL = "qat+ema"  # what its average gains over qat, no consistency is needed for


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    values: dict[str, Any]  # by axis
    settings: dict[str, Any]  # all of them, decided
    data: str
    runs: dict[str, str]  # the folder of each method's runs


@dataclass(frozen=True)
class Grid:
    """A sweep: what was asked for, and the runs that are finished."""

    axes: tuple[str, ...]
    points: list[Point]
    data: list[ImageData]
    versions: dict[str, str]
    records: dict[str, dict[int, Record]]  # by folder and seed
    command: str  # that gives it

    @property
    def seeds(self) -> tuple[int, ...]:
        """The same at every point."""
        return tuple(self.points[0].settings["seeds"])

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method of a point, in the order of the table."""
        return tuple(dict.fromkeys(name for point in self.points for name in point.runs))

    @property
    def common(self) -> dict[str, Any]:
        """The settings in which all points agree."""
        first = self.points[0].settings
        return {name: value for name, value in first.items() if all(p.settings[name] == value for p in self.points)}

    @property
    def title(self) -> str:
        """What is common to all points, in one line."""
        known = self.common
        parts = [self.data[0].name] if len(self.data) == 1 else []
        parts += [known["model"]] if "model" in known else []
        bits = "".join(f"{x}{known[n]}" for x, n in (("W", "weight_bits"), ("A", "activation_bits")) if n in known)
        parts += [" ".join(filter(None, (known.get("quantizer", ""), bits)))] if bits or "quantizer" in known else []
        parts += [f"{known['labels']} labels"] if "labels" in known else []
        parts += [f"Keras on {known['engine']}"] if known.get("backend") == "keras" else []
        return ", ".join([*parts, f"over {' and '.join(self.axes)}"])

    def runs(self, point: Point, method: str) -> dict[int, Record]:
        """The finished runs of a method at a point, by seed."""
        return self.records.get(point.runs.get(method, ""), {})

    def gain(self, point: Point, method: str, column: str, baseline: str) -> Gain | None:
        """The paired gain of a method over plain QAT, or over the average of the control.

        None where one of them has no such run, where they are the same, and where the baseline depends on settings
        that the method does not read, so that there is not one gain but several.
        """
        own, other = METHODS[method], METHODS[baseline]
        if method == baseline or not own.quantized or (other.average and not own.average):
            return None
        theirs, against = self.runs(point, baseline), "teacher_accuracy" if other.average else "accuracy"
        pairs = [
            (run[column], theirs[seed][against])
            for seed, run in sorted(self.runs(point, method).items())
            if seed in theirs
        ]
        if not pairs or pairs[0][0] is None:
            return None
        return gain([mine - its for mine, its in pairs])


def results(grid: Grid) -> dict[str, Any]:
    """The content of sweep.json."""
    common = grid.common
    return {
        "format": 1,
        "command": "sweep",
        "complete": all(
            set(grid.seeds) <= grid.runs(point, name).keys() for point in grid.points for name in point.runs
        ),
        "axes": {axis: list(dict.fromkeys(point.values[axis] for point in grid.points)) for axis in grid.axes},
        "settings": common,
        "data": [data.to_dict() for data in grid.data],
        "versions": grid.versions,
        "points": [
            {
                "values": point.values,
                "settings": {name: value for name, value in point.settings.items() if name not in common},
                "methods": {name: _method(grid, point, name) for name in point.runs},
            }
            for point in grid.points
        ],
    }


def _method(grid: Grid, point: Point, name: str) -> dict[str, Any]:
    runs = sorted(grid.runs(point, name).items())
    return {
        "runs": point.runs[name],
        "accuracy": {str(seed): run["accuracy"] for seed, run in runs},
        "teacher_accuracy": {str(seed): run["teacher_accuracy"] for seed, run in runs}
        if METHODS[name].average
        else None,
        # Of the last epoch, on augmented images: near zero, the labeled images are learned by heart.
        "task_loss": {str(seed): run["history"][-1]["task"] for seed, run in runs},
        "gain_over_qat": _gains(grid, point, name, "qat"),
        "gain_over_control": _gains(grid, point, name, CONTROL),
    }


def _gains(grid: Grid, point: Point, name: str, baseline: str) -> dict[str, Any]:
    found = {}
    for role, column in (("student", "accuracy"), ("teacher", "teacher_accuracy")):
        measured = grid.gain(point, name, column, baseline)
        interval = None
        if measured is not None and measured.half is not None:
            interval = [measured.mean - measured.half, measured.mean + measured.half]
        found[role] = None if measured is None else {"mean": measured.mean, "interval": interval}
    return found


HEADER = ("accuracy %", "average (EMA) %", "gain over qat", "average's gain", "over qat+ema", "average's over qat+ema")


def markdown(grid: Grid) -> str:
    """The content of table.md: a row for each run that is not the run of an earlier row."""
    header = ("method", *grid.axes, *HEADER)
    lines = [f"# {grid.title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for method in grid.methods:
        seen: set[str] = set()
        for point in grid.points:
            folder = point.runs.get(method)
            if folder is None or folder in seen or not grid.runs(point, method):
                continue
            seen.add(folder)
            same = [other for other in grid.points if other.runs.get(method) == folder]
            cells = [method, *(_values(axis, same, grid) for axis in grid.axes), *_cells(grid, point, method)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(grid)), ""])


def shown(value: Any) -> str:
    """A value of an axis as a user types it.

    >>> [shown(value) for value in (0.9999999, 1000, 2.0, True, "weak", None)]
    ['0.9999999', '1000', '2', 'yes', 'weak', 'none']
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _values(axis: str, same: Sequence[Point], grid: Grid) -> str:
    values = list(dict.fromkeys(shown(point.values[axis]) for point in same))
    every = {shown(point.values[axis]) for point in grid.points}
    return "any" if len(values) > 1 and set(values) == every else ", ".join(values)


def _cells(grid: Grid, point: Point, method: str) -> list[str]:
    runs = grid.runs(point, method).values()
    average = METHODS[method].average
    columns = ("accuracy", "teacher_accuracy")
    return [
        str(spread([run["accuracy"] for run in runs])),
        str(spread([run["teacher_accuracy"] for run in runs])) if average else "-",
        *(
            str(grid.gain(point, method, column, baseline) or "-")
            for baseline in ("qat", CONTROL)
            for column in columns
        ),
    ]


def _notes(grid: Grid) -> list[str]:
    count = len(grid.seeds)
    done = sum(len(runs) for runs in grid.records.values())
    total = count * len({folder for point in grid.points for folder in point.runs.values()})
    return [
        f"`{grid.command}`",
        *([f"Not finished: {done} of {total} runs."] if done < total else []),
        f"mean ± standard deviation over {count} seeds; gains are paired differences by seed, in points, with their "
        "95 % t confidence interval."
        if count > 1
        else "One seed: there is no standard deviation and no confidence interval, and a gain may be chance.",
        "Gains over qat are over its student; gains over qat+ema, the control, are over its average. Of many points "
        "the best gain is flattered by chance: 95 % is the confidence of one interval, not of the best of them.",
        "any: the method does not depend on this setting, or not at this point, and its runs are common to all values.",
        "Accuracy on the test images, without augmentation; the last epoch's network, not the best.",
    ]
