"""The flatbuffer of a LiteRT file: names, metadata, and whether everything in it is an integer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crcore import CRCoreError

METADATA = "crcore"
# The format asks for it, and kernels read tensors in place.
_ALIGNMENT = 16


def with_metadata(tflite: bytes, text: str) -> bytes:
    """The file with a text stored in it, in place of one that was stored before."""
    model = _read(tflite)
    content = np.frombuffer(text.encode(), np.uint8)
    entry = next((entry for entry in model.metadata or [] if entry.name == METADATA.encode()), None)
    if entry is None:
        entry = _schema().MetadataT(name=METADATA.encode(), buffer=len(model.buffers))
        model.metadata = [*(model.metadata or []), entry]
        model.buffers.append(_schema().BufferT())
    model.buffers[entry.buffer].data = content
    return _written(model)


def metadata_of(tflite: bytes) -> str | None:
    """The text that `with_metadata` stored; None where there is none."""
    model = _read(tflite)
    for entry in model.metadata or []:
        if entry.name == METADATA.encode():
            return bytes(np.asarray(model.buffers[entry.buffer].data, np.uint8)).decode()
    return None


def finished(tflite: bytes, *, inputs: Sequence[str], outputs: Sequence[str], is_integer: bool) -> bytes:
    """A converted file with its inputs and outputs named and ordered as given.

    Args:
        tflite: its signature calls them ``input_0``, ``output_0`` and so on; the file may have them in any order.
        inputs: names in order.
        outputs: names in order.
        is_integer: whether it is an error if something in it computes in float.

    Raises:
        CRCoreError: it does, and `is_integer`.
    """
    model = _read(tflite)
    (graph,) = model.subgraphs
    (signature,) = model.signatureDefs
    if is_integer:
        _check_is_integer(model, graph)
    graph.outputs = _renamed(graph, signature.outputs, outputs)
    graph.inputs = _renamed(graph, signature.inputs, inputs)  # last: an input may be an output as it is
    return _written(model)


def _renamed(graph: Any, entries: list[Any], names: Sequence[str]) -> Any:
    """Give tensors of the signature the names at their places; returns their indices in that order."""
    entries.sort(key=lambda entry: int(entry.name.rpartition(b"_")[2]))
    for entry, name in zip(entries, names, strict=True):
        entry.name = name.encode()
        graph.tensors[entry.tensorIndex].name = name.encode()
    return np.array([entry.tensorIndex for entry in entries], np.int32)


def _kind(model: Any, operator: Any) -> str:
    """The name of an operator's kernel."""
    kinds = {value: name for name, value in vars(_schema().BuiltinOperator).items() if isinstance(value, int)}
    code = model.operatorCodes[operator.opcodeIndex]
    return kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]


def _check_is_integer(model: Any, graph: Any) -> None:
    schema = _schema()
    floats = {schema.TensorType.FLOAT32, schema.TensorType.FLOAT16, schema.TensorType.FLOAT64}
    found = []
    for operator in graph.operators:
        touched = [graph.tensors[i] for i in (*operator.inputs, *operator.outputs) if i >= 0]
        if any(tensor.type in floats for tensor in touched):
            found.append(f"{_kind(model, operator)} (makes {graph.tensors[operator.outputs[0]].name.decode()!r})")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CRCoreError(
            f"{len(found)} of {len(graph.operators)} operators stay in float: {', '.join(found[:5])}{more}; LiteRT "
            "computes with integers only where every tensor has a range: quantize those layers too, or export to ONNX"
        )


def _schema() -> Any:
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise CRCoreError("LiteRT is not installed; pip install 'crcore[litert]'") from error
    return schema_py_generated


def _read(tflite: bytes) -> Any:
    if tflite[4:8] != b"TFL3":
        raise CRCoreError("this is no LiteRT file (a .tflite file has 'TFL3' at its fifth byte); export it again")
    schema = _schema()
    try:
        return schema.ModelT.InitFromPackedBuf(tflite, 0)
    except Exception as error:  # offsets that lead nowhere end in errors of many kinds
        raise CRCoreError("this LiteRT file is truncated or damaged; export it again") from error


def _written(model: Any) -> bytes:
    import flatbuffers

    class Builder(flatbuffers.Builder):
        """Numbers at multiples of `_ALIGNMENT`, which the generated Python code forgets."""

        def CreateNumpyVector(self, x: Any) -> Any:  # noqa: N802 (the base class's name)
            content = np.ascontiguousarray(x).astype(x.dtype.newbyteorder("<"), copy=False).tobytes()
            self.StartVector(x.itemsize, x.size, _ALIGNMENT)
            self.head -= len(content)
            self.Bytes[self.head : self.head + len(content)] = content
            self.vectorNumElems = x.size
            return self.EndVector()

    builder = Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
