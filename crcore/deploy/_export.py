"""What the exporters of all backends have in common: a traced network in, a verified file out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from crcore._files import replaced
from crcore.deploy._graph import codes_by_layer, counted, float_twin
from crcore.deploy._litert import to_litert, with_metadata
from crcore.deploy._litert_file import METADATA
from crcore.deploy._onnx import to_onnx
from crcore.deploy._prepare import has_only_8_bits, prepared_graph
from crcore.deploy._traced import Traced, check_request, existing_file, metadata_text
from crcore.deploy._verify import MINIMUM_AGREEMENT, Verification, verify


def write_onnx(
    traced: Traced,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    integer_only: bool | None = None,
    minimum_agreement: float = MINIMUM_AGREEMENT,
    metadata: Mapping[str, Any] | None = None,
) -> Verification:
    """Write a network for ONNX Runtime, run the file there, and keep it if it computes what was trained.

    Args:
        traced: the network.
        path: the file, ``.onnx``; replaced as a whole or not at all.
        opset: see `to_onnx`.
        integer_only: see `prepared_graph`; None: where every trained activation has 8 bits.
        minimum_agreement: percent of the sample on which the file's largest output must be that of the network.
        metadata: for JSON, stored in the file.

    Raises:
        CRCoreError: the network cannot be written, the file does not compute the same, or it cannot be stored.
    """
    check_request(path, ".onnx", integer_only=integer_only, minimum_agreement=minimum_agreement, metadata=metadata)
    if integer_only is None:
        integer_only = has_only_8_bits(traced.graph)
    prepared = prepared_graph(traced.graph, traced.sample, integer_only=integer_only)
    model, notices = to_onnx(prepared, opset=opset, integer_only=integer_only)
    if metadata is not None:
        onnx.helper.set_model_props(model, {METADATA: metadata_text(metadata)})
    return _write(model.SerializeToString(), traced, path, minimum_agreement, notices)


def write_litert(
    traced: Traced,
    path: str | os.PathLike[str],
    *,
    minimum_agreement: float = MINIMUM_AGREEMENT,
    metadata: Mapping[str, Any] | None = None,
) -> Verification:
    """The same for LiteRT, in integers from input to output; ``path`` ends in ``.tflite``."""
    check_request(path, ".tflite", minimum_agreement=minimum_agreement, metadata=metadata)
    written = to_litert(prepared_graph(traced.graph, traced.sample, entire=True))
    if metadata is not None:
        written = with_metadata(written, metadata_text(metadata))
    return _write(written, traced, path, minimum_agreement, _ends_of_int8(traced.graph))


def _ends_of_int8(graph: onnx.ModelProto) -> tuple[str, ...]:
    """What to say of weights of 128 steps, which LiteRT cannot hold."""
    found = {name: int((np.abs(codes) == 128).sum()) for name, codes in codes_by_layer(graph).items()}
    layers = [name for name, count in found.items() if count]
    if not layers:
        return ()
    return (
        f"{sum(found.values())} weights of {counted(layers)} have the code -128, "
        "which LiteRT's int8 lacks: they are stored as -127; LSQ(bits=8, narrow=True) trains without that code",
    )


def verify_file(traced: Traced, path: str | os.PathLike[str]) -> Verification:
    """Run a file that was written from the network, beside its float twin: does it compute what was trained?

    Raises:
        CRCoreError: the file is missing, cannot be run, or does not take the sample.
    """
    file = existing_file(path)
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / f"float{file.suffix}"
        model = float_twin(prepared_graph(traced.graph, traced.sample, integer_only=False))
        twin.write_bytes(model.SerializeToString() if twin.suffix == ".onnx" else to_litert(model))
        return verify(file, traced, float_path=twin)


def _write(
    content: bytes, traced: Traced, path: str | os.PathLike[str], minimum_agreement: float, notices: tuple[str, ...]
) -> Verification:
    with replaced(path) as temporary:
        temporary.write_bytes(content)
        found = verify_file(traced, temporary)
        found = replace(found, path=os.fspath(path), notices=(*notices, *found.notices))
        found.check(minimum_agreement)
    return found
