"""`export_onnx` and `export_litert`: the trained integers as a file that a runtime runs, verified there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from crcore import CRCoreError
from crcore_keras._convert import convert
from crcore_keras._layers import IntegerLayer
from crcore_keras._tree import walk

if TYPE_CHECKING:  # an extra: only those who export need ONNX
    from crcore.deploy import Traced, Verification

_BATCH = 64


def export_onnx(
    model: keras.Model,
    sample: Any,
    path: str | os.PathLike[str],
    *,
    labels: Any = None,
    opset: int | None = None,
    integer_only: bool | None = None,
    minimum_agreement: float = 99.5,
    metadata: Mapping[str, Any] | None = None,
) -> Verification:
    """Write a trained model as an ONNX file (QDQ) that holds its integers, scales and zero points, and prove it.

    Batch normalization is folded into scales and biases; the integers stay those that were trained. Weights of 1 and 2
    bits are stored as int2, of 3 and 4 bits as int4, of 5 to 8 bits as int8. The file is run in ONNX Runtime on the
    sample before it is put in place. It takes and gives what the model does, in the model's own layout.

    A layer of a class of your own is exported if it computes what the Keras class that it derives from computes. A
    convolution whose ``call`` first puts zeros around what it is given says so in an attribute, for each axis of the
    image: ``explicit_padding = ((top, bottom), (left, right))``.

    Args:
        model: from `prepare`, trained; a `ConsistencyModel`, whose average is taken where it has one; or from
            `convert`. Functional or Sequential.
        sample: a few hundred real inputs: an array ``[N, ...]``, a list of them in the order of ``model.inputs``, or a
            dictionary by input name.
        path: the file, ``.onnx``; replaced as a whole or not at all.
        labels: ``[N]`` classes of the sample, for the accuracies.
        opset: 14 to 25; None: the oldest that holds the weights packed (20; 21 with int4; 25 with int2).
        integer_only: sums, pooled maps and the like, which training leaves in float, get 8 bits with ranges from the
            sample, so that integer kernels run from end to end. False: they stay in float, and grids below 8 bits
            compute in float what training computed. None: True where every trained activation has 8 bits.
        minimum_agreement: percent of the sample on which file and model must name the same class.
        metadata: for JSON, stored in the file under ``"crcore"``.

    Returns:
        what was measured; ``print(result.table())``.

    Raises:
        CRCoreError: the model has not seen data, has a layer without a form in an exported file, or does not take the
            sample; the file does not compute the same (the message names the first layer that differs); it cannot be
            stored.
    """
    from crcore import deploy

    deploy.check_request(
        path, ".onnx", integer_only=integer_only, minimum_agreement=minimum_agreement, metadata=metadata
    )
    return deploy.write_onnx(
        _traced(model, sample, labels),
        path,
        opset=opset,
        integer_only=integer_only,
        minimum_agreement=minimum_agreement,
        metadata=metadata,
    )


def export_litert(
    model: keras.Model,
    sample: Any,
    path: str | os.PathLike[str],
    *,
    labels: Any = None,
    minimum_agreement: float = 99.5,
    metadata: Mapping[str, Any] | None = None,
) -> Verification:
    """Write a trained model as a LiteRT file of int8 from input to output, and prove it in the LiteRT interpreter.

    Arguments, result and errors as for `export_onnx`; the file's name ends in ``.tflite``. TensorFlow must be
    installed, whose converter writes the file, whatever engine Keras runs on. Weights take 8 bits each, whatever their
    width.
    """
    from crcore import deploy

    deploy.check_request(path, ".tflite", minimum_agreement=minimum_agreement, metadata=metadata)
    traced = _traced(model, sample, labels)
    return deploy.write_litert(traced, path, minimum_agreement=minimum_agreement, metadata=metadata)


def verify(model: keras.Model, sample: Any, path: str | os.PathLike[str], *, labels: Any = None) -> Verification:
    """Compare an exported file with the model that it was written from, on other inputs.

    Args:
        model, sample, labels: as for `export_onnx`.
        path: an ``.onnx`` or ``.tflite`` file.

    Returns:
        what was measured; ``result.check()`` raises where a limit is exceeded.

    Raises:
        CRCoreError: the file cannot be read, or the model does not take the sample.
    """
    from crcore import deploy

    deploy.existing_file(path)
    return deploy.verify_file(_traced(model, sample, labels), path)


def _traced(model: Any, sample: Any, labels: Any) -> Traced:
    """The network as its marker graph, and what it computes on the sample."""
    from crcore.deploy import Traced
    from crcore_keras._graph import graph_of, marker_graph

    is_converted = isinstance(model, keras.Model) and any(isinstance(layer, IntegerLayer) for _, layer in walk(model))
    converted = model if is_converted else convert(model)
    function = graph_of(converted, converted.name)
    arrays = _arrays(function, sample)
    graph = marker_graph(converted)
    inputs = keras.tree.pack_sequence_as(function._inputs_struct, list(arrays.values()))
    outputs = converted.predict(inputs, batch_size=_BATCH, verbose=0)
    return Traced(graph, arrays, np.asarray(keras.tree.flatten(outputs)[0], np.float32), _numpy(labels))


def _arrays(function: Any, sample: Any) -> dict[str, Any]:
    """The sample by input name, in the order of the model's inputs."""
    names = [each.name for each in function.inputs]
    values = list(sample) if isinstance(sample, (list, tuple)) else [sample]
    given = dict(sample) if isinstance(sample, Mapping) else dict(zip(names, values, strict=False))
    if given.keys() != set(names) or (not isinstance(sample, Mapping) and len(values) != len(names)):
        found = sorted(map(str, given)) if isinstance(sample, Mapping) else f"{len(values)} arrays"
        raise CRCoreError(
            f"the model takes the inputs {names}, sample has {found}; give an array [N, ...], a list of one for each "
            "input, or a dictionary by name"
        )
    return {each.name: _array(each, given[each.name]) for each in function.inputs}


def _array(expected: Any, value: Any) -> Any:
    """One input of the sample, in the dtype that the graph takes; ``expected``: what Keras says of it."""
    dtype = "float32" if "float" in expected.dtype else expected.dtype
    wanted = f"[{', '.join(['N', *(str(size or 'any') for size in expected.shape[1:])])}] of {dtype}"
    try:
        array = np.asarray(ops.convert_to_numpy(value))
    except Exception as error:  # each engine has errors of its own
        raise CRCoreError(
            f"input {expected.name!r} takes an array {wanted}, sample has {type(value).__name__}"
        ) from error
    sizes = [None, *expected.shape[1:]]
    fits = array.ndim == len(sizes) and all(w in (None, g) for w, g in zip(sizes, array.shape, strict=True))
    if not fits or array.size == 0 or array.dtype.kind not in "fiub":
        raise CRCoreError(
            f"input {expected.name!r} takes an array {wanted}, sample has {list(array.shape)} of {array.dtype}; give a "
            "few hundred real inputs, prepared as in training"
        )
    cast = array.astype(dtype)
    if cast.dtype.kind != "f" and not (cast == array).all():
        raise CRCoreError(f"input {expected.name!r} takes {dtype}, sample has other values than that holds; cast it")
    return cast


def _numpy(labels: Any) -> Any:
    try:
        return None if labels is None else np.asarray(ops.convert_to_numpy(labels))
    except Exception as error:  # each engine has errors of its own
        raise CRCoreError(f"labels must be whole numbers [N], got {type(labels).__name__}") from error
