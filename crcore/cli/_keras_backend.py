"""The Keras backend of the command: thin, over the modules that do the work. Imported for `--backend keras` alone."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import crcore_keras as crk
import keras
import torch

import crcore as cr
from crcore.cli import _keras_training
from crcore.cli._data import Images
from crcore.cli._keras_checkpoints import load_state, read_network, save_network
from crcore.cli._keras_evaluation import KerasEvaluation, channels_last
from crcore.cli._keras_models import build_model
from crcore.cli._methods import Method
from crcore.cli._network_info import NetworkInfo
from crcore.cli._quantizer_statistics import Quantized, Visit
from crcore.cli._random import seed_of

if TYPE_CHECKING:
    from crcore.deploy import Verification
    from crcore.flatness import LossLandscape


class KerasBackend:
    """Networks are `keras.Model`s of images ``[N, H, W, C]``; the engine chooses the device."""

    name = "keras"
    suffix = ".keras"
    progress_name = "progress.npz"
    channel_axis = -1
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.engine: str = keras.config.backend()

    def versions(self) -> dict[str, str]:
        """Keras and its engine."""
        return {"keras": keras.__version__, self.engine: importlib.import_module(self.engine).__version__}

    def network(self, model: str, *, num_classes: int, in_channels: int, size: tuple[int, int], seed: int = 0) -> Any:
        """A float network with the random weights of a seed."""
        _seed(seed, "initial weights")
        return build_model(model, num_classes=num_classes, in_channels=in_channels, size=size)

    def prepare(self, network: Any, recipe: cr.Recipe, *, seed: int = 0) -> Any:
        """`crcore_keras.prepare`; random layers of the copy, such as dropout, start from `seed` in every method."""
        _seed(seed, "network")
        return crk.prepare(network, recipe)

    def has_batchnorm(self, network: Any) -> bool:
        """Whether a network has BatchNormalization."""
        return any(isinstance(layer, keras.layers.BatchNormalization) for layer in network._flatten_layers())

    def train(self, student: Any, method: Method, *, amp: bool, **options: Any) -> tuple[Any, dict[str, Any]]:
        """See `_keras_training.train`; `amp` is refused before."""
        return _keras_training.train(student, method, **options)

    def evaluation(self, test: Images, *, mean: Sequence[float], std: Sequence[float]) -> KerasEvaluation:
        """The test images as arrays."""
        return KerasEvaluation(test, mean=mean, std=std)

    def landscape(self, network: Any, images: torch.Tensor, labels: torch.Tensor) -> "LossLandscape":
        """`crcore_keras.Landscape`."""
        return crk.Landscape(network, channels_last(images), labels.numpy())

    def visit_quantizers(self, network: Any, images: torch.Tensor, visit: Visit) -> None:
        """Through the quantizers' own calls, which are theirs again afterwards; Keras has no hooks. Runs eagerly."""
        with ExitStack() as restore:
            for name, quantizer in _quantizers(network):
                restore.enter_context(patch.object(quantizer, "call", _visited(quantizer, name, visit)))
            network(channels_last(images), training=False)

    def save_network(self, path: Path, network: Any, info: NetworkInfo) -> None:
        """Write a .keras file."""
        save_network(path, network, info)

    def read_network(self, path: Path) -> tuple[Path, NetworkInfo]:
        """Read what `save_network` wrote."""
        return read_network(path)

    def load_state(self, network: Any, state: Path, path: Path) -> None:
        """Load the weights of the file `state`, which is `path`."""
        load_state(network, path)

    def export(
        self,
        network: Any,
        path: Path,
        images: torch.Tensor,
        *,
        metadata: dict[str, Any],
        opset: int | None,
        integer_only: bool | None,
        minimum_agreement: float,
    ) -> "Verification":
        """`crcore_keras.export_onnx` or `export_litert`."""
        sample = channels_last(images)
        common: dict[str, Any] = {"metadata": metadata, "minimum_agreement": minimum_agreement}
        if path.suffix == ".tflite":
            return crk.export_litert(network, sample, path, **common)
        return crk.export_onnx(network, sample, path, opset=opset, integer_only=integer_only, **common)

    def verify(self, network: Any, path: Path, images: torch.Tensor, labels: torch.Tensor) -> "Verification":
        """`crcore_keras.verify`."""
        return crk.verify(network, channels_last(images), path, labels=labels.numpy())

    def save_quantized(self, network: Any, path: Path) -> None:
        """`crcore_keras.save_quantized`."""
        crk.save_quantized(network, path)

    def load_quantized(self, network: Any, path: Path) -> Any:
        """`crcore_keras.load_quantized`."""
        return crk.load_quantized(network, path)


def _quantizers(layer: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every `FakeQuantize` in a layer or model, with its name from there."""
    for child in layer._flatten_layers(include_self=False, recursive=False):
        where = f"{name}.{child.name}".lstrip(".")
        if isinstance(child, crk.FakeQuantize):
            yield where, child
        else:
            yield from _quantizers(child, where)


def _visited(quantizer: Any, name: str, visit: Visit) -> Callable[..., Any]:
    """The call of a quantizer, which hands what it gets to `visit` the first time."""
    call, seen = quantizer.call, False

    def visited(x: Any, training: bool = False) -> Any:
        nonlocal seen
        if not seen:
            seen = True
            layer, _, place = name.rpartition(".")
            arrays = (x, quantizer.codes(x), *quantizer.affine(x))
            values, codes, scale, zero_point = (keras.ops.convert_to_numpy(array) for array in arrays)
            found = Quantized(quantizer.quantizer, values, codes, scale, zero_point, quantizer.code_limits(x))
            visit(layer, place.removesuffix("_quantizer"), found)
        return call(x, training=training)

    return visited


def _seed(seed: int, stream: str) -> None:
    keras.utils.set_random_seed(seed_of(seed, stream) % 2**32)  # which is what it takes
