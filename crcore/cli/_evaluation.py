"""Top-1 accuracy on images without augmentation (torch); the same code for every network."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crcore.cli._data import Images
from crcore.cli._views import View

MOST = 500  # images in a batch


class Evaluation:
    """The test images, on the device."""

    def __init__(self, test: Images, *, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.images, self.labels = test.images.to(device), test.labels.to(device)
        size = (self.images.shape[2], self.images.shape[3])
        self.view = View("none", size=size, flip=False, mean=mean, std=std).to(device)

    def accuracy(self, model: nn.Module) -> float:
        """Percent of the images whose largest logit is the label's. The model's mode is as it was afterwards."""
        return 100 * int((self._classes(model) == self.labels).sum()) / len(self.labels)

    def predictions(self, model: nn.Module) -> NDArray[np.int64]:
        """The class of the largest logit of each image."""
        found: NDArray[np.int64] = self._classes(model).cpu().numpy()
        return found

    @torch.inference_mode()
    def _classes(self, model: nn.Module) -> Tensor:
        training = model.training
        model.eval()
        starts = range(0, len(self.labels), MOST)
        classes = [model(self.view(self.images[start : start + MOST], 0)).argmax(1) for start in starts]
        model.train(training)
        return torch.cat(classes)
