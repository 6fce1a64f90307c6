"""A marker graph, made ready to be written for a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from crcore.deploy._complete import complete
from crcore.deploy._fold import fold
from crcore.deploy._graph import Graph


def prepared_graph(
    model: onnx.ModelProto, sample: Mapping[str, Any], *, integer_only: bool = True, entire: bool = False
) -> onnx.ModelProto:
    """Fold a marker graph, and give what training left in float a grid of 8 bits where integer kernels need one.

    Args:
        model: from a backend.
        sample: arrays ``[N, ...]`` by input name; the ranges are taken from them.
        integer_only: whether sums, pooled maps and the like get grids.
        entire: whether integers are to flow from input to output, as LiteRT has it: outputs get grids as well.

    Raises:
        CRCoreError: the network gives NaN or infinity on the sample.
    """
    graph = Graph(model)
    fold(graph)
    if integer_only:
        complete(graph, sample, entire=entire)
    return graph.to_model()


def has_only_8_bits(model: onnx.ModelProto) -> bool:
    """Whether every activation of a marker graph has a grid of 8 bits: then nothing is lost on integer kernels."""
    grids = [node.attributes for node in Graph(model).nodes if node.is_quantizer]
    return bool(grids) and all(given["hi"] - given["lo"] in (254, 255) for given in grids)
