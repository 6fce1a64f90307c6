"""The grid of a sweep: `--vary NAME=V1,V2,...`, each value read and checked as the option --NAME is."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crcore.cli._errors import CommandError
from crcore.cli._settings import Settings

TOGETHER = {"bits": ("weight_bits", "activation_bits")}  # axes that set several options to one value
NOT_VARIED = ("methods", "seeds", "init", "engine", "evaluate_every")


@dataclass(frozen=True)
class Axis:
    """One `--vary`."""

    name: str  # as typed: "consistency-weight", "bits"
    values: tuple[str, ...]  # as typed

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that it sets."""
        return settings_of(self.name)

    def value(self, settings: Settings) -> Any:
        """Its value at a point."""
        return getattr(settings, self.settings[0])

    def options(self, value: str) -> list[str]:
        """The options that give a value."""
        names = [name.replace("_", "-") for name in self.settings]
        if self.name in ("flip", "amp"):
            if value not in ("yes", "no"):
                raise CommandError(f"--vary {self.name}: a value is yes or no, got {value!r}")
            return [f"--{name}" if value == "yes" else f"--no-{name}" for name in names]
        return [f"--{name}={value}" for name in names]


def settings_of(axis: str) -> tuple[str, ...]:
    """The settings that an axis of this name sets."""
    return TOGETHER.get(axis, (axis.replace("-", "_"),))


def names() -> tuple[str, ...]:
    """What can be varied."""
    single = (name.replace("_", "-") for name in Settings.__dataclass_fields__ if name not in NOT_VARIED)
    return (*single, *TOGETHER)


def axis(text: str) -> Axis:
    """The argparse type of `--vary`.

    >>> axis("ramp=0.1,0.5")
    Axis(name='ramp', values=('0.1', '0.5'))
    """
    name, equals, listed = text.partition("=")
    values = tuple(value.strip() for value in listed.split(","))
    if not equals or not all(values):
        raise argparse.ArgumentTypeError(f"must be NAME=V1,V2,... such as consistency-weight=0,0.5,1; got {text!r}")
    if name not in names():
        raise argparse.ArgumentTypeError(f"{name!r} cannot be varied; choose from {', '.join(names())}")
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"a value is given twice in {text!r}; give each once")
    return Axis(name, values)


def check_axes(axes: Sequence[Axis]) -> None:
    """Refuse two axes of one setting."""
    taken: dict[str, str] = {}
    for one in axes:
        for setting in one.settings:
            if setting in taken:
                raise CommandError(f"--vary {taken[setting]} and --vary {one.name} set the same; give one of them")
            taken[setting] = one.name


def points(axes: Sequence[Axis]) -> list[list[str]]:
    """The options of each point of the grid; the last axis changes fastest.

    >>> points([Axis("ramp", ("0.1", "0.5")), Axis("bits", ("2",))])
    [['--ramp=0.1', '--weight-bits=2', '--activation-bits=2'], ['--ramp=0.5', '--weight-bits=2', '--activation-bits=2']]
    """
    check_axes(axes)
    grid = itertools.product(*([one.options(value) for value in one.values] for one in axes))
    return [[option for options in point for option in options] for point in grid]
