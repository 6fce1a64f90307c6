"""The largest loss in a ball around the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crcore import CRCoreError
from crcore.flatness._landscape import LossLandscape, Progress, check_count, check_finite


@dataclass(frozen=True)
class Sharpness:
    """How much the mean loss can grow nearby.

    Attributes:
        loss: at the weights.
        increase: the largest that was found, at least 0; a lower bound of the largest there is.
        radius, steps: as asked for.
    """

    loss: float
    increase: float
    radius: float
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def sharpness(
    landscape: LossLandscape, radius: float = 0.01, steps: int = 10, *, progress: Progress | None = None
) -> Sharpness:
    """The largest increase of the mean loss over ``|d| <= radius * |weights|``, by projected gradient ascent.

    Keskar et al., 2017 (arXiv 1609.04836), section 2.2.2, with a ball for the box. With one step it is the perturbation
    of SAM, ``d = radius * |weights| * g / |g|`` (Foret et al., 2021, arXiv 2010.01412, equation 2). More steps have the
    length ``2.5 / steps`` of the radius, so that the border is within reach of any turn (Madry et al., 2018,
    arXiv 1706.06083).

    Args:
        landscape: of a backend.
        radius: relative to the L2 norm of all weights, > 0.
        steps: of ascent; a gradient and an evaluation each.
        progress: called after each step with the number of steps so far.

    Raises:
        CRCoreError: a radius that is not above 0; steps below 1; a loss or a gradient is not finite.
    """
    check_count("steps", steps)
    if not 0.0 < radius < np.inf:
        raise CRCoreError(
            f"radius must be above 0, got {radius!r}; 0.01 moves the weights by one percent of their norm"
        )
    weights = landscape.weights
    reach = radius * float(np.linalg.norm(weights))

    def mean_loss() -> float:
        losses = landscape.evaluate(weights=weights + moved)[0]
        check_finite("a loss", losses)
        return float(losses.mean())

    moved = np.zeros_like(weights)
    loss = largest = mean_loss()
    for step in range(steps):
        gradient = landscape.gradient(weights + moved)
        check_finite("a gradient", gradient)
        norm = np.linalg.norm(gradient)
        if norm > 0.0:
            moved = moved + 2.5 * reach / steps * gradient / norm
        moved *= min(1.0, reach / max(float(np.linalg.norm(moved)), 1e-300))
        largest = max(largest, mean_loss())
        if progress is not None:
            progress(step + 1)
    return Sharpness(loss, largest - loss, radius, steps)
