"""The proof of an export: the file, run in its runtime, beside what the trained network computes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crcore import CRCoreError
from crcore.deploy._contents import differing_layers
from crcore.deploy._first_difference import LIMIT, first_difference, makers_of
from crcore.deploy._graph import codes_by_layer
from crcore.deploy._runtimes import Runtime, open_runtime
from crcore.deploy._traced import Traced, check_minimum

MINIMUM_AGREEMENT = 99.5  # percent
_STEPS = 255  # of the grid in which float outputs are compared
_NEAR = 0.05  # of the range of an output of one value: values as far apart count as the same
_ROUNDS = 15  # of timing
_COMPARED = 32  # elements of the sample whose activations are compared


@dataclass(frozen=True)
class Verification:
    """What was found in a file when it ran beside the trained network."""

    path: str
    runtime: str  # "onnxruntime" or "litert"
    samples: int  # N
    # The largest |difference| of outputs, in steps of the file's 8-bit output; of 1/255 of the range if it is float.
    max_code_difference: float
    # Percent of the sample on which the largest outputs of file and network are the same; of an output of one value,
    # on which it is as good as the same.
    agreement: float
    expected_accuracy: float | None  # percent, of the trained network; None without labels
    accuracy: float | None  # percent, of the file
    size: int  # bytes
    float_size: int | None  # bytes of the float twin, None where there is none
    latency: float  # seconds for one element of the sample on one thread, median
    float_latency: float | None  # the same of the float twin, timed in turn
    layers: int  # how many have trained integers
    differing_layers: tuple[str, ...]  # whose integers, or the grid of whose input, are not the trained ones, in order
    first_difference: str | None  # where activations leave those of the trained network; None where they do not
    classes: int = 0  # how many outputs are compared for the largest
    notices: tuple[str, ...] = ()  # what the user should know of the file

    def check(self, minimum_agreement: float = MINIMUM_AGREEMENT) -> None:
        """Pass a file that computes what was trained.

        Args:
            minimum_agreement: percent of the sample.

        Raises:
            CRCoreError: integers or grids are not the trained ones, or the file agrees too seldom.
        """
        check_minimum(minimum_agreement)
        if self.differing_layers:
            raise CRCoreError(
                f"{self.path} does not hold what was trained: {len(self.differing_layers)} of {self.layers} layers "
                f"differ in integers or in their input's grid, first {self.differing_layers[0]!r}; export it again"
            )
        if not self.agreement >= minimum_agreement:
            where = f"; first differs {self.first_difference}" if self.first_difference else ""
            raise CRCoreError(
                f"{self.path} agrees with the trained network on the {self._what} of {self.agreement:.3f} % of "
                f"{self.samples} "
                f"inputs, and {minimum_agreement:g} % are required{where}; a larger sample of real inputs gives better "
                "ranges, integer_only=False (ONNX) leaves in float what training left in float, and minimum_agreement "
                "can be lowered for a network that is unsure of its classes"
            )

    def table(self) -> str:
        """What was found, in lines for people."""
        rows = [("", "file", "trained", "")]
        if self.accuracy is not None and self.expected_accuracy is not None:
            rows.append(("accuracy", f"{self.accuracy:.2f} %", f"{self.expected_accuracy:.2f} %", ""))
        rows += [
            (f"same {self._what}", f"{self.agreement:.2f} %", "", f"of {self.samples} inputs"),
            ("largest difference", f"{self.max_code_difference:.1f}", "", "steps of the 8-bit output"),
            ("layers as trained", f"{self.layers - len(self.differing_layers)}", f"{self.layers}", ""),
            ("", "file", "float", "ratio"),
            _compared("size, kB", self.size, self.float_size, 1e3),
            _compared("latency, ms", self.latency, self.float_latency, 1e-3),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
        ]
        first = [f"first differs {self.first_difference}"] if self.first_difference else []
        return "\n".join([f"{self.path} in {self.runtime}", *lines, *first, *self.notices])

    @property
    def _what(self) -> str:
        return "value" if self.classes == 1 else "class"

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON."""
        return asdict(self)


