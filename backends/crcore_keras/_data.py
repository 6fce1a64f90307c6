"""A labeled and an unlabeled data set as one, whatever each of them is."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from crcore import CRCoreError

# A training batch that has both is a dictionary with these two keys.
LABELED, UNLABELED = KEYS = "labeled", "unlabeled"


def has_unlabeled(x: Any) -> bool:
    """Whether the inputs of a batch are labeled and unlabeled ones side by side."""
    return isinstance(x, Mapping) and set(x) == set(KEYS)


def labeled(x: Any, y_pred: Any) -> Any:
    """The predictions for the labeled inputs, which come first."""
    if not has_unlabeled(x):
        return y_pred
    n = ops.shape(keras.tree.flatten(x[LABELED])[0])[0]
    return keras.tree.map_structure(lambda prediction: prediction[:n], y_pred)


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
        CRCoreError: the number of labeled batches is not known; no data; ``validation_split``.
    """
    options = dict(options)
    if options.get("validation_split"):
        raise CRCoreError("validation_split does not go with unlabeled=; give validation_data instead")
    sample_weight = options.pop("sample_weight", None)
    shuffle = options.pop("shuffle", True)
    if _is_arrays(x):
        labeled: Any = _Arrays(
            keras.utils.pack_x_y_sample_weight(x, y, sample_weight), batch_size, shuffle=shuffle, endless=False
        )
    else:
        labeled = x
    if _is_arrays(unlabeled):
        unlabeled = _Arrays((unlabeled,), batch_size or _batch_size_of(labeled), shuffle=shuffle, endless=True)
    given = options.pop("steps_per_epoch", None)
    joined = _Joined(labeled, unlabeled, given or _length(labeled))
    start = _Start(joined, options.get("initial_epoch", 0))
    options["callbacks"] = _with_callback(options.get("callbacks"), start)
    options["shuffle"] = False  # of the batches' indices, which _Joined wants in order
    if batch_size and not options.get("validation_batch_size"):
        options["validation_batch_size"] = batch_size
    return joined, options


def check_alike(batch: Mapping[str, Any]) -> None:
    """Raises CRCoreError where labeled and unlabeled inputs cannot stand in one batch."""
    labeled, unlabeled = ([tuple(leaf.shape[1:]) for leaf in keras.tree.flatten(batch[key])] for key in KEYS)
    if labeled != unlabeled:
        raise CRCoreError(
            f"labeled and unlabeled inputs must have one shape, got {labeled} and {unlabeled} per sample; two "
            "unlabeled views are given as ((view, other_view),)"
        )


class _Joined(keras.utils.PyDataset):
    """Draws the next batch of both for each index, in order.

    Keras reads batches before training, to look at their shapes, and throws them away: what is read before `begin`
    is read again after it, so that an epoch is a pass over the labeled data, also where these are an iterator.
    """

    def __init__(self, labeled: Any, unlabeled: Any, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self._labeled, self._unlabeled = _forever(labeled, "labeled"), _forever(unlabeled, "unlabeled")
        self._seen: list[Any] | None = []  # None: in training
        self._next: Iterator[Any] = iter(())
        self._index, self._latest = 0, None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Any:
        with self._lock:
            if self._seen is not None:
                while len(self._seen) <= index:
                    self._seen.append(self._draw())
                return self._seen[index]
            if index == self._index:  # not TensorFlow's thread that reads ahead for an iterator that is gone
                self._index, self._latest = (index + 1) % self._steps, next(self._next)
            return self._latest

    def begin(self, epochs: int) -> None:
        """From now on every batch is given once, beginning with the first one after so many epochs."""
        with self._lock:
            if self._seen is not None:
                drawn = itertools.chain(self._seen, iter(self._draw, None))
                self._next, self._seen = itertools.islice(drawn, epochs * self._steps, None), None

    def _draw(self) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(next(self._labeled))
        rest = keras.utils.unpack_x_y_sample_weight(next(self._unlabeled))[0]
        if len(keras.tree.flatten(x)) == len(keras.tree.flatten(rest)):  # a DataLoader makes lists of tuples
            rest = keras.tree.pack_sequence_as(x, keras.tree.flatten(rest))
        both = {LABELED: x, UNLABELED: rest}
        batch = keras.utils.pack_x_y_sample_weight(both, y, sample_weight)
        return _tuples(keras.tree.map_structure(_as_numpy, batch))


class _Start(keras.callbacks.Callback):
    """Tells the data when training begins, and how many epochs `BackupAndRestore` has brought back."""

    def __init__(self, data: _Joined, initial_epoch: int) -> None:
        super().__init__()
        self._data, self._initial_epoch = data, initial_epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._data.begin(epoch - self._initial_epoch)


def _with_callback(callbacks: Any, callback: Any) -> Any:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.callbacks.append(callback)
        return callbacks
    return [*keras.tree.flatten(callbacks if callbacks is not None else []), callback]


class _Arrays:
    """Arrays in batches, in a new order for each pass; if ``endless``, a batch goes on in the next pass."""

    def __init__(self, arrays: Any, batch_size: int | None, *, shuffle: bool, endless: bool) -> None:
        self._arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        self._n = int(keras.tree.flatten(arrays)[0].shape[0])
        self.batch_size = batch_size or 32  # what Keras takes
        self._shuffle, self._endless = shuffle, endless

    def __len__(self) -> int:
        return -(-self._n // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = self._pass()
        while len(order):
            while self._endless and len(order) < self.batch_size:
                order = np.concatenate([order, self._pass()])
            index, order = order[: self.batch_size], order[self.batch_size :]
            yield keras.tree.map_structure(lambda array, index=index: _as_numpy(array)[index], self._arrays)
            if self._endless and not len(order):
                order = self._pass()

    def _pass(self) -> Any:
        order = np.arange(self._n)
        if self._shuffle:  # from Python's generator, which keras.utils.set_random_seed sets
            np.random.default_rng(random.getrandbits(64)).shuffle(order)
        return order


def _tuples(value: Any) -> Any:
    """Lists as tuples, at any depth: tf.data takes no lists."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _as_numpy(array: Any) -> Any:
    return array.detach().cpu().numpy() if hasattr(array, "detach") else np.asarray(array)  # torch's, on any device


def _forever(data: Any, name: str) -> Iterator[Any]:
    """Pass after pass over the batches."""
    while True:
        is_empty = True
        for batch in _pass_over(data):
            is_empty = False
            yield batch
        if hasattr(data, "__next__"):
            raise CRCoreError(
                f"the {name} {type(data).__name__} gives no more batches; a generator must go on for as long as "
                "training does"
            )
        if is_empty:
            raise CRCoreError(f"the {name} data are empty; leave the argument out, or give a batch at least")


def _pass_over(data: Any) -> Iterator[Any]:
    if not isinstance(data, keras.utils.PyDataset):
        yield from data
        return
    data.on_epoch_begin()
    for index in itertools.count() if data.num_batches is None else range(data.num_batches):
        yield data[index]
    data.on_epoch_end()


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
