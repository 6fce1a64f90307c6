"""What is stored beside the weights of a network, whatever the backend."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import crcore as cr
from crcore.cli._errors import CommandError, one_line


@dataclass(frozen=True)
class NetworkInfo:
    """What has to be known to rebuild a network and to feed it."""

    role: str  # "float", "student" or "teacher"
    model: str
    recipe: dict[str, Any] | None  # Recipe.to_dict(), None for the float network
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    image_size: int | None  # as it was asked for
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str
    versions: dict[str, str]
    # Which training images were labeled; None where an earlier version did not say.
    labels: int | None = None
    seed: int | None = None

    def to_metadata(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"kind": "network", **asdict(self)}


def info_from(metadata: dict[str, Any], path: Path) -> NetworkInfo:
    """What `NetworkInfo.to_metadata` gave; `path` is where it was read."""
    if metadata.get("kind") == "quantized":
        raise CommandError(
            f"{path} holds packed integers, which cannot be trained, measured or exported; give the student or teacher "
            "checkpoint that it was made from"
        )
    if metadata.get("kind") != "network":
        raise CommandError(
            f"{path} holds the state of an unfinished run, not a network; give a float, student or teacher checkpoint"
        )
    try:
        given = {name: value for name, value in metadata.items() if name != "kind"}
        for name in ("classes", "size", "mean", "std"):
            given[name] = tuple(given[name])
        return NetworkInfo(**given)
    except (KeyError, TypeError) as error:
        raise CommandError(
            f"{path}: its metadata are not those of this version of crcore ({one_line(error)}); train again"
        ) from error


def network_recipe(info: NetworkInfo, path: Path) -> cr.Recipe | None:
    """The recipe of a checkpoint, None for a float network."""
    if info.recipe is None:
        return None
    try:
        return cr.Recipe.from_dict(info.recipe)
    except cr.CRCoreError as error:
        raise CommandError(
            f"{path}: its recipe cannot be read ({one_line(error)}); was it made by a newer crcore?"
        ) from error
