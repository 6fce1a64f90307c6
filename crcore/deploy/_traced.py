"""What a backend hands over to be exported, and what is asked of it: checked before anything is written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from crcore import CRCoreError
from crcore._files import as_path

SUFFIXES = (".onnx", ".tflite")


@dataclass(frozen=True)
class Traced:
    """A trained network: its graph, and what it computes on a sample.

    Args:
        graph: a marker graph.
        sample: arrays ``[N, ...]`` by input name: for the ranges that training did not give, and for the proof.
        expected: the network's first output on the sample, ``[N, classes]`` or with more axes.
        labels: classes, whole numbers of the shape of ``expected`` without its classes; None: no accuracies.
        class_axis: which axis of ``expected`` has the classes.

    Raises:
        CRCoreError: the sample is no batch or holds NaN or infinity, ``expected`` has no classes, or the labels do not
            fit it.
    """

    graph: onnx.ModelProto
    sample: Mapping[str, Any]
    expected: Any
    labels: Any = None
    class_axis: int = -1

    def __post_init__(self) -> None:
        sizes = {name: len(array) if np.ndim(array) else 0 for name, array in self.sample.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise CRCoreError(
                f"sample must hold a batch of inputs [N, ...], of the same N; got N = {sizes}; a few hundred real "
                "inputs, prepared as in training, give good ranges"
            )
        if not all(np.isfinite(array).all() for array in self.sample.values()):
            raise CRCoreError("sample holds NaN or infinity; give real inputs, prepared as in training")
        if np.ndim(self.expected) < 2:
            raise CRCoreError(
                f"the network's first output must be [N, classes], got the shape {np.shape(self.expected)}; export a "
                "network that ends in logits, and take the largest outside of it"
            )
        if self.labels is not None:
            self._check_labels(np.asarray(self.labels))

    @property
    def classes(self) -> int:
        """How many."""
        return int(self.expected.shape[self.class_axis])

    def _check_labels(self, labels: Any) -> None:
        shape = list(self.expected.shape)
        del shape[self.class_axis]
        if self.classes == 1:
            raise CRCoreError("labels are classes, and the network's output is one value; leave labels out")
        if labels.shape != tuple(shape):
            raise CRCoreError(f"labels must have the shape {tuple(shape)}, got {labels.shape}")
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= self.classes:
            ends = f"{labels.min()} to {labels.max()} of " if labels.dtype.kind in "iuf" else ""
            raise CRCoreError(f"labels must be whole numbers from 0 to {self.classes - 1}, got {ends}{labels.dtype}")


def check_request(
    path: str | os.PathLike[str],
    suffix: str,
    *,
    integer_only: bool | None = None,
    minimum_agreement: float = 100.0,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Raise `CRCoreError` for what an exporter was asked and cannot do, before a network is traced in vain."""
    file = as_path(path)
    if file.suffix != suffix:
        raise CRCoreError(f"the file's name must end in {suffix}, got {file.name!r}")
    if file.is_dir() or not file.parent.is_dir():
        why = "it is a folder" if file.is_dir() else f"there is no folder {str(file.parent)!r}"
        raise CRCoreError(f"{file}: {why}; give the path of a file in a folder that exists")
    if integer_only not in (None, True, False) or isinstance(integer_only, int) != isinstance(integer_only, bool):
        raise CRCoreError(f"integer_only must be True, False or None, got {integer_only!r}")
    check_minimum(minimum_agreement)
    if metadata is not None:
        metadata_text(metadata)


def check_minimum(agreement: float) -> None:
    """Raise `CRCoreError` unless it is a number of percent."""
    is_number = isinstance(agreement, (int, float, np.number)) and not isinstance(agreement, bool)
    if not (is_number and math.isfinite(agreement) and 0 <= agreement <= 100):
        raise CRCoreError(f"minimum_agreement is in percent, a number from 0 to 100; got {agreement!r}")


def metadata_text(metadata: Mapping[str, Any]) -> str:
    """What is stored in a file.

    Raises:
        CRCoreError: JSON cannot say it.
    """
    if not isinstance(metadata, Mapping):
        raise CRCoreError(f"metadata must be a dictionary for JSON, got {type(metadata).__name__}")
    try:
        return json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CRCoreError(
            f"metadata must be a dictionary for JSON, of text, finite numbers, lists and dictionaries ({error})"
        ) from error


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path of an exported file.

    Raises:
        CRCoreError: another suffix, or no such file.
    """
    file = as_path(path)
    if file.suffix not in SUFFIXES:
        raise CRCoreError(f"{file} has no runtime here; give a file that ends in {' or '.join(SUFFIXES)}")
    if not file.is_file():
        raise CRCoreError(f"{file}: no such file; give the path of an exported file")
    return file
