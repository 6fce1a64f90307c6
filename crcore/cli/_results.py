"""results.json, read again and checked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crcore.cli._errors import CommandError, one_line
from crcore.cli._report import Record

_RECORDED = {"seed", "method", "differs", "accuracy", "teacher_accuracy", "float_steps", "steps", "history"}
_MEASURED = {"epoch", "step", "task", "consistency", "weight", "decay", "accuracy", "teacher_accuracy"}
_SETTINGS = {"seeds", "methods", "model", "quantizer", "weight_bits", "activation_bits", "labels", "lr", "float_lr"}
_DATA = {"name", "train", "test", "test_source", "classes", "channels", "size", "fingerprint"}


@dataclass(frozen=True)
class Results:
    """What `crcore compare` or `crcore train` wrote, finished or not."""

    folder: Path
    command: str  # "compare" or "train"
    complete: bool
    settings: dict[str, Any]  # Settings.to_dict()
    data: dict[str, Any]
    versions: dict[str, str]
    records: list[Record]  # of the runs that are finished, at least one


def read_results(folder: Path) -> Results:
    """The results in the `--out` folder of a run."""
    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder; give the --out folder of crcore compare or train")
    file = folder / "results.json"
    if not file.is_file():
        if (folder / "settings.json").is_file():
            raise CommandError(
                f"{folder} has no finished run yet; results.json comes with the first one, --resume continues"
            )
        raise CommandError(f"{folder} has no results.json; give the --out folder of crcore compare or train")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        results = Results(
            folder=folder,
            command=found["command"],
            complete=bool(found["complete"]),
            settings=_with(found["settings"], _SETTINGS, "settings"),
            data=_with(found["data"], _DATA, "data"),
            versions=dict(found["versions"]),
            records=[_with(record, _RECORDED, "a run") for record in found["runs"]],
        )
        for record in results.records:
            for entry in record["history"]:
                _with(entry, _MEASURED, "the history of a run")
            float(record["accuracy"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CommandError(f"{file} is damaged ({one_line(error)}); give crcore's own file, or run again") from error
    if not results.records or not all(record["history"] for record in results.records):
        raise CommandError(f"{file} is damaged (a run without history); give crcore's own file, or run again")
    return results


def _with(found: dict[str, Any], keys: set[str], where: str) -> dict[str, Any]:
    missing = keys - found.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} missing in {where}")
    return found
