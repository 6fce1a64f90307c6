"""How far apart PyTorch and Keras train: the same network, weights, batches and views, side by side.

One training runs in PyTorch (crcore_torch, a plain loop) and once per Keras engine (crcore_keras.ConsistencyModel, its
compiled step), each in a process of its own, all in float32 on the CPU. A table says how far each engine is from
PyTorch after the first, the tenth and the last step; a further row, how far PyTorch is from itself in float64, says
how much of that is rounding. What is trained stands in parity_net.py, beside this file.

examples:
  python benchmarks/training_parity.py                                   all engines, the table on the screen
  python benchmarks/training_parity.py --engines jax --steps 200         one engine, for longer
  python benchmarks/training_parity.py --out parity.json                 every loss and tensor, and the versions
  python benchmarks/training_parity.py --update docs/parity.md           write the table into the document
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from parity_net import LEARNING_RATE, MOMENTUM, Training, differences, keras_run, torch_run

ENGINES = ("tensorflow", "jax", "torch")
REFERENCE, IN_FLOAT64 = "pytorch", "pytorch-float64"
TITLES = {IN_FLOAT64: "PyTorch in float64"} | {
    engine: f"Keras on {name}" for engine, name in zip(ENGINES, ("TensorFlow", "JAX", "torch"), strict=True)
}
COLUMNS = {
    "loss": "losses",
    "weights": "weights",
    "scales": "scales",
    "statistics": "BatchNorm statistics",
    "teacher": "teacher",
    "codes": "codes that differ",
}
BEGIN, END = "<!-- training parity: begin -->", "<!-- training parity: end -->"


def main() -> None:
    """Run what the command line asks for."""
    given = arguments()
    if given.worker:
        run, path = given.worker
        np.savez(path, **train(run, given.steps))
        return
    if given.update and BEGIN not in given.update.read_text():
        sys.exit(f"{given.update} has no line {BEGIN!r}; put it and {END!r} where the table should be")
    runs = {run: in_own_process(run, given.steps) for run in (REFERENCE, IN_FLOAT64, *given.engines)}
    found = {run: compare(runs[run], runs[REFERENCE], given.steps) for run in (*given.engines, IN_FLOAT64)}
    text = table(found) + f"\n\n{versions()}\n"
    print(text)
    if given.out:
        given.out.write_text(json.dumps(report(found, runs, given.steps), indent=1) + "\n")
    if given.update:
        given.update.write_text(updated(given.update.read_text(), text))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=engines, default=ENGINES, metavar="A,B", help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="optimizer steps (default: 50)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all numbers there")
    parser.add_argument("--update", type=Path, metavar="FILE.md", help=f"replace what stands after {BEGIN}")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    return given


def engines(text: str) -> tuple[str, ...]:
    """The engines named on the command line."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"no engine {unknown[0]!r}; choose from {', '.join(ENGINES)}")
    return names


def steps_to_report(steps: int) -> tuple[int, ...]:
    """The first, the tenth and the last step."""
    return tuple(sorted({1, min(10, steps), steps}))


def train(run: str, steps: int) -> dict[str, np.ndarray]:
    """One training, in this process."""
    dtype = "float64" if run == IN_FLOAT64 else "float32"
    training = Training(dtype=dtype, steps=steps, report=steps_to_report(steps))
    return torch_run(training) if run in (REFERENCE, IN_FLOAT64) else keras_run(training)


def in_own_process(run: str, steps: int) -> dict[str, np.ndarray]:
    """One training, in a process that has the engine for its own."""
    print(f"{run}: {steps} steps", file=sys.stderr)
    # One thread, so that sums are made in one order; and JAX looks for no accelerator.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    if run in ENGINES:
        environment["KERAS_BACKEND"] = run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.npz"
        command = [sys.executable, __file__, "--steps", str(steps), "--worker", run, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{run} failed:\n{done.stderr}")
        with np.load(path) as arrays:
            return dict(arrays)


def compare(run: dict[str, np.ndarray], reference: dict[str, np.ndarray], steps: int) -> dict[int, dict[str, float]]:
    """The differences by step."""
    return {step: differences(run, reference, step) for step in steps_to_report(steps)}


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """The differences as a table in Markdown."""
    lines = [["", "step", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    for run, by_step in found.items():
        for step, values in by_step.items():
            numbers = [f"{values[name]:.1e}" if name != "codes" else f"{values[name]:.1%}" for name in COLUMNS]
            lines.append([TITLES[run], str(step), *(number.replace("%", " %") for number in numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> str:
    """What was compared, in a sentence."""
    names = ("torch", "keras", "tensorflow", "jax", "numpy")
    return ", ".join(f"{name} {version(name)}" for name in names) + "; one CPU thread."


def report(found: dict[str, Any], runs: dict[str, dict[str, np.ndarray]], steps: int) -> dict[str, Any]:
    """Everything, for JSON."""
    recipe = Training().recipe.to_dict()
    return {
        "versions": versions(),
        "training": {"steps": steps, "learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "recipe": recipe},
        "reference": REFERENCE,
        "differences": found,
        "runs": {run: {key: array.tolist() for key, array in arrays.items()} for run, arrays in runs.items()},
    }


def updated(document: str, text: str) -> str:
    """The document with ``text`` between the two marks."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


if __name__ == "__main__":
    main()
