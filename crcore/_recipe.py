"""The recipe: what is quantized how, and how the network is trained to agree with its own average."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from crcore._consistency import Consistency
from crcore._divergences import js_divergence, kl_divergence, mse_divergence
from crcore._ema import EMA
from crcore._errors import CRCoreError
from crcore._grid import check_bits
from crcore._oscillation import Dampening, Freezing
from crcore._quantizers import LSQ, PACT, DoReFa, LSQPlus, MinMax
from crcore._schedules import Constant, Ramp
from crcore._typing import Quantizer, Role

VERSION = 1

# What a saved recipe may name. Reading one looks names up here and never imports or runs anything.
_VALUES: Mapping[str, type] = MappingProxyType(
    {
        cls.__name__: cls
        for cls in (LSQ, LSQPlus, PACT, DoReFa, MinMax, Constant, Ramp, Consistency, EMA, Dampening, Freezing)
    }
)
# Entries that recipes were saved without before there were any, and still are where they are None.
_NEWER = frozenset({"dampening", "freezing"})
_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {function.__name__: function for function in (kl_divergence, js_divergence, mse_divergence)}
)


@dataclass(frozen=True)
class LayerQuantizers:
    """What one layer's weight and input are quantized with; None leaves that tensor in float."""

    weights: Quantizer | None
    activations: Quantizer | None


