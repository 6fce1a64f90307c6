"""Colour jitter (torch): kornia's ColorJitter to the bit, in a fraction of its time.

The colour wheel costs most of it. kornia selects by `torch.where`, pixel by pixel; here masks of zeros and ones are
multiplied in, and remainders of numbers that are out by one period at most are one subtraction. Both are exact.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CIRCLE = 2 * math.pi


def jitter_(
    pixels: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, *, order: Sequence[int]
) -> Tensor:
    """RGB images in [0, 1], changed in place: memory that is new to the process takes longer than a sum in it.

    Args:
        pixels: [N, 3, H, W].
        brightness: [N], a factor; so are contrast and saturation. 1 changes nothing.
        hue: [N], in turns of the colour wheel.
        order: a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """
    factors = [factor.to(pixels.device).view(-1, 1, 1, 1) for factor in (brightness, contrast, saturation, hue)]
    steps = (_brighten_, _contrast_, _saturate_, _turn_)
    for number in order:
        steps[number](pixels, factors[number])
    return pixels


def _brighten_(pixels: Tensor, factor: Tensor) -> None:
    pixels.mul_(factor).clamp_(0, 1)


def _contrast_(pixels: Tensor, factor: Tensor) -> None:
    """A blend with the mean of the grey image."""
    mean = _grey(pixels).mean((-2, -1), keepdim=True)
    pixels.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturate_(pixels: Tensor, factor: Tensor) -> None:
    """A blend with the grey image."""
    grey = _grey(pixels).mul_(1 - factor)
    pixels.mul_(factor).add_(grey).clamp_(0, 1)


def _grey(pixels: Tensor) -> Tensor:
    """ITU-R BT.601 luma, [N, 1, H, W]."""
    red, green, blue = pixels.unbind(1)
    weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device).unbind()
    grey = red * weights[0]
    return grey.addcmul_(green, weights[1]).addcmul_(blue, weights[2]).unsqueeze(1)


def _turn_(pixels: Tensor, turns: Tensor) -> None:
    """RGB to HSV, a turn of the hue, and back."""
    largest, smallest = pixels.amax(1), pixels.amin(1)
    spread = largest - smallest
    # Where an image is black or grey, zero is divided by one.
    saturation = spread / (largest + 1e-8).add_(largest.clone().eq_(0))
    hue = _hue(pixels, largest, spread.add_(spread.clone().eq_(0)))
    hue.add_((turns * 2 * math.pi).squeeze(1))
    _wrap_(hue, CIRCLE)
    _put_rgb(pixels, hue, saturation, largest)


def _hue(pixels: Tensor, largest: Tensor, spread: Tensor) -> Tensor:
    """Radians [N, H, W] in [0, 2 pi)."""
    from_red, from_green, from_blue = (largest - colour for colour in pixels.unbind(1))
    red = from_red.clone().eq_(0)  # 1 where it is the largest, or one of them
    green = from_green.clone().eq_(0).mul_(1 - red)
    hue = (from_blue - from_green).mul_(red)
    hue.addcmul_((from_red - from_blue).add_(spread, alpha=2), green)
    hue.addcmul_((from_green - from_red).add_(spread, alpha=4), (1 - red).sub_(green))
    hue.div_(spread).div_(6)
    return _wrap_(hue, 1).mul_(CIRCLE)


def _wrap_(numbers: Tensor, period: float) -> Tensor:
    """Into [0, period), from one period below or above it. Masks are floats: bools take longer to write."""
    numbers.add_(numbers.clone().lt_(0), alpha=period)
    return numbers.sub_(numbers.clone().ge_(period), alpha=period)


def _put_rgb(pixels: Tensor, hue: Tensor, saturation: Tensor, value: Tensor) -> None:
    """``value * (1 - saturation * w)``, with w from 0 around a colour's own hue to 1 opposite of it."""
    place = hue.div_(CIRCLE).mul_(6)  # in [0, 6]; 6, of rounding, gives what 0 gives
    red, green, blue = pixels.unbind(1)
    torch.minimum(place - 1, 5 - place, out=red)  # 0 until 1, 1 from 2 to 4, 0 from 5
    torch.maximum(1 - place, place - 3, out=green)
    torch.maximum(3 - place, place - 5, out=blue)
    pixels.clamp_(0, 1).mul_(saturation.unsqueeze(1)).neg_().add_(1).mul_(value.unsqueeze(1))
