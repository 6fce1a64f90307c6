"""Forward and backward of a quantizer alone: `quantizer` of torch_step.py."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from shared import progress
from torch import Tensor
from torch_measures import Settings, attempt, clean, ratios
from torch_students import quantizer_of


def quantizer(
    shape: tuple[int, ...], dtype: str, variants: tuple[str, ...], settings: Settings, repeats: int
) -> dict[str, Any]:
    """Forward and backward of the input quantizer, in copies of the tensor.

    Forward at least reads x and writes y, as a copy does; backward reads x and g and writes dx, one and a half copies.
    Inputs and gradients rotate, so that what a cache holds is as in a network.
    """
    made = {"device": settings.device, "dtype": getattr(torch, dtype)}
    buffers = [(torch.randn(shape, **made).requires_grad_(), torch.randn(shape, **made)) for _ in range(3)]
    target = torch.empty(shape, **made)
    missing: dict[str, str] = {}

    def ready(title: str, *, whole: bool = False) -> Callable[[Tensor], Tensor]:
        quantize = quantizer_of(title.removesuffix(", compiled"), buffers[0][0].detach())
        if whole:
            quantize = torch.compile(quantize)
        for x, g in buffers:
            quantize(x).backward(g)
        return quantize

    found = {variant: attempt(variant, missing, ready) for variant in variants if variant != "float"}
    for variant in ("crcore", "crcore-core", "detach"):
        title = f"{variant}, compiled"
        if found.get(variant) is None:
            continue
        found[title] = attempt(title, missing, partial(ready, whole=True))
    samples: dict[str, dict[str, list[float]]] = {"forward": {}, "backward": {}}
    for round_ in range(settings.rounds):
        for title, quantize in [("copy", None), *found.items()]:
            if title in missing:
                continue
            seconds = [pair(quantize, *buffer, target, settings) for buffer in queued(buffers, repeats, settings)]
            for way, marks in zip(samples, read(seconds, settings), strict=True):
                samples[way].setdefault(title, []).append(statistics.median(marks))
        progress(f"quantizer, {dtype}: round {round_ + 1} of {settings.rounds}")
    copies = samples["backward"]["copy"] = samples["forward"]["copy"]  # of a copy there is no backward
    samples["both"] = {
        title: [a + b for a, b in zip(samples["forward"][title], samples["backward"][title], strict=True)]
        for title in samples["forward"]
        if title != "copy"
    } | {"copy": copies}
    size = 2 * target.nbytes / statistics.median(copies)
    least = {"forward": 1.0, "backward": 1.5, "both": 2.5}
    clean(settings)
    in_copies = {way: ratios(by_title, "copy") for way, by_title in samples.items()}
    return {
        "shape": list(shape),
        "dtype": dtype,
        "clock": "event" if settings.cuda else "cpu",
        "copy, bytes per second": size,
        "in copies": in_copies,
        "share of the copy's bandwidth": {
            way: {title: least[way] / value["median"] for title, value in by_title.items()}
            for way, by_title in in_copies.items()
        },
        "seconds by round": samples,
        "not measured": missing,
    }


def queued(buffers: list[Any], repeats: int, settings: Settings) -> Iterator[Any]:
    """The buffers in turn; on CUDA after a pause in which the queue fills, so that launching is not what is timed."""
    if settings.cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
    return itertools.islice(itertools.cycle(buffers), repeats)


def pair(quantize: Any, x: Tensor, g: Tensor, target: Tensor, settings: Settings) -> list[Any]:
    """Marks before, between and after forward and backward; of a copy there is no backward."""
    marks = [mark(settings)]
    if quantize is None:
        target.copy_(x.detach())
        return [*marks, mark(settings), mark(settings)]
    x.grad = None
    y = quantize(x)
    marks.append(mark(settings))
    y.backward(g)
    return [*marks, mark(settings)]


def mark(settings: Settings) -> Any:
    """A moment: an event in the queue, or CPU seconds."""
    if not settings.cuda:
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def read(marks: list[list[Any]], settings: Settings) -> tuple[list[float], list[float]]:
    """Seconds of each forward, and of each backward."""
    if settings.cuda:
        torch.cuda.synchronize()

    def between(a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if settings.cuda else b - a

    return [between(m[0], m[1]) for m in marks], [between(m[1], m[2]) for m in marks]
