"""What exported files cost beside the float network: latency and size, in ONNX Runtime and LiteRT, on one CPU thread.

ResNet-18 and MobileNetV2 in CIFAR form (32x32 images), with random weights and ranges from noise: what a network has
learned changes neither the time nor the size of its file. Of each network these files are made and run:

  float             the network as torch.onnx exports it; for LiteRT the same graph, converted
  W8A8, W4A8, W4A4  crcore_torch.export_onnx and export_litert with integer kernels from end to end (integer_only=True);
                    weights and activations LSQ, weights per channel, 8 bits in the first and the last layer
  W8A8 MinMax       the same with MinMax activations, whose ranges end where the images' values do, as the static
                    quantizer's; LSQ's reach beyond ReLU6's 6, which takes a clip behind each convolution
  W4A4 in float     export_onnx as it is by default below 8-bit activations: integers stored, floats computed
  static            ONNX Runtime's own quantize_static of the float file: QDQ, QUInt8 activations, QInt8 weights per
                    channel, min-max calibration on the same images. What crcore's files are held to

In each round every file computes one batch in turn, so that whatever else the machine does meets all of them. Ratios
are medians over rounds of the ratio within a round. Input and output are float arrays; what it takes to round them for
LiteRT is counted. Nothing is asserted; the aims are printed.

examples:
  python benchmarks/deploy.py                                 both networks; minutes
  python benchmarks/deploy.py --out benchmarks/results        writes deploy.json there
  python benchmarks/deploy.py --models resnet8 --rounds 7     does it run at all?
  python benchmarks/deploy.py --table benchmarks/results/deploy.json
                                                              the tables of an earlier run
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared import processor, progress

BATCHES = (1, 32)
# Name: bits of weights and activations, and the quantizer of the activations.
WIDTHS = {
    "W8A8": (8, 8, "LSQ"),
    "W8A8 MinMax": (8, 8, "MinMax"),
    "W4A8": (4, 8, "LSQ"),
    "W4A4": (4, 4, "LSQ"),
}
RUNTIMES = {".onnx": "ONNX Runtime", ".tflite": "LiteRT"}
CALIBRATION = 64  # images
MODELS = ("resnet18", "mobilenetv2")
HELD = ("W8A8", "W8A8 MinMax", "W4A8")  # to the static quantizer's time
AIMS = {f"{name} / static": "at most 1" for name in HELD} | {"size of W4A8 / float": "at most 0.14"}
# TensorFlow, which writes the files for LiteRT, reports its start on the screen otherwise.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    """Run what the command line asks for."""
    given = arguments()
    if given.table:
        print(tables(json.loads(given.table.read_text())))
        return
    os.environ.update(ENVIRONMENT)
    found = measured(given.models, given.rounds)
    print(tables(found))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "deploy.json").write_text(json.dumps(found, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        type=lambda text: tuple(text.split(",")),
        default=MODELS,
        metavar="A,B",
        help=f"names as in crcore compare --model (default: {','.join(MODELS)})",
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="7 or more (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write deploy.json there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing, print the tables of a deploy.json")
    given = parser.parse_args()
    if given.rounds < 7:
        parser.error(f"--rounds must be at least 7 for a median that says something, got {given.rounds}")
    return given


def measured(models: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """All numbers."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            progress(f"{model}: exporting")
            files, notes = written(model, Path(folder))
            found[model] = {
                "bytes": {name: path.stat().st_size for name, path in files.items()},
                "latency": {
                    f"{RUNTIMES[suffix]}, batch {batch}": timed(model, files, suffix, batch, rounds)
                    for suffix in RUNTIMES
                    for batch in BATCHES
                },
                "agreement with the trained network, percent of the images": notes,
            }
    packages = ("crcore", "torch", "onnx", "onnxruntime", "ai-edge-litert", "tensorflow", "numpy")
    return {
        "settings": {"rounds": rounds, "threads": 1, "image": [3, 32, 32], "calibration images": CALIBRATION},
        "aims": AIMS,
        "models": found,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": {
            "system": platform.system(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load average at the end": os.getloadavg()[1] if hasattr(os, "getloadavg") else None,
        },
    }


