"""What a training step costs on each Keras engine, beside the float step: ResNet-18 in CIFAR form, W4A4.

Steps are those that ``fit`` runs, on one CPU thread: JAX compiles them with XLA; TensorFlow makes a graph of them,
which Keras gives to XLA only where there is an accelerator, or with --xla; torch runs them eagerly. In each round every
variant makes its steps in turn, so that whatever else the machine does meets all of them:

  float        the network itself
  qat          prepare(network, recipe), weights and activations LSQ at 4 bits, first and last layer at 8
  average      the same with its moving average, ConsistencyModel without a consistency term
  consistency  ConsistencyModel: the average is the teacher, and sees a second view
  hgq2         HGQ2's layers at the same widths, fixed point, with trained bit widths but without its resource estimate

The two views come from the data: augmentation is not part of the step. It can cost more than all of this: Keras'
preprocessing layers such as RandAugment can take longer than the step.

Each step is timed from its beginning until its loss is there; what ``fit`` does before and after its steps is left out.
Ratios are medians over rounds of the ratio within a round, of wall time; those of CPU time, which another process on
the same core does not lengthen, stand beside them. Nothing is asserted; the aims are printed.

examples:
  python benchmarks/keras_step.py                                        all engines, one after the other
  python benchmarks/keras_step.py --engines jax --rounds 20              one engine, for longer (or KERAS_BACKEND=jax)
  python benchmarks/keras_step.py --out benchmarks/results               writes keras_step-<engine>.json there
  python benchmarks/keras_step.py --engines tensorflow --xla             compile(jit_compile=True)
  pip install --no-deps --target peers HGQ2 quantizers
  python benchmarks/keras_step.py --peers peers                          with HGQ2, which crcore does not install
  python benchmarks/keras_step.py --model resnet8 --batch 4 --rounds 1   does it run at all?
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from shared import names_of, processor, progress

ENGINES = ("tensorflow", "jax", "torch")
VARIANTS = ("float", "qat", "average", "consistency", "hgq2")
RATIOS = {
    "qat / float": ("qat", "float"),
    "average / qat": ("average", "qat"),
    "consistency / qat": ("consistency", "qat"),
    "hgq2 / float": ("hgq2", "float"),
}
AIMS = {"qat / float": 1.25, "consistency / qat": 1.36}  # on the engines that compile
# How the engines are told to use one thread and no accelerator; `measure` does the rest.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


def main() -> None:
    """Run what the command line asks for."""
    given = arguments()
    if given.worker:
        print(json.dumps(measure(given)))
        return
    for engine in given.engines:
        found = in_own_process(engine)
        print(table(found), flush=True)
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            name = (
                f"keras_step-{engine}-xla.json" if given.xla and engine == "tensorflow" else f"keras_step-{engine}.json"
            )
            (given.out / name).write_text(json.dumps(found, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = os.environ.get("KERAS_BACKEND")
    parser.add_argument(
        "--engines",
        type=names_of(ENGINES),
        default=(chosen,) if chosen in ENGINES else ENGINES,
        metavar="A,B",
        help=f"of {', '.join(ENGINES)} (default: $KERAS_BACKEND, or all)",
    )
    parser.add_argument(
        "--variants",
        type=names_of(VARIANTS),
        default=VARIANTS,
        metavar="A,B",
        help=f"of {', '.join(VARIANTS)} (default: all; hgq2 is left out where it is not installed)",
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps per round (default: %(default)s)")
    parser.add_argument("--model", default="resnet18", help="resnet8, resnet20 or resnet18 (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "--xla", action="store_true", help="compile with XLA on TensorFlow; keras_step-tensorflow-xla.json"
    )
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where HGQ2 is, if not installed")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write keras_step-<engine>.json there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in ("rounds", "steps", "batch"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}")
    return given


def in_own_process(engine: str) -> dict[str, Any]:
    """The measurements of one engine, which has a process for its own; progress goes to the screen."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    environment = os.environ | ENVIRONMENT | {"KERAS_BACKEND": engine}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All variants on the engine of this process."""
    if hasattr(os, "sched_setaffinity"):  # JAX makes as many threads as there are cores that it may use
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if given.peers:
        sys.path.append(str(given.peers))
    import keras

    engine = keras.backend.backend()
    if engine == "torch":
        import torch

        torch.set_num_threads(1)
    keras.utils.set_random_seed(0)
    networks, missing = built(given.variants, given.model, xla=given.xla)
    wall: dict[str, list[list[float]]] = {name: [] for name in networks}
    cpu: dict[str, list[list[float]]] = {name: [] for name in networks}
    first: dict[str, float] = {}
    for name, network in networks.items():
        first[name] = sum(timed_steps(network, name, given.batch, 1)[0])
        progress(f"{engine}: {name}, first step (tracing, compiling) {first[name]:.1f} s")
    for round_ in range(given.rounds):
        for name, network in networks.items():
            seconds, cpu_seconds = timed_steps(network, name, given.batch, given.steps)
            wall[name].append(seconds)
            cpu[name].append(cpu_seconds)
        seconds_text = ", ".join(f"{name} {statistics.mean(wall[name][-1]):.2f}" for name in networks)
        progress(f"{engine}: round {round_ + 1} of {given.rounds}, seconds per step: {seconds_text}")
    return {
        "engine": engine,
        "XLA": {name: bool(network.jit_compile) for name, network in networks.items()},
        "model": given.model,
        "batch": given.batch,
        "threads": 1,
        "median seconds per step": medians(wall),
        "median CPU seconds per step": medians(cpu),
        "ratios": ratios(wall),
        "ratios of CPU time": ratios(cpu),
        "aims": AIMS if engine != "torch" else {},
        "not measured": missing,
        "seconds of the first step": first,
        "seconds per step, by round": wall,
        "CPU seconds per step, by round": cpu,
        "versions": versions(missing),
        "machine": {
            "system": platform.system(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "load average at the end": os.getloadavg()[1] if hasattr(os, "getloadavg") else None,
        },
    }


def built(variants: tuple[str, ...], model: str, *, xla: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The compiled variants, all with the same initial weights, and why others are missing."""
    import crcore_keras as crk
    import keras

    import crcore as cr
    from crcore.cli._keras_models import MODELS

    def recipe(**options: Any) -> cr.Recipe:
        return cr.Recipe(weights=cr.LSQ(4, per_channel=True), activations=cr.LSQ(4), **options)

    network = MODELS[model](num_classes=10, input_shape=(32, 32, 3))
    with_average = recipe(ema=cr.EMA(0.999))
    with_consistency = recipe(ema=cr.EMA(0.999), consistency=cr.Consistency(weight=1.0))
    makers = {
        "float": lambda: network,
        "qat": lambda: crk.prepare(network, recipe()),
        "average": lambda: crk.ConsistencyModel(crk.prepare(network, with_average), with_average),
        "consistency": lambda: crk.ConsistencyModel(crk.prepare(network, with_consistency), with_consistency),
        "hgq2": lambda: hgq2(network),
    }
    networks: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in variants:
        try:
            networks[name] = makers[name]()
        except Exception as error:
            if name != "hgq2":
                raise
            missing[name] = f"{type(error).__name__}: {error}"
            progress(f"hgq2 is left out, {missing[name]}")
    for each in networks.values():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        jit_compile = True if xla and keras.backend.backend() == "tensorflow" else "auto"
        each.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, jit_compile=jit_compile)
    return networks, missing


def hgq2(network: Any) -> Any:
    """The network with HGQ2's convolutions and classifier in place of Keras'.

    Theirs pad "same" also where the stride is 2, as many zeros on other sides; BatchNorm, ReLU and Add stay in float,
    as in crcore.
    """
    import keras
    from hgq.config import QuantizerConfig
    from hgq.layers import QConv2D, QDense

    kernels = [layer for layer in network.layers if hasattr(layer, "kernel")]

    def quantized(layer: Any) -> Any:
        if layer not in kernels:
            return type(layer).from_config(layer.get_config())
        bits = 8 if layer in (kernels[0], kernels[-1]) else 4
        signed = layer is kernels[0]  # all others see the output of a ReLU
        weights = QuantizerConfig("kbi", "weight", b0=bits - 1, heterogeneous_axis=(-1,), homogeneous_axis=None)
        inputs = QuantizerConfig(
            "kbi",
            "datalane",
            k0=signed,
            b0=bits - signed,
            overflow_mode="SAT",
            heterogeneous_axis=(),
            homogeneous_axis=None,
        )
        options = {"kq_conf": weights, "iq_conf": inputs, "enable_ebops": False, "name": layer.name}
        if isinstance(layer, keras.layers.Dense):
            return QDense(layer.units, **options)
        return QConv2D(
            layer.filters,
            layer.kernel_size,
            strides=layer.strides,
            padding="same",
            use_bias=False,
            **options,
        )

    return keras.models.clone_model(network, clone_function=quantized)


def timed_steps(network: Any, name: str, batch: int, steps: int) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of each of some steps of ``fit``."""
    import keras

    class Timer(keras.callbacks.Callback):
        """Notes when a step began and when its loss is there, which is computed together with all else."""

        def __init__(self) -> None:
            super().__init__()
            self.wall: list[float] = []
            self.cpu: list[float] = []

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            float(logs["loss"])  # JAX returns before it has computed
            self.wall.append(time.perf_counter() - self.began[0])
            self.cpu.append(time.process_time() - self.began[1])

    timer = Timer()
    network.fit(data(batch, steps, two_views=name == "consistency"), epochs=1, verbose=0, callbacks=[timer])
    return timer.wall, timer.cpu


def data(batch: int, steps: int, *, two_views: bool) -> Any:
    """A data set that gives the same batch ``steps`` times."""
    import keras
    import numpy as np

    random = np.random.default_rng(0)
    views = [random.standard_normal((batch, 32, 32, 3)).astype("float32") for _ in range(2)]
    labels = random.integers(0, 10, batch)

    class Repeated(keras.utils.PyDataset):
        """One batch, again and again."""

        def __len__(self) -> int:
            return steps

        def __getitem__(self, index: int) -> Any:
            return (tuple(views) if two_views else views[0]), labels

    return Repeated()


def medians(samples: dict[str, list[list[float]]]) -> dict[str, float]:
    """Over all steps of all rounds."""
    return {name: statistics.median(chain.from_iterable(rounds)) for name, rounds in samples.items()}


def ratios(samples: dict[str, list[list[float]]]) -> dict[str, float]:
    """Medians over the rounds, each of which compares what ran next to each other."""
    return {
        title: statistics.median(sum(a) / sum(b) for a, b in zip(samples[over], samples[under], strict=True))
        for title, (over, under) in RATIOS.items()
        if over in samples and under in samples
    }


def versions(missing: dict[str, str]) -> dict[str, str]:
    """Of what was measured."""
    packages = ["crcore", "keras", "tensorflow", "jax", "torch", "numpy"] + ([] if "hgq2" in missing else ["HGQ2"])
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def table(found: dict[str, Any]) -> str:
    """The ratios in Markdown."""
    engine = found["engine"] + (" with XLA" if any(found["XLA"].values()) else "")
    lines = [f"| {engine} | ratio | of CPU time | aim |", "|---|---|---|---|"]
    for title, ratio in found["ratios"].items():
        aim = found["aims"].get(title)
        cpu = found["ratios of CPU time"][title]
        lines.append(f"| {title} | {ratio:.2f} | {cpu:.2f} | {f'at most {aim}' if aim else '-'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
