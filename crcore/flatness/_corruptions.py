"""Common corruptions of small images, with the severities of CIFAR-10-C.

Hendrycks & Dietterich, 2019 (arXiv 1903.12261): those of the benchmark, and of its extra ones, that NumPy and SciPy can
make. The amounts are those of the authors' program for 32x32 images (github.com/hendrycks/robustness,
ImageNet-C/create_c/make_cifar_c.py); their results differ by a rounding to 8 bits, which is left out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from crcore import CRCoreError

Images = NDArray[Any]  # [N, H, W, C], in [0, 1]
Random = np.random.Generator


@dataclass(frozen=True)
class Corruption:
    """What is done to images ``[N, H, W, C]``, and how much of it at severities 1 to 5."""

    amounts: tuple[float, float, float, float, float]
    apply: Callable[[Images, float, Random], Images]
    is_random: bool = False


def _gaussian_noise(images: Images, std: float, random: Random) -> Images:
    return images + std * random.standard_normal(images.shape)


def _shot_noise(images: Images, photons: float, random: Random) -> Images:
    return random.poisson(images * photons) / photons


def _impulse_noise(images: Images, share: float, random: Random) -> Images:
    hit = random.random(images.shape)
    salt = random.random(images.shape) < 0.5
    return np.where(hit < share, salt, images)


def _speckle_noise(images: Images, std: float, random: Random) -> Images:
    return images + images * std * random.standard_normal(images.shape)


def _gaussian_blur(images: Images, sigma: float, random: Random) -> Images:
    blurred: Images = gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")
    return blurred


def _brightness(images: Images, more: float, random: Random) -> Images:
    """More of the value in HSV, hue and saturation kept: all channels by one factor; black becomes grey."""
    value = images.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + more, 1.0)
    return np.where(value > 0.0, images * (brighter / np.where(value > 0.0, value, 1.0)), brighter)


def _contrast(images: Images, factor: float, random: Random) -> Images:
    mean = images.mean(axis=(1, 2), keepdims=True)
    return (images - mean) * factor + mean


def _pixelate(images: Images, factor: float, random: Random) -> Images:
    """Made smaller and larger again by PIL's box filter: every pixel gets the mean of those that share its box."""
    rows, columns = (_same_box(size, int(size * factor)) for size in images.shape[1:3])
    return np.einsum("ih,nhwc,jw->nijc", rows, images, columns, optimize=True)


def _same_box(size: int, smaller: int) -> NDArray[np.float64]:
    """``[size, size]``: for each pixel the mean over the pixels whose centres lie in its box of ``size / smaller``."""
    box = ((np.arange(size) + 0.5) * max(smaller, 1) / size).astype(int)
    same = (box[:, None] == box).astype(np.float64)
    mean: NDArray[np.float64] = same / same.sum(axis=1, keepdims=True)
    return mean


CORRUPTIONS = MappingProxyType(
    {
        "gaussian_noise": Corruption((0.04, 0.06, 0.08, 0.09, 0.10), _gaussian_noise, is_random=True),
        "shot_noise": Corruption((500, 250, 100, 75, 50), _shot_noise, is_random=True),
        "impulse_noise": Corruption((0.01, 0.02, 0.03, 0.05, 0.07), _impulse_noise, is_random=True),
        "speckle_noise": Corruption((0.06, 0.1, 0.12, 0.16, 0.2), _speckle_noise, is_random=True),
        "gaussian_blur": Corruption((0.4, 0.6, 0.7, 0.8, 1.0), _gaussian_blur),
        "brightness": Corruption((0.05, 0.1, 0.15, 0.2, 0.3), _brightness),
        "contrast": Corruption((0.75, 0.5, 0.4, 0.3, 0.15), _contrast),
        "pixelate": Corruption((0.95, 0.9, 0.85, 0.75, 0.65), _pixelate),
    }
)


def corrupt(
    images: NDArray[Any], corruption: str, severity: int, *, channel_axis: int = 1, random: Random | None = None
) -> NDArray[Any]:
    """Corrupted images, of the same shape and dtype, within [0, 1].

    Args:
        images: floats in [0, 1], ``[N, C, H, W]``, or with the channels (one or three) on another axis.
        corruption: a name in `CORRUPTIONS`.
        severity: 1 to 5; 0 leaves them as they are.
        channel_axis: 1 as in PyTorch, -1 as in Keras.
        random: what noise is drawn from; the default gives the same noise each time.

    Raises:
        CRCoreError: a name or severity that is not known; images of another kind, or with other channels.
    """
    check_images(images)
    chosen = corruption_named(corruption)
    if severity not in range(6):
        raise CRCoreError(f"severity must be 0 (none) to 5, got {severity!r}")
    if severity == 0:
        return images
    if images.shape[channel_axis] not in (1, 3):
        raise CRCoreError(
            f"images must have one or three channels, got {list(images.shape)} with channels on axis {channel_axis}; "
            "channel_axis is 1 in PyTorch, -1 in Keras"
        )
    last = np.moveaxis(images, channel_axis, -1)
    found = chosen.apply(last, chosen.amounts[severity - 1], np.random.default_rng(0) if random is None else random)
    return np.moveaxis(np.clip(found, 0.0, 1.0), -1, channel_axis).astype(images.dtype)


def corruption_named(name: str) -> Corruption:
    """The corruption of that name."""
    if name not in CORRUPTIONS:
        raise CRCoreError(f"corruption must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    return CORRUPTIONS[name]


def check_images(images: Any) -> None:
    """Raise unless they are floats ``[N, ., ., .]`` in [0, 1]."""
    is_image = isinstance(images, np.ndarray) and images.ndim == 4 and np.issubdtype(images.dtype, np.floating)
    if not is_image or images.size == 0:
        shown = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise CRCoreError(f"images must be a NumPy array of floats with four axes, such as [N, C, H, W], got {shown}")
    if not (images.min() >= 0.0 and images.max() <= 1.0):
        raise CRCoreError(
            f"images must lie in [0, 1], got {images.min():g} to {images.max():g}; divide pixels by 255; give "
            "normalization as the argument normalize"
        )
