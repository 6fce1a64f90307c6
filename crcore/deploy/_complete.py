"""Completion: ranges for what training left in float, so that integer kernels can run from end to end.

Training quantizes what layers multiply with. An integer kernel needs more: sums, pooled maps and what a convolution
hands to them. Those get 8 bits here, from the ranges that they have on a sample. Trained grids are never changed, and
a tensor that also feeds a trained grid gets a grid that subdivides it, so that rounding twice is rounding once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime

from crcore import CRCoreError, MinMax
from crcore.deploy._fold import LINEAR
from crcore.deploy._graph import DOMAIN, FAKE_QUANTIZE, Graph, Node, expanded

BITS = 8
_STEPS = 2**BITS - 1
# Operators whose results are values that they were given, or zero: see `is_passive`.
_PASSIVE = ("Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
# Operators that follow another one without a rounding in between: integer kernels clip where they round.
_ACTIVATIONS = ("Relu", "Clip")
_ELEMENTWISE = ("Add", "Mul", "Sub", "Concat", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu")
_POOLS = ("GlobalAveragePool", "AveragePool")
# Without an integer kernel in ONNX Runtime, where they stay in float, as do the matrix products that they read.
_LITERT = ("Gelu", "Tanh")
_FIXED = ("Sigmoid", "Softmax")  # values in [0, 1); integer kernels insist on a scale of 1 / 256
_BATCH = 32
_LARGEST_MULTIPLIER = 254.0  # XNNPACK, which runs LiteRT's int8 kernels, takes less than 256


@dataclass(frozen=True)
class Grid:
    """``(clip(round(x / scale) + zero_point, lo, hi) - zero_point) * scale``."""

    scale: Any  # 0-d float32
    zero_point: int
    lo: int
    hi: int

    @property
    def low(self) -> float:
        """The smallest value."""
        return (self.lo - self.zero_point) * float(self.scale)

    @property
    def high(self) -> float:
        """The largest value."""
        return (self.hi - self.zero_point) * float(self.scale)


def fits_byte(quantizer: Node) -> bool:
    """Whether the codes of a ``FakeQuantize`` fit the 8 bits of an integer kernel, a zero among them."""
    return quantizer.attributes["hi"] - quantizer.attributes["lo"] <= _STEPS and not quantizer.attributes.get("binary")


def complete(graph: Graph, sample: Mapping[str, Any], *, entire: bool) -> None:
    """Insert 8-bit quantizers where integer kernels need them, in place.

    Args:
        graph: folded.
        sample: what the network takes, by input name.
        entire: whether the network's outputs get a grid too, and operators for which LiteRT alone has integer kernels.
    """
    region = _integer_region(graph, (*_ELEMENTWISE, *_POOLS, *_FIXED, *(_LITERT if entire else ())))
    results = {_result(graph, node): node.op in _FIXED for node in region}
    sources = [name for name in graph.inputs if _is_used_by(graph, name, region)]
    ranges = _ranges(graph, [*sources, *results], sample)
    for tensor, fixed in {**dict.fromkeys(sources, False), **results}.items():
        _quantize(graph, tensor, ranges[tensor], fixed=fixed, outputs=entire)
    make_room_for_biases(graph)
    if entire:
        _bound_multipliers(graph)


def is_passive(graph: Graph, node: Node) -> bool:
    """Whether an operator only moves values about; a ``Pad`` adds zeros at most."""
    fills = node.op == "Pad" and node.attributes.get("mode", "constant") == "constant" and node.inputs[2:]
    if fills and fills[0] and np.any(graph.constants.get(fills[0], 1)):
        return False
    return node.op in _PASSIVE


def _integer_region(graph: Graph, operators: tuple[str, ...]) -> list[Node]:
    """The operators that can compute with integers: their inputs come from such, and such read their results.

    A sum that a layer normalization reads, for instance, is better left in float, with what leads to it.
    """
    makers, readers = graph.makers(), graph.readers()
    region = {id(node) for node in graph.nodes if _can_be_integer(graph, node, operators, makers)}
    parts = {id(node) for node in graph.nodes if is_passive(graph, node) or _belongs(graph, node, makers)}
    while True:
        leaving = {
            id(node)
            for node in graph.nodes
            if id(node) in region
            and not (
                _reads_integers(graph, node, region, makers)
                and _is_read_by_integers(graph, node, parts, region, readers)
            )
        }
        if not leaving:
            return [node for node in graph.nodes if id(node) in region]
        region -= leaving


def _can_be_integer(graph: Graph, node: Node, operators: tuple[str, ...], makers: Mapping[str, Node]) -> bool:
    if node.op not in LINEAR:
        return node.op in operators and not _belongs(graph, node, makers)
    data, weight = makers.get(node.inputs[0]), makers.get(node.inputs[1])
    return data is not None and data.is_quantizer and weight is not None and weight.is_weight and fits_byte(data)


def _belongs(graph: Graph, node: Node, makers: Mapping[str, Node]) -> bool:
    """Whether the operator is part of the one before it: an activation, or the bias of a matrix product."""
    if node.op in _ACTIVATIONS:
        return True
    before = makers.get(node.inputs[0]) if node.op == "Add" else None
    return before is not None and before.op == "MatMul" and node.inputs[1] in graph.constants


def _reads_integers(graph: Graph, node: Node, region: set[int], makers: Mapping[str, Node]) -> bool:
    if node.op in LINEAR:
        return True
    for name in node.inputs:
        maker = makers.get(name)
        while maker is not None and (is_passive(graph, maker) or _belongs(graph, maker, makers)):
            name, maker = maker.inputs[0], makers.get(maker.inputs[0])
        known = name in graph.constants or name in graph.inputs or name == ""
        if not known and (maker is None or not (maker.is_quantizer or id(maker) in region)):
            return False
    return True


def _is_read_by_integers(
    graph: Graph, node: Node, parts: set[int], region: set[int], readers: Mapping[str, list[Node]]
) -> bool:
    if node.output in graph.outputs:
        return True
    return all(
        reader.is_quantizer
        or id(reader) in region
        or (id(reader) in parts and _is_read_by_integers(graph, reader, parts, region, readers))
        for reader in readers[node.output]
    )


def _result(graph: Graph, node: Node) -> str:
    """Where the operator's result is rounded: behind the activation that belongs to it."""
    makers, readers = graph.makers(), graph.readers()
    tensor = node.output
    while tensor not in graph.outputs and len(readers[tensor]) == 1 and _belongs(graph, readers[tensor][0], makers):
        tensor = readers[tensor][0].output
    return tensor