def written(model: str, folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """All files of a network, by "name.suffix", and how often each agreed with it; random weights are unsure."""
    import crcore_torch as crt
    import torch

    import crcore as cr
    from crcore import deploy
    from crcore.cli._models import MODELS as KNOWN

    torch.manual_seed(0)
    network = KNOWN[model](num_classes=10, in_channels=3)
    images = torch.randn(CALIBRATION, 3, 32, 32)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average of what it sees, so that one batch is enough
    with torch.no_grad():
        network(images)
    network.eval()
    files = {name: folder / name for name in ("float.onnx", "float.tflite", "static.onnx")}
    dynamic = ({0: torch.export.Dim.AUTO},)
    program = torch.onnx.export(
        network, (images[:2],), dynamo=True, dynamic_shapes=dynamic, opset_version=deploy.OPSET, verbose=False
    )
    graph = program.model_proto
    files["float.onnx"].write_bytes(graph.SerializeToString())
    sample = {graph.graph.input[0].name: images.numpy()}
    files["float.tflite"].write_bytes(deploy.to_litert(deploy.prepared_graph(graph, sample, integer_only=False)))
    static(files["float.onnx"], files["static.onnx"], sample)
    agreements: dict[str, float] = {}

    def export(name: str, student: Any, **options: Any) -> None:
        files[name] = folder / name
        write = crt.export_litert if name.endswith(".tflite") else crt.export_onnx
        agreements[name] = write(student, images, files[name], minimum_agreement=0, **options).agreement

    for name, (weights, activations, quantizer) in WIDTHS.items():
        of_activations = getattr(cr, quantizer)(activations)
        student = crt.prepare(network, cr.Recipe(cr.LSQ(weights, per_channel=True), of_activations))
        with torch.no_grad():
            student.train()(images)
        student.eval()
        export(f"{name}.onnx", student, integer_only=True)
        export(f"{name}.tflite", student)
        files[f"{name}.safetensors"] = folder / f"{name}.safetensors"
        crt.save_quantized(student, files[f"{name}.safetensors"])
        if activations < 8:
            export(f"{name} in float.onnx", student)
    return files, agreements


def static(source: Path, target: Path, sample: dict[str, Any]) -> None:
    """ONNX Runtime's own static quantizer, after the preparation that it recommends."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(quantization.CalibrationDataReader):
        """The images, eight at a time."""

        def __init__(self) -> None:
            self.starts = iter(range(0, CALIBRATION, 8))

        def get_next(self) -> dict[str, Any] | None:
            start = next(self.starts, None)
            return None if start is None else {name: images[start : start + 8] for name, images in sample.items()}

    prepared = source.with_name("prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(target),
        Batches(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )


def timed(model: str, files: dict[str, Path], suffix: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds for a batch in one runtime, each file in turn in every round."""
    import numpy as np

    from crcore.deploy import open_runtime

    images = np.random.default_rng(0).standard_normal((batch, 3, 32, 32), np.float32)
    runtimes = {name.removesuffix(suffix): open_runtime(path) for name, path in files.items() if name.endswith(suffix)}
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for round_ in range(rounds + 2):  # the first two warm up
        for name, runtime in runtimes.items():
            began = time.perf_counter()
            runtime.run(images)
            if round_ > 1:
                seconds[name].append(time.perf_counter() - began)
    progress(f"{model}: {RUNTIMES[suffix]}, batch {batch}")
    peers = [peer for peer in ("float", "static") if peer in seconds]
    return {
        "median seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "ratios": {
            f"{name} / {peer}": statistics.median(a / b for a, b in zip(seconds[name], seconds[peer], strict=True))
            for name in seconds
            for peer in peers
            if name != peer
        },
        "seconds by round": seconds,
    }


def tables(found: dict[str, Any]) -> str:
    """The results in Markdown: how many times as fast as float, and sizes."""
    lines: list[str] = []
    for model, results in found["models"].items():
        names = [name for name in results["latency"]["ONNX Runtime, batch 1"]["median seconds"] if name != "float"]
        aims = " | ".join(f"{name} / static" for name in HELD)
        lines += [
            f"| {model}: times as fast as float | {' | '.join(names)} | float, ms | {aims} |",
            f"|{'---|' * (len(names) + len(HELD) + 2)}",
        ]
        for title, timing in results["latency"].items():
            ratios = timing["ratios"]
            speeds = [f"{1 / ratios[f'{n} / float']:.2f}" if f"{n} / float" in ratios else "-" for n in names]
            held = [f"{ratios[f'{n} / static']:.2f}" if f"{n} / static" in ratios else "-" for n in HELD]
            milliseconds = f"{1e3 * timing['median seconds']['float']:.2f}"
            lines.append(f"| {title} | {' | '.join([*speeds, milliseconds, *held])} |")
        sizes = results["bytes"]
        lines += [
            "",
            f"| {model}: bytes, and of the float file | {' | '.join(WIDTHS)} | float |",
            f"|{'---|' * (len(WIDTHS) + 2)}",
        ]
        for suffix, title in {**RUNTIMES, ".safetensors": "packed safetensors"}.items():
            reference = sizes.get(f"float{suffix}", sizes["float.onnx"])
            cells = [f"{sizes[n + suffix]:,} ({sizes[n + suffix] / reference:.3f})" for n in WIDTHS]
            lines.append(f"| {title} | {' | '.join([*cells, f'{reference:,}'])} |")
        lines.append("")
    return "\n".join([*lines, "aims: " + "; ".join(f"{name} {aim}" for name, aim in found["aims"].items())])


if __name__ == "__main__":
    main()
