"""The prepared graph as an ONNX file with QuantizeLinear and DequantizeLinear (QDQ), as runtimes read it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper, numpy_helper, version_converter

from crcore import CRCoreError
from crcore.deploy._graph import OPSET, Graph, counted, fits_byte
from crcore.deploy._loading import one_line
from crcore.deploy._qdq import PACKED, PACKED_2, PACKED_4, WIDE, as_products, clip_as_codes, width_of, write_markers

OLDEST, NEWEST = 14, 25  # onnx converts the operators of usual networks no further back
_IR_VERSIONS = {PACKED_4: 10, PACKED_2: 13}


def to_onnx(
    model: onnx.ModelProto, *, opset: int | None = None, integer_only: bool = True
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Write a prepared marker graph as QDQ.

    Args:
        model: from `prepared_graph`.
        opset: 14 to 25; None: the oldest that holds the weights packed, at least 20.
        integer_only: whether grids below 8 bits are to run on integer kernels too, as the graph was prepared.

    Returns:
        the model, and what the user should know of it, as sentences. The integers of a layer are the initializer
        ``<layer>.codes``, those of its input the tensor ``<layer>.input_codes``.

    Raises:
        CRCoreError: an opset that is not supported, or in which the network cannot be said.
    """
    graph = Graph(model)
    widths = {node.attributes["layer"]: width_of(node.attributes) for node in graph.nodes if node.is_weight}
    best = _best_opset(graph, widths)
    opset = best if opset is None else opset
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST <= opset <= NEWEST:
        raise CRCoreError(
            f"opset must be a whole number from {OLDEST} to {NEWEST}, got {opset!r}; {best} suits this network"
        )
    wide = [layer for layer, width in widths.items() if width > 8]
    if wide and opset < WIDE:
        raise CRCoreError(
            f"opset {opset} has no integers of 16 bits, which the weights of {counted(wide)} take; give opset={WIDE} "
            "or more, or leave it out"
        )
    if integer_only:
        clip_as_codes(graph)
    as_products(graph)
    packed = write_markers(graph, opset, integer_only)
    written = _converted(graph.to_model(standard=True), opset)
    _pack(written, packed)
    unpacked = [name for name, width in widths.items() if width in PACKED and opset < PACKED[width][2]]
    return written, (_notice(unpacked, opset, best),) if unpacked else ()


def _best_opset(graph: Graph, widths: Mapping[str, int]) -> int:
    wide = any(not (fits_byte(n) or n.attributes.get("binary")) for n in graph.nodes if n.is_quantizer)
    wide = wide or any(width > 8 for width in widths.values())
    return max([OPSET, *(PACKED[w][2] for w in widths.values() if w in PACKED), *([WIDE] if wide else [])])


def _notice(layers: list[str], opset: int, best: int) -> str:
    return (
        f"opset {opset} has no type as narrow as the weights of {counted(layers)}: "
        f"their integers are stored as they are in a wider one; opset={best} packs them"
    )


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model in another opset, by onnx's own converter."""
    if opset == OPSET:
        return model
    try:
        found = version_converter.convert_version(model, opset)
    except Exception as error:  # the converter raises RuntimeError and kinds of its own
        raise CRCoreError(
            f"the network cannot be written in opset {opset} ({one_line(error)}); leave opset out, "
            f"or give one from {OPSET} to {NEWEST}"
        ) from error
    found.ir_version = max(found.ir_version, *(ir for since, ir in _IR_VERSIONS.items() if opset >= since), 8)
    return found


def _pack(model: onnx.ModelProto, packed: Mapping[str, int]) -> None:
    """Store integers in their narrow types."""
    types = {f"{layer}.codes": kind for layer, kind in packed.items()}
    for tensor in model.graph.initializer:
        if tensor.name in types:
            codes = numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                numpy_helper.from_array(codes.astype(helper.tensor_dtype_to_np_dtype(types[tensor.name])), tensor.name)
            )
