"""Stratified, seeded choices of images: which labels are kept, and which images are held out as a test set."""

import numpy as np
from numpy.typing import NDArray

from crcore.cli._errors import CommandError
from crcore.cli._random import seed_of


def stratified(labels: NDArray[np.int64], count: int, *, seed: int, stream: str) -> NDArray[np.int64]:
    """Indices of `count` images, each class in proportion to its frequency and at least once, in increasing order.

    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> chosen = stratified(labels, 3, seed=0, stream="labels")
    >>> labels[chosen].tolist()
    [0, 0, 1]
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if not len(classes) <= count <= len(labels):
        raise CommandError(
            f"cannot choose {count} of {len(labels)} images with {len(classes)} classes: "
            f"the number must be between {len(classes)} (one of each class) and {len(labels)}"
        )
    # Largest remainder: exact total, no class off its share by more than one image, none empty.
    share = sizes * (count / len(labels))
    quota = np.maximum(np.floor(share).astype(np.int64), 1)
    while quota.sum() < count:
        quota[np.argmax(np.where(quota < sizes, share - quota, -np.inf))] += 1
    while quota.sum() > count:
        quota[np.argmax(np.where(quota > 1, quota - share, -np.inf))] -= 1
    generator = np.random.default_rng(seed_of(seed, stream))
    chosen = [
        generator.permutation(np.flatnonzero(labels == name))[:size] for name, size in zip(classes, quota, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