def _is_used_by(graph: Graph, tensor: str, region: list[Node]) -> bool:
    """Whether an operator of the region reads the tensor as it is, or moved about."""
    inside = {id(node) for node in region}
    return any(
        id(reader) in inside or (is_passive(graph, reader) and _is_used_by(graph, reader.output, region))
        for reader in graph.readers()[tensor]
    )


def _quantize(graph: Graph, tensor: str, found: tuple[float, float], *, fixed: bool, outputs: bool) -> None:
    """Give a tensor its grid, and what only moves its values about the same one."""
    if tensor in graph.outputs and not outputs:
        return
    readers = graph.readers()
    trained = list(_trained_grids(graph, tensor, readers))
    alone = len(trained) == 1 and not _has_other_readers(graph, tensor, readers)
    if alone and readers[tensor] == [trained[0]]:
        return  # it is rounded to the trained grid right away
    if fixed:
        grid = Grid(np.float32(1 / 256), 0, 0, _STEPS)
    else:
        needed = None if alone else found
        candidates = [subdivided(_grid_of(graph, node), needed) for node in trained]
        grid = next((candidate for candidate in candidates if candidate is not None), None) or _fresh_grid(found)
    _insert(graph, tensor, grid)


def _insert(graph: Graph, tensor: str, grid: Grid) -> None:
    readers = graph.readers()[tensor]
    same = next((node for node in readers if node.is_quantizer and _grid_of(graph, node) == grid), None)
    if same is not None:  # what read the tensor before it reads it from now on
        graph.nodes.remove(same)
        _insert_after(graph, tensor, same)
    else:
        output = tensor in graph.outputs
        source = tensor
        if output:  # the quantizer takes over its name
            source = graph.fresh(f"{tensor}.float")
            maker = graph.makers()[tensor]
            maker.outputs = [source if name == tensor else name for name in maker.outputs]
        same = Node(
            f"{DOMAIN}.{FAKE_QUANTIZE}",
            [
                source,
                graph.constant(grid.scale, f"{tensor}.scale"),
                graph.constant(np.int32(grid.zero_point), f"{tensor}.zero_point"),
            ],
            [tensor if output else graph.fresh(f"{tensor}.quantized")],
            {"lo": grid.lo, "hi": grid.hi, "layer": ""},
        )
        _insert_after(graph, source, same)
        if output:
            for reader in readers:
                reader.inputs = [source if name == tensor else name for name in reader.inputs]
            tensor = source
    for reader in readers:
        if reader is not same:
            reader.inputs = [same.output if name == tensor else name for name in reader.inputs]
    for reader in readers:
        if is_passive(graph, reader) and not _is_rounded_next(graph, reader.output, grid):
            _insert(graph, reader.output, grid)


