"""Quantized files that are changed behind crcore's back: taken apart and put together by their documented form."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

METADATA = {"kind": "quantized", "version": 1}


def description(path: Path) -> bytes:
    """The JSON that says what the tensors hold."""
    return zlib.decompress(load_file(path)["layers"].tobytes())


def described(text: bytes) -> Any:
    return np.frombuffer(zlib.compress(text), np.uint8)


def saved(tensors: dict[str, Any], path: Path, metadata: Any = None) -> Path:
    """A file with these tensors and the checksum that belongs to them."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].tobytes(), zlib.crc32(name.encode(), crc))
    save_file(tensors, path, metadata={"crcore": json.dumps({**METADATA, "crc32": crc} | (metadata or {}))})
    return path


def rewritten(path: Path, new: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """The file with other tensors or another description."""
    tensors, text = load_file(path), json.loads(description(path))
    change(tensors, text)
    return saved(tensors | {"layers": described(json.dumps(text).encode())}, new)


def flips(size: int) -> st.SearchStrategy[dict[int, int]]:
    """Some bytes of ``size``, each with what is to be added to it."""
    return st.dictionaries(st.integers(0, size - 1), st.integers(1, 255), min_size=1, max_size=4)


def flipped(data: bytes, flips: dict[int, int]) -> bytes:
    changed = bytearray(data)
    for place, difference in flips.items():
        changed[place] = (changed[place] + difference) % 256
    return bytes(changed)


@st.composite
def damaged(draw: st.DrawFn, path: Path, bad: Path) -> Path:
    """A file with some other bytes: as they lie; or, with the checksum that fits, in its description or its numbers."""
    tensors = load_file(path)
    kind = draw(st.sampled_from(["file", "layers", "codes", "float32"]))
    whole = {"file": path.read_bytes(), "layers": description(path)}.get(kind) or tensors[kind].tobytes()
    changed = flipped(whole, draw(flips(len(whole))))
    if kind == "file":
        bad.write_bytes(changed)
        return bad
    other = described(changed) if kind == "layers" else np.frombuffer(changed, tensors[kind].dtype)
    return saved(tensors | {kind: other}, bad)
