"""Networks out of files, whatever wrote them: checkpoints, and what `crcore export` made of them."""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

import crcore as cr
from crcore.cli._backends import Backend, Network, backend_name_of, open_backend
from crcore.cli._data import ImageData, load_data
from crcore.cli._errors import CommandError, one_line
from crcore.cli._files import put_in_place
from crcore.cli._network_info import NetworkInfo, info_from, network_recipe
from crcore.cli._session import versions
from crcore.cli._settings import BACKENDS
from crcore.cli._views import View

RUNTIME_SUFFIXES = (".onnx", ".tflite")
_PACKAGES = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert"}
_MOST = 500  # images in a batch
_PACKED = "crcore.network"  # a metadata entry beside that of `save_quantized`


@dataclass(frozen=True)
class FileNetwork:
    """A network that was read from a file, ready to be tested."""

    info: NetworkInfo
    recipe: cr.Recipe | None  # None: a float network
    runtime: str | None  # that of an exported file: "onnxruntime" or "litert"
    versions: dict[str, str]
    accuracy: Callable[[ImageData], float]  # percent, on the test images


def read_file(path: Path, *, device: str) -> FileNetwork:
    """A network from a checkpoint or from an exported file; its network is built and checked here."""
    if path.suffix in RUNTIME_SUFFIXES:
        return _in_runtime(path, device)
    packed = packed_info(path) if path.suffix == ".safetensors" else None
    backend = open_backend(backend_name_of(path) if packed is None else packed[0], device=device)
    if packed is None:
        info, network = load_checkpoint(backend, path)
    else:
        info, network = packed[1], load_packed(backend, path, packed[1])

    def accuracy(data: ImageData) -> float:
        return backend.evaluation(data.test, mean=info.mean, std=info.std).accuracy(network)

    return FileNetwork(info, network_recipe(info, path), None, versions(backend), accuracy)


def load_checkpoint(backend: Backend, path: Path) -> tuple[NetworkInfo, Network]:
    """The network of a checkpoint, prepared as it was trained."""
    state, info = backend.read_network(path)
    recipe = network_recipe(info, path)
    network = _built(backend, info)
    if recipe is not None:
        network = backend.prepare(network, recipe)
    backend.load_state(network, state, path)
    return info, network


def load_packed(backend: Backend, path: Path, info: NetworkInfo) -> Network:
    """The network of a packed file, in integers."""
    return backend.load_quantized(_built(backend, info), path)


def add_info(path: Path, backend: Backend, info: NetworkInfo) -> None:
    """Store what the command needs of a network in a packed file."""
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    metadata[_PACKED] = json.dumps(described(info, backend), sort_keys=True)
    with put_in_place(path) as temporary:
        safetensors.numpy.save_file(safetensors.numpy.load_file(path), temporary, metadata=metadata)


def packed_info(path: Path) -> tuple[str, NetworkInfo] | None:
    """The backend and the description of the network in a packed file; None: it is no such file."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return None  # for the reader of checkpoints, which says what is wrong
    try:
        if _PACKED in metadata:
            return _description(json.loads(metadata[_PACKED]), path)
        if json.loads(metadata.get("crcore", "{}")).get("kind") == "quantized":
            raise CommandError(
                f"{path} was written by save_quantized and does not say of which model it is; read it with "
                "load_quantized, or let crcore export --to safetensors write one"
            )
    except (ValueError, KeyError, AttributeError) as error:
        raise CommandError(f"{path}: its metadata are damaged ({one_line(error)}); export it again") from error
    return None


def data_for(info: NetworkInfo, path: Path, name: str | None) -> ImageData:
    """The data that a network was trained on, or others that it can take."""
    return check_data(load_data(name or info.data, image_size=info.image_size), info, path)


def check_data(data: ImageData, info: NetworkInfo, path: Path) -> ImageData:
    """The data, where the network of `path` can take them."""
    if (len(data.classes), data.channels, data.size) != (len(info.classes), info.channels, info.size):
        raise CommandError(
            f"{path} was trained on {len(info.classes)} classes of images {_shape(info.channels, info.size)}; "
            f"--data {data.name} has {len(data.classes)} classes of {_shape(data.channels, data.size)}; give data like "
            "those it was trained on"
        )
    return data


def view_of(info: NetworkInfo) -> View:
    """What turns images into the network's input: its normalization, and no augmentation."""
    return View("none", size=info.size, flip=False, mean=info.mean, std=info.std)


def _built(backend: Backend, info: NetworkInfo) -> Network:
    return backend.network(info.model, num_classes=len(info.classes), in_channels=info.channels, size=info.size)


def described(info: NetworkInfo, backend: Backend) -> dict[str, Any]:
    """What an exported file says of its network: `NetworkInfo`, and the backend, which decides the layout of images."""
    return info.to_metadata() | {"backend": backend.name}


def _description(metadata: dict[str, Any], path: Path) -> tuple[str, NetworkInfo]:
    """What `described` gave."""
    backend = metadata.pop("backend", None)
    if backend not in BACKENDS:
        raise CommandError(
            f"{path}: its metadata are not those of crcore export; only files that it wrote can be used here"
        )
    return backend, info_from(metadata, path)


def _in_runtime(path: Path, device: str) -> FileNetwork:
    from crcore.deploy import open_runtime

    if device not in ("auto", "cpu"):
        raise CommandError(f"--device {device}: exported files run on the CPU; leave the option out")
    runtime = open_runtime(path)
    metadata = runtime.metadata()
    if metadata is None:
        raise CommandError(f"{path} has no crcore metadata; only files that crcore export wrote can be used here")
    backend, info = _description(metadata, path)
    channels_last = backend == "keras"

    def accuracy(data: ImageData) -> float:
        view, correct = view_of(info), 0
        for start in range(0, len(data.test.labels), _MOST):
            images = view(data.test.images[start : start + _MOST], 0).numpy()
            logits = runtime.run(images.transpose(0, 2, 3, 1) if channels_last else images)
            correct += int(np.sum(logits.argmax(axis=1) == data.test.labels[start : start + _MOST].numpy()))
        return 100 * correct / len(data.test.labels)

    package = _PACKAGES[runtime.name]
    found = {name: importlib.metadata.version(name) for name in ("crcore", "numpy", package)}
    return FileNetwork(info, network_recipe(info, path), runtime.name, found, accuracy)


def _shape(channels: int, size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}x{channels}"
