"""Views: what they show, and that each pixel is the one that kornia's augmentation gave to published results."""

import math
import threading
from collections.abc import Sequence

import kornia.augmentation as K
import pytest
import torch
from kornia.enhance import adjust_hue
from torch import Tensor, nn

from crcore.cli._colour import jitter_
from crcore.cli._views import View

SIZES = [(8, 8), (12, 12), (32, 32), (33, 47)]
MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.3, 0.25)


def images(count: int = 16, channels: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, *size), generator=generator, dtype=torch.uint8)


def view(kind: str, channels: int = 3, size: tuple[int, int] = (32, 32), *, flip: bool = True) -> View:
    return View(kind, size=size, flip=flip, mean=MEAN[:channels], std=STD[:channels])


def kornia_s_view(kind: str, pixels: Tensor, seed: int, *, flip: bool) -> Tensor:
    """The views as the first version drew them, with kornia 0.9 and torch's default generator."""
    size, channels = (pixels.shape[2], pixels.shape[3]), pixels.shape[1]
    steps: list[nn.Module] = []
    if kind != "none":
        steps.append(K.RandomCrop(size, padding=max(min(size) // 8, 1), padding_mode="reflect", cropping_mode="slice"))
        if flip:
            steps.append(K.RandomHorizontalFlip(p=0.5))
    if kind == "strong":
        if channels == 3:
            steps.append(K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8))
        else:
            steps += [K.RandomBrightness((0.6, 1.4), p=0.8), K.RandomContrast((0.6, 1.4), p=0.8)]
        steps.append(K.RandomErasing(scale=(0.02, 0.2), p=0.5, value=0.5))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        out = nn.Sequential(*steps)(pixels.float() / 255)
    out = (out - _per_channel(MEAN[:channels])) / _per_channel(STD[:channels])
    return out.contiguous(memory_format=torch.channels_last)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["none", "weak", "strong"])
def test_views_are_kornia_s_to_the_bit(kind: str, channels: int, flip: bool) -> None:
    for size in SIZES:
        augment = view(kind, channels, size, flip=flip)
        for count in (2, 5, 64):
            pixels = images(count, channels, size)
            for seed in range(3):
                expected, found = kornia_s_view(kind, pixels, seed, flip=flip), augment(pixels, seed)
                assert torch.equal(found, expected), (size, count, seed)
                assert found.stride() == expected.stride()


@pytest.mark.parametrize("levels", [(0,), (255,), (0, 255), (0, 1), (254, 255), (0, 128, 255)])
def test_flat_black_white_and_pure_colours_are_kornia_s_to_the_bit(levels: tuple[int, ...]) -> None:
    choice = images(64, seed=1).long() % len(levels)
    pixels = torch.tensor(levels, dtype=torch.uint8)[choice]
    grey = pixels[:, :1].expand(-1, 3, -1, -1).contiguous()
    for each in (pixels, grey):
        for seed in range(20):
            assert torch.equal(view("strong")(each, seed), kornia_s_view("strong", each, seed, flip=True))


def test_every_colour_is_kornia_s_to_the_bit() -> None:
    """All 16.8 million would take minutes: every third level of each channel, with turns of the hue either way."""
    levels = torch.arange(0, 256, 3, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 86, -1)
    pixels = torch.stack([colours[:, :, start : start + 86] for start in range(0, colours.shape[2], 86)])
    for seed in range(4):
        assert torch.equal(
            view("strong", size=(86, 86))(pixels, seed), kornia_s_view("strong", pixels, seed, flip=True)
        )


def test_hues_that_round_to_a_whole_turn_are_kornia_s_to_the_bit() -> None:
    """Channels that differ in their last bit lie as little before red as rounding takes for red itself."""
    least = 2.0**-24
    pixels = torch.tensor([[1.0, 0.5, 0.5 + least], [1.0, 0.5 + least, 0.5], [0.5 - least, 0.0, least / 8]])
    pixels = pixels.view(3, 3, 1, 1).repeat(7, 1, 1, 1)
    neutral, turns = torch.ones(21), torch.linspace(-0.1, 0.083, 7).repeat_interleave(3)
    expected = adjust_hue(pixels, turns * 2 * math.pi)
    found = jitter_(pixels, neutral, neutral, neutral, turns, order=(3,))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["none", "weak", "strong"])
def test_the_images_stay_as_they_are(kind: str) -> None:
    pixels = images()
    view(kind)(pixels, 0)
    assert torch.equal(pixels, images())


def test_threads_that_draw_at_once_do_not_meet() -> None:
    augment, pixels = view("strong"), images(64)
    expected = [augment(pixels, seed) for seed in range(40)]
    found: dict[int, Tensor] = {}

    def draw(first: int) -> None:
        for seed in range(first, 40, 4):
            found[seed] = augment(pixels, seed)

    threads = [threading.Thread(target=draw, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(40))
