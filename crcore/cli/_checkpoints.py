"""Checkpoints as safetensors files with JSON metadata (torch); written to a temporary name, then put in place."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import crcore as cr
from crcore.cli._errors import CommandError, one_line

KEY = "crcore"  # a single metadata entry, so that equal contents make equal files


@dataclass(frozen=True)
class NetworkInfo:
    """What has to be known to rebuild a network and to feed it."""

    role: str  # "float", "student" or "teacher"
    model: str
    recipe: dict[str, Any] | None  # Recipe.to_dict(), None for the float network
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    image_size: int | None  # as it was asked for
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str
    versions: dict[str, str]


def save_network(path: Path, module: nn.Module, info: NetworkInfo) -> None:
    """Write the state of a network together with what rebuilds it."""
    _write(path, module.state_dict(), {"kind": "network", **asdict(info)})


def read_network(path: Path) -> tuple[dict[str, Tensor], NetworkInfo]:
    """Read a checkpoint that `save_network` wrote."""
    tensors, metadata = _read(path)
    if metadata.pop("kind", None) != "network":
        raise CommandError(
            f"{path} holds the state of an unfinished run, not a network; give a float, student or teacher.safetensors"
        )
    try:
        for name in ("classes", "size", "mean", "std"):
            metadata[name] = tuple(metadata[name])
        return tensors, NetworkInfo(**metadata)
    except (KeyError, TypeError) as error:
        raise CommandError(
            f"{path}: its metadata are not those of this version of crcore ({one_line(error)}); train again"
        ) from error


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a state into a network of the same form, or say which entry does not fit."""
    expected = module.state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong += [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if wrong:
        raise CommandError(
            f"{path} does not fit the network: {wrong[0]} and {len(wrong) - 1} more entries differ; "
            "give the checkpoint of the same model and recipe"
        )
    module.load_state_dict(dict(tensors))


def network_recipe(info: NetworkInfo, path: Path) -> cr.Recipe | None:
    """The recipe of a checkpoint, None for a float network."""
    if info.recipe is None:
        return None
    try:
        return cr.Recipe.from_dict(info.recipe)
    except cr.CRCoreError as error:
        raise CommandError(
            f"{path}: its recipe cannot be read ({one_line(error)}); was it made by a newer crcore?"
        ) from error


def save_progress(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    """Write all that a run needs to continue after its last whole epoch."""
    tensors = {
        f"{part}/{name}": value for part, module in modules.items() for name, value in module.state_dict().items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    _write(path, tensors, {"kind": "progress", "record": record})


def load_progress(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `save_progress` wrote and return the record of the epochs that are done."""
    tensors, metadata = _read(path)
    for part, module in modules.items():
        prefix = f"{part}/"
        load_state(module, {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}, path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, entry = name.split("/")
            state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    record: dict[str, Any] = metadata["record"]
    return record


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then put it in place: a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    # Copies, because safetensors refuses entries that share memory, as tied weights do.
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(copies, temporary, metadata={KEY: json.dumps(metadata, sort_keys=True)})
    os.replace(temporary, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CommandError(f"{path}: no such checkpoint; give a .safetensors file that crcore wrote")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise CommandError(
            f"{path} cannot be read ({one_line(error)}): it is damaged, cut short or no safetensors file; "
            "copy it again, or train again"
        ) from error
    if text is None:
        raise CommandError(f"{path} has no crcore metadata; only checkpoints that crcore wrote can be used here")
    try:
        metadata: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise CommandError(f"{path}: its metadata are damaged ({one_line(error)}); train again") from error
    return tensors, metadata