@dataclass(frozen=True)
class Recipe:
    """What is quantized how, plus consistency and EMA. The one description that both backends read.

    Two recipes are equal if and only if they behave the same, on every model: choices that depend on the role (signed
    weights) are filled in, numbers become constant schedules, what cannot act (a warm-up beyond its cap, the divergence
    of a zero weight) is dropped, the order of ``skip`` and ``overrides`` plays no part.

    Args:
        weights: the quantizer of each layer's weight; None leaves weights in float.
        activations: the quantizer of each layer's input, per tensor; None leaves activations in float.
        first_last_bits: width of the first and the last layer; None treats them like the rest.
        overrides: layer-name pattern -> ``{"weights": quantizer, "activations": quantizer}``. Either key may be left
            out, which keeps what the layer has without the override, or be None, which leaves that tensor in float.
        skip: layer-name patterns that stay in float.
        consistency: the consistency term; None trains plain QAT.
        ema: the teacher's average; None where there is no teacher.
        dampening, freezing: two remedies for weights that oscillate between integers; None for neither.

    Patterns are those of `fnmatch` (``*`` crosses dots). One matches a layer by its own name or by that of a module it
    is in, so ``"encoder"`` covers ``"encoder.0.attention"``. An exact name wins over a pattern; a layer that two
    patterns override is an error, as is a pattern without a layer.

    Raises:
        CRCoreError: a value of the wrong kind; per-channel activations (no integer kernel can undo them); a remedy for
            oscillations without weights that have a learned scale.

    >>> recipe = Recipe(LSQ(bits=4, per_channel=True), LSQ(bits=4), skip="head")
    >>> recipe == Recipe.from_dict(recipe.to_dict())
    True
    >>> plan = recipe.assign(["stem", "body", "head"])
    >>> plan["stem"].weights.bits, plan["body"].weights.bits, plan["head"]
    (8, 4, None)
    """

    weights: Quantizer | None
    activations: Quantizer | None
    first_last_bits: int | None = field(default=8, kw_only=True)
    overrides: Mapping[str, Mapping[str, Quantizer | None]] = field(default_factory=dict, kw_only=True)
    skip: Sequence[str] = field(default=(), kw_only=True)
    consistency: Consistency | None = field(default=None, kw_only=True)
    ema: EMA | None = field(default=None, kw_only=True)
    dampening: Dampening | None = field(default=None, kw_only=True)
    freezing: Freezing | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "weights", _for_role("weights", self.weights))
        set_(self, "activations", _for_role("activations", self.activations))
        if self.first_last_bits is not None:
            check_bits(self.first_last_bits)
            for name in ("weights", "activations"):  # an error here, not when a model is met
                _with_bits(name, getattr(self, name), self.first_last_bits)
            if all(q is None or q.bits == self.first_last_bits for q in (self.weights, self.activations)):
                set_(self, "first_last_bits", None)  # one spelling per behaviour
        skip = (self.skip,) if isinstance(self.skip, str) else self.skip
        if not isinstance(skip, Sequence) or not all(isinstance(pattern, str) for pattern in skip):
            raise CRCoreError(f"skip takes layer-name patterns, got {self.skip!r}; for example skip=('head', 'rnn.*')")
        set_(self, "skip", tuple(sorted(set(skip))))
        if not isinstance(self.overrides, Mapping):
            raise CRCoreError(
                f"overrides maps layer-name patterns to quantizers, got {self.overrides!r}; "
                "for example overrides={'blocks.*': {'weights': LSQ(bits=8)}}"
            )
        if not all(isinstance(pattern, str) for pattern in self.overrides):
            raise CRCoreError(f"overrides maps layer-name patterns (text) to quantizers, got {list(self.overrides)!r}")
        set_(self, "overrides", {pattern: _override(pattern, given) for pattern, given in self.overrides.items()})
        kinds = {"consistency": Consistency, "ema": EMA, "dampening": Dampening, "freezing": Freezing}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind | None):
                raise CRCoreError(f"{name} must be a {kind.__name__} or None, got {getattr(self, name)!r}")
        if self.dampening == Dampening(0.0):
            set_(self, "dampening", None)
        self._check_remedies()

    def assign(self, layers: Sequence[str], modules: Sequence[str] = ()) -> dict[str, LayerQuantizers | None]:
        """The quantizers of each layer; None for a layer that is skipped.

        Args:
            layers: names of the layers that can be quantized, in the order in which data meets them. The first and the
                last of them get ``first_last_bits``, skipped or not.
            modules: names that a ``skip`` pattern may also cover, such as parameters and layers of unknown kinds.

        Raises:
            CRCoreError: a pattern matches nothing, or two patterns override one layer.
        """
        self._check_patterns([*layers, *modules])
        plan: dict[str, LayerQuantizers | None] = {}
        for index, name in enumerate(layers):
            quantizers = {"weights": self.weights, "activations": self.activations}
            if self.first_last_bits is not None and index in (0, len(layers) - 1):
                quantizers = {key: _with_bits(key, value, self.first_last_bits) for key, value in quantizers.items()}
            quantizers |= self._override_of(name)
            plan[name] = None if self.skips(name) else LayerQuantizers(**quantizers)
        return plan

    def skips(self, name: str) -> bool:
        """Whether the layer, or a module that it is in, is to stay in float."""
        return any(_matches(name, pattern) for pattern in self.skip)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON, with the ``version`` of its form.

        Raises:
            CRCoreError: a quantizer, schedule or divergence that is not crcore's own, which a file cannot name.
        """
        entries = {entry.name: _encode(getattr(self, entry.name)) for entry in fields(self)}
        return {"version": VERSION} | {k: v for k, v in entries.items() if k not in _NEWER or v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` described. Runs no code that the dictionary names.

        Raises:
            CRCoreError: another version, an unknown or missing entry, or a value that is not allowed.
        """
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, Mapping) else data
            raise CRCoreError(
                f"a recipe of version {VERSION} is expected, got {version!r}; save it again with to_dict()"
            )
        names = {name.name for name in fields(cls)}
        given = set(data) - {"version"}
        if given | _NEWER != names:
            raise CRCoreError(
                f"a recipe has the entries {sorted(names)}; unknown: {sorted(given - names)}, "
                f"missing: {sorted(names - _NEWER - given)}"
            )
        return cls(**{name: _decode(data[name]) for name in given})

    def _check_remedies(self) -> None:
        given = [self.weights, *(override.get("weights") for override in self.overrides.values())]
        quantizers = [quantizer for quantizer in given if quantizer is not None]
        for remedy in (self.dampening, self.freezing):
            if remedy is None:
                continue
            if not quantizers:
                raise CRCoreError(f"{remedy} acts on quantized weights, and this recipe leaves all of them in float")
            for quantizer in quantizers:
                remedy.check(quantizer)

    def _override_of(self, name: str) -> Mapping[str, Quantizer | None]:
        if name in self.overrides:
            return self.overrides[name]
        matching = [pattern for pattern in self.overrides if _matches(name, pattern)]
        if len(matching) > 1:
            raise CRCoreError(
                f"overrides {matching} all match layer {name!r}; make the patterns exclude each other, "
                f"or add an override for exactly {name!r}"
            )
        return self.overrides[matching[0]] if matching else {}

    def _check_patterns(self, names: Sequence[str]) -> None:
        for option, patterns in (("skip", self.skip), ("overrides", self.overrides)):
            for pattern in patterns:
                if not any(_matches(name, pattern) for name in names):
                    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names)[:3]
                    raise CRCoreError(
                        f"{option} pattern {pattern!r} matches no layer of this model; names are for example "
                        + ", ".join(map(repr, near))
                    )


