"""Images for training and testing (torch tensors), from the embedded digits, a folder or a name on the hub."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crcore.cli._errors import CommandError
from crcore.cli._split import stratified

DIGITS = "digits"


@dataclass(frozen=True)
class Images:
    """Images of one split, all in memory."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]


@dataclass(frozen=True)
class ImageData:
    """A data set: what is trained on, what is tested on, and what the network has to know about it."""

    name: str
    train: Images
    test: Images
    test_source: str  # which images the test set is
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of the training pixels in [0, 1]
    std: tuple[float, ...]  # per channel, > 0
    fingerprint: str  # of all pixels and labels

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.train.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return (self.train.images.shape[2], self.train.images.shape[3])

    def to_dict(self) -> dict[str, Any]:
        """What results say of the data."""
        return {
            "name": self.name,
            "train": len(self.train.labels),
            "test": len(self.test.labels),
            "test_source": self.test_source,
            "classes": list(self.classes),
            "channels": self.channels,
            "size": list(self.size),
            "fingerprint": self.fingerprint,
        }


def load_data(name: str, *, image_size: int | None = None) -> ImageData:
    """Read a data set: "digits", a folder of parquet files, an image folder, or a name on the Hugging Face hub."""
    if name == DIGITS:
        return _digits(image_size)
    from crcore.cli._folders import read_splits  # needs the `datasets` library, which digits does not

    splits, classes = read_splits(name, image_size=image_size)
    train_images, train_labels = splits["train"]
    for split in ("test", "validation"):
        if split in splits:
            return _assemble(name, splits["train"], splits[split], f"the {split} images", classes)
    train, test = _hold_out(train_labels, fraction=0.2)
    return _assemble(
        name,
        (train_images[train], train_labels[train]),
        (train_images[test], train_labels[test]),
        "a fifth of the images, held out (stratified, the same for all seeds)",
        classes,
    )


def _digits(image_size: int | None) -> ImageData:
    """scikit-learn's digits: 1,797 grey 8x8 images; a third is the test set, so that one image is 0.17 points."""
    if image_size not in (None, 8):
        raise CommandError(f"--image-size {image_size}: the embedded digits are 8x8; leave the option out")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    train, test = _hold_out(labels, fraction=1 / 3)
    return _assemble(
        DIGITS,
        (images[train], labels[train]),
        (images[test], labels[test]),
        "a third of the images, held out (stratified, the same for all seeds)",
        tuple("0123456789"),
    )


def _hold_out(labels: NDArray[np.int64], *, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of training and test images. The seed is fixed: runs of all seeds are tested on the same images."""
    count = max(round(fraction * len(labels)), len(np.unique(labels)))
    test = stratified(labels, count, seed=0, stream="test split")
    return np.setdiff1d(np.arange(len(labels)), test), test


def _assemble(
    name: str,
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test_source: str,
    classes: tuple[str, ...],
) -> ImageData:
    if train[0].shape[1:] != test[0].shape[1:]:
        raise CommandError(
            f"--data {name}: training images have shape {train[0].shape[1:]} and test images {test[0].shape[1:]} "
            "(channels, height, width); --image-size N makes them one size"
        )
    digest = hashlib.blake2b(digest_size=16)
    for array in (*train, *test):
        digest.update(np.ascontiguousarray(array).tobytes())
    # Channel by channel in exact integer sums: no float copy of the whole set.
    levels = np.arange(256) / 255
    counts = [np.bincount(train[0][:, c].ravel(), minlength=256) for c in range(train[0].shape[1])]
    mean = [float(count @ levels / count.sum()) for count in counts]
    variance = [float(count @ (levels - m) ** 2 / count.sum()) for count, m in zip(counts, mean, strict=True)]
    return ImageData(
        name=name,
        train=Images(torch.from_numpy(train[0]), torch.from_numpy(train[1])),
        test=Images(torch.from_numpy(test[0]), torch.from_numpy(test[1])),
        test_source=test_source,
        classes=classes,
        mean=tuple(mean),
        std=tuple(max(v, 1e-6) ** 0.5 for v in variance),
        fingerprint=digest.hexdigest(),
    )
