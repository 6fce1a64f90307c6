"""Augmented views of a batch of images (torch), each draw a function of one seed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from crcore.cli._colour import jitter_


class View(nn.Module):
    """Images uint8 [N, C, H, W] to one augmented and normalised float view [N, C, H, W].

    weak     crop after padding by an eighth of the size, horizontal flip
    strong   weak, then colour jitter (brightness and contrast where images are grey) and random erasing
    none     normalisation only

    Draws and pixels are those of kornia 0.9 to the bit: RandomCrop, RandomHorizontalFlip, ColorJitter,
    RandomBrightness, RandomContrast and RandomErasing, which the tests compare with. For small images kornia's calls
    cost more than the arithmetic, and both cost more than a tenth of a step.
    """

    mean: Tensor  # [1, C, 1, 1], of pixels in [0, 1]
    std: Tensor  # [1, C, 1, 1], > 0

    def __init__(
        self, kind: str, *, size: tuple[int, int], flip: bool, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.weak, self.strong, self.flip = kind in ("weak", "strong"), kind == "strong", flip
        self.padding = max(min(size) // 8, 1)
        self.rows, self.columns = (_reflected(length, self.padding) for length in size)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor, seed: int) -> Tensor:
        """One view, drawn from `seed` alone; torch's generators are left as they were."""
        # Draws are made on the CPU, whatever the device of the images: a seed gives the same view everywhere.
        draw = _Draw(len(images), seed)
        if self.weak:
            images = self._moved(images, draw)
        pixels = images.float().div_(255)
        if self.strong:
            pixels = _recoloured(pixels, draw)
            pixels = _erased(pixels, draw)
        return pixels.sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)

    def _moved(self, images: Tensor, draw: "_Draw") -> Tensor:
        """Pad, crop and flip in one look-up, of bytes."""
        count, channels, height, width = images.shape
        places = 2 * self.padding + 1
        left, top = draw.uniform().mul_(places).long(), draw.uniform().mul_(places).long()
        x = self.columns[left[:, None] + torch.arange(width)]
        y = self.rows[top[:, None] + torch.arange(height)]
        if self.flip:
            x = torch.where(draw.chance(0.5)[:, None], x.flip(1), x)
        pixel = (y * width)[:, :, None] + x[:, None, :]  # [N, H, W], its number in the image that it is taken from
        pixel = pixel.to(images.device).view(count, 1, -1).expand(-1, channels, -1)
        return images.flatten(2).gather(2, pixel).view(images.shape)


def _recoloured(pixels: Tensor, draw: "_Draw") -> Tensor:
    """Brightness, contrast, saturation and hue of eight in ten images, or the first two of grey ones."""
    if pixels.shape[1] == 3:
        applied = draw.chance(0.8)
        brightness, contrast = draw.uniform(0.6, 1.4), draw.uniform(0.6, 1.4)
        hue, saturation = draw.uniform(-0.1, 0.1), draw.uniform(0.6, 1.4)
        changed = jitter_(pixels.clone(), brightness, contrast, saturation, hue, order=draw.order(4))
        return torch.where(_per_image(applied, pixels), changed, pixels, out=changed)
    for operation in (torch.add, torch.mul):  # kornia's RandomBrightness adds, its ColorJitter multiplies
        applied, factor = draw.chance(0.8), draw.uniform(0.6, 1.4)
        offset = 1 if operation is torch.add else 0
        changed = operation(pixels, _per_image(factor - offset, pixels)).clamp_(0, 1)
        pixels = torch.where(_per_image(applied, pixels), changed, pixels)
    return pixels


def _erased(pixels: Tensor, draw: "_Draw") -> Tensor:
    """A grey rectangle of 2 to 20 % of the area in every second image."""
    height, width = pixels.shape[2:]
    applied = draw.chance(0.5)
    area = draw.uniform(0.02, 0.2) * (height * width)
    flat, tall = draw.uniform(0.3, 1.0), draw.uniform(1.0, 3.3)
    ratio = torch.where(draw.uniform().round().bool(), flat, tall)
    tallness = ((area * ratio) ** 0.5).round().clamp(1, height)
    wideness = ((area / ratio) ** 0.5).round().clamp(1, width)
    left = (draw.uniform() * (width - wideness + 1)).floor()
    top = (draw.uniform() * (height - tallness + 1)).floor()
    inside_x = _between(torch.arange(width), left, left + wideness)
    inside_y = _between(torch.arange(height), top, top + tallness)
    erased = (inside_y[:, :, None] & inside_x[:, None, :] & applied[:, None, None])[:, None]
    return pixels.masked_fill_(erased.to(pixels.device), 0.5)


class _Draw:
    """Random numbers of one seed, one for each image."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 [N] in [low, high)."""
        width = float(np.float32(high) - np.float32(low))
        return torch.rand(self.count, generator=self.generator).mul_(width).add_(low)

    def chance(self, p: float) -> Tensor:
        """bool [N], true with probability p."""
        return torch.rand(self.count, generator=self.generator) < p

    def order(self, count: int) -> list[int]:
        """A permutation."""
        found: list[int] = torch.randperm(count, generator=self.generator).tolist()
        return found


def _reflected(length: int, padding: int) -> Tensor:
    """Where the pixels of a padded row come from: 2 1 | 0 1 2 3 | 2 1."""
    inside = torch.arange(length)
    return torch.cat([inside[1 : padding + 1].flip(0), inside, inside[-padding - 1 : -1].flip(0)])


def _per_image(values: Tensor, pixels: Tensor) -> Tensor:
    return values.to(pixels.device).view(-1, 1, 1, 1)


def _between(position: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """bool [N, len(position)]."""
    return (position >= low[:, None]) & (position < high[:, None])
