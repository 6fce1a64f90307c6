"""Completion: ranges for what training left in float, so that integer kernels can run from end to end.

Training quantizes what layers multiply with. An integer kernel needs more: sums, pooled maps and what a convolution
hands to them. Those get 8 bits here, from the ranges that they have on a sample. Trained grids are never changed, and
a tensor that also feeds a trained grid gets a grid that subdivides it, so that rounding twice is rounding once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from crcore import CRCoreError, MinMax
from crcore.deploy._graph import DOMAIN, FAKE_QUANTIZE, Graph, Node, expanded
from crcore.deploy._loading import onnx_session
from crcore.deploy._regions import FIXED, integer_region, is_passive, is_used_by, result_of
from crcore.deploy._scales import bound_multipliers, make_room_for_biases

BITS = 8
_STEPS = 2**BITS - 1
_BATCH = 32
# Times the step that the observed range alone would give: what a tensor's other readers lose to a coarser one is more
# than what the reader with the trained grid gains from being rounded to once.
_COARSEST = 1.5


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


def complete(graph: Graph, sample: Mapping[str, Any], *, entire: bool) -> None:
    """Insert 8-bit quantizers where integer kernels need them, in place.

    Args:
        graph: folded.
        sample: what the network takes, by input name.
        entire: whether the network's outputs get a grid too, and operators for which LiteRT alone has integer kernels.
    """
    region = integer_region(graph, litert=entire)
    results = {result_of(graph, node): node.op in FIXED for node in region}
    sources = [name for name in graph.inputs if is_used_by(graph, name, region)]
    ranges = _ranges(graph, [*sources, *results], sample)
    for tensor, fixed in {**dict.fromkeys(sources, False), **results}.items():
        _quantize(graph, tensor, ranges[tensor], fixed=fixed, outputs=entire)
    make_room_for_biases(graph)
    if entire:
        bound_multipliers(graph)


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
        grid = own = _fresh_grid(found)
        for node in trained:
            finer = subdivided(_grid_of(graph, node), None if alone else found)
            if finer is not None and (alone or finer.scale <= _COARSEST * own.scale):
                grid = finer
                break
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
    session = onnx_session(Path("network"), model.SerializeToString()) if wanted else None
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
