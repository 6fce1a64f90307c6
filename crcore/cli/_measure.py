"""What `crcore flatness` and `crcore sensitivity` measure of one checkpoint, as the contents of a JSON file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crcore import flatness
from crcore.cli._backends import Backend, Network, backend_name_of, open_backend
from crcore.cli._data import ImageData, Images, load_data
from crcore.cli._errors import CommandError
from crcore.cli._network_info import NetworkInfo
from crcore.cli._networks import check_data, load_checkpoint, view_of
from crcore.cli._session import versions
from crcore.cli._split import stratified

FORMAT = 1  # of the files
Measured = dict[str, Any]
Progress = Callable[[str, int, int | None], None]  # what is measured, evaluations done, and of how many, where known


@dataclass(frozen=True)
class Where:
    """On which images, and with which random numbers."""

    samples: int
    split: str  # "train": images that the network had labels of; "test"
    seed: int
    data: str | None  # None: what the network was trained on
    device: str


@dataclass(frozen=True)
class Flatness:
    """What is asked of the Hessian."""

    top: int = 50  # eigenvalues
    probes: int = 50  # of the trace
    density: bool = True

    kind = "flatness"

    def measure(self, subject: "Subject", where: Where, progress: Progress) -> Measured:
        """The part of the file that is about the Hessian."""
        landscape = subject.landscape()

        def shown(what: str, total: int | None = None) -> Callable[[int], None]:
            return lambda done: progress(what, done, total)

        found: Measured = {
            "parameters": landscape.size,
            "loss": float(landscape.evaluate()[0].mean()),
            "eigenvalues": flatness.top_eigenvalues(
                landscape, self.top, seed=where.seed, progress=shown("eigenvalues")
            ).tolist(),
        }
        trace = flatness.trace(landscape, probes=self.probes, seed=where.seed, progress=shown("trace", self.probes))
        found["trace"] = {"mean": trace.mean, "half": trace.half_width}
        found["density"] = {"values": [], "density": []}
        if self.density:
            probes, steps = 3, min(80, landscape.size)
            density = flatness.spectral_density(
                landscape,
                probes=probes,
                steps=steps,
                points=512,
                seed=where.seed,
                progress=shown("density", probes * steps),
            )
            found["density"] = {"values": density.eigenvalues.tolist(), "density": density.density.tolist()}
        return found


@dataclass(frozen=True)
class Sensitivity:
    """What is done to inputs and weights."""

    draws: int = 5  # of each noise
    radii: tuple[float, ...] = (0.005, 0.01, 0.02)  # of sharpness, relative to the norm of the weights

    kind = "sensitivity"

    def measure(self, subject: "Subject", where: Where, progress: Progress) -> Measured:
        """The part of the file that is about noise."""
        landscape, axis = subject.landscape(), subject.backend.channel_axis
        pixels, normalize = subject.pixels(), subject.normalize
        common: dict[str, Any] = {"draws": self.draws, "seed": where.seed}

        def shown(what: str) -> Callable[[int], None]:
            return lambda done: progress(what, done, None)

        noise = flatness.noise_sensitivity(landscape, pixels, normalize, progress=shown("input noise"), **common)
        corrupted = flatness.corruption_sensitivity(
            landscape, pixels, normalize, channel_axis=axis, progress=shown("corruptions"), **common
        )
        weights = flatness.weight_sensitivity(landscape, progress=shown("weight noise"), **common)
        curves = [_curve(noise, "gaussian noise on the input", "input", "standard deviation, pixels in [0, 1]")]
        curves += [_curve(c, name.replace("_", " "), "corruption", "severity") for name, c in corrupted.items()]
        curves += [_curve(weights, "noise on the weights", "weights", "of each filter's norm")]
        sharp = [flatness.sharpness(landscape, radius, progress=shown("sharpness")).increase for radius in self.radii]
        return {
            "parameters": landscape.size,
            "curves": curves,
            "sharpness": {"radius": list(self.radii), "increase": sharp},
        }


Instrument = Flatness | Sensitivity


class Data:
    """Data sets that were read, each once."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, int | None], ImageData] = {}

    def of(self, info: NetworkInfo, path: Path, name: str | None) -> ImageData:
        """Those of a network, checked to be such as it takes."""
        key = (name or info.data, info.image_size)
        if key not in self._read:
            self._read[key] = load_data(key[0], image_size=key[1])
        return check_data(self._read[key], info, path)


