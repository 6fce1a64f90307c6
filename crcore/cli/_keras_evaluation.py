"""Top-1 accuracy of Keras networks on images without augmentation: the images of `_evaluation.py`, channels last."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from crcore.cli._data import Images
from crcore.cli._views import View

MOST = 500  # images in a batch


def channels_last(images: Tensor) -> NDArray[np.float32]:
    """``[N, C, H, W]`` as an array ``[N, H, W, C]``."""
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


class KerasEvaluation:
    """The test images, in batches of one size, because engines compile a network for each size."""

    def __init__(self, test: Images, *, mean: Sequence[float], std: Sequence[float]) -> None:
        size = (test.images.shape[2], test.images.shape[3])
        view = View("none", size=size, flip=False, mean=mean, std=std)
        self.labels = test.labels.numpy()
        batches = -(-len(self.labels) // MOST)
        self.batch_size = -(-len(self.labels) // batches)
        self.images = [
            channels_last(view(test.images[start : start + self.batch_size], 0))
            for start in range(0, len(self.labels), self.batch_size)
        ]

    def accuracy(self, network: Any) -> float:
        """Percent of the images whose largest logit is the label's."""
        return 100 * int((self.predictions(network) == self.labels).sum()) / len(self.labels)

    def predictions(self, network: Any) -> NDArray[np.int64]:
        """The class of the largest logit of each image."""
        logits = [network.predict_on_batch(_filled(images, self.batch_size))[: len(images)] for images in self.images]
        return np.concatenate(logits).argmax(axis=1)


def _filled(images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """The images, with the last one repeated up to `size`."""
    missing = size - len(images)
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
