"""The commands flatness and sensitivity: several checkpoints side by side, a file beside each, and a figure."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Table

from crcore import CRCoreError
from crcore.cli._errors import CommandError, one_line
from crcore.cli._figures.landscape import flatness_panels, sensitivity_panels
from crcore.cli._figures.style import write_png
from crcore.cli._files import write_text
from crcore.cli._measure import (
    FORMAT,
    Data,
    Flatness,
    Instrument,
    Measured,
    Progress,
    Sensitivity,
    Where,
    measured,
    settings_of,
)

ROLES = ("float", "student", "teacher")
_SUFFIXES = (".safetensors", ".keras")
_PANELS = {"flatness": flatness_panels, "sensitivity": sensitivity_panels}


def measure(paths: Sequence[Path], instrument: Instrument, where: Where, *, out: Path | None, as_json: bool) -> None:
    """Measure each checkpoint, unless that was done with the same settings, and show them side by side."""
    checkpoints = checkpoints_of(paths)
    out = _figure(checkpoints, instrument, out)
    console = Console(stderr=True)
    data = Data()
    found = [_measured_once(checkpoint, instrument, where, data, console) for checkpoint in checkpoints]
    write_png(out, _PANELS[instrument.kind](found), f"{found[0]['data']}, {found[0]['samples']} images")
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    screen = Console(width=None if sys.stdout.isatty() else 120)
    screen.print(_table(found, instrument))
    if not isinstance(instrument, Flatness):
        screen.print(
            "noise and corruptions: what the highest level changes of the accuracy, in points; of corruptions the mean",
            highlight=False,
        )
    screen.print(
        f"wrote {out}, and a file ending in {_ending(instrument)} beside each checkpoint",
        highlight=False,
        soft_wrap=True,
    )


def measure_missing(folder: Path, *, data_name: str | None) -> None:
    """Measure with both instruments, as the commands do by default, what was not measured in a folder."""
    console, data = Console(stderr=True), Data()
    for checkpoint in checkpoints_of([folder]):
        if is_repeated(checkpoint):
            continue
        for instrument, samples, split in ((Flatness(), 256, "train"), (Sensitivity(), 1000, "test")):
            if _earlier(checkpoint, instrument.kind) is None:
                where = Where(samples, split, seed=0, data=data_name, device="auto")
                try:
                    _measured_once(checkpoint, instrument, where, data, console)
                except (CRCoreError, OSError) as error:  # the page shows the others
                    console.print(
                        f"{checkpoint}: not measured: {one_line(error)}", highlight=False, soft_wrap=True, markup=False
                    )


def checkpoints_of(paths: Sequence[Path]) -> list[Path]:
    """The checkpoints that are named, and all those in the folders that are."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for role in ROLES for suffix in _SUFFIXES for file in path.rglob(f"{role}{suffix}")]
            if not inside:
                raise CommandError(
                    f"{path} holds no checkpoint; give the --out folder of crcore compare, sweep or train"
                )
            found += sorted(inside)
        elif path.is_file() or path.suffix in _SUFFIXES:  # the reader says what is wrong with a file
            found.append(path)
        else:
            raise CommandError(f"{path}: no such checkpoint or folder; give what crcore compare or crcore train wrote")
    return list(dict.fromkeys(found))


def measurement_file(checkpoint: Path, kind: str) -> Path:
    """Where the measurement of a checkpoint is kept."""
    return checkpoint.with_name(f"{checkpoint.stem}-{kind}.json")


def is_repeated(file: Path) -> bool:
    """Whether a file is of the student of qat+ema, which is qat's, and that of qat stands beside it."""
    of_student = file.name.startswith("student") and file.parent.name == "qat+ema"
    return of_student and (file.parent.parent / "qat" / file.name).is_file()


