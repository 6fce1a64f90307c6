"""The commands compare, train and evaluate. Their arguments are checked in `_arguments.py`."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import crcore as cr
from crcore.cli._curves import draw_curves
from crcore.cli._errors import CommandError
from crcore.cli._files import write_text
from crcore.cli._networks import data_for, read_file
from crcore.cli._progress import Progress
from crcore.cli._recipes import quantizer_name, quantizers
from crcore.cli._report import HEADER, cells, markdown, notes, rows, time_spent, title
from crcore.cli._runs import all_runs, total_steps
from crcore.cli._session import Session, check_same_quantization, open_session
from crcore.cli._settings import Settings, check_bits


def compare(settings: Settings, *, out: Path, resume: bool) -> None:
    """Train every method with every seed and show the table."""
    session = open_session(settings, out=out, resume=resume)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{title(session.settings.to_dict(), session.data.to_dict())}; results go to {out}", highlight=False)
    records = _train_all(session, console, command="compare")
    settings_, data = session.settings.to_dict(), session.data.to_dict()
    write_text(out / "table.md", markdown(records, settings_, data))
    draw_curves(out / "curves.png", records, title(settings_, data))
    _print_table(console, records, title(settings_, data), notes(records, settings_, data))
    _print_time(console, records)
    console.print(f"wrote {out / 'results.json'}, table.md, curves.png and the checkpoints", highlight=False)


def train(settings: Settings, *, out: Path, resume: bool) -> None:
    """Train one method with one seed and name its checkpoint."""
    session = open_session(settings, out=out, resume=resume)
    console = Console(width=None if sys.stdout.isatty() else 120)
    (record,) = _train_all(session, console, command="train")
    teacher = record["teacher_accuracy"]
    average = "" if teacher is None else f", its average {teacher:.2f} %"
    console.print(f"accuracy {record['accuracy']:.2f} %{average}", highlight=False)
    _print_time(console, [record])
    for checkpoint in record["checkpoints"]:
        console.print(f"wrote {out / checkpoint}", highlight=False, soft_wrap=True)


def evaluate(
    checkpoint: Path,
    *,
    data_name: str | None,
    device_name: str,
    expected: dict[str, Any],
    as_json: bool,
) -> None:
    """Rebuild the network of a checkpoint and measure its accuracy on the test images."""
    network = read_file(checkpoint, device=device_name)
    info = network.info
    _check_expected(checkpoint, info.model, network.recipe, expected)
    data = data_for(info, checkpoint, data_name)
    accuracy = network.accuracy(data)
    if as_json:
        result = {
            "checkpoint": str(checkpoint),
            "accuracy": accuracy,
            "role": info.role,
            "model": info.model,
            "runtime": network.runtime,
            "data": data.name,
            "test_images": len(data.test.labels),
            "recipe": info.recipe,
            "versions": {"trained": info.versions, "evaluated": network.versions},
        }
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        where = "" if network.runtime is None else f", in {network.runtime}"
        sys.stdout.write(
            f"accuracy {accuracy:.2f} % on {len(data.test.labels)} test images of {data.name} "
            f"({info.role} network, {info.model}{where})\n"
        )


def _train_all(session: Session, console: Console, *, command: str) -> list[dict[str, Any]]:
    """Train, and write results.json after every run, so that a long comparison can be looked at while it lasts."""
    records: list[dict[str, Any]] = []
    with Progress(console, total_steps(session)) as progress:
        for record in all_runs(session, progress):
            records.append(record)
            results = {
                "format": 1,
                "command": command,
                "backend": session.backend.name,
                "engine": session.backend.engine,
                "complete": len(records) == len(session.settings.seeds) * len(session.settings.methods),
                "settings": session.settings.to_dict(),
                "data": session.data.to_dict(),
                "versions": session.versions,
                "runs": records,
            }
            write_text(session.out / "results.json", json.dumps(results, indent=2) + "\n")
    return records


def _print_table(console: Console, records: list[dict[str, Any]], caption: str, remarks: list[str]) -> None:
    table = Table(title=caption, title_justify="left")
    for column in HEADER[:-1]:  # what differs needs more room than a column of a terminal has
        table.add_column(column)
    lines = rows(records)
    for row in lines:
        table.add_row(*cells(row)[:-1])
    console.print(table)
    for row in lines:
        console.print(f"{row.method:17} {row.differs}", highlight=False)
    for remark in remarks:
        console.print(remark, highlight=False)


def _print_time(console: Console, records: list[dict[str, Any]]) -> None:
    """On the screen alone: the files of a run do not depend on the machine."""
    line = time_spent(records)
    if line is not None:
        console.print(line, highlight=False)


def _check_expected(checkpoint: Path, model: str, recipe: cr.Recipe | None, expected: dict[str, Any]) -> None:
    """Refuse a checkpoint that is not what the user said it is."""
    check_bits(expected["weight_bits"], expected["activation_bits"])
    if expected["model"] not in (None, model):
        raise CommandError(f"--model {expected['model']}: {checkpoint} holds a {model}; leave the option out")
    asked = {name: expected[name] for name in ("quantizer", "weight_bits", "activation_bits")}
    if all(value is None for value in asked.values()):
        return
    if recipe is None or recipe.weights is None or recipe.activations is None:
        raise CommandError(
            f"{checkpoint} holds a float network; leave --quantizer, --weight-bits, --activation-bits out"
        )
    weights, activations = quantizers(
        asked["quantizer"] or quantizer_name(recipe),
        recipe.weights.bits if asked["weight_bits"] is None else asked["weight_bits"],
        recipe.activations.bits if asked["activation_bits"] is None else asked["activation_bits"],
    )
    check_same_quantization(recipe, cr.Recipe(weights, activations), what=str(checkpoint))
