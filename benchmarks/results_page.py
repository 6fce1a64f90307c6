"""Write the tables and figures of docs/results.md, and a table of README.md, from what evidence.py recorded.

They stand between two lines of a page, `<!-- KIND NAME -->` and `<!-- end -->`, and are made of docs/results/NAME.

examples:
  python benchmarks/results_page.py            rewrite them
  python benchmarks/results_page.py --check    say whether they are what the results give
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from statistics import mean
from typing import Any

from evidence import RESULTS, ROOT, RUNS
from performance_page import grid
from shared import rewrite

from crcore.cli._report import Gain, gain, spread
from crcore.cli._sweep_report import shown

PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
PART = re.compile(r"(<!-- (?P<kind>\w+) (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.S)


def main() -> None:
    """Rewrite the pages, or check them."""
    rewrite(PAGES, updated, __doc__)


def updated(page: str) -> str:
    """The page with its parts made anew."""

    def made(match: re.Match[str]) -> str:
        if match["kind"] not in PARTS:
            raise SystemExit(f"no part {match['kind']!r}; there are {', '.join(PARTS)}")
        return f"{match[1]}\n{PARTS[match['kind']](match['name'])}\n\n{match[4]}"

    return PART.sub(made, page)


def read(name: str, file: str) -> Any:
    """A recorded file."""
    return json.loads((RESULTS / name / file).read_text(encoding="utf-8"))


def command(name: str) -> str:
    """What to type; NETWORKS are the checkpoints of a sweep, of all seeds."""
    line = RUNS[name].command.format(data="cifar10/", networks="NETWORKS")
    return f"`{line}`"


def sweep(name: str) -> str:
    """The table of a sweep: a row for each run that is not the run of an earlier row."""
    found = read(name, "sweep.json")
    head = ["method", *found["axes"], "accuracy %", "average %", "gain over qat", "average over qat+ema's average"]
    rows, seen = [], set()
    for point in found["points"]:
        for method, result in point["methods"].items():
            if result["runs"] in seen:
                continue
            seen.add(result["runs"])
            same = [p for p in found["points"] if p["methods"].get(method, {}).get("runs") == result["runs"]]
            rows.append([method, *(values(axis, same, found) for axis in found["axes"]), *cells(result)])
    order = list(found["points"][0]["methods"])
    rows.sort(key=lambda row: order.index(row[0]))
    seeds = len(found["settings"]["seeds"])
    figure = f"![Accuracy over {' and '.join(found['axes'])}](results/{name}/sweep.png)"
    return f"{command(name)}, {seeds} seeds\n\n{grid(head, rows)}\n\n{figure}"


def values(axis: str, same: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """The values of an axis that a run stands for."""
    here = list(dict.fromkeys(point["values"][axis] for point in same))
    if len(here) > 1 and len(here) == len(found["axes"][axis]):
        return "any"
    return ", ".join(shown(value) for value in here)


def cells(result: dict[str, Any]) -> list[str]:
    """Accuracy and gains of one method at one point."""
    average = result["teacher_accuracy"]
    return [
        str(spread(list(result["accuracy"].values()))),
        "-" if average is None else str(spread(list(average.values()))),
        interval(result["gain_over_qat"]["student"]),
        interval(result["gain_over_control"]["teacher"]),
    ]


def interval(found: dict[str, Any] | None) -> str:
    """A mean gain with its 95 % confidence interval; in bold where that does not hold zero."""
    if found is None:
        return "-"
    text = f"{found['mean']:+.2f}"
    if found["interval"] is None:
        return text
    low, high = found["interval"]
    text = f"{text} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def by_method(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Measurements of the seeds of each method."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        methods.setdefault(each["method"], []).append(each)
    return methods


def flatness(name: str) -> str:
    """Eigenvalues and trace, mean and deviation over the networks of all seeds, and the change from plain QAT."""
    methods = by_method(read(name, "flatness.json"))
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "largest": lambda each: each["eigenvalues"][0],
        "mean of the top 50": lambda each: sum(each["eigenvalues"]) / len(each["eigenvalues"]),
        "50th": lambda each: each["eigenvalues"][-1],
        "trace": lambda each: each["trace"]["mean"],
        "loss": lambda each: each["loss"],
    }
    return measured(name, methods, columns)


def sensitivity(name: str) -> str:
    """Accuracy, and what is lost under the largest disturbance of each kind."""

    def lost(group: str) -> Callable[[dict[str, Any]], float]:
        def mean(each: dict[str, Any]) -> float:
            curves = [curve["accuracy"]["mean"] for curve in each["curves"] if curve["group"] == group]
            return sum(curve[-1] - curve[0] for curve in curves) / len(curves)

        return mean

    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "accuracy %": lambda each: each["curves"][0]["accuracy"]["mean"][0],
        "input noise 0.1, points": lost("input"),
        "corruptions at severity 5, points": lost("corruption"),
        "weight noise 0.3, points": lost("weights"),
        "sharpness at 0.01": lambda each: each["sharpness"]["increase"][1],
    }
    return measured(name, by_method(read(name, "sensitivity.json")), columns)


def measured(
    name: str,
    methods: dict[str, list[dict[str, Any]]],
    columns: dict[str, Callable[[dict[str, Any]], float]],
) -> str:
    """A row for each method; under it the paired difference from plain QAT."""
    rows = []
    for method, each in methods.items():
        rows.append([method, *(str(spread([value(one) for one in each])) for value in columns.values())])
        if method not in ("fp32", "qat"):
            pairs = list(zip(each, methods["qat"], strict=True))
            changes = (gain([value(mine) - value(plain) for mine, plain in pairs]) for value in columns.values())
            rows.append([f"{method} - qat", *map(str, changes)])
    of = " and ".join(f"`{sweep}`" for sweep, _ in RUNS[name].of)
    seeds = len(next(iter(methods.values())))
    kind = RUNS[name].kept[0].removesuffix(".json")
    figure = f"![{kind}](results/{name}/{kind}.png)"
    return f"{command(name)}, the networks of {of}, {seeds} seeds\n\n{grid(['method', *columns], rows)}\n\n{figure}"


def students(name: str) -> str:
    """What consistency gained on other libraries' students, over the average of the control."""
    found = read(name, "results.json")
    runs: dict[str, dict[str, dict[int, Any]]] = {}
    for record in found["runs"]:
        runs.setdefault(record["library"], {}).setdefault(record["method"], {})[record["seed"]] = record
    head = ["library", "method", "accuracy %", "average %", "gain over qat", "average over qat+ema's average"]
    rows = []
    for library, methods in runs.items():
        plain = methods["qat+ema"]  # its student is plain QAT's
        for method, each in methods.items():
            accuracies = [[run[column] for run in each.values()] for column in ("accuracy", "teacher_accuracy")]
            gains = ["-", "-"]
            if method != "qat+ema":
                gains = [
                    with_interval(gain([run[column] - plain[seed][column] for seed, run in each.items()]))
                    for column in ("accuracy", "teacher_accuracy")
                ]
            rows.append([library, method, *(str(spread(values)) for values in accuracies), *gains])
    return f"{command(name)}, {len(found['settings']['seeds'])} seeds\n\n{grid(head, rows)}"