def verify(
    path: str | os.PathLike[str], traced: Traced, *, float_path: str | os.PathLike[str] | None = None
) -> Verification:
    """Run an exported file and say how far it computes what was trained.

    Args:
        path: ``.onnx`` or ``.tflite``.
        traced: the network that it was written from.
        float_path: the same network in float, in a file for the same runtime, for the ratios.

    Raises:
        CRCoreError: a file cannot be run, or does not take the sample.
    """
    file = Path(path)
    runtime = open_runtime(file)
    trained, found = np.asarray(traced.expected, np.float32), runtime.run(traced.sample)
    if found.shape != trained.shape:
        raise CRCoreError(f"{file} gives an output of the shape {found.shape}, the trained network {trained.shape}")
    axis, codes = traced.class_axis, codes_by_layer(traced.graph)
    classes, named = trained.argmax(axis), found.argmax(axis)
    same = (classes == named) & np.isfinite(found).all(axis)
    if traced.classes == 1:
        same = (np.abs(found - trained) <= _NEAR * np.ptp(trained)).all(axis)
    twin = open_runtime(float_path) if float_path is not None else None
    latency, *float_latency = latencies([runtime] if twin is None else [runtime, twin], traced.sample)
    right = None if traced.labels is None else [100 * float((c == traced.labels).mean()) for c in (classes, named)]
    return Verification(
        path=str(file),
        runtime=runtime.name,
        samples=len(trained),
        max_code_difference=_code_difference(trained, found, runtime.step),
        agreement=100 * float(same.mean()),
        expected_accuracy=None if right is None else right[0],
        accuracy=None if right is None else right[1],
        size=file.stat().st_size,
        float_size=None if twin is None else twin.path.stat().st_size,
        latency=latency,
        float_latency=float_latency[0] if float_latency else None,
        layers=len(codes),
        differing_layers=differing_layers(file, traced.graph),
        first_difference=_where(file, traced, same.reshape(len(trained), -1).all(axis=1)),
        classes=traced.classes,
        notices=_unseen(traced),
    )


def _unseen(traced: Traced) -> tuple[str, ...]:
    """What to say of outputs that are not compared."""
    names = [value.name for value in traced.graph.graph.output]
    return (f"the network has {len(names)} outputs; agreement is that of the first, {names[0]!r}",) * (len(names) > 1)


def latencies(
    runtimes: list[Runtime], sample: Mapping[str, Any], *, batch: int = 1, rounds: int = _ROUNDS
) -> list[float]:
    """Median seconds for a batch, each runtime in turn in every round, so that other load meets all of them."""
    inputs = {name: array[:batch] for name, array in sample.items()}
    for runtime in runtimes:
        runtime.run(inputs)
    seconds: list[list[float]] = [[] for _ in runtimes]
    for _ in range(rounds):
        for runtime, found in zip(runtimes, seconds, strict=True):
            began = time.perf_counter()
            runtime.run(inputs)
            found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


def _code_difference(trained: Any, found: Any, step: float | None) -> float:
    if step is None:
        step = float(trained.max() - trained.min()) / _STEPS or 1.0
    difference = np.abs(found - trained).max() / step
    return float(difference) if np.isfinite(difference) else float("inf")


def _where(file: Path, traced: Traced, same: Any) -> str | None:
    """Where the file begins to differ, on the elements of the sample that tell most."""
    chosen = np.argsort(same, kind="stable")[:_COMPARED]
    found = first_difference(file, traced.graph, {name: array[chosen] for name, array in traced.sample.items()})
    if found is None and 100 * same.mean() < MINIMUM_AGREEMENT:
        last = " and ".join(map(repr, makers_of(traced.graph, None))) or "no layer"
        return f"the output, which is computed by {last}: no layer's input is off by more than {100 * LIMIT:.0f} %"
    return found


def _compared(title: str, value: float, beside: float | None, unit: float) -> tuple[str, str, str, str]:
    if beside is None:
        return title, f"{value / unit:.2f}", "", ""
    return title, f"{value / unit:.2f}", f"{beside / unit:.2f}", f"{value / beside:.3f}"
