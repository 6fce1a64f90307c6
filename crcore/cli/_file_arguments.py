"""The options of the commands that work on what was trained before: evaluate, export, flatness, sensitivity, report."""

import argparse
from pathlib import Path

from crcore.cli._settings import QUANTIZERS


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Of `crcore evaluate`."""
    parser.add_argument("checkpoint", type=Path, help="a .safetensors, .keras, .onnx or .tflite file that crcore wrote")
    parser.add_argument("--data", help="as in crcore compare; default: what the checkpoint was trained on")
    parser.add_argument("--model", help="refuse a checkpoint of another model")
    parser.add_argument("--quantizer", choices=QUANTIZERS, help="refuse a checkpoint of another quantizer")
    parser.add_argument("--weight-bits", type=int, metavar="N", help="refuse a checkpoint of another width")
    parser.add_argument("--activation-bits", type=int, metavar="N", help="refuse a checkpoint of another width")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Of `crcore export`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a checkpoint, or a folder that holds one")
    parser.add_argument("--to", choices=("onnx", "litert", "safetensors"), required=True, help="what to write")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: beside the checkpoint, as teacher.onnx, teacher.tflite or teacher-packed.safetensors",
    )
    parser.add_argument(
        "--role", choices=("student", "teacher"), help="of RUN's checkpoints; default: the teacher if there is one"
    )
    parser.add_argument(
        "--verify", action="store_true", help="measure on all test images, and print accuracy, size and latency"
    )
    parser.add_argument("--data", metavar="PATH", help="as in crcore compare; default: what RUN was trained on")
    parser.add_argument(
        "--samples",
        type=int,
        default=512,
        metavar="N",
        help="training images that a file must pass before it is put in place; ranges that training did not give are "
        "taken from them",
    )
    parser.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help="of the ONNX file, 14 to 25; default: the oldest that holds the weights packed (20; 21 with int4; 25 with "
        "int2)",
    )
    parser.add_argument(
        "--integer-only",
        action=argparse.BooleanOptionalAction,
        help="ONNX: 8 bits for sums and pooled maps too, so that integer kernels run from end to end; default: yes "
        "where every trained activation has 8 bits",
    )
    parser.add_argument(
        "--minimum-agreement",
        type=float,
        default=99.5,
        metavar="X",
        help="percent of the images on which the file must name the class that the trained network names",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_flatness(parser: argparse.ArgumentParser) -> None:
    """Of `crcore flatness`."""
    parser.add_argument("--top", type=int, default=50, metavar="N", help="how many eigenvalues, largest first")
    parser.add_argument("--probes", type=int, default=50, metavar="N", help="random vectors for the trace")
    parser.add_argument(
        "--density",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the density of all eigenvalues, which takes as long as the largest; default: yes",
    )
    _add_measurement(parser, samples=256, split="train")


def add_sensitivity(parser: argparse.ArgumentParser) -> None:
    """Of `crcore sensitivity`."""
    parser.add_argument("--draws", type=int, default=5, metavar="N", help="independent draws of each noise, 2 or more")
    parser.add_argument(
        "--radii",
        type=_numbers,
        default=(0.005, 0.01, 0.02),
        metavar="X,...",
        help="of sharpness, relative to the norm of all weights; default: 0.005,0.01,0.02",
    )
    _add_measurement(parser, samples=1000, split="test")


def _add_measurement(parser: argparse.ArgumentParser, *, samples: int, split: str) -> None:
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a checkpoint, or a folder: all that it holds"
    )
    parser.add_argument(
        "--samples", type=int, default=samples, metavar="N", help="images that the loss is averaged over"
    )
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default=split,
        help="which images; of the training images those that were labeled. They are not augmented",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random vectors and of noise")
    parser.add_argument(
        "--data", metavar="PATH", help="as in crcore compare; default: what the checkpoint was trained on"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the figure; default: in the folder of them all")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"give numbers with commas between, such as 0.01,0.02, got {text!r}") from None


def add_report(parser: argparse.ArgumentParser) -> None:
    """Of `crcore report`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out folder of crcore compare or crcore train")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in RUN")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure what is missing of one seed's networks first, as crcore flatness and crcore sensitivity do",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="whose networks are shown layer by layer; default: the run's first"
    )
    parser.add_argument("--data", metavar="PATH", help="as in crcore compare; default: what RUN was trained on")
