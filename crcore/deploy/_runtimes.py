"""Files in the runtimes that they are made for, with one face: float arrays in, a float array out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crcore import CRCoreError
from crcore.deploy._litert_file import METADATA, metadata_of
from crcore.deploy._loading import damaged, litert_interpreter, one_line, onnx_model, onnx_session, quiet

_BATCH = 64  # of what is computed at once, for the sake of memory


class Runtime(Protocol):
    """A file, ready to run on the CPU."""

    name: str  # "onnxruntime" or "litert"
    path: Path
    inputs: dict[str, tuple[int | None, ...]]  # names and shapes in order; None where any size is taken
    step: float | None  # of the first output's grid; None where that is float

    def run(self, inputs: Mapping[str, Any] | Any) -> Any:
        """Compute the first output.

        Args:
            inputs: float arrays ``[N, ...]`` by name, or the one array of a network with one input; any ``N``.

        Returns:
            ``[N, ...]``, float32.

        Raises:
            CRCoreError: names or shapes that the file does not take.
        """
        ...

    def metadata(self) -> dict[str, Any] | None:
        """What was stored in the file when it was exported; None where there is nothing."""
        ...


def open_runtime(path: str | os.PathLike[str], *, threads: int = 1) -> Runtime:
    """Open an exported file.

    Args:
        path: ``.onnx`` for ONNX Runtime, ``.tflite`` for LiteRT.
        threads: CPU threads that compute.

    Raises:
        CRCoreError: the runtime is not installed; the file is missing, damaged, or none that the runtime takes.
    """
    file = Path(path)
    kind = _KINDS.get(file.suffix)
    if kind is None:
        raise CRCoreError(f"{file} has no runtime here; give a file that ends in {' or '.join(_KINDS)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise CRCoreError(f"threads must be a whole number from 1, got {threads!r}")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CRCoreError(f"{file} cannot be read ({error.strerror}); give the path of an exported file") from error
    return kind(file, content, threads)


class OnnxRuntime:
    """ONNX Runtime, with its CPU kernels."""

    name = "onnxruntime"

    def __init__(self, path: Path, content: bytes, threads: int) -> None:
        self.path = path
        self.step: float | None = None
        self._model = onnx_model(path, content)
        self._session = onnx_session(path, content, threads=threads)
        self.inputs: dict[str, tuple[int | None, ...]] = {
            value.name: tuple(size if isinstance(size, int) else None for size in value.shape)
            for value in self._session.get_inputs()
        }
        self._output = self._session.get_outputs()[0].name

    def run(self, inputs: Mapping[str, Any] | Any) -> Any:
        """See `Runtime`."""
        arrays = _checked(self, inputs)
        try:
            return np.concatenate([self._session.run([self._output], batch)[0] for batch in _batches(arrays)])
        except Exception as error:  # ONNX Runtime's kinds have no common base
            raise CRCoreError(
                f"{self.path} does not run in ONNX Runtime ({one_line(error)}); export it again"
            ) from error

    def metadata(self) -> dict[str, Any] | None:
        """See `Runtime`."""
        text = next((entry.value for entry in self._model.metadata_props if entry.key == METADATA), None)
        return _parsed(self.path, text)


class LiteRT:
    """The LiteRT interpreter, with the kernels of XNNPACK."""

    name = "litert"

    def __init__(self, path: Path, content: bytes, threads: int) -> None:
        self.path, self._content = path, content
        self._interpreter = litert_interpreter(path, content, num_threads=threads)
        try:
            self._inputs = {entry["name"]: entry for entry in self._interpreter.get_input_details()}
            self._output = self._interpreter.get_output_details()[0]
        except (ValueError, IndexError) as error:  # names that are no UTF-8; no output
            raise damaged(path, "LiteRT", error) from error
        self.inputs: dict[str, tuple[int | None, ...]] = {
            name: tuple(None if size < 0 else int(size) for size in entry["shape_signature"])
            for name, entry in self._inputs.items()
        }
        scale, _ = self._output["quantization"]
        self.step: float | None = float(scale) or None
        self._shapes = {name: tuple(entry["shape"]) for name, entry in self._inputs.items()}

    def run(self, inputs: Mapping[str, Any] | Any) -> Any:
        """See `Runtime`. Inputs and outputs pass the grids that the file gives them."""
        return np.concatenate([self._computed(batch) for batch in _batches(_checked(self, inputs))])

    def metadata(self) -> dict[str, Any] | None:
        """See `Runtime`."""
        try:
            text = metadata_of(self._content)
        except Exception as error:  # flatbuffers' own Python code raises whatever an odd offset makes of it
            raise damaged(self.path, "LiteRT", error) from error
        return _parsed(self.path, text)

    def _computed(self, batch: Mapping[str, Any]) -> Any:
        shapes = {name: array.shape for name, array in batch.items()}
        try:
            if shapes != self._shapes:
                self._resize(shapes)
            for name, array in batch.items():
                self._interpreter.set_tensor(self._inputs[name]["index"], to_codes(array, self._inputs[name]))
            self._interpreter.invoke()
            return to_values(self._interpreter.get_tensor(self._output["index"]), self._output)
        except (ValueError, RuntimeError) as error:
            raise CRCoreError(f"{self.path} does not run in LiteRT ({one_line(error)}); export it again") from error

    def _resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        with quiet():
            for name, shape in shapes.items():
                self._interpreter.resize_tensor_input(self._inputs[name]["index"], shape, strict=True)
            self._interpreter.allocate_tensors()
        self._shapes = dict(shapes)


_KINDS: dict[str, Callable[[Path, bytes, int], Runtime]] = {".onnx": OnnxRuntime, ".tflite": LiteRT}


def to_codes(values: Any, tensor: Mapping[str, Any]) -> Any:
    """Float values in the grid of a LiteRT tensor, rounded half to even as in training; float tensors take floats."""
    scale, zero_point = tensor["quantization"]
    if not scale:
        return values.astype(tensor["dtype"])
    ends = np.iinfo(tensor["dtype"])
    codes = np.rint(values / np.float32(scale)) + zero_point
    return np.clip(codes, ends.min, ends.max).astype(tensor["dtype"])


def to_values(codes: Any, tensor: Mapping[str, Any]) -> Any:
    """What the codes of a LiteRT tensor stand for; floats stand for themselves."""
    scale, zero_point = tensor["quantization"]
    return (codes.astype(np.float32) - zero_point) * np.float32(scale) if scale else codes


def _checked(runtime: Runtime, inputs: Mapping[str, Any] | Any) -> dict[str, Any]:
    """Float32 arrays by name, in the shapes that the file takes."""
    names = list(runtime.inputs)
    given = inputs if isinstance(inputs, Mapping) else {names[0]: inputs}
    if set(given) != set(names):
        raise CRCoreError(f"{runtime.path} takes the inputs {', '.join(names)}; got {', '.join(given)}")
    arrays = {name: np.asarray(given[name]) for name in names}
    for name, array in arrays.items():
        taken = runtime.inputs[name]
        fits = array.ndim == len(taken) and all(b in (None, a) for a, b in zip(array.shape[1:], taken[1:], strict=True))
        if not fits or len(array) == 0:
            sizes = ", ".join("N" if i == 0 else str(size or "any") for i, size in enumerate(taken))
            raise CRCoreError(f"{runtime.path}: input {name!r} takes arrays [{sizes}], got the shape {array.shape}")
    if len({len(array) for array in arrays.values()}) > 1:
        raise CRCoreError(f"{runtime.path}: all inputs must have the same N, got {[len(a) for a in arrays.values()]}")
    return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}


def _batches(arrays: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    size = len(next(iter(arrays.values())))
    for start in range(0, size, _BATCH):
        yield {name: np.ascontiguousarray(array[start : start + _BATCH]) for name, array in arrays.items()}


def _parsed(path: Path, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CRCoreError(f"{path}: its metadata are damaged ({one_line(error)}); export it again") from error
    if not isinstance(found, dict):
        raise CRCoreError(f"{path}: its metadata are no JSON object; export it again")
    return found
