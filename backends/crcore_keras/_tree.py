"""The layers in a model, and what they are called there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def children(layer: Any) -> dict[str, Any]:
    """The layers that a layer or model holds itself, by name, in the order in which it registered them."""
    found: dict[str, Any] = {}
    for child in layer._flatten_layers(include_self=False, recursive=False):
        name, n = child.name, 1
        while name in found:  # Keras makes names unique in functional models alone
            name, n = f"{child.name}_{n}", n + 1
        found[name] = child
    return found


def walk(layer: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every layer in ``layer``, itself included, each once, with its name from there."""
    seen: set[int] = set()

    def visit(name: str, layer: Any) -> Iterator[tuple[str, Any]]:
        if id(layer) not in seen:
            seen.add(id(layer))
            yield name, layer
            for own, child in children(layer).items():
                yield from visit(f"{name}.{own}" if name else own, child)

    return visit(name, layer)
