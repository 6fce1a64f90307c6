"""A labeled and an unlabeled data set as one, whatever each of them is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from crcore import CRCoreError

# A training batch that has both is a dictionary with these two keys.
LABELED, UNLABELED = "labeled", "unlabeled"


def has_unlabeled(x: Any) -> bool:
    """Whether the inputs of a batch are labeled and unlabeled ones side by side."""
    return isinstance(x, Mapping) and set(x) == {LABELED, UNLABELED}


def with_unlabeled(
    x: Any, y: Any, unlabeled: Any, batch_size: int | None, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A data set for ``fit`` whose batches are ``({"labeled": x, "unlabeled": u}, y, sample_weight)``.

    Args:
        x, y, batch_size, options: what ``fit`` was given.
        unlabeled: inputs, or a data set whose batches are inputs or ``(inputs, ...)``.

    Returns:
        the data set, and the options that are left for ``fit``.

    Raises:
        CRCoreError: the length of the labeled data is not known; ``validation_split``.
    """
    options = dict(options)
    if options.get("validation_split"):
        raise CRCoreError("validation_split does not go with unlabeled=; give validation_data instead")
    sample_weight = options.pop("sample_weight", None)
    shuffle = options.get("shuffle", True)
    if _is_arrays(x):
        labeled: Any = _Arrays(
            keras.utils.pack_x_y_sample_weight(x, y, sample_weight), batch_size, shuffle=shuffle, whole_batches=False
        )
    else:
        labeled = x
    if _is_arrays(unlabeled):
        unlabeled = _Arrays((unlabeled,), batch_size or _batch_size_of(labeled), shuffle=shuffle, whole_batches=True)
    steps = options.pop("steps_per_epoch", None) or _length(labeled)
    return _Joined(labeled, unlabeled, steps), options


class _Joined(keras.utils.PyDataset):
    """Draws the next batch of both for each index, in order."""

    def __init__(self, labeled: Any, unlabeled: Any, steps: int) -> None:
        super().__init__()
        self._labeled, self._unlabeled, self._steps = labeled, unlabeled, steps
        self._rest = _forever(unlabeled)
        self._batches = _forever(labeled)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(next(self._batches))
        both = {LABELED: x, UNLABELED: keras.utils.unpack_x_y_sample_weight(next(self._rest))[0]}
        return keras.tree.map_structure(np.asarray, keras.utils.pack_x_y_sample_weight(both, y, sample_weight))

    def on_epoch_begin(self) -> None:
        """An epoch starts at the beginning of the labeled data, whatever Keras drew to look at the shapes."""
        if not hasattr(self._labeled, "__next__"):  # an iterator cannot start again
            self._batches = _forever(self._labeled)


class _Arrays:
    """Arrays in batches, in a new order each time."""

    def __init__(self, arrays: Any, batch_size: int | None, *, shuffle: bool, whole_batches: bool) -> None:
        self._arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        self._n = int(keras.tree.flatten(arrays)[0].shape[0])
        self.batch_size = min(batch_size or 32, self._n)  # 32 is what Keras takes
        self._shuffle, self._whole_batches = shuffle, whole_batches

    def __len__(self) -> int:
        return self._n // self.batch_size if self._whole_batches else -(-self._n // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = np.arange(self._n)
        if self._shuffle:  # from Python's generator, which keras.utils.set_random_seed sets
            np.random.default_rng(random.getrandbits(64)).shuffle(order)
        for batch in range(len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield keras.tree.map_structure(lambda array, index=index: np.asarray(array)[index], self._arrays)


def _forever(data: Any) -> Iterator[Any]:
    """Pass after pass over the batches."""
    while True:
        batch = None
        if isinstance(data, keras.utils.PyDataset):
            for index in range(len(data)):
                yield (batch := data[index])
            data.on_epoch_end()
        else:
            for batch in data:
                yield batch
        if batch is None or hasattr(data, "__next__"):
            raise CRCoreError(
                f"{type(data).__name__} gives no more batches; a generator must go on for as long as training does"
            )


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        raise CRCoreError(
            f"the number of batches in {type(data).__name__} is not known; give fit(..., steps_per_epoch=...)"
        ) from None


def _batch_size_of(data: Any) -> int | None:
    return data.batch_size if isinstance(data, _Arrays) else None


def _is_arrays(data: Any) -> bool:
    leaves = keras.tree.flatten(data)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)
