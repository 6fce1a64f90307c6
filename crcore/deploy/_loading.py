"""Files into the runtimes' own objects: a damaged or foreign one is an error, and nothing worse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from crcore import CRCoreError

_LARGEST = 2**31  # elements of one tensor: what a file asks for is allocated before anything is looked at


def onnx_model(path: Path, content: bytes) -> onnx.ModelProto:
    """Parse an ONNX file that holds all of itself.

    Raises:
        CRCoreError: it is damaged, or asks for other files, whose paths nobody has checked.
    """
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own kind, which has moved between its versions
        raise damaged(path, "ONNX", error) from error
    outside = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise CRCoreError(f"{path} keeps {outside[0]!r} in another file; give a file that holds all of its weights")
    return model


def onnx_session(path: Path, content: bytes, *, threads: int = 1, optimised: bool = True) -> Any:
    """A session of ONNX Runtime that says nothing by itself.

    Raises:
        CRCoreError: it refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        # Without the fallback, which tries the same once more and prints that it does.
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=False)
    except Exception as error:  # its kinds have no common base
        raise damaged(path, "ONNX", error) from error


def litert_interpreter(path: Path, content: bytes, **options: Any) -> Any:
    """An interpreter of a LiteRT file, its tensors allocated; ``options`` are its own.

    Raises:
        CRCoreError: LiteRT is not installed, or the file is damaged.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise CRCoreError("LiteRT is not installed; pip install 'crcore[litert]'") from error
    try:
        # The interpreter checks every offset in the flatbuffer, and then reads these without looking for them.
        model = schema.Model.GetRootAs(content, 0)
        if not (model.SubgraphsLength() and model.BuffersLength() and model.OperatorCodesLength()):
            raise ValueError("it holds no network")
        graph = model.Subgraphs(0)
        sizes = (graph.Tensors(i).ShapeAsNumpy() for i in range(graph.TensorsLength()))
        if any(np.prod(size, dtype=np.float64) > _LARGEST for size in sizes):
            raise ValueError(f"it has a tensor of more than {_LARGEST} elements")
        with quiet():
            interpreter = Interpreter(model_content=content, **options)
            interpreter.allocate_tensors()
    except Exception as error:  # ValueError and RuntimeError, and what flatbuffers' Python code makes of odd offsets
        raise damaged(path, "LiteRT", error) from error
    return interpreter


@contextmanager
def quiet() -> Iterator[None]:
    """Without what C++ libraries write to the standard error stream, past Python, whatever its log level.

    TensorFlow's is set by an environment variable alone, and only before the first import.
    """
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def damaged(path: Path, kind: str, error: BaseException) -> CRCoreError:
    """The error for a file that a runtime, or its parser, refuses."""
    return CRCoreError(
        f"{path} cannot be used ({one_line(error)}): it is damaged, cut short, or no {kind} file; export it again"
    )


def one_line(error: BaseException) -> str:
    """The message of an error of another library, without its line breaks."""
    return " ".join(str(error).split())[:200]
