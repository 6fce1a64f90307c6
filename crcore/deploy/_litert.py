"""A marker graph as a LiteRT file that computes with int8 alone.

TensorFlow's converter writes the file. The graph is handed to it with TensorFlow's fake quantization at exactly the
trained ranges, so that the integers in the file are those that training left.
"""

from __future__ import annotations

import warnings
from typing import Any

import onnx

from crcore import CRCoreError
from crcore.deploy._graph import Graph
from crcore.deploy._litert_file import finished
from crcore.deploy._litert_file import metadata_of as metadata_of
from crcore.deploy._litert_file import with_metadata as with_metadata
from crcore.deploy._litert_network import Network
from crcore.deploy._litert_ops import OPERATORS
from crcore.deploy._loading import quiet


def to_litert(model: onnx.ModelProto) -> bytes:
    """Write a network for LiteRT.

    Args:
        model: a prepared marker graph in which every tensor between integer operators passes a ``FakeQuantize``; or
            one without any marker, see `float_twin`.

    Returns:
        a ``.tflite`` file: int8 input, output and kernels (float32 for a graph without markers). Inputs and outputs
        have the graph's names, order and layout; the batch size is free (``resize_tensor_input``).

    Raises:
        CRCoreError: an operator that has no form there; integers that int8 kernels cannot hold; something stays in
            float; TensorFlow is missing or refuses the network.
    """
    graph = Graph(model)
    is_integer = any(node.is_quantizer for node in graph.nodes)
    weight = next((node for node in graph.nodes if node.is_weight), None)
    if weight is not None and not is_integer:
        raise CRCoreError(
            f"layer {weight.attributes['layer']!r} has integer weights and no activation is quantized; LiteRT's "
            "integer kernels need both: train with activations=..., or export to ONNX"
        )
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf = _tensorflow()
        converted = _converted(tf, graph, is_integer)
    return finished(converted, inputs=graph.inputs, outputs=graph.outputs, is_integer=is_integer)


def _converted(tf: Any, graph: Graph, is_integer: bool) -> bytes:
    def compute(*inputs: Any) -> dict[str, Any]:
        network = Network(tf, graph, OPERATORS, is_integer=is_integer)
        return {f"output_{i}": value for i, value in enumerate(network(inputs))}

    module = tf.Module()  # the converter keeps names only for a function that belongs to something
    module.compute = tf.function(compute, autograph=False)
    specs = [tf.TensorSpec(_shape(graph, name), name=f"input_{i}") for i, name in enumerate(graph.inputs)]
    function = module.compute.get_concrete_function(*specs)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], module)
    if is_integer:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    try:
        return bytes(converter.convert())
    except Exception as error:  # its kinds are many
        reason = next((line for line in str(error).splitlines() if "error:" in line), str(error).partition("\n")[0])
        raise CRCoreError(
            f"TensorFlow's converter refuses the network: {reason.rpartition('error: ')[2]}; export to ONNX instead"
        ) from error


def _shape(graph: Graph, name: str) -> list[int | None]:
    """The shape of an input, its batch free."""
    (described,) = (value for value in graph.model.graph.input if value.name == name)
    kind = described.type.tensor_type.elem_type
    if kind != onnx.TensorProto.FLOAT:
        given = onnx.helper.tensor_dtype_to_np_dtype(kind)
        raise CRCoreError(f"input {name!r} is {given}, and LiteRT files of crcore take float32; export to ONNX instead")
    sizes = [dim.dim_value for dim in described.type.tensor_type.shape.dim]
    if any(size <= 0 for size in sizes[1:]):
        raise CRCoreError(
            f"input {name!r} must have every size known but the batch's, got {sizes} (0 is unknown); "
            "trace the network with a sample of the size that it is used with"
        )
    return [None, *sizes[1:]]


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ImportError as error:
        raise CRCoreError(
            "LiteRT files are written by TensorFlow's converter, which cannot be imported; pip install tensorflow"
        ) from error
    return tensorflow
