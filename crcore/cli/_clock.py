"""Where the time of a run goes (torch), without a wait for the device."""

import time
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Seconds by part, each from the end of the part before it: `start`, `lap` after each part, at times `settle`.

    On CUDA the device is behind the program. There the marks are events in its queue, so that a part has the seconds
    in which the device was at it or, where it had nothing to do, waited for it.
    """

    def __init__(self, device: torch.device, seconds: dict[str, float]) -> None:
        """`seconds` is added to."""
        self._cuda, self._seconds = device.type == "cuda", seconds
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """What was before this belongs to no part."""
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        """A part ends."""
        self._marks.append((part, self._now()))

    def settle(self) -> None:
        """Add up. To be called where the program has just read a result of the device, since that waits for it."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        for (_, begin), (part, end) in pairwise(self._marks):
            passed = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            self._seconds[part] = self._seconds.get(part, 0.0) + passed
        del self._marks[:-1]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
