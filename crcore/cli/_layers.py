"""The quantizers of a run's networks on test images, for `crcore report`."""

from collections.abc import Sequence
from dataclasses import dataclass

import crcore as cr
from crcore.cli._backends import backend_name_of, open_backend
from crcore.cli._data import ImageData
from crcore.cli._errors import one_line
from crcore.cli._networks import data_for, load_checkpoint, view_of
from crcore.cli._quantizer_statistics import Quantized, QuantizerStatistics, statistics_of
from crcore.cli._results import Results

SAMPLES = 256  # test images in the batch


@dataclass(frozen=True)
class NetworkLayers:
    """One network's quantizers by layer and place, in the order in which they run."""

    method: str
    role: str  # "student" or "teacher"
    layers: dict[str, dict[str, QuantizerStatistics]]  # layer -> "weight", "input" or another place


def measure_layers(
    results: Results, *, seed: int, data_name: str | None, methods: Sequence[str]
) -> tuple[list[NetworkLayers], list[str]]:
    """The networks of one seed, and a sentence for each that cannot be shown."""
    found: list[NetworkLayers] = []
    problems: list[str] = []
    data: ImageData | None = None
    for method in methods:
        role = "teacher" if method == "qat+ema" else "student"  # qat+ema's student is qat's
        suffix = ".keras" if results.settings.get("backend") == "keras" else ".safetensors"
        path = results.folder / f"seed{seed}" / method / f"{role}{suffix}"
        name = backend_name_of(path)
        try:
            backend = open_backend(name, device="cpu" if name == "torch" else "auto")
            info, network = load_checkpoint(backend, path)
            if data is None:
                data = data_for(info, path, data_name)
                if data.fingerprint != results.data["fingerprint"]:
                    problems.append(f"The images of {data.name} are not those of the run; what is shown is of these.")
            layers: dict[str, dict[str, QuantizerStatistics]] = {}

            def visit(layer: str, place: str, tensor: Quantized, layers: dict = layers) -> None:
                layers.setdefault(layer, {})[place] = statistics_of(tensor)

            backend.visit_quantizers(network, view_of(info)(data.test.images[:SAMPLES], 0), visit)
        except (cr.CRCoreError, OSError) as error:
            problems.append(f"{method}: {one_line(error)}.")
            continue
        found.append(NetworkLayers(method, role, layers))
    return found, problems
