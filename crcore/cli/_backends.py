"""The seam between the command and the libraries that train: one protocol, a torch and a Keras implementation.

Data, views, batches, settings, recipes and reports are common. What a backend does with them is its own.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import crcore as cr
from crcore.cli._errors import CommandError, one_line

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from crcore.cli._batches import Batches
    from crcore.cli._data import Images
    from crcore.cli._methods import Method
    from crcore.cli._network_info import NetworkInfo
    from crcore.cli._progress import Progress
    from crcore.cli._quantizer_statistics import Visit
    from crcore.deploy import Verification
    from crcore.flatness import LossLandscape

ENGINES = ("tensorflow", "jax", "torch")  # of Keras, those that can train
Network = Any  # a torch.nn.Module or a keras.Model


class Evaluation(Protocol):
    """The test images."""

    def accuracy(self, network: Network) -> float:
        """Percent of the images whose largest logit is the label's."""
        ...

    def predictions(self, network: Network) -> "NDArray[np.int64]":
        """The class of the largest logit of each image."""
        ...


class Backend(Protocol):
    """What builds, trains, tests and stores networks."""

    name: str  # as in --backend
    engine: str  # what computes: "torch", or the engine of Keras
    suffix: str  # of checkpoints
    progress_name: str  # of the file that an unfinished run continues from
    channel_axis: int  # of a batch of images

    @property
    def device(self) -> "torch.device":
        """Where images are kept and views are drawn."""
        ...

    def versions(self) -> dict[str, str]:
        """Packages that decide a result, beside those of every backend."""
        ...

    def network(
        self, model: str, *, num_classes: int, in_channels: int, size: tuple[int, int], seed: int = 0
    ) -> Network:
        """A float network by its `--model` name, checked, with the random weights of a seed."""
        ...

    def prepare(self, network: Network, recipe: cr.Recipe, *, seed: int = 0) -> Network:
        """A quantized copy of a network; its messages name the layer and the way out."""
        ...

    def has_batchnorm(self, network: Network) -> bool:
        """Whether a network has BatchNorm with running statistics."""
        ...

    def train(
        self,
        student: Network,
        method: "Method",
        *,
        recipe: cr.Recipe | None,
        reference: Network | None,
        batches: "Batches",
        evaluation: Any,
        epochs: int,
        lr: float,
        weight_decay: float,
        evaluate_every: int,
        reestimate_batchnorm: int,
        amp: bool,
        progress: "Progress",
        progress_file: Path,
    ) -> tuple[Network | None, dict[str, Any]]:
        """Train `student` in place, from `progress_file` on where there is one.

        `reference` is the float network to distill from; `reestimate_batchnorm` counts the batches after the last step
        on which BatchNorm of student and average is measured anew. Returns the averaged network, where the method has
        one, and the record of the run.
        """
        ...

    def evaluation(self, test: "Images", *, mean: Sequence[float], std: Sequence[float]) -> Evaluation:
        """The test images, ready for the networks of this backend."""
        ...

    def landscape(self, network: Network, images: "torch.Tensor", labels: "torch.Tensor") -> "LossLandscape":
        """The network's mean cross entropy over normalised views ``[N, C, H, W]``, as a function of its weights."""
        ...

    def visit_quantizers(self, network: Network, images: "torch.Tensor", visit: "Visit") -> None:
        """Run a quantized network once, in inference mode, and hand each of its quantizers' tensors to `visit`.

        `images` are normalised views ``[N, C, H, W]``. Quantizers come in the order in which they run, each once.
        """
        ...

    def save_network(self, path: Path, network: Network, info: "NetworkInfo") -> None:
        """Write a checkpoint, whole or not at all."""
        ...

    def read_network(self, path: Path) -> tuple[Any, "NetworkInfo"]:
        """A checkpoint's state, for `load_state`, and what rebuilds its network."""
        ...

    def load_state(self, network: Network, state: Any, path: Path) -> None:
        """Load a state into a network of the same form, or say what does not fit."""
        ...

    def export(
        self,
        network: Network,
        path: Path,
        images: "torch.Tensor",
        *,
        metadata: dict[str, Any],
        opset: int | None,
        integer_only: bool | None,
        minimum_agreement: float,
    ) -> "Verification":
        """Write a quantized network for the runtime of the file's ending, and prove it there.

        `images` are normalised views ``[N, C, H, W]``: ranges are taken from them, and the proof is made on them.
        `opset` and `integer_only` are for ONNX; `minimum_agreement` is in percent of the images.
        """
        ...

    def verify(self, network: Network, path: Path, images: "torch.Tensor", labels: "torch.Tensor") -> "Verification":
        """Compare an exported file with the network that it was written from, on other images."""
        ...

    def save_quantized(self, network: Network, path: Path) -> None:
        """Write the integers of a quantized network, packed."""
        ...

    def load_quantized(self, network: Network, path: Path) -> Network:
        """The network that `save_quantized` saved; `network` is its float form."""
        ...


def open_backend(name: str, *, device: str) -> Backend:
    """The backend of a `--backend` option. Its library is imported here."""
    if name == "torch":
        from crcore.cli._torch_backend import TorchBackend

        return TorchBackend(device)
    check_options_of_keras(device=device, amp=False)
    _import_keras()
    from crcore.cli._keras_backend import KerasBackend

    return KerasBackend()


def backend_name_of(checkpoint: Path) -> str:
    """The backend that wrote a checkpoint, by the file's name."""
    return "keras" if checkpoint.suffix == ".keras" else "torch"


def check_options_of_keras(*, device: str, amp: bool) -> None:
    """Refuse what only the torch backend does."""
    if device != "auto":
        raise CommandError(
            f"--device {device}: with --backend keras the engine chooses its device; leave the option out "
            "(CUDA_VISIBLE_DEVICES= hides GPUs from every engine)"
        )
    if amp:
        raise CommandError("--amp goes with --backend torch alone; leave the option out")


def _import_keras() -> None:
    """Import Keras and its engine, or say in one line which of them is missing and how to get it."""
    asked = os.environ.get("KERAS_BACKEND")
    if asked is not None and asked not in ENGINES:
        raise CommandError(
            f"KERAS_BACKEND={asked} is no engine that can train; set KERAS_BACKEND to {', '.join(ENGINES)}"
        )
    try:
        from keras import config
    except ModuleNotFoundError as error:
        raise CommandError(
            _way_out(f"the package {(error.name or '').partition('.')[0]!r} is missing", asked)
        ) from error
    except Exception as error:  # an engine that is damaged, or too old for this Keras
        raise CommandError(
            _way_out(f"Keras cannot be imported ({type(error).__name__}: {one_line(error)})", asked)
        ) from error
    if config.backend() not in ENGINES:  # from ~/.keras/keras.json
        raise CommandError(
            f"Keras runs on {config.backend()!r}, which cannot train; set KERAS_BACKEND to {', '.join(ENGINES)}"
        )


def _way_out(problem: str, asked: str | None) -> str:
    engine = asked or ENGINES[0]
    return (
        f"{problem}; --backend keras needs Keras and an engine: pip install keras {engine}, then set "
        f"KERAS_BACKEND={engine} (engines: {', '.join(ENGINES)})"
    )
