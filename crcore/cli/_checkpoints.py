"""Checkpoints as safetensors files with JSON metadata (torch); written to a temporary name, then put in place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from crcore.cli._errors import CommandError, one_line
from crcore.cli._files import put_in_place
from crcore.cli._network_info import NetworkInfo, info_from

KEY = "crcore"  # a single metadata entry, so that equal contents make equal files


def save_network(path: Path, module: nn.Module, info: NetworkInfo) -> None:
    """Write the state of a network together with what rebuilds it."""
    _write(path, module.state_dict(), info.to_metadata())


def read_network(path: Path) -> tuple[dict[str, Tensor], NetworkInfo]:
    """Read a checkpoint that `save_network` wrote."""
    tensors, metadata = _read(path)
    return tensors, info_from(metadata, path)


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


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    # Copies, because safetensors refuses entries that share memory, as tied weights do.
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    with put_in_place(path) as temporary:
        safetensors.torch.save_file(copies, temporary, metadata={KEY: json.dumps(metadata, sort_keys=True)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CommandError(f"{path}: no such checkpoint; give one that crcore wrote, or a file that it exported")
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
