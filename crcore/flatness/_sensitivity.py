"""Loss and accuracy as noise grows: on the inputs, on the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crcore import CRCoreError
from crcore.flatness._corruptions import CORRUPTIONS, check_images, corrupt, corruption_named
from crcore.flatness._estimate import Estimate, estimate
from crcore.flatness._landscape import LossLandscape, Progress, check_count, check_finite

Normalize = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Curve:
    """Mean loss and accuracy over the samples, at each level of noise.

    The band (`Estimate`) is over independent draws of the noise: it would vanish with many draws. How the loss varies
    from sample to sample is not in it; the samples are the same for every draw and level.

    Attributes:
        name: of what grows.
        levels: ``[L]``, such as standard deviations or severities; 0 is the network as it is.
        loss: arrays ``[L]``.
        accuracy: arrays ``[L]`` in percent; None where targets are no labels.
    """

    name: str
    levels: NDArray[np.float64]
    loss: Estimate
    accuracy: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "levels": self.levels.tolist(),
            "loss": self.loss.to_dict(),
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
        }


def noise_sensitivity(
    landscape: LossLandscape,
    images: NDArray[Any],
    normalize: Normalize | None = None,
    *,
    levels: Sequence[float] = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1),
    draws: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Curve:
    """Under Gaussian noise on the inputs: ``normalize(clip(images + level * z, 0, 1))``, ``z`` standard normal.

    Args:
        landscape: of a backend; its labels belong to ``images``.
        images: ``[N, ...]``, floats in [0, 1], before normalization.
        normalize: from images to the network's inputs; None where it takes them as they are.
        levels: standard deviations, where a pixel's range is 1.
        draws: of ``z``, at least 2; each serves all levels.
        seed: of the noise, which is drawn with NumPy: the same on every backend for images of one shape.
        progress: called after each evaluation with the number of evaluations so far, of which there is one for each
            draw and level above 0.

    Raises:
        CRCoreError: images outside of [0, 1], or of another number than labels; negative levels; fewer than two draws;
            a loss that is not finite.
    """
    check_count("draws", draws, 2)
    check_images(images)

    def noisy(level: float, draw: int) -> NDArray[Any]:
        z = np.random.default_rng([seed, draw]).standard_normal(images.shape)
        return np.clip(images + level * z, 0.0, 1.0).astype(images.dtype)

    return _input_curve("noise", landscape, images, normalize, noisy, levels, draws, _Count(progress))


def corruption_sensitivity(
    landscape: LossLandscape,
    images: NDArray[Any],
    normalize: Normalize | None = None,
    *,
    corruptions: Iterable[str] = tuple(CORRUPTIONS),
    channel_axis: int = 1,
    draws: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Curve]:
    """Under common corruptions of severity 0 (none) to 5, as `corrupt` makes them (arXiv 1903.12261).

    Args:
        landscape, images, normalize, seed, progress: as in `noise_sensitivity`.
        corruptions: names in `CORRUPTIONS`.
        channel_axis: of ``images``: 1 as in PyTorch, -1 as in Keras.
        draws: of each noise, at least 2; corruptions without noise are made once.

    Returns:
        one curve for each corruption, by name; its levels are the severities.

    Raises:
        CRCoreError: as `noise_sensitivity` and `corrupt`.
    """
    check_count("draws", draws, 2)
    check_images(images)
    chosen = {name: corruption_named(name) for name in corruptions}
    count = _Count(progress)

    def corrupted(name: str) -> Callable[[float, int], NDArray[Any]]:
        return lambda severity, draw: corrupt(
            images, name, int(severity), channel_axis=channel_axis, random=np.random.default_rng([seed, draw])
        )

    return {
        name: _input_curve(
            name, landscape, images, normalize, corrupted(name), range(6), draws if each.is_random else 1, count
        )
        for name, each in chosen.items()
    }


def weight_sensitivity(
    landscape: LossLandscape,
    *,
    levels: Sequence[float] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3),
    draws: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Curve:
    """Under Gaussian noise on the weights, filter by filter: ``w + level * |w| * z / |z|``, ``z`` standard normal.

    Filter normalization of Li et al., 2018 (arXiv 1712.09913), section 4: networks whose filters differ in scale alone
    are moved alike. Biases and normalization layers stay as they are, as in the authors' program. Of a quantized
    network the float weights are moved, then quantized.

    Args:
        landscape: of a backend.
        levels: the noise's L2 norm on each filter, relative to that of the filter.
        draws: of the direction ``z``, at least 2; each serves all levels.
        seed, progress: as in `noise_sensitivity`.

    Raises:
        CRCoreError: negative levels; fewer than two draws; a loss that is not finite.
    """
    check_count("draws", draws, 2)
    weights, filters = landscape.weights, landscape.filters
    count = _Count(progress)

    def outputs(level: float, draw: int) -> tuple[NDArray[np.float64], NDArray[Any]]:
        direction = _filter_noise(weights, filters, np.random.default_rng([seed, draw]))
        return landscape.evaluate(weights=weights + level * direction)

    return _curve("weights", landscape, outputs, levels, draws, count)


def _filter_noise(
    weights: NDArray[np.float64], filters: NDArray[np.int64], random: np.random.Generator
) -> NDArray[np.float64]:
    """Noise that has, on each filter, the norm of the filter."""
    is_filter = filters >= 0
    noise, found = random.standard_normal(weights.size), np.zeros_like(weights)
    if is_filter.any():
        belongs = filters[is_filter]
        wanted, given = (np.sqrt(np.bincount(belongs, values[is_filter] ** 2)) for values in (weights, noise))
        found[is_filter] = noise[is_filter] * (wanted / np.where(given > 0.0, given, 1.0))[belongs]
    return found


class _Count:
    """Evaluations so far."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done = progress, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done)