def with_interval(found: Gain) -> str:
    """As `interval`."""
    ends = None if found.half is None else [found.mean - found.half, found.mean + found.half]
    return interval({"mean": found.mean, "interval": ends})


def overview(names: str) -> str:
    """Every point of some sweeps, whose names are joined by dots: what the average, consistency, and it with unlabeled
    images gained over plain QAT; the float network beside them.
    """
    head = ["runs", "point", "qat's loss", "qat %", "fp32 - qat", "average alone", "qat+cr", "qat+cr+unlabeled"]
    rows = []
    for name in names.split("."):
        found = read(name, "sweep.json")
        for point in found["points"]:
            methods = point["methods"]
            plain = methods["qat"]["accuracy"]
            floats = [methods["fp32"]["accuracy"][seed] - plain[seed] for seed in plain]
            gains = [
                interval(methods[method]["gain_over_qat"][role]) if method in methods else "-"
                for method, role in (("qat+ema", "teacher"), ("qat+cr", "student"), ("qat+cr+unlabeled", "student"))
            ]
            where = ", ".join(f"{axis} {values(axis, [point], found)}" for axis in found["axes"])
            loss = f"{mean(methods['qat']['task_loss'].values()):.3f}"
            rows.append([name, where, loss, str(spread(list(plain.values()))), with_interval(gain(floats)), *gains])
    return grid(head, rows)


PARTS: dict[str, Callable[[str], str]] = {
    "overview": overview,
    "sweep": sweep,
    "flatness": flatness,
    "sensitivity": sensitivity,
    "students": students,
}


if __name__ == "__main__":
    main()
