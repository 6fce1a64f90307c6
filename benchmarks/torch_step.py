"""What quantization and the teacher cost in PyTorch, in time and memory, beside float and beside other libraries.

  step       training step (forward, backward, SGD with momentum) over the float step, eager
  compiled   the same under torch.compile, each network compiled whole, over the compiled float step
  parts      consistency step and moving average over the QAT step
  memory     peak of one step, and bytes kept for backward, over float; one process per variant on a CPU
  scaling    QAT over float as batch, depth and number of quantizers grow
  quantizer  LSQ's forward and backward alone, in memory copies of the tensor

Networks are ResNet-18 and MobileNetV2 in CIFAR form and a vision transformer (12 layers of 192), for 32x32 images.
Everything is W4A4, weights per channel, 8 bits in the first and last layer. Variants: the float network; crcore, and
each of its kernels; LSQ as it is usually written (`detach`), as an autograd.Function, and with torch's own learnable
operator; Brevitas, torchao, NNCF, NVIDIA's Model Optimizer. A quantizer's kind is its library's: crcore and NNCF train
scales of weights and inputs, Brevitas those of inputs, torchao finds them in each step; Model Optimizer keeps them, and
hands the gradient through unchanged, which is less work. What cannot be measured is reported with its reason.

In each round every variant runs in turn, in one process; ratios are medians, with quartiles, of the ratio within a
round. On a CPU everything is on one thread of one core, by CPU time, which other processes do not lengthen, and by wall
time. On CUDA several steps are timed together, by the wall between synchronizations and by events. Data are random and
on the device before. Nothing is asserted about time.

examples:
  python benchmarks/torch_step.py --out benchmarks/results/torch_step-cpu.json     everything, takes hours
  python benchmarks/torch_step.py --measure step --networks resnet18 --rounds 3    a first look
  python benchmarks/torch_step.py --peers peers                                    with peers from that folder
  python benchmarks/torch_step.py --device cuda --autocast bfloat16 --channels-last --batch 32,128,512
  python benchmarks/torch_step.py --device cuda --measure compiled --compile-mode reduce-overhead    CUDA graphs
  python benchmarks/performance_page.py                                            docs/performance.md from all results

Peers that crcore does not install for its tests; --no-deps, so that torch stays as it is (the Makefile does the same):
  pip install --no-deps --target peers nncf nvidia-modelopt tabulate pydot psutil openvino-telemetry omegaconf \\
      antlr4-python3-runtime==4.9.3 pulp nvidia-ml-py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shared import names_of, processor

MEASURES = ("step", "compiled", "parts", "memory", "scaling", "quantizer")
NETWORKS = ("resnet18", "mobilenetv2", "vit")
PACKAGES = ("torch", "numpy", "transformers", "triton", "brevitas", "torchao", "nncf", "nvidia-modelopt")


def main() -> None:
    """Run what the command line asks for."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "600")  # it compiles when first used, here on one core
    given = arguments()
    if given.peers:
        sys.path.append(str(given.peers))
    warnings.filterwarnings("ignore")  # of other libraries, about each other
    with redirect_stdout(sys.stderr):  # other libraries talk
        one_thread(given.device)
        for found in measured(given):
            if given.out:  # after each measure, so that what is stopped leaves something
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(found, indent=1) + "\n")
    if not given.out:
        print(json.dumps(found, indent=None if given.worker else 1))


def arguments() -> argparse.Namespace:
    """The command line."""
    from torch_students import VARIANTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", type=names_of(MEASURES), default=MEASURES, metavar="A,B", help=f"of {', '.join(MEASURES)}"
    )
    parser.add_argument(
        "--networks",
        type=lambda text: tuple(text.split(",")),
        default=NETWORKS,
        metavar="A,B",
        help="resnet18, mobilenetv2, vit; and resnet8, resnet20, vit-small, tiny (default: the first three)",
    )
    parser.add_argument(
        "--variants",
        type=names_of(VARIANTS),
        default=VARIANTS,
        metavar="A,B",
        help=f"of {', '.join(VARIANTS)} (default: all; float is always there)",
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, metavar="N", help="timed together (default: 1; on CUDA 20)")
    parser.add_argument("--batch", type=sizes, default=(32,), metavar="N,M", help="images in a step (default: 32)")
    parser.add_argument("--memory-batch", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--shape", type=sizes, metavar="N,C,H,W", help="of `quantizer` (default: 32,64,32,32; on CUDA 256,64,56,56)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="the step in mixed precision")
    parser.add_argument("--channels-last", action="store_true", help="network and images")
    parser.add_argument("--compile-mode", metavar="MODE", help="torch.compile's, such as reduce-overhead")
    parser.add_argument("--small", action="store_true", help="does it run at all? `scaling` measures one point")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where peers are, if not installed")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="(default: the screen)")
    parser.add_argument("--worker", metavar="VARIANT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.steps = given.steps if given.steps is not None else (20 if given.device == "cuda" else 1)
    given.shape = given.shape or ((256, 64, 56, 56) if given.device == "cuda" else (32, 64, 32, 32))
    for name in ("rounds", "steps", "memory_batch"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    if len(given.shape) != 4:
        parser.error(f"--shape takes four sizes, got {given.shape}")
    given.out = None if given.worker else given.out
    given.variants = tuple(name for name in VARIANTS if name == "float" or name in given.variants)
    return given


def sizes(text: str) -> tuple[int, ...]:
    """A type for argparse: numbers of at least 1, separated by commas."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 32,128")
    return tuple(map(int, text.split(",")))


def one_thread(device: str) -> None:
    """On one core, where the system can do that; CUDA's host threads stay free."""
    import torch

    torch.set_num_threads(1)
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more would share that core
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device")


def settings_of(given: argparse.Namespace) -> Any:
    """What all measures have in common."""
    from torch_measures import Settings

    return Settings(given.device, given.rounds, given.steps, given.autocast, given.channels_last, given.compile_mode)


def measured(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What was found so far, after each measure; or the one thing that this process is for."""
    import torch
    import torch_measures as measures
    from torch_memory import memory, worker
    from torch_quantizer import quantizer

    settings, began = settings_of(given), time.time()
    if given.worker:
        yield worker(given, settings)
        return
    found: dict[str, Any] = {
        "settings": {name: value for name, value in vars(given).items() if name not in ("out", "peers", "worker")},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "machine": {
            "device": torch.cuda.get_device_name() if given.device == "cuda" else processor(),
            "system": platform.system(),
            "cores": os.cpu_count(),
        },
    }
    pairs = [(name, batch) for name in given.networks for batch in given.batch]
    whole = tuple(name for name in measures.COMPILED if name in given.variants)
    todo = {
        "step": lambda: [measures.step(name, given.variants, batch, settings) for name, batch in pairs],
        "compiled": lambda: [measures.compiled(name, whole, batch, settings) for name, batch in pairs],
        "parts": lambda: [measures.parts(name, batch, settings) for name, batch in pairs],
        "memory": lambda: [memory(name, given, settings) for name in given.networks],
        "scaling": lambda: measures.scaling(settings, small=given.small),
        "quantizer": lambda: [
            quantizer(given.shape, dtype, given.variants, settings, 20 if given.device == "cuda" else 5)
            for dtype in (("float32", "bfloat16") if given.device == "cuda" else ("float32",))
        ],
    }
    for measure in given.measure:
        found[measure] = todo[measure]()
        found["minutes"] = (time.time() - began) / 60
        if hasattr(os, "getloadavg"):
            found["machine"]["load average at the end"] = os.getloadavg()[1]
        yield found


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