def _for_role(name: str, quantizer: Quantizer | None) -> Quantizer | None:
    if quantizer is None:
        return None
    role: Role = "weight" if name == "weights" else "activation"
    if isinstance(quantizer, type) or not isinstance(quantizer, Quantizer):
        raise CRCoreError(f"{name} must be a quantizer such as LSQ(bits=4), or None for float; got {quantizer!r}")
    if role == "activation" and quantizer.per_channel:
        raise CRCoreError(
            "activations are quantized per tensor, since an integer kernel cannot undo one scale per input channel; "
            f"use {type(quantizer).__name__}(bits={quantizer.bits}) without per_channel"
        )
    return quantizer.for_role(role)


def _override(pattern: str, given: Any) -> dict[str, Quantizer | None]:
    if not isinstance(given, Mapping) or not given or not set(given) <= {"weights", "activations"}:
        raise CRCoreError(
            f"overrides[{pattern!r}] must be a dictionary with 'weights', 'activations' or both, got {given!r}; "
            f"for example overrides={{{pattern!r}: {{'weights': LSQ(bits=8)}}}}"
        )
    return {name: _for_role(name, quantizer) for name, quantizer in given.items()}


def _with_bits(name: str, quantizer: Any, bits: int) -> Any:
    return None if quantizer is None else _for_role(name, replace(quantizer, bits=bits))


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if callable(value) and value in _FUNCTIONS.values():
        return {"function": next(name for name, function in _FUNCTIONS.items() if function is value)}
    if is_dataclass(value) and _VALUES.get(type(value).__name__) is type(value):
        return {"type": type(value).__name__} | {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    raise CRCoreError(f"{value!r} cannot be saved: a recipe file can name {sorted([*_VALUES, *_FUNCTIONS])}")


def _decode(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_decode(item) for item in data)
    if not isinstance(data, Mapping):
        return data
    # Text, because overrides may be for layers that are called "type" or "function": those lead to a dictionary.
    if isinstance(data.get("function"), str):
        return _lookup(_FUNCTIONS, data["function"])
    if not isinstance(data.get("type"), str):
        return {name: _decode(item) for name, item in data.items()}
    cls = _lookup(_VALUES, data["type"])
    arguments = {name: _decode(item) for name, item in data.items() if name != "type"}
    unknown = set(arguments) - {f.name for f in fields(cls)}
    if unknown:
        raise CRCoreError(f"{cls.__name__} has no {sorted(unknown)}; the recipe comes from another version of crcore")
    try:
        return cls(**arguments)
    except TypeError as error:  # a required argument is missing, or a value is of the wrong kind
        raise CRCoreError(f"the recipe's {cls.__name__} cannot be read: {error}") from None


def _lookup(known: Mapping[str, Any], name: Any) -> Any:
    if not isinstance(name, str) or name not in known:
        raise CRCoreError(f"a recipe file can name {sorted(known)}, got {name!r}")
    return known[name]
