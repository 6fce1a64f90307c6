"""Which images a step sees, and their views (torch). All of it depends on (seed, step) and on nothing else."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crcore.cli._data import ImageData
from crcore.cli._random import seed_of
from crcore.cli._split import stratified
from crcore.cli._views import View


class Batches:
    """The batches of one seed. Methods share them: a method only decides whether the unlabeled images are appended."""

    def __init__(
        self,
        data: ImageData,
        *,
        seed: int,
        labels: int | None,
        unlabeled: int | None = None,
        batch_size: int,
        student_view: str,
        teacher_view: str,
        flip: bool,
        device: torch.device,
    ) -> None:
        every = np.arange(len(data.train.labels))
        kept = every if labels is None else stratified(data.train.labels.numpy(), labels, seed=seed, stream="labels")
        rest = np.setdiff1d(every, kept)
        # A stream of its own, in which fewer images are the first of more.
        chosen = np.random.default_rng(seed_of(seed, "unlabeled images")).permutation(rest)[:unlabeled]
        rest = np.sort(chosen)
        self.seed = seed
        self.images = data.train.images.to(device)
        self.labels = data.train.labels.to(device)
        self.labeled = _Order(kept, min(batch_size, len(kept)), seed=seed, stream="labeled order")
        self.unlabeled = _Order(rest, min(batch_size, len(rest)), seed=seed, stream="unlabeled order")
        self.steps_per_epoch = self.labeled.batches
        size = (self.images.shape[2], self.images.shape[3])
        views = (
            View(kind, size=size, flip=flip, mean=data.mean, std=data.std) for kind in (student_view, teacher_view)
        )
        self.student_view, self.teacher_view = (view.to(device) for view in views)

    def student(self, step: int, *, unlabeled: bool = False) -> tuple[Tensor, Tensor]:
        """The student's views [B, C, H, W] and the labels [L] of the first L of them; the rest are unlabeled."""
        index = self.labeled.at(step)
        return self._views(self.student_view, "student view", step, unlabeled), self.labels[index]

    def teacher(self, step: int, *, unlabeled: bool = False) -> Tensor:
        """The teacher's own views of the same images in the same order."""
        return self._views(self.teacher_view, "teacher view", step, unlabeled)

    def further(self, step: int, count: int, *, unlabeled: bool = False) -> Iterator[Tensor]:
        """The student's views of `count` steps from `step` on."""
        for further in range(step, step + count):
            yield self.student(further, unlabeled=unlabeled)[0]

    def _views(self, view: View, stream: str, step: int, unlabeled: bool) -> Tensor:
        views: Tensor = view(self.images[self.labeled.at(step)], seed_of(self.seed, stream, step))
        if not unlabeled:
            return views
        # A stream of its own, so that the labeled views stay those of the other methods.
        more = view(self.images[self.unlabeled.at(step)], seed_of(self.seed, f"unlabeled {stream}", step))
        return torch.cat([views, more])


class _Order:
    """Shuffled passes over a set of images; a pass ends where no full batch is left."""

    def __init__(self, index: NDArray[np.int64], size: int, *, seed: int, stream: str) -> None:
        self.index, self.size, self.seed, self.stream = index, size, seed, stream
        self.batches = len(index) // size if size else 0
        self._pass = self._step = -1
        self._order = index
        self._batch = torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> Tensor:
        """Indices [size] of the batch of a step."""
        if step == self._step:  # asked for by images, labels and the teacher's view
            return self._batch
        number, batch = divmod(step, self.batches)
        if number != self._pass:
            generator = np.random.default_rng(seed_of(self.seed, self.stream, number))
            self._pass, self._order = number, generator.permutation(self.index)
        self._step, self._batch = step, torch.from_numpy(self._order[batch * self.size : (batch + 1) * self.size])
        return self._batch
