"""`export_onnx` and `export_litert`: the trained integers as a file that a runtime runs, verified there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crcore import CRCoreError
from crcore_torch._convert import convert
from crcore_torch._follow import unwrapped
from crcore_torch._layers import IntegerLayer
from crcore_torch._teacher import Teacher

if TYPE_CHECKING:  # an extra: only those who export need ONNX
    from crcore.deploy import Traced, Verification

Sample = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]

_BATCH = 64


def export_onnx(
    model: nn.Module,
    sample: Sample,
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
    sample before it is put in place.

    Args:
        model: from `prepare`, trained; a `Teacher`, whose average is taken; or from `convert`.
        sample: a few hundred real inputs: a tensor ``[N, ...]``, a tuple of them, or a dictionary of arguments by name.
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
        CRCoreError: the model has not seen data, cannot be traced, or does not take the sample; the file does not
            compute the same (the message names the first layer that differs); it cannot be stored.
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
    model: nn.Module,
    sample: Sample,
    path: str | os.PathLike[str],
    *,
    labels: Any = None,
    minimum_agreement: float = 99.5,
    metadata: Mapping[str, Any] | None = None,
) -> Verification:
    """Write a trained model as a LiteRT file of int8 from input to output, and prove it in the LiteRT interpreter.

    Arguments, result and errors as for `export_onnx`; the file's name ends in ``.tflite``. TensorFlow must be
    installed, whose converter writes the file. Weights take 8 bits each, whatever their width.
    """
    from crcore import deploy

    deploy.check_request(path, ".tflite", minimum_agreement=minimum_agreement, metadata=metadata)
    traced = _traced(model, sample, labels)
    return deploy.write_litert(traced, path, minimum_agreement=minimum_agreement, metadata=metadata)


def verify(model: nn.Module, sample: Sample, path: str | os.PathLike[str], *, labels: Any = None) -> Verification:
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


def _traced(model: nn.Module, sample: Sample, labels: Any) -> Traced:
    """The network as its marker graph, and what it computes on the sample."""
    from crcore.deploy import Traced
    from crcore_torch._graph import as_float32, marker_graph

    source = unwrapped(model.model if isinstance(model, Teacher) else model)
    is_converted = isinstance(source, nn.Module) and any(
        isinstance(module, IntegerLayer) for module in source.modules()
    )
    converted = source.eval() if is_converted else convert(source)
    _check(sample)
    expected = _outputs(converted, sample)
    keywords = dict(sample) if isinstance(sample, Mapping) else {}
    graph = marker_graph(converted, _positional(sample), keywords)
    names, tensors = [value.name for value in graph.graph.input], [*_positional(sample), *keywords.values()]
    if len(names) != len(tensors):
        raise CRCoreError(
            f"the sample has {len(tensors)} tensors, {type(converted).__name__} reads {names}; leave out the rest"
        )
    arrays = {name: as_float32(tensor).numpy() for name, tensor in zip(names, tensors, strict=True)}
    # Images that are segmented have their classes where their channels were.
    return Traced(graph, arrays, expected, _numpy(labels), class_axis=1 if expected.ndim > 3 else -1)


def _check(sample: Any) -> None:
    is_known = isinstance(sample, (Tensor, tuple, list, Mapping))
    tensors = [] if not is_known else list(sample.values() if isinstance(sample, Mapping) else _positional(sample))
    wrong = next((type(each).__name__ for each in tensors if not isinstance(each, Tensor)), None)
    if not tensors or wrong:
        raise CRCoreError(
            "sample must be a tensor [N, ...] of real inputs, a tuple of such, or a dictionary of them by argument "
            f"name, not {type(sample).__name__}{f' of {wrong}' if wrong else ''}; torch.as_tensor makes one of an array"
        )
    empty = next((tuple(tensor.shape) for tensor in tensors if tensor.ndim == 0 or len(tensor) == 0), None)
    if empty is not None:
        raise CRCoreError(f"sample must hold a batch of real inputs [N, ...], got the shape {empty}")


@torch.no_grad()
def _outputs(model: nn.Module, sample: Sample) -> Any:
    """``[N, classes]``: the model's first output on the sample."""
    try:
        outputs = [model(*batch[0], **batch[1]) for batch in _batches(model, sample)]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise CRCoreError(
            f"{type(model).__name__} does not take the sample ({' '.join(str(error).split())[:200]}); "
            f"{_dtypes(model, sample) or 'give inputs as in training'}"
        ) from error
    found = [tensor for tensor in map(_first, outputs) if tensor is not None]
    if not found or found[0].ndim == 0:
        raise CRCoreError(
            f"the first output of {type(model).__name__} must be a tensor [N, classes], got "
            f"{'one number' if found else 'none'}; a loss that comes first stays away where the sample has no labels"
        )
    return torch.cat(found).float().cpu().numpy()


def _dtypes(model: nn.Module, sample: Sample) -> str | None:
    """What to say where the sample's floats are not those of the model."""
    tensors = sample.values() if isinstance(sample, Mapping) else _positional(sample)
    given = next((tensor.dtype for tensor in tensors), None)
    taken = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), given)
    if given == taken:
        return None
    return f"the sample is {given} and the model {taken}; give sample.to({taken}) if it is no index"


def _batches(model: nn.Module, sample: Sample) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    named = dict(sample) if isinstance(sample, Mapping) else {}
    tensors = _positional(sample)
    for start in range(0, len((*tensors, *named.values())[0]), _BATCH):
        part = slice(start, start + _BATCH)
        yield tuple(t[part].to(device) for t in tensors), {name: t[part].to(device) for name, t in named.items()}


def _positional(sample: Sample) -> tuple[Tensor, ...]:
    if isinstance(sample, Mapping):
        return ()
    return (sample,) if isinstance(sample, Tensor) else tuple(sample)


def _first(output: Any) -> Tensor | None:
    """The first tensor of what a model returns, also in a tuple or a dictionary such as transformers' outputs."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for found in map(_first, parts) if found is not None), None)


def _numpy(labels: Any) -> Any:
    return labels.cpu().numpy() if isinstance(labels, Tensor) else labels
