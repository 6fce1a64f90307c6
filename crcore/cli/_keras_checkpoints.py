"""Checkpoints of Keras networks: `.keras` files with one more member, crcore.json; written whole or not at all."""

import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from crcore.cli._errors import CommandError, one_line
from crcore.cli._files import put_in_place
from crcore.cli._network_info import NetworkInfo, info_from

MEMBER = "crcore.json"


def save_network(path: Path, network: Any, info: NetworkInfo) -> None:
    """Write a network, which Keras itself can load too, together with what the command needs of it."""
    with put_in_place(path, ending=".keras") as temporary:
        network.save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(MEMBER, json.dumps(info.to_metadata(), sort_keys=True))


def read_network(path: Path) -> tuple[Path, NetworkInfo]:
    """Check a file that `save_network` wrote; its weights are read by `load_state`."""
    if not path.is_file():
        raise CommandError(f"{path}: no such checkpoint; give a .keras file that crcore wrote")
    if path.suffix != ".keras":
        raise CommandError(f"{path} is no .keras file; with --backend keras give one, or leave --backend keras out")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            text = archive.read(MEMBER) if MEMBER in archive.namelist() else None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise _unreadable(path, one_line(error)) from error
    if broken is not None:
        raise _unreadable(path, broken)
    if text is None:
        raise CommandError(f"{path} has no crcore metadata; only checkpoints that crcore wrote can be used here")
    try:
        metadata: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise CommandError(f"{path}: its metadata are damaged ({one_line(error)}); train again") from error
    return path, info_from(metadata, path)


def load_state(network: Any, path: Path) -> None:
    """Load the weights of a checkpoint into a network of the same form. No code of the file is run."""
    try:
        network.load_weights(path)
    except Exception as error:  # Keras and h5py raise their own, and crcore_keras names another quantizer
        raise CommandError(
            f"{path} does not fit the network ({one_line(error)}); give the checkpoint of the same model and recipe"
        ) from error


def save_progress(path: Path, model: Any, record: dict[str, Any]) -> None:
    """Write all that a run needs to continue after its last whole epoch.

    As plain arrays: a file of Keras' own takes longer to write than a short epoch takes to train.
    """
    arrays = {str(index): keras.ops.convert_to_numpy(variable) for index, variable in enumerate(_variables(model))}
    with put_in_place(path) as temporary, temporary.open("wb") as file:
        np.savez(file, record=np.array(json.dumps(record)), **arrays)


def load_progress(path: Path, model: Any) -> dict[str, Any]:
    """Restore what `save_progress` wrote into a model made alike, and return the record of the epochs that are done."""
    variables = _variables(model)
    try:
        with np.load(path) as file:
            arrays = [file[str(index)] for index in range(len(file.files) - 1)]
            record: dict[str, Any] = json.loads(file["record"].item())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CommandError(
            f"--resume: {path} is damaged ({one_line(error)}); delete it to train that run again"
        ) from error
    if [array.shape for array in arrays] != [tuple(variable.shape) for variable in variables]:
        raise CommandError(f"--resume: {path} is of another network; was the model changed? give another --out")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    return record


def _variables(model: Any) -> list[Any]:
    """Weights, statistics, counters and states of random layers, then the optimizer's; each once, in a fixed order."""
    return [*model.variables, *model.optimizer.variables]


def _unreadable(path: Path, why: str) -> CommandError:
    return CommandError(
        f"{path} cannot be read ({why}): it is damaged, cut short or no .keras file; copy it again, or train again"
    )