def _insert_after(graph: Graph, tensor: str, node: Node) -> None:
    maker = graph.makers().get(tensor)
    graph.nodes.insert(0 if maker is None else graph.nodes.index(maker) + 1, node)


def _is_rounded_next(graph: Graph, tensor: str, grid: Grid) -> bool:
    readers = graph.readers()[tensor]
    return len(readers) == 1 and readers[0].is_quantizer and _grid_of(graph, readers[0]) == grid


def _trained_grids(graph: Graph, tensor: str, readers: Mapping[str, list[Node]]) -> Iterator[Node]:
    """The trained quantizers that read the tensor, also behind operators that only move its values about."""
    for reader in readers[tensor]:
        if reader.is_quantizer and not reader.attributes.get("binary"):
            yield reader
        elif is_passive(graph, reader):
            yield from _trained_grids(graph, reader.output, readers)


def _has_other_readers(graph: Graph, tensor: str, readers: Mapping[str, list[Node]]) -> bool:
    return tensor in graph.outputs or any(
        not reader.is_quantizer and (not is_passive(graph, reader) or _has_other_readers(graph, reader.output, readers))
        for reader in readers[tensor]
    )


def _grid_of(graph: Graph, node: Node) -> Grid:
    scale, zero_point = (graph.constants[name] for name in node.inputs[1:])
    return Grid(np.float32(scale), int(zero_point), node.attributes["lo"], node.attributes["hi"])


def subdivided(trained: Grid, needed: tuple[float, float] | None) -> Grid | None:
    """An 8-bit grid ``k`` times finer than a trained one, ``k`` odd, that holds ``needed`` (None: the trained range).

    With ``k`` odd the ties of the trained grid are no ties of the finer one, so that rounding to this and then to that
    gives what rounding to that alone gives. None: even ``k = 1`` does not reach far enough.
    """
    low, high = (trained.low, trained.high) if needed is None else (min(needed[0], 0.0), max(needed[1], 0.0))
    step = float(trained.scale)
    if not trained.lo <= trained.zero_point <= trained.hi:  # without a zero, which the finer one needs
        return None
    for k in range(_STEPS, 0, -2):
        lo, hi = round(low * k / step), round(high * k / step)
        if hi - lo <= _STEPS:
            # Unsigned, with the room that is left over above the range.
            zero_point = -lo if lo < 0 else 0
            if k == 1 and trained.hi - trained.lo == _STEPS and (needed is None or _holds(trained, low, high)):
                return trained
            return Grid(np.float32(trained.scale / np.float32(k)), zero_point, 0, _STEPS)
    return None


def _holds(grid: Grid, low: float, high: float) -> bool:
    half = 0.5 * float(grid.scale)
    return grid.low - half <= low and high <= grid.high + half