def _input_curve(
    name: str,
    landscape: LossLandscape,
    images: NDArray[Any],
    normalize: Normalize | None,
    changed: Callable[[float, int], NDArray[Any]],
    levels: Sequence[float],
    draws: int,
    count: _Count,
) -> Curve:
    if len(images) != len(landscape.y):
        raise CRCoreError(
            f"images must be those of the landscape, in its order: got {len(images)} for {len(landscape.y)} labels"
        )

    def outputs(level: float, draw: int) -> tuple[NDArray[np.float64], NDArray[Any]]:
        x = images if level == 0 else changed(level, draw)
        return landscape.evaluate(x if normalize is None else normalize(x))

    return _curve(name, landscape, outputs, levels, draws, count)


def _curve(
    name: str,
    landscape: LossLandscape,
    outputs: Callable[[float, int], tuple[NDArray[np.float64], NDArray[Any]]],
    levels: Sequence[float],
    draws: int,
    count: _Count,
) -> Curve:
    values = np.asarray(levels, np.float64)
    if values.ndim != 1 or values.size == 0 or not ((values >= 0.0) & np.isfinite(values)).all():
        raise CRCoreError(f"levels must be numbers from 0, got {levels!r}")
    found = np.empty((draws, len(values), 2))
    for place, level in enumerate(levels):
        for draw in range(draws):
            if level == 0 and draw > 0:  # nothing is drawn
                found[draw, place] = found[0, place]
                continue
            found[draw, place] = _loss_and_accuracy(*outputs(level, draw), landscape.y)
            count()
    accuracy = None if np.isnan(found[..., 1]).any() else estimate(found[..., 1])
    return Curve(name, values, estimate(found[..., 0]), accuracy)


def _loss_and_accuracy(losses: NDArray[np.float64], logits: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
    """Means over the samples; NaN for an accuracy where ``y`` are no labels."""
    check_finite("a loss", losses)
    is_label = y.ndim == 1 and np.issubdtype(y.dtype, np.integer) and logits.ndim == 2
    return float(losses.mean()), 100.0 * float((logits.argmax(axis=1) == y).mean()) if is_label else np.nan
