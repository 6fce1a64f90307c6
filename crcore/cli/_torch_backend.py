"""The torch backend of the command: thin, over the modules that do the work."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crcore_torch as crt
import torch
from torch import Tensor, nn

import crcore as cr
from crcore.cli import _training
from crcore.cli._checkpoints import load_state, read_network, save_network
from crcore.cli._data import Images
from crcore.cli._errors import CommandError
from crcore.cli._evaluation import Evaluation
from crcore.cli._methods import Method
from crcore.cli._models import build_model
from crcore.cli._network_info import NetworkInfo
from crcore.cli._quantizer_statistics import Quantized, Visit
from crcore.cli._random import seed_of

if TYPE_CHECKING:
    from crcore.deploy import Verification
    from crcore.flatness import LossLandscape


class TorchBackend:
    """Networks are `torch.nn.Module`s on one device."""

    name = engine = "torch"
    suffix = ".safetensors"
    progress_name = "progress.safetensors"
    channel_axis = 1

    def __init__(self, device: str) -> None:
        self.device = choose_device(device)

    def versions(self) -> dict[str, str]:
        """Nothing beside what every backend names: torch is one of those, because it draws the views."""
        return {}

    def network(
        self, model: str, *, num_classes: int, in_channels: int, size: tuple[int, int], seed: int = 0
    ) -> nn.Module:
        """A float network with the random weights of a seed."""
        torch.manual_seed(seed_of(seed, "initial weights"))
        network = build_model(model, num_classes=num_classes, in_channels=in_channels, size=size)
        # The memory format in which convolutions are fastest, on CPUs and on GPUs.
        return network.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def prepare(self, network: nn.Module, recipe: cr.Recipe, *, seed: int = 0) -> nn.Module:
        """`crcore_torch.prepare`. Random layers take their seeds from the step, see `_training.py`."""
        student: nn.Module = crt.prepare(network, recipe)
        return student

    def has_batchnorm(self, network: nn.Module) -> bool:
        """Whether a network has BatchNorm with running statistics."""
        kind = nn.modules.batchnorm._BatchNorm
        return any(isinstance(module, kind) and module.track_running_stats for module in network.modules())

    def train(
        self, student: nn.Module, method: Method, *, reference: nn.Module | None, **options: Any
    ) -> tuple[nn.Module | None, dict[str, Any]]:
        """See `_training.train`."""
        return _training.train(student, method, reference=None if reference is None else reference.eval(), **options)

    def evaluation(self, test: Images, *, mean: Sequence[float], std: Sequence[float]) -> Evaluation:
        """The test images, on the device."""
        return Evaluation(test, mean=mean, std=std, device=self.device)

    def landscape(self, network: nn.Module, images: Tensor, labels: Tensor) -> "LossLandscape":
        """`crcore_torch.Landscape`."""
        return crt.Landscape(network, images, labels)

    @torch.no_grad()
    def visit_quantizers(self, network: nn.Module, images: Tensor, visit: Visit) -> None:
        """Through forward hooks. The network's mode is as it was afterwards."""
        handles: list[torch.utils.hooks.RemovableHandle] = []

        def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            if id(module) not in seen:  # a layer that runs twice is shown at its first time
                seen.add(id(module))
                quantizer: Any = module
                layer, _, place = names[id(module)].rpartition(".")
                visit(layer, place.removesuffix("_quantizer"), _quantized(quantizer, arguments[0]))

        seen: set[int] = set()
        names = {id(module): name for name, module in network.named_modules() if isinstance(module, crt.FakeQuantize)}
        training = network.training
        try:
            handles += [module.register_forward_hook(hook) for module in network.modules() if id(module) in names]
            network.eval()(images.to(self.device))
        finally:
            network.train(training)
            for handle in handles:
                handle.remove()

    def save_network(self, path: Path, network: nn.Module, info: NetworkInfo) -> None:
        """Write a safetensors file."""
        save_network(path, network, info)

    def read_network(self, path: Path) -> tuple[dict[str, Tensor], NetworkInfo]:
        """Read what `save_network` wrote."""
        if path.suffix == ".keras":
            raise CommandError(f"{path} is a Keras network; give --backend keras, or a .safetensors file")
        return read_network(path)

    def load_state(self, network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
        """Load the tensors of `read_network`."""
        load_state(network, state, path)

    def export(
        self,
        network: nn.Module,
        path: Path,
        images: Tensor,
        *,
        metadata: dict[str, Any],
        opset: int | None,
        integer_only: bool | None,
        minimum_agreement: float,
    ) -> "Verification":
        """`crcore_torch.export_onnx` or `export_litert`."""
        common: dict[str, Any] = {"metadata": metadata, "minimum_agreement": minimum_agreement}
        if path.suffix == ".tflite":
            return crt.export_litert(network, images, path, **common)
        return crt.export_onnx(network, images, path, opset=opset, integer_only=integer_only, **common)

    def verify(self, network: nn.Module, path: Path, images: Tensor, labels: Tensor) -> "Verification":
        """`crcore_torch.verify`."""
        return crt.verify(network, images, path, labels=labels)

    def save_quantized(self, network: nn.Module, path: Path) -> None:
        """`crcore_torch.save_quantized`."""
        crt.save_quantized(network, path)

    def load_quantized(self, network: nn.Module, path: Path) -> nn.Module:
        """`crcore_torch.load_quantized`."""
        return crt.load_quantized(network, path)


def _quantized(quantizer: crt.FakeQuantize, values: Tensor) -> Quantized:
    scale, zero_point = quantizer.affine(values)
    arrays = (values, quantizer.codes(values), scale, zero_point)
    values_, codes, scale_, zero_point_ = (array.detach().cpu().numpy() for array in arrays)
    return Quantized(quantizer.quantizer, values_, codes, scale_, zero_point_, quantizer.code_limits(values))


def choose_device(name: str) -> torch.device:
    """The device of a `--device` option."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this torch sees no CUDA device; use --device cpu, or install a CUDA build")
    return torch.device(name)
