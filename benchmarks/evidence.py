"""The runs behind docs/results.md: does consistency regularization deliver, and when?

Each is one command, listed in RUNS. What it wrote is copied to docs/results/NAME, and
`python benchmarks/results_page.py` makes the page of it. Runs are resumed where they stopped; all of them take hours on
two cores, and those of ResNet-18 and MobileNetV2 at full size need a GPU.

examples:
  python benchmarks/evidence.py --data cifar10/                 all of them
  python benchmarks/evidence.py --data cifar10/ --only lambda unlabeled
  python benchmarks/evidence.py --list                          their command lines

The CIFAR-10 of the recorded results is a JPEG re-encoding, scaled to 16x16 pixels, tested on 5,000 of the test images.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shared import progress

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
CIFAR = "--data {data} --image-size 16 --student-view"  # and which
# 1,500 optimizer steps; a pass over 250 labeled images, in batches of 64, is 3 of them, over 1,000 it is 15.
FEWEST = f"{CIFAR} strong --labels 250 --epochs 500 --evaluate-every 125"
FEW = f"{CIFAR} strong --labels 1000 --epochs 100 --evaluate-every 25"
# scikit-learn's digits: with 30 labels a pass is one step.
DIGITS = "--student-view strong"
SCARCE = f"{DIGITS} --labels 30 --epochs 1000 --evaluate-every 200 --consistency-weight 5"
FULL = (
    "crcore sweep --data {{data}} --model {model} --batch-size 128 --epochs 30 --amp --vary bits=4,2 "
    "--vary quantizer=lsq,lsq+,pact,dorefa,minmax --methods fp32,qat,qat+ema,qat+kd,qat+cr"
)
SWEEP = ("sweep.json", "table.md", "sweep.png")


@dataclass(frozen=True)
class Run:
    """A command, and what of its output folder is kept."""

    command: str  # without --out; {data} and {networks} are filled in
    kept: tuple[str, ...] = SWEEP
    of: tuple[tuple[str, int], ...] = ()  # the sweeps whose networks are measured, and the number of a point in each
    methods: tuple[str, ...] = ()  # of those sweeps
    gpu: bool = False  # takes days without one


CONTROLLED = "fp32,qat,qat+ema,qat+cr+unlabeled"
# 30 digits, 1,000 steps, W4A4: ten seeds.
SCARCE_NETWORKS = (("digits-30", 2), ("confirmed-30", 0))
COMPARED = ("fp32", "qat", "qat+cr", "qat+cr+unlabeled")
RUNS = {
    "labels-250": Run(
        f"crcore sweep {FEWEST} --vary bits=4 --consistency-weight 5 --seeds 5 "
        "--methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    "labels-1000": Run(f"crcore sweep {FEW} --vary bits=4,2 --consistency-weight 2"),
    # Three times the steps; those of labels-1000 are 1,500.
    "steps": Run(
        f"crcore sweep {CIFAR} strong --labels 1000 --float-epochs 100 --evaluate-every 75 --consistency-weight 2 "
        "--vary epochs=300 --methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    # Weak views and the default lambda, 1.
    "labels-1000-weak": Run(
        f"crcore sweep {CIFAR} weak --labels 1000 --epochs 100 --evaluate-every 25 --vary bits=4 "
        "--methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    # Begun first, and left after one seed for a smaller lambda.
    "labels-1000-lambda-5": Run(f"crcore sweep {FEW} --vary bits=4,2 --consistency-weight 5 --seeds 1"),
    "labels-4000": Run(
        f"crcore sweep {CIFAR} strong --labels 4000 --epochs 24 --evaluate-every 6 --consistency-weight 2 "
        "--vary bits=4,2"
    ),
    "labels-4000-weak": Run(
        f"crcore sweep {CIFAR} weak --labels 4000 --epochs 24 --evaluate-every 6 --consistency-weight 2 "
        "--vary bits=4 --methods fp32,qat,qat+ema,qat+cr"
    ),
    "labels-50000": Run(f"crcore sweep {CIFAR} strong --epochs 3 --consistency-weight 2 --vary bits=4,2"),
    "labels-50000-weak": Run(f"crcore sweep {CIFAR} weak --epochs 3 --vary bits=4 --methods fp32,qat,qat+ema,qat+cr"),
    "digits-30": Run(
        f"crcore sweep {DIGITS} --labels 30 --float-epochs 1000 --consistency-weight 5 --evaluate-every 200 "
        "--vary epochs=200,1000 --vary bits=4,2 --seeds 5 --methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    "digits-labels": Run(
        f"crcore sweep {DIGITS} --epochs 200 --evaluate-every 100 --vary labels=30,60,120 --vary consistency-weight=1,5"
    ),
    "lambda": Run(
        f"crcore sweep {SCARCE} --vary consistency-weight=1,5,20 --vary ramp-shape=sigmoid,constant "
        f"--methods {CONTROLLED}"
    ),
    "unlabeled": Run(f"crcore sweep {SCARCE} --vary unlabeled=120,all --methods {CONTROLLED}"),
    "quantizers": Run(
        f"crcore sweep {SCARCE} --vary quantizer=lsq,lsq+,pact,dorefa,minmax "
        "--methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    # Settings as above, chosen by looking at seeds 0 to 4; seeds that nobody had looked at.
    "confirmed-30": Run(
        f"crcore sweep {SCARCE} --vary bits=4,2 --seeds 5-9 --methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    "confirmed-250": Run(
        f"crcore sweep {FEWEST} --vary bits=4 --consistency-weight 5 --seeds 5-9 "
        "--methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    "confirmed-1000": Run(
        f"crcore sweep {FEW} --vary bits=4 --consistency-weight 2 --seeds 5-9 "
        "--methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    # resnet8 itself is in labels-1000.
    "capacity": Run(
        f"crcore sweep {FEW} --vary model=evidence_networks:resnet8x2 "
        "--consistency-weight 2 --methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"
    ),
    "resnet18-16": Run(
        f"crcore sweep {CIFAR} strong --model resnet18 --labels 1000 --epochs 30 --evaluate-every 10 "
        "--consistency-weight 2 --vary bits=4 --seeds 2 --methods fp32,qat,qat+cr"
    ),
    # The paper's networks at full size, on all labels: weak views, as the command's defaults are below 100 epochs.
    "resnet18": Run(FULL.format(model="resnet18"), gpu=True),
    "mobilenetv2": Run(FULL.format(model="mobilenetv2"), gpu=True),
    "views": Run(
        "crcore sweep --labels 30 --epochs 1000 --evaluate-every 200 --vary student-view=weak,strong "
        f"--vary consistency-weight=1,5 --methods {CONTROLLED}"
    ),
    # 200 labels, 60 passes: what the command does without options, and strong views in its place.
    "views-200": Run("crcore sweep --vary student-view=weak,strong --methods fp32,qat,qat+ema,qat+cr,qat+cr+unlabeled"),
    "decay": Run(f"crcore sweep {SCARCE} --vary ema-decay=0.9,0.999 --methods {CONTROLLED}"),
    "teacher-batchnorm": Run(f"crcore sweep {SCARCE} --vary teacher-batchnorm=average,copy --methods {CONTROLLED}"),
    "oscillation": Run(
        f"crcore sweep {SCARCE} --weight-bits 2 --activation-bits 2 --vary dampening=none,0.01 "
        "--vary freezing=none,0.01 --methods fp32,qat,qat+cr+unlabeled"
    ),
    "other-libraries": Run(
        f"python benchmarks/other_students.py {SCARCE} --libraries brevitas,torchao "
        "--students qat+ema,qat+cr,qat+cr+unlabeled",
        kept=("results.json", "table.md"),
    ),
    "flatness": Run(
        "crcore flatness {networks} --top 50 --samples 256 --split test --no-density",
        kept=("flatness.json", "flatness.png"),
        of=SCARCE_NETWORKS,
        methods=COMPARED,
    ),
    "flatness-1000": Run(
        "crcore flatness {networks} --data {data} --top 50 --samples 256 --split train --no-density",
        kept=("flatness.json", "flatness.png"),
        of=(("labels-1000", 0),),
        methods=COMPARED,
    ),
    "sensitivity": Run(
        "crcore sensitivity {networks} --samples 599 --draws 3",
        kept=("sensitivity.json", "sensitivity.png"),
        of=SCARCE_NETWORKS,
        methods=COMPARED,
    ),
}


def main() -> None:
    """Run what was asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's parquet files")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(RUNS),
        default=[name for name, run in RUNS.items() if not run.gpu],
        metavar="NAME",
        help="some runs; default: all that need no GPU",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="where runs are kept")
    parser.add_argument("--list", action="store_true", help="print the command lines and end")
    given = parser.parse_args()
    for name in given.only:
        run = RUNS[name]
        if given.list:
            print(f"{name}\n    {run.command.format(data='cifar10/', networks='NETWORKS')}\n")
            continue
        if "{data}" in run.command and given.data is None:
            parser.error(f"{name} needs --data, a folder of CIFAR-10's parquet files")
        progress(f"{name}: {run.command}")
        out = given.out / name
        out.mkdir(parents=True, exist_ok=True)
        if run.of:
            kind = run.kept[0].removesuffix(".json")
            networks = shlex.join(map(str, networks_of(run, given.out)))
            line = run.command.format(data=given.data, networks=networks)
            (out / run.kept[0]).write_text(start(line, "--out", str(out / f"{kind}.png"), "--json"))
        else:
            start(run.command.format(data=given.data), "--out", str(out), "--resume")  # a new folder is begun
        folder = RESULTS / name
        folder.mkdir(parents=True, exist_ok=True)
        for kept in run.kept:
            shutil.copyfile(out / kept, folder / kept)


def start(command: str, *options: str) -> str:
    """Run a command in this Python, with the networks that stand beside this file at hand; return what it printed."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    measures = "--json" in options
    program, *arguments = shlex.split(command)
    script = ["-m", "crcore.cli"] if program == "crcore" else [str(ROOT / arguments.pop(0))]
    done = subprocess.run(
        [sys.executable, *script, *arguments, *options],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE if measures else None,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def networks_of(run: Run, folder: Path) -> list[Path]:
    """The student (or float) checkpoints of the methods of finished sweeps, of all seeds."""
    found = []
    for sweep, point in run.of:
        file = folder / sweep / "sweep.json"
        if not file.exists():
            sys.exit(f"{file} is missing: run --only {sweep} first")
        methods = json.loads(file.read_text(encoding="utf-8"))["points"][point]["methods"]
        found += [
            file.parent / methods[name]["runs"] / f"seed{seed}" / f"{role(name)}.safetensors"
            for name in run.methods
            for seed in methods[name]["accuracy"]
        ]
    return found


def role(method: str) -> str:
    """Which checkpoint of a run is measured."""
    return "float" if method == "fp32" else "student"


if __name__ == "__main__":
    main()
