"""QuantizeLinear and DequantizeLinear in place of the markers.

Weights are stored in as few bits as their trained grid needs: int8 or uint8, and from opset 21 on int4 or uint4, from
opset 25 on int2 or uint2. A packed weight passes a Cast to 8 bits, which runtimes compute once, when they load the
file: ONNX Runtime's integer convolutions take 8 bits and nothing else (with int2 it refuses the whole graph).

Activations are uint8 whatever their width, since nothing of them is stored; the ends of a narrower grid are a Clip. A
signed grid is shifted by 128, because on x86 only uint8 activations run on integer kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from crcore.deploy._graph import Graph, Node, fits_byte, quantize_in_float
from crcore.deploy._scales import make_room_for_biases

PACKED_4, PACKED_2 = 21, 25  # the opsets that brought int4 and int2
WIDE = 21  # the opset that brought 16 bits to QuantizeLinear
# Width in bits: the types without and with a sign, and the opset that brought them.
PACKED = {2: (TensorProto.UINT2, TensorProto.INT2, PACKED_2), 4: (TensorProto.UINT4, TensorProto.INT4, PACKED_4)}


def width_of(attributes: Mapping[str, Any]) -> int:
    """The smallest of 2, 4, 8, 16 and 32 bits that holds the grid."""
    lo, hi = attributes["lo"], attributes["hi"]
    for bits in (2, 4, 8, 16):
        if (lo >= 0 and hi < 2**bits) or (lo >= -(2 ** (bits - 1)) and hi < 2 ** (bits - 1)):
            return bits
    return 32


def clip_as_codes(graph: Graph) -> None:
    """``FakeQuantize(Clip(x))`` is ``FakeQuantize(x)`` with nearer ends, since rounding is monotone.

    So that a clip at a value inside the grid (ReLU6's 6) does not come between a convolution and its rounding, where
    integer kernels could not run.
    """
    makers, readers = graph.makers(), graph.readers()
    for node in graph.nodes:
        if not node.is_quantizer or node.attributes.get("binary"):
            continue
        clip = makers.get(node.inputs[0])
        while clip is not None and clip.op in ("Clip", "Relu") and len(readers[clip.output]) == 1:
            ends = _clip_ends(graph, clip)
            if ends is None or clip.output in graph.outputs:
                break
            scale, zero_point = (graph.constants[name] for name in node.inputs[1:])
            given = node.attributes
            lo, hi = (
                given[name]
                if np.isinf(end)
                else int(np.clip(np.round(end / scale) + zero_point, given["lo"], given["hi"]))
                for name, end in zip(("lo", "hi"), ends, strict=True)
            )
            node.attributes |= {"lo": lo, "hi": hi}
            node.inputs[0] = clip.inputs[0]
            clip = makers.get(node.inputs[0])
    graph.drop_unread()  # else a clip would still count as a reader


def _clip_ends(graph: Graph, clip: Node) -> tuple[Any, Any] | None:
    ends = [np.float32(0 if clip.op == "Relu" else -np.inf), np.float32(np.inf)]
    for index, name in enumerate(clip.inputs[1:3]):
        if name:
            if name not in graph.constants:
                return None
            ends[index] = np.float32(graph.constants[name])
    return ends[0], ends[1]


def as_products(graph: Graph) -> None:
    """``Gemm`` of quantized data is written ``MatMul`` and ``Sub`` of the negative bias.

    ONNX Runtime has an integer ``MatMul`` with a float result, and none of ``Gemm``; a bias that is added would make it
    put the two together to a ``Gemm`` again.
    """
    makers = graph.makers()
    for node in [node for node in graph.nodes if node.op == "Gemm"]:
        data, weight = makers.get(node.inputs[0]), makers.get(node.inputs[1])
        plain = node.attributes.get("alpha", 1.0) == node.attributes.get("beta", 1.0) == 1.0
        if data is None or weight is None or not (data.is_quantizer and weight.is_weight and plain):
            continue
        if node.attributes.get("transA") or (len(node.inputs) > 2 and node.inputs[2] not in graph.constants):
            continue
        if node.attributes.get("transB"):
            own = Node(
                weight.op, list(weight.inputs), [graph.fresh(f"{weight.output}.transposed")], {**weight.attributes}
            )
            own.inputs[0] = graph.constant(graph.constants[weight.inputs[0]].T, f"{weight.inputs[0]}.transposed")
            if "axis" in own.attributes:
                own.attributes["axis"] = 1 - own.attributes["axis"]
            graph.insert([own], before=node)
            node.inputs[1] = own.output
        bias = node.inputs[2:]
        node.op, node.inputs, node.attributes = "MatMul", node.inputs[:2], {}
        if bias:
            product = graph.fresh(f"{node.output}.product")
            minus = graph.constant(-graph.constants[bias[0]], f"{bias[0]}.minus")
            place = graph.nodes.index(node)
            graph.nodes.insert(place + 1, Node("Sub", [product, minus], [node.output]))
            node.outputs = [product]


def write_markers(graph: Graph, opset: int, integer_only: bool) -> dict[str, int]:
    """Replace the markers; returns the type of each layer whose integers are to be packed."""
    packed: dict[str, int] = {}
    finer = _finer_steps(graph) if integer_only else {}
    if integer_only:
        make_room_for_biases(graph, finer)
    _leave_coarse_in_float(graph, finer)
    makers, readers = graph.makers(), graph.readers()
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.is_weight:
            nodes += _weight(graph, node, finer.get(node.output, 1), packed, opset)
        elif node.is_quantizer and node.attributes.get("binary"):
            nodes += quantize_in_float(graph, node)
        elif node.is_quantizer:
            # An integer matrix product has a float result, and is exact as it is.
            in_float = not integer_only and any(reader.op != "MatMul" for reader in readers[node.output])
            before = makers.get(node.inputs[0])
            if integer_only and before is not None and before.is_quantizer and fits_byte(before) and fits_byte(node):
                nodes += _plus_zero(graph, node)
            nodes += _quantizer(graph, node, opset, in_float)
        elif node.op in ("Conv", "ConvTranspose") and _has_integer_bias(graph, node, makers):
            nodes += [*_integer_bias(graph, node, makers, finer.get(node.inputs[1])), node]
        else:
            nodes.append(node)
    graph.nodes = nodes
    return packed


def _finer_steps(graph: Graph) -> dict[str, int]:
    """For the weight of each convolution that runs on an integer kernel: a factor for its codes.

    The kernel adds the bias in steps of ``scale of x * scale of w``, which are coarse where both have few bits: to
    round the bias to them would move one output code in a hundred. With codes a whole factor larger, and a scale as
    much smaller, the weights are the same and the steps finer. The factor keeps codes within int8, and pairs of
    products within int16, in which x86 CPUs without VNNI add them.
    """
    makers, readers = graph.makers(), graph.readers()
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "Conv" or (len(node.inputs) > 2 and node.inputs[2] not in graph.constants):
            continue
        data, weight = makers.get(node.inputs[0]), makers.get(node.inputs[1])
        after = readers[node.output]
        if data is None or weight is None or not (data.is_quantizer and weight.is_weight and fits_byte(data)):
            continue
        is_rounded = len(after) == 1 and after[0].is_quantizer and fits_byte(after[0])
        if not is_rounded or width_of(weight.attributes) > 8:
            continue
        largest = max(abs(weight.attributes["lo"]), abs(weight.attributes["hi"]))
        data_code = max(1, data.attributes["hi"] + (128 if data.attributes["lo"] < 0 else 0))
        room = max(1, min(127 // largest, (2**15 - 1) // (2 * data_code * largest)))
        found[weight.output] = min(room, found.get(weight.output, room))
    return found


def _leave_coarse_in_float(graph: Graph, finer: dict[str, int]) -> None:
    """Keep a convolution in float whose accumulator has steps above those of its result, and so no room for a bias.

    That is one with a channel of next to no variance, by which batch normalization divided. A bias that is subtracted
    behind the convolution is what ONNX Runtime does not make an integer kernel of.
    """
    makers, readers = graph.makers(), graph.readers()
    coarse: set[str] = set()
    for node in [
        node for node in graph.nodes if node.op == "Conv" and len(node.inputs) > 2 and node.inputs[1] in finer
    ]:
        scales = [graph.constants[each.inputs[1]] for each in (makers[node.inputs[0]], makers[node.inputs[1]])]
        step = np.abs(scales[0] * scales[1]).max() / finer[node.inputs[1]]
        if step <= graph.constants[readers[node.output][0].inputs[1]]:
            continue
        coarse.add(node.inputs[1])
        bias = graph.constants[node.inputs.pop()]
        product = graph.fresh(f"{node.output}.product")
        shape = [-1, *[1] * (graph.constants[makers[node.inputs[1]].inputs[0]].ndim - 2)]
        minus = graph.constant(-bias.reshape(shape), f"{node.output}.minus")
        graph.nodes.insert(graph.nodes.index(node) + 1, Node("Sub", [product, minus], [node.output]))
        node.outputs = [product]
    for weight in coarse:
        del finer[weight]


def _weight(graph: Graph, node: Node, finer: int, packed: dict[str, int], opset: int) -> list[Node]:
    codes, scale, zero_point = (graph.constants[name] for name in node.inputs)
    given = node.attributes
    layer, width = given["layer"], width_of(given)
    name = f"{layer}.codes"
    if name not in graph.constants:
        graph.constants[name] = codes
    elif not np.array_equal(graph.constants[name], codes):  # one weight, used as it is and transposed
        name = graph.constant(codes, name)
    read, nodes = name, []
    types = [PACKED[bits] for bits in sorted(PACKED) if bits >= width and opset >= PACKED[bits][2]]
    if types:
        packed[layer] = types[0][given["lo"] < 0]
    if layer in packed or finer > 1:
        factor = graph.constant(np.int32(finer), f"{layer}.finer")
        wide, product, read = (graph.fresh(f"{layer}.codes{part}") for part in (".wide", ".product", ".byte"))
        to_byte = {"to": helper.np_dtype_to_tensor_dtype(codes.dtype)}
        if finer == 1:
            nodes = [Node("Cast", [name], [read], to_byte)]
        else:
            nodes = [
                Node("Cast", [name], [wide], {"to": TensorProto.INT32}),
                Node("Mul", [wide, factor], [product]),
                Node("Cast", [product], [read], to_byte),
            ]
    inputs = [read, graph.constant((scale / np.float32(finer)).astype(np.float32), f"{layer}.scale")]
    if zero_point.any():
        inputs.append(graph.constant((finer * zero_point).astype(codes.dtype), f"{layer}.zero_point"))
    axis = {"axis": given["axis"]} if scale.ndim else {}
    return [*nodes, Node("DequantizeLinear", inputs, [node.output], axis)]


def _quantizer(graph: Graph, node: Node, opset: int, in_float: bool) -> list[Node]:
    given = node.attributes
    scale, zero_point = (graph.constants[name] for name in node.inputs[1:])
    lo, hi = given["lo"], given["hi"]
    wide = not fits_byte(node)
    if wide and opset < WIDE:
        return quantize_in_float(graph, node)
    dtype, shift, top = (np.uint16, 2**15, 2**16 - 1) if wide else (np.uint8, 2**7, 2**8 - 1)
    shift = shift if lo < 0 else 0
    name = given["layer"] or node.output
    codes = graph.fresh(f"{name}.input_codes")
    parameters = [
        graph.constant(scale, f"{name}.input_scale"),
        graph.constant(dtype(int(zero_point) + shift), f"{name}.input_zero_point"),
    ]
    is_whole = (lo + shift, hi + shift) == (0, top)
    if is_whole and (wide or not in_float):
        return [
            Node("QuantizeLinear", [node.inputs[0], *parameters], [codes]),
            Node("DequantizeLinear", [codes, *parameters], [node.output]),
        ]
    inside = graph.fresh(f"{codes}.clipped")
    if in_float or wide:
        # A Clip of floats keeps convolutions in float, where they compute what training did, their biases unrounded. In
        # front of a whole grid it would be optimized away.
        ends = [np.float32(end - int(zero_point)) * scale for end in (lo, hi)]
        clip = [graph.constant(end, f"{name}.{which}") for end, which in zip(ends, ("lo", "hi"), strict=True)]
        if is_whole:
            return [
                Node("QuantizeLinear", [node.inputs[0], *parameters], [codes]),
                Node("DequantizeLinear", [codes, *parameters], [inside]),
                Node("Clip", [inside, *clip], [node.output]),
            ]
        return [
            Node("Clip", [node.inputs[0], *clip], [inside]),
            Node("QuantizeLinear", [inside, *parameters], [codes]),
            Node("DequantizeLinear", [codes, *parameters], [node.output]),
        ]
    clip = [graph.constant(dtype(end + shift), f"{name}.{which}") for end, which in ((lo, "lo"), (hi, "hi"))]
    return [
        Node("QuantizeLinear", [node.inputs[0], *parameters], [inside]),
        Node("Clip", [inside, *clip], [codes]),
        Node("DequantizeLinear", [codes, *parameters], [node.output]),
    ]


def _plus_zero(graph: Graph, node: Node) -> list[Node]:
    """A sum with zero in front of a quantizer whose input is rounded already.

    ONNX Runtime goes from one grid to another by way of floats, in two passes. A sum it makes one integer kernel of.
    """
    parameters = [graph.constant(np.float32(1), "one"), graph.constant(np.uint8(0), "zero_point")]
    zero, total = graph.fresh("zero.values"), graph.fresh(f"{node.inputs[0]}.plus_zero")
    codes = graph.constant(np.uint8(0), "zero")
    source, node.inputs[0] = node.inputs[0], total
    return [Node("DequantizeLinear", [codes, *parameters], [zero]), Node("Add", [source, zero], [total])]


def _has_integer_bias(graph: Graph, node: Node, makers: Mapping[str, Node]) -> bool:
    data, weight = makers.get(node.inputs[0]), makers.get(node.inputs[1])
    is_quantized = data is not None and weight is not None and data.is_quantizer and weight.is_weight
    return is_quantized and len(node.inputs) > 2 and node.inputs[2] in graph.constants


def _integer_bias(graph: Graph, node: Node, makers: Mapping[str, Node], finer: int | None) -> list[Node]:
    """The bias of a convolution in steps of its integer kernel's accumulator.

    Of one that computes in float (``finer`` is None) in steps of its own, as good as float: ONNX Runtime would round a
    bias that is left in float to those of the accumulator there too.
    """
    bias = graph.constants[node.inputs[2]].astype(np.float64)
    data, weight = makers[node.inputs[0]], makers[node.inputs[1]]
    if finer is None:
        step = np.asarray(max(np.abs(bias).max(), 1e-30) / 2**30, np.float32)
    else:
        step = graph.constants[data.inputs[1]] * (graph.constants[weight.inputs[1]] / np.float32(finer))
    codes = graph.constant(np.round(bias / step).astype(np.int32), f"{node.inputs[2]}.codes")
    found = graph.fresh(f"{node.inputs[2]}.values")
    node.inputs[2] = found
    axis = {"axis": 0} if step.ndim else {}
    return [Node("DequantizeLinear", [codes, graph.constant(step, f"{codes}.scale")], [found], axis)]
