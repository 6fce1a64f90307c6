"""Top-1 accuracy on images without augmentation (torch); the same code for every network."""

from collections.abc import Sequence

import torch
from torch import nn

from crcore.cli._data import Images
from crcore.cli._views import View


class Evaluation:
    """The test images, on the device."""

    def __init__(self, test: Images, *, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.images, self.labels = test.images.to(device), test.labels.to(device)
        size = (self.images.shape[2], self.images.shape[3])
        self.view = View("none", size=size, flip=False, mean=mean, std=std).to(device)

    @torch.inference_mode()
    def accuracy(self, model: nn.Module, *, batch_size: int = 500) -> float:
        """Percent of the images whose largest logit is the label's. The model's mode is as it was afterwards."""
        training = model.training
        model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.labels.device)
        for start in range(0, len(self.labels), batch_size):
            logits = model(self.view(self.images[start : start + batch_size], 0))
            correct += (logits.argmax(1) == self.labels[start : start + batch_size]).sum()
        model.train(training)
        return 100 * int(correct) / len(self.labels)
