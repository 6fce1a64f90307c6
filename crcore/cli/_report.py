"""The results as numbers: means, standard deviations, and the gain over plain QAT with its confidence interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds, in percent."""

    mean: float
    std: float | None  # None with one seed

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class Gain:
    """Mean of the differences by seed, in points, and the half-width of its 95 % t confidence interval."""

    mean: float
    half: float | None  # None with one seed

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.mean - self.half:+.2f}, {self.mean + self.half:+.2f}]"


@dataclass(frozen=True)
class Row:
    """One method of the table."""

    method: str
    student: Spread
    teacher: Spread | None
    student_gain: Gain | None  # None where plain QAT was not run, and for qat itself
    teacher_gain: Gain | None
    steps: str
    differs: str


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    >>> print(spread([90.0, 92.0]))
    91.00 ± 1.41
    """
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def gain(differences: Sequence[float]) -> Gain:
    """Mean and 95 % confidence interval of paired differences, after Student's t with n - 1 degrees of freedom.

    >>> print(gain([1.0, 2.0, 3.0]))
    +2.00 [-0.48, +4.48]
    """
    count = len(differences)
    if count < 2:
        return Gain(differences[0], None)
    from scipy.stats import t

    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return Gain(statistics.fmean(differences), half)


def rows(records: Sequence[Record]) -> list[Row]:
    """One row for each method, in the order of the runs."""
    by_method: dict[str, dict[int, Record]] = {}
    for record in records:
        by_method.setdefault(record["method"], {})[record["seed"]] = record
    baseline = by_method.get("qat")
    return [_row(method, runs, baseline) for method, runs in by_method.items()]


def _row(method: str, runs: dict[int, Record], baseline: dict[int, Record] | None) -> Row:
    def over_qat(column: str) -> Gain | None:
        if baseline is None or method == "qat" or any(run[column] is None for run in runs.values()):
            return None
        # All of them, in a comparison that is finished.
        pairs = [(run, baseline[seed]) for seed, run in runs.items() if seed in baseline]
        return gain([run[column] - plain["accuracy"] for run, plain in pairs]) if pairs else None

    teacher = [run["teacher_accuracy"] for run in runs.values() if run["teacher_accuracy"] is not None]
    first = next(iter(runs.values()))
    before = "" if first["float_steps"] == 0 else f"{first['float_steps'] or '?'} + "
    return Row(
        method=method,
        student=spread([run["accuracy"] for run in runs.values()]),
        teacher=spread(teacher) if teacher else None,
        student_gain=over_qat("accuracy"),
        teacher_gain=over_qat("teacher_accuracy"),
        steps=f"{before}{first['steps']}",
        differs=first["differs"],
    )


HEADER = ("method", "accuracy %", "average (EMA) %", "gain over qat", "average's gain", "steps", "what differs")


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, in the order of `HEADER`."""
    optional = (row.teacher, row.student_gain, row.teacher_gain)
    return (row.method, str(row.student), *("-" if c is None else str(c) for c in optional), row.steps, row.differs)


def title(settings: dict[str, Any], data: dict[str, Any]) -> str:
    """What was compared, in one sentence."""
    return (
        f"{data['name']}, {settings['model']}, {settings['quantizer']} W{settings['weight_bits']}"
        f"A{settings['activation_bits']}, {settings['labels']} of {data['train']} training images labeled"
        + (f", Keras on {settings['engine']}" if settings.get("backend") == "keras" else "")
    )


def notes(records: Sequence[Record], settings: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """What a reader has to know to judge the numbers."""
    count = len(settings["seeds"])
    interval = (
        f"mean ± standard deviation over {count} seeds; gains are paired differences by seed, in points, "
        "with their 95 % t confidence interval"
        if count > 1
        else "one seed: there is no standard deviation and no confidence interval, and a gain may be chance"
    )
    return [
        f"{interval}.",
        *learned(records),
        f"Accuracy on {data['test']} test images ({data['test_source']}), without augmentation; "
        "the last epoch's network, not the best.",
        "Steps: optimizer steps of the float network that the run starts from + its own. Float and QAT runs use "
        f"learning rates of {settings['float_lr']} and {settings['lr']}.",
        f"Common to all: batch {settings['batch_size']}, the student's {settings['student_view']} views (the same bits "
        "in every method), SGD with a cosine schedule. The EMA teacher sees "
        f"{settings['teacher_view']} views of its own.",
        *_of_qat(settings),
    ]


def learned(records: Sequence[Record]) -> list[str]:
    """How well the labeled images were learned, which tells where consistency pays; of runs that say it.

    >>> learned([{"method": "qat", "history": [{"task": 0.9}, {"task": 0.25}]}])
    ['Training loss in the last epoch: qat 0.250. Near zero, labeled images are known by heart: see docs/recipes.md.']
    """
    losses: dict[str, list[float]] = {}
    for record in records:
        if record.get("history"):
            losses.setdefault(record["method"], []).append(record["history"][-1]["task"])
    if not losses:
        return []
    means = ", ".join(f"{method} {statistics.fmean(each):.3f}" for method, each in losses.items())
    return [
        f"Training loss in the last epoch: {means}. Near zero, labeled images are known by heart: see docs/recipes.md."
    ]


def _of_qat(settings: dict[str, Any]) -> list[str]:
    """What was asked of all QAT methods beside what each is said to do; earlier versions did not store it."""
    dampening, freezing = settings.get("dampening"), settings.get("freezing")
    remedies = [f"dampened with a weight of {dampening}"] if dampening else []
    remedies += [f"frozen above a frequency of {freezing}"] if freezing is not None else []
    found = [f"In all QAT methods, weights that oscillate are {' and '.join(remedies)}."] if remedies else []
    count = settings.get("reestimate_batchnorm", 0)
    return found + ([f"BatchNorm's statistics were measured anew on {count} batches after QAT."] if count else [])


# Of a run's `seconds_by_part`, in the order of a step. The Keras backend sees teacher, student and update as one.
PARTS = {
    "data": "data and augmentation",
    "teacher": "teacher",
    "student": "student",
    "update": "optimizer and average",
    "network": "network",
    "evaluation": "tests",
}


def time_spent(records: Sequence[Record]) -> str | None:
    """Where the time of the runs went, in one line; None where no run says so, as those of earlier versions.

    >>> time_spent([{"seconds_by_part": {"data": 1.0, "student": 8.0, "evaluation": 1.0}}])
    'Time: 10 s; data and augmentation 10.0 %, student 80.0 %, tests 10.0 %.'
    """
    seconds: dict[str, float] = {}
    for record in records:
        for part, spent in record.get("seconds_by_part", {}).items():
            seconds[part] = seconds.get(part, 0.0) + spent
    total = sum(seconds.values())
    if not total:
        return None
    shares = (f"{name} {100 * seconds[part] / total:.1f} %" for part, name in PARTS.items() if part in seconds)
    return f"Time: {total:.0f} s; {', '.join(shares)}."


def markdown(records: Sequence[Record], settings: dict[str, Any], data: dict[str, Any]) -> str:
    """The content of table.md."""
    lines = [f"# {title(settings, data)}", "", f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows(records)]
    lines += ["", *(f"- {note}" for note in notes(records, settings, data)), ""]
    return "\n".join(lines)