def _fresh_grid(found: tuple[float, float]) -> Grid:
    """The observed range, by the core's own rule."""
    quantizer = MinMax(BITS, signed=False, symmetric=False)
    low, high = quantizer.init(np.array(found, np.float32), axes=(0,))
    scale, zero_point = quantizer.affine(low, high)
    return Grid(np.float32(scale.item()), int(zero_point.item()), 0, _STEPS)


def _ranges(graph: Graph, tensors: list[str], sample: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of each tensor, as the trained network computes on the sample."""
    model = expanded(graph.to_model())
    wanted = [name for name in dict.fromkeys(tensors) if name not in graph.inputs]
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted if name not in known
    )
    found = {name: (float(sample[name].min()), float(sample[name].max())) for name in tensors if name in graph.inputs}
    size = min(len(array) for array in sample.values()) if wanted else 0
    session = float_session(model) if wanted else None
    for start in range(0, size, _BATCH):
        batch = {name: array[start : start + _BATCH] for name, array in sample.items()}
        values = [] if session is None else session.run(wanted, batch)
        for name, value in zip(wanted, values, strict=True):
            low, high = found.get(name, (np.inf, -np.inf))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    bad = [name for name, ends in found.items() if not np.isfinite(ends).all()]
    if bad:
        raise CRCoreError(
            f"the network gives NaN or infinity on the sample (at {bad[0]!r}); give inputs as in training"
        )
    return found


def float_session(model: onnx.ModelProto) -> Any:
    """A session of ONNX Runtime on a model in memory."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def make_room_for_biases(graph: Graph, finer: Mapping[str, int] | None = None) -> None:
    """Let every bias fit the accumulator of 32 bits, whose step is the product of the scales.

    A channel that batch normalization has all but switched off has a scale near zero and a bias that is not: its scale
    is raised to where the bias takes 30 bits, which leaves what the channel's weights contribute negligible.

    Args:
        graph: changed in place.
        finer: by weight, by what whole number its scale is going to be divided.
    """
    makers = graph.makers()
    for node in graph.nodes:
        if node.op not in LINEAR or len(node.inputs) < 3 or node.inputs[2] not in graph.constants:
            continue
        if node.op == "ConvTranspose":  # without an integer kernel
            continue
        data, weight = makers.get(node.inputs[0]), makers.get(node.inputs[1])
        if data is None or not data.is_quantizer or weight is None or not weight.is_weight:
            continue
        scale = graph.constants[weight.inputs[1]]
        step = graph.constants[data.inputs[1]] / np.float32((finer or {}).get(weight.output, 1))
        least = np.abs(graph.constants[node.inputs[2]]) / (step * np.float32(2**30))
        least = np.maximum(least if scale.ndim else least.max(), np.float32(2.0**-100)).astype(np.float32)
        if (np.abs(scale) < least).any():
            raised = np.where(np.abs(scale) < least, least, scale)
            weight.inputs[1] = graph.constant(raised.astype(np.float32), f"{weight.inputs[1]}.raised")


def _bound_multipliers(graph: Graph) -> None:
    """Keep the step of an accumulator below 254 steps of the result, since XNNPACK refuses a network with more.

    Such a channel has next to no variance, by which batch normalization divided: its result is one value, or clipped on
    either side of its grid, with a step of 254 as well.
    """
    makers, readers = graph.makers(), graph.readers()
    for node in graph.nodes:
        data, weight = (makers.get(name) for name in node.inputs[:2]) if node.op in LINEAR else (None, None)
        if data is None or weight is None or not (data.is_quantizer and weight.is_weight):
            continue
        after = readers[_result(graph, node)]
        if len(after) != 1 or not after[0].is_quantizer:
            continue
        most = _LARGEST_MULTIPLIER * graph.constants[after[0].inputs[1]] / graph.constants[data.inputs[1]]
        scale = graph.constants[weight.inputs[1]]
        if (np.abs(scale) > most).any():
            bounded = np.clip(scale, -most, most).astype(np.float32)
            weight.inputs[1] = graph.constant(bounded, f"{weight.inputs[1]}.bounded")