def _measured_once(checkpoint: Path, instrument: Instrument, where: Where, data: Data, console: Console) -> Measured:
    file, earlier = measurement_file(checkpoint, instrument.kind), _earlier(checkpoint, instrument.kind)
    if earlier is not None and earlier["settings"] == settings_of(instrument, where):
        console.print(f"{checkpoint}: measured earlier", highlight=False, soft_wrap=True)
        return earlier
    with _bar(console, str(checkpoint)) as shown:
        found = measured(checkpoint, instrument, where, data, shown)
    write_text(file, json.dumps(found) + "\n")
    console.print(
        f"{checkpoint}: {instrument.kind} measured on {found['samples']} images", highlight=False, soft_wrap=True
    )
    return found


def _earlier(checkpoint: Path, kind: str) -> Measured | None:
    """What was measured since the checkpoint was written; None where that is nothing, or damaged."""
    file = measurement_file(checkpoint, kind)
    if not file.is_file() or file.stat().st_mtime < checkpoint.stat().st_mtime:
        return None
    try:
        found: Measured = json.loads(file.read_text(encoding="utf-8"))
        return found if found["format"] == FORMAT and isinstance(found["settings"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Progress]:
    """A bar on a terminal; how many products the eigenvalues will need is not known before."""
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=16),
        bars.TextColumn("{task.fields[what]} {task.completed}"),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None, what="")
        yield lambda what, done, total: bar.update(task, what=what, completed=done, total=total)


def _figure(checkpoints: Sequence[Path], instrument: Instrument, out: Path | None) -> Path:
    if out is None:
        if len(checkpoints) == 1:
            return measurement_file(checkpoints[0], instrument.kind).with_suffix(".png")
        return Path(os.path.commonpath([file.parent.absolute() for file in checkpoints])) / f"{instrument.kind}.png"
    if out.suffix != ".png":
        raise CommandError(f"--out {out}: the name must end in .png")
    if out.is_dir() or not out.parent.is_dir():
        why = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise CommandError(f"--out {out}: {why}; name a file in a folder that exists")
    return out


def _ending(instrument: Instrument) -> str:
    return f"-{instrument.kind}.json"


def _table(found: Sequence[Measured], instrument: Instrument) -> Table:
    rows = [_flatness_row(each) if isinstance(instrument, Flatness) else _sensitivity_row(each) for each in found]
    table = Table(title=f"{found[0]['data']}, {found[0]['samples']} images", title_justify="left")
    for column in rows[0]:
        table.add_column(column, no_wrap=column == "checkpoint")
    for row in rows:
        table.add_row(*row.values())
    return table


def _head(found: Measured) -> dict[str, str]:
    return {"checkpoint": found["checkpoint"], "weights": f"{found['parameters']:,}"}


def _flatness_row(found: Measured) -> dict[str, str]:
    values = found["eigenvalues"]
    places = sorted({1, min(10, len(values)), len(values)})
    return {
        **_head(found),
        "loss": f"{found['loss']:.4f}",
        **{f"eigenvalue {place}": f"{values[place - 1]:.4g}" for place in places},
        "trace": f"{found['trace']['mean']:.4g} ± {found['trace']['half']:.2g}",
    }


def _sensitivity_row(found: Measured) -> dict[str, str]:
    def change(group: str) -> str:
        """Of the accuracy at the highest level, in points, on average over the curves."""
        curves: list[Any] = [curve for curve in found["curves"] if curve["group"] == group]
        clean = curves[0]["accuracy"]["mean"][0]
        changes = [curve["accuracy"]["mean"][-1] - clean for curve in curves]
        return f"{sum(changes) / len(changes):+.1f}"

    sharp = found["sharpness"]
    return {
        **_head(found),
        "accuracy %": f"{found['curves'][0]['accuracy']['mean'][0]:.2f}",
        "input noise": change("input"),
        "corruptions": change("corruption"),
        "weight noise": change("weights"),
        f"sharpness at {sharp['radius'][-1]:g}": f"{sharp['increase'][-1]:.4g}",
    }