@dataclass(frozen=True)
class Subject:
    """A network from a checkpoint, and the images on which it is measured."""

    backend: Backend
    network: Network
    info: NetworkInfo
    data: ImageData
    images: Images

    def landscape(self) -> flatness.LossLandscape:
        """The mean cross entropy over the images."""
        return self.backend.landscape(self.network, view_of(self.info)(self.images.images, 0), self.images.labels)

    def pixels(self) -> NDArray[np.float32]:
        """The images in [0, 1], with the channels where the backend has them."""
        return np.moveaxis(
            self.images.images.numpy().astype(np.float32) / np.float32(255), 1, self.backend.channel_axis
        )

    def normalize(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """From pixels to the network's input."""
        shape = [1] * pixels.ndim
        shape[self.backend.channel_axis] = -1
        mean, std = (np.reshape(np.asarray(each, np.float32), shape) for each in (self.info.mean, self.info.std))
        normalized: NDArray[np.float32] = (pixels.astype(np.float32) - mean) / std
        return normalized


def open_subject(checkpoint: Path, where: Where, data: Data) -> Subject:
    """Read the network and choose its images."""
    name = backend_name_of(checkpoint)
    backend = open_backend(name, device=where.device)
    info, network = load_checkpoint(backend, checkpoint)
    found = data.of(info, checkpoint, where.data)
    return Subject(backend, network, info, found, _chosen(found, info, where))


def measured(checkpoint: Path, instrument: Instrument, where: Where, data: Data, progress: Progress) -> Measured:
    """The contents of the file of one instrument and one checkpoint."""
    subject = open_subject(checkpoint, where, data)
    return {
        "format": FORMAT,
        "kind": instrument.kind,
        "checkpoint": "/".join(checkpoint.parts[-3:]),
        "model": subject.info.model,
        "role": subject.info.role,
        "method": _method_of(checkpoint),
        "data": subject.data.name,
        "samples": len(subject.images.labels),
        **instrument.measure(subject, where, progress),
        "settings": settings_of(instrument, where),
        "versions": versions(subject.backend),
    }


def settings_of(instrument: Instrument, where: Where) -> dict[str, Any]:
    """All that was asked for, as it comes out of JSON."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(instrument) | asdict(where)))
    return settings


def _chosen(data: ImageData, info: NetworkInfo, where: Where) -> Images:
    """Images from all over a set, which may be in the order of its classes."""
    images = data.train if where.split == "train" else data.test
    among = np.arange(len(images.labels))
    if where.split == "train" and info.labels is not None and info.seed is not None:
        among = stratified(images.labels.numpy(), info.labels, seed=info.seed, stream="labels")
    count = min(where.samples, len(among))
    chosen = among[np.arange(count) * len(among) // count]
    return Images(images.images[chosen], images.labels[chosen])


def _method_of(checkpoint: Path) -> str | None:
    """As the run says that is beside it; None where there is none."""
    try:
        method = json.loads((checkpoint.parent / "run.json").read_text(encoding="utf-8"))["method"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(method)


def _curve(curve: flatness.Curve, name: str, group: str, unit: str) -> Measured:
    bands: Measured = {}
    for quantity, found in (("loss", curve.loss), ("accuracy", curve.accuracy)):
        if found is None:  # the labels of images are labels
            raise CommandError(f"{name}: no accuracy was measured; are the labels whole numbers?")
        bands[quantity] = {end: np.asarray(getattr(found, end)).tolist() for end in ("mean", "low", "high")}
    return {"name": name, "group": group, "unit": unit, "levels": list(map(float, curve.levels)), **bands}


def check_counts(**counts: int | Sequence[float]) -> None:
    """Refuse numbers that no measurement can be made with."""
    lowest = {"draws": 2, "probes": 2, "seed": 0}
    for name, given in counts.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(given, int):
            if given < (least := lowest.get(name, 1)):
                raise CommandError(f"{option} must be {least} or more, got {given}")
        elif not given or not all(0 < value < np.inf for value in given):
            raise CommandError(f"{option} must be positive numbers, got {', '.join(map(str, given)) or 'none'}")
