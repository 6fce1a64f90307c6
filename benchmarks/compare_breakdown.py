"""Where the time of `crcore compare` goes: data and augmentation beside the network, for each method.

Runs the command itself, each case in a process of its own, and reads the `seconds_by_part` that it writes for each run:

  data        gathering the images of a step, augmenting and normalising them; with qat+cr for both views
  teacher     the forward pass of the averaged network, with qat+cr
  student     forward and backward pass
  update      optimizer, average, losses, progress
  network     the three before together, which `fit` of Keras does not tell apart
  evaluation  the test after an epoch

Shares are of the training steps, without the tests, whose number is a setting. The images are random pixels of 32x32,
or the first ones of --data; sizes do not depend on what they show, and hardly the time. Of the digits, all are taken.
Nothing is asserted.

examples:
  python benchmarks/compare_breakdown.py                                          minutes, on one CPU thread
  python benchmarks/compare_breakdown.py --threads 2 --out breakdown-2.json       another number of threads
  python benchmarks/compare_breakdown.py --data cifar10/                          your images, 32x32 in colour
  python benchmarks/compare_breakdown.py --cases digits,resnet8-weak              some cases
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared import processor

METHODS = ("fp32", "qat", "qat+cr")
TEST_IMAGES = 100


@dataclass(frozen=True)
class Case:
    """One run of the command."""

    model: str
    view: str  # of student and teacher
    steps: int  # of an epoch
    epochs: int = 1
    digits: bool = False
    engine: str | None = None  # of Keras


CASES = {
    "digits": Case("resnet8", "weak", steps=3, epochs=40, digits=True),
    "digits-strong": Case("resnet8", "strong", steps=3, epochs=40, digits=True),
    "resnet8-weak": Case("resnet8", "weak", steps=40),
    "resnet8-strong": Case("resnet8", "strong", steps=40),
    "resnet20-weak": Case("resnet20", "weak", steps=20),
    "resnet20-strong": Case("resnet20", "strong", steps=20),
    "resnet18-weak": Case("resnet18", "weak", steps=4),
    "resnet18-strong": Case("resnet18", "strong", steps=4),
    "keras-jax-strong": Case("resnet8", "strong", steps=40, engine="jax"),
}


def main() -> None:
    """Run what the command line asks for."""
    given = arguments()
    found: dict[str, Any] = {
        "processor": processor(),
        "threads": given.threads,
        "batch": given.batch,
        "images": "random pixels" if given.data is None else given.data.name,
        "versions": {name: version(name) for name in ("crcore", "torch", "keras", "jax")},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        write_images(images, given.data, max(case.steps for case in CASES.values()) * given.batch)
        for name in given.cases:
            found["cases"][name] = measure(CASES[name], images, Path(folder) / name, given)
            print(line(name, found["cases"][name]), file=sys.stderr, flush=True)
    print(table(found))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in CASES]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(CASES)}")
        return chosen

    parser.add_argument(
        "--cases", type=names, default=list(CASES), metavar="A,B", help=f"of {', '.join(CASES)} (default: all)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images in a step (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="as in crcore compare (default: random pixels)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the measurements there, as JSON")
    return parser.parse_args()


def write_images(folder: Path, source: Path | None, count: int) -> None:
    """Parquet files of as many images as are needed, so that no case spends its time reading others."""
    import datasets

    datasets.disable_progress_bars()
    import numpy as np
    from PIL import Image

    if source is None:
        random = np.random.default_rng(0)
        sets = {
            split: (random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10)
            for split, n in (("train", count), ("test", TEST_IMAGES))
        }
    else:
        from crcore.cli._data import load_data

        data = load_data(str(source))
        sets = {
            split: (part.images[:n].permute(0, 2, 3, 1).numpy(), part.labels[:n].numpy())
            for split, part, n in (("train", data.train, count), ("test", data.test, TEST_IMAGES))
        }
    classes = [str(label) for label in range(1 + max(int(labels.max()) for _, labels in sets.values()))]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    for split, (pixels, labels) in sets.items():
        rows = {"img": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def measure(case: Case, images: Path, out: Path, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds by part of each method, without its tests."""
    labels = 200 if case.digits else case.steps * given.batch
    options = {
        "--data": "digits" if case.digits else str(images),
        "--model": case.model,
        "--methods": ",".join(METHODS),
        "--student-view": case.view,
        "--teacher-view": case.view,
        "--labels": str(labels),
        "--batch-size": str(given.batch),
        "--epochs": str(case.epochs),
        "--evaluate-every": str(case.epochs),
        "--seeds": "1",
        "--out": str(out),
    }
    if case.engine is not None:
        options["--backend"] = "keras"
    command = [sys.executable, "-m", "crcore.cli", "compare", *(word for pair in options.items() for word in pair)]
    threads = str(given.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'false' if given.threads == 1 else 'true'}",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": case.engine or "",
    }
    if case.engine is None:
        del environment["KERAS_BACKEND"]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return {run["method"]: run["seconds_by_part"] for run in json.loads((out / "results.json").read_text())["runs"]}


def share(seconds: dict[str, float], part: str) -> float:
    """In percent of the training steps."""
    return 100 * seconds.get(part, 0.0) / sum(spent for name, spent in seconds.items() if name != "evaluation")


def line(name: str, case: dict[str, dict[str, float]]) -> str:
    """The share of the data, by method."""
    return f"{name}: data " + ", ".join(f"{method} {share(seconds, 'data'):.1f} %" for method, seconds in case.items())


def table(found: dict[str, Any]) -> str:
    """The share of the data for each method, and of the other parts with qat+cr, in Markdown."""
    lines = [
        "| case | fp32: data | qat: data | qat+cr: data | teacher | student | update |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in found["cases"].items():
        cells = [f"{share(case[method], 'data'):.1f} %" for method in METHODS]
        last = case[METHODS[-1]]
        cells += [f"{share(last, part):.1f} %" if part in last else "-" for part in ("teacher", "student", "update")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
