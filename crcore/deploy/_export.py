"""What the exporters of all backends have in common: a traced network in, a verified file out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from crcore import CRCoreError
from crcore._files import replaced
from crcore.deploy._graph import codes_by_layer, float_twin
from crcore.deploy._litert import to_litert, with_metadata
from crcore.deploy._onnx import to_onnx
from crcore.deploy._prepare import has_only_8_bits, prepared_graph
from crcore.deploy._verify import Verification, verify

METADATA = "crcore"  # the key of the JSON text in the file's own metadata
SUFFIXES = (".onnx", ".tflite")


def write_onnx(
    graph: onnx.ModelProto,
    sample: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    expected: Any,
    labels: Any = None,
    opset: int | None = None,
    integer_only: bool | None = None,
    minimum_agreement: float = 99.5,
    metadata: Mapping[str, Any] | None = None,
) -> Verification:
    """Write a traced network for ONNX Runtime, run the file there, and keep it if it computes what was trained.

    Args:
        graph: a marker graph.
        sample: arrays ``[N, ...]`` by input name: for the ranges that training did not give, and for the proof.
        path: the file, ``.onnx``; replaced as a whole or not at all.
        expected: ``[N, classes]``, what the trained network computes on the sample.
        labels: ``[N]`` classes, for the accuracies.
        opset: see `to_onnx`.
        integer_only: see `prepared_graph`; None: where every trained activation has 8 bits.
        minimum_agreement: percent of the sample on which the file's largest output must be that of the network.
        metadata: for JSON, stored in the file.

    Raises:
        CRCoreError: the network cannot be written, the file does not compute the same, or it cannot be stored.
    """
    _check_path(path, ".onnx")
    if integer_only is None:
        integer_only = has_only_8_bits(graph)
    prepared = prepared_graph(graph, sample, integer_only=integer_only)
    model, notices = to_onnx(prepared, opset=opset, integer_only=integer_only)
    if metadata is not None:
        onnx.helper.set_model_props(model, {METADATA: json.dumps(metadata, sort_keys=True)})
    return _write(model.SerializeToString(), graph, sample, Path(path), expected, labels, minimum_agreement, notices)


def write_litert(
    graph: onnx.ModelProto,
    sample: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    expected: Any,
    labels: Any = None,
    minimum_agreement: float = 99.5,
    metadata: Mapping[str, Any] | None = None,
) -> Verification:
    """The same for LiteRT, in integers from input to output; ``path`` ends in ``.tflite``."""
    _check_path(path, ".tflite")
    written = to_litert(prepared_graph(graph, sample, entire=True))
    if metadata is not None:
        written = with_metadata(written, json.dumps(metadata, sort_keys=True))
    notices = _ends_of_int8(graph)
    return _write(written, graph, sample, Path(path), expected, labels, minimum_agreement, notices)


def _ends_of_int8(graph: onnx.ModelProto) -> tuple[str, ...]:
    """What to say of weights of 128 steps, which LiteRT cannot hold."""
    found = {name: int((np.abs(codes) == 128).sum()) for name, codes in codes_by_layer(graph).items()}
    layers = [name for name, count in found.items() if count]
    if not layers:
        return ()
    return (
        f"{sum(found.values())} weights of {len(layers)} layers ({', '.join(layers[:3])}, ...) have the code -128, "
        "which LiteRT's int8 lacks: they are stored as -127; LSQ(bits=8, narrow=True) trains without that code",
    )


def verify_file(
    graph: onnx.ModelProto,
    sample: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    expected: Any,
    labels: Any = None,
) -> Verification:
    """Run a file that was written from ``graph``, beside its float twin: does it compute what was trained?"""
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / f"float{Path(path).suffix}"
        model = float_twin(prepared_graph(graph, sample, integer_only=False))
        twin.write_bytes(model.SerializeToString() if twin.suffix == ".onnx" else to_litert(model))
        return verify(
            path,
            expected=expected,
            sample=sample,
            codes=codes_by_layer(graph),
            labels=labels,
            float_path=twin,
            graph=graph,
        )


def _write(
    content: bytes,
    graph: onnx.ModelProto,
    sample: Mapping[str, Any],
    path: Path,
    expected: Any,
    labels: Any,
    minimum_agreement: float,
    notices: tuple[str, ...],
) -> Verification:
    with replaced(path) as temporary:
        temporary.write_bytes(content)
        found = verify_file(graph, sample, temporary, expected=expected, labels=labels)
        found = replace(found, path=str(path), notices=notices)
        found.check(minimum_agreement)
    return found


def _check_path(path: str | os.PathLike[str], suffix: str) -> None:
    given = Path(path)
    if given.suffix != suffix:
        raise CRCoreError(f"the file's name must end in {suffix}, got {given.name!r}")
    if not given.parent.is_dir():
        raise CRCoreError(f"there is no folder {str(given.parent)!r} for {given.name!r}; create it first")


def check_sample(sample: Mapping[str, Any], labels: Any) -> None:
    """Raise `CRCoreError` unless all arrays have one, non-zero, number of elements along their first axis."""
    sizes = {name: len(array) if np.ndim(array) else 0 for name, array in sample.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise CRCoreError(
            f"sample must hold a batch of inputs [N, ...], of the same N; got N = {sizes}; a few hundred real inputs, "
            "prepared as in training, give good ranges"
        )
    if not all(np.isfinite(array).all() for array in sample.values()):
        raise CRCoreError("sample holds NaN or infinity; give real inputs, prepared as in training")
    if labels is not None and np.shape(labels) != (next(iter(sizes.values())),):
        raise CRCoreError(f"labels must have the shape ({next(iter(sizes.values()))},), got {np.shape(labels)}")
