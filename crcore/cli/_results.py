"""results.json, read again and checked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crcore.cli._errors import CommandError, one_line
from crcore.cli._report import Record

_NUMBER = (int, float)
_MAYBE = (int, float, type(None))
# What the page reads, and of which type.
_RESULTS = {"command": str, "complete": bool, "settings": dict, "data": dict, "versions": dict, "runs": list}
_SETTINGS = {
    "seeds": list,
    "methods": list,
    "model": str,
    "quantizer": str,
    **dict.fromkeys(("weight_bits", "activation_bits", "labels", "batch_size"), int),
    **dict.fromkeys(("lr", "float_lr"), _NUMBER),
    **dict.fromkeys(("student_view", "teacher_view"), str),
}
_DATA = {
    **dict.fromkeys(("name", "test_source", "fingerprint"), str),
    **dict.fromkeys(("train", "test", "channels"), int),
    **dict.fromkeys(("classes", "size"), list),
}
_RUN = {"seed": int, "method": str, "differs": str, "steps": int, "float_steps": (int, type(None)), "history": list}
_RUN |= {"accuracy": _NUMBER, "teacher_accuracy": _MAYBE}
_EPOCH = {"epoch": int, "step": int, "task": _NUMBER, "consistency": _NUMBER, "weight": _MAYBE, "decay": _MAYBE}
_EPOCH |= {"accuracy": _MAYBE, "teacher_accuracy": _MAYBE}


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
        if (folder / "sweep.json").is_file():
            raise CommandError(
                f"{folder} is a sweep, shown by its table.md and sweep.png; give the folder of crcore compare or train"
            )
        if (folder / "settings.json").is_file():
            raise CommandError(
                f"{folder} has no finished run yet; results.json comes with the first one, --resume continues"
            )
        raise CommandError(f"{folder} has no results.json; give the --out folder of crcore compare or train")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        _check(found, _RESULTS, "the file")
        _check(found["settings"], _SETTINGS, "settings")
        _check(found["data"], _DATA, "data")
        for record in found["runs"]:
            _check(record, _RUN, "a run")
            for entry in record["history"]:
                _check(entry, _EPOCH, "the history of a run")
        _check_sizes(found)
    except ValueError as error:
        raise CommandError(f"{file} is damaged ({one_line(error)}); give crcore's own file, or run again") from error
    return Results(
        folder=folder,
        command=found["command"],
        complete=found["complete"],
        settings=found["settings"],
        data=found["data"],
        versions=found["versions"],
        records=found["runs"],
    )


def _check(found: Any, types: dict[str, Any], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no object")
    missing = types.keys() - found.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} missing in {where}")
    for name, kind in types.items():
        if not isinstance(found[name], kind):
            raise ValueError(f"{name} in {where} is {found[name]!r}")


def _check_sizes(found: dict[str, Any]) -> None:
    """Lists that must not be empty, or must be as long as others."""
    if found["command"] not in ("compare", "train"):
        raise ValueError(f"it was written by {found['command']}")
    if not (found["settings"]["seeds"] and found["settings"]["methods"] and found["runs"]):
        raise ValueError("no run in it")
    if len(found["data"]["size"]) != 2:
        raise ValueError("size in data is no height and width")
    measured: dict[str, Any] = {}
    for record in found["runs"]:
        epochs = [[entry[name] is None for name in _EPOCH] for entry in record["history"]]
        if not epochs or measured.setdefault(record["method"], epochs) != epochs:
            raise ValueError(f"the history of {record['method']} is not as long as with another seed")
