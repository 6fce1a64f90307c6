"""The quantized checkpoint: a converted network in one small file, its integer weights packed to their bits.

A safetensors file, whose tensors `crcore._contents` describes. Its metadata have a checksum of them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from crcore._checkpoints import KEY, PortableLayer, array_differences, file_names, matched, setting_differences, write
from crcore._contents import FORM, SCALE, WEIGHT, ZERO_POINT, layers_of, tensors_of
from crcore._errors import CRCoreError
from crcore._packing import code_dtype


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A safetensors file with a converted network. To read one takes NumPy and safetensors, and no framework.

    Args:
        path: the file.
        names: from the network's layer names to those in the file, for layers whose names differ. For backends.

    >>> import tempfile, numpy, safetensors, safetensors.numpy
    >>> from crcore import LSQ
    >>> arrays = {"weight": numpy.array([[-8, 7]], "int8"), "weight_quantizer.scale": numpy.array(0.5, "float32")}
    >>> layer = PortableLayer(arrays, {"kind": "linear"}, {"weight_quantizer": LSQ(bits=4, signed=True)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint = QuantizedCheckpoint(f"{folder}/net.safetensors")
    ...     checkpoint.write({"head": layer}, safetensors.numpy.save_file)
    ...     head = checkpoint.read(safetensors.safe_open)["head"]
    >>> codes, scale, zero_point = (
    ...     head.arrays[entry] for entry in ("weight", "weight_quantizer.scale", "weight_quantizer.zero_point")
    ... )
    >>> ((codes - zero_point) * scale).tolist(), head.quantizers["weight_quantizer"].bits
    ([[-4.0, 3.5]], 4)
    """

    path: str | os.PathLike[str]
    names: Mapping[str, str] | None = None

    def write(self, layers: Mapping[str, PortableLayer], save_file: Callable[..., None]) -> None:
        """Write a converted network; the file is replaced as a whole or not at all.

        Args:
            layers: by name. A quantized weight is given as its integer ``weight``, ``weight_quantizer.scale`` and
                ``weight_quantizer.zero_point`` (none: 0), with the ``weight_quantizer`` that made it, its sign known.
                One and the same array in two layers is stored once.
            save_file: `safetensors.numpy.save_file`.

        Raises:
            CRCoreError: ``names`` does not fit the network, an array is of a type that NumPy or safetensors lacks,
                codes or scales are none that the quantizer gives, a quantizer is none of crcore's, or the file cannot
                be written.
        """
        tensors = tensors_of({file: layers[name] for name, file in file_names(layers, self.names).items()})
        write(self.path, tensors, FORM.described(crc32=_checksum(tensors)), save_file)

    def read(self, safe_open: Callable[..., Any]) -> dict[str, PortableLayer]:
        """All that the file holds.

        Args:
            safe_open: `safetensors.safe_open`.

        Returns:
            layers by their names in the file, as `write` was given them. Codes are of the type of `code_dtype`.

        Raises:
            CRCoreError: the file is missing, damaged, or no quantized checkpoint of this version.
        """
        with FORM.opened(self.path, safe_open) as file:
            metadata = FORM.checked((file.metadata() or {}).get(KEY))
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if metadata.get("crc32") != _checksum(tensors):
                raise CRCoreError("its checksum is another: it was damaged on the way; copy it again")
            return layers_of(tensors)

    def read_for(
        self,
        layers: Mapping[str, PortableLayer],
        channels: Mapping[str, tuple[int, ...]],
        safe_open: Callable[..., Any],
    ) -> dict[str, PortableLayer]:
        """What the file holds for each layer of a float network, checked to fit it in full. For backends.

        Args:
            layers: the float network's layers by name.
            channels: of the layers whose weight can be quantized, the shape of one scale per channel.
            safe_open: `safetensors.safe_open`.

        Returns:
            layers by the network's names.

        Raises:
            CRCoreError: as for `read`; or the file or the network has layers that the other lacks, or a layer's kind,
                settings or arrays differ.
        """
        names = file_names(layers, self.names)
        return matched(self.path, layers, names, self.read(safe_open), partial(_differences, channels))


def _differences(
    channels: Mapping[str, tuple[int, ...]], name: str, mine: PortableLayer, theirs: PortableLayer
) -> list[str]:
    """In what a layer of the float network and its counterpart in the file differ; the first kind of it."""
    axes = theirs.settings.get("axes")
    if axes not in (None, mine.settings.get("axes")):
        return [f"its arrays in the file have the axis order of {axes}, which alone knows it; load it there"]
    if found := setting_differences(mine, theirs):
        return found
    attached = {place: each for place, each in theirs.quantizers.items() if place not in mine.quantizers}
    if attached and (name not in channels or (mine.settings["kind"] == "embedding" and "input_quantizer" in attached)):
        return [f"the file quantizes it ({', '.join(attached)}), which crcore cannot in this network"]
    own = [
        f"{place} is {theirs.quantizers.get(place)!r} in the file, {quantizer!r} in the network; make it the file's"
        for place, quantizer in mine.quantizers.items()
        if theirs.quantizers.get(place) != _with_sign(quantizer, theirs.quantizers.get(place))
    ]
    return own or array_differences(_expected(mine, attached, channels.get(name, ())), theirs.arrays)


def _with_sign(quantizer: Any, other: Any) -> Any:
    """The quantizer, with the sign that the other has got from data."""
    return replace(quantizer, signed=other.signed) if quantizer.signed is None and other is not None else quantizer


def _expected(mine: PortableLayer, attached: Mapping[str, Any], channels: tuple[int, ...]) -> dict[str, Any]:
    """The arrays that a layer of the float network has with these quantizers, by shape and type."""
    arrays = dict(mine.arrays)
    wide = "float64" if WEIGHT in arrays and arrays[WEIGHT].dtype == np.float64 else "float32"
    for place, quantizer in attached.items():
        if place == "input_quantizer":
            arrays |= {f"{place}.{name}": np.empty((), wide) for name in quantizer.parameters}
            continue
        shape = channels if quantizer.per_channel else ()
        arrays[WEIGHT] = np.broadcast_to(np.empty((), code_dtype(quantizer)), arrays[WEIGHT].shape)
        arrays |= {SCALE: np.empty(shape, wide), ZERO_POINT: np.empty(shape, np.int32)}
    return arrays


def _checksum(tensors: Mapping[str, Any]) -> int:
    """CRC-32 of names and little-endian bytes, in the order of names."""
    found = 0
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.astype(tensor.dtype.newbyteorder("<")).tobytes(), zlib.crc32(name.encode(), found))
    return found
