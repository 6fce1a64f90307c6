"""Augmented views of a batch of images (torch, kornia), each draw a function of one seed."""

from collections.abc import Sequence

import kornia.augmentation as K
import torch
from torch import Tensor, nn


class View(nn.Module):
    """Images uint8 [N, C, H, W] to one augmented and normalised float view [N, C, H, W].

    weak     crop after padding by an eighth of the size, horizontal flip
    strong   weak, then colour jitter (brightness and contrast where images are grey) and random erasing
    none     normalisation only
    """

    mean: Tensor  # [1, C, 1, 1], of pixels in [0, 1]
    std: Tensor  # [1, C, 1, 1], > 0

    def __init__(
        self, kind: str, *, size: tuple[int, int], flip: bool, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        if kind in ("weak", "strong"):
            padding = max(min(size) // 8, 1)
            steps.append(K.RandomCrop(size, padding=padding, padding_mode="reflect", cropping_mode="slice"))
            if flip:
                steps.append(K.RandomHorizontalFlip(p=0.5))
        if kind == "strong":
            if len(mean) == 3:
                steps.append(K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8))
            else:
                steps += [K.RandomBrightness((0.6, 1.4), p=0.8), K.RandomContrast((0.6, 1.4), p=0.8)]
            steps.append(K.RandomErasing(scale=(0.02, 0.2), p=0.5, value=0.5))
        self.augment = nn.Sequential(*steps)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor, seed: int) -> Tensor:
        """One view, drawn from `seed` alone; the caller's generators are left as they were."""
        pixels = images.float() / 255
        # kornia draws its parameters on the CPU from the default generator, whatever the device of the images.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            pixels = self.augment(pixels)
        out: Tensor = (pixels - self.mean) / self.std
        return out.contiguous(memory_format=torch.channels_last)
