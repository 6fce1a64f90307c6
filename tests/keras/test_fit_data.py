"""``fit(..., unlabeled=)``: every kind of data beside every other, each labeled sample once per epoch."""

from __future__ import annotations

import importlib.util
import itertools

import crcore_keras as crk
import keras
import numpy as np
import pytest
from keras import ops
from small_trainings import compiled, data, fitted, recipe

import crcore as cr

LABELED, UNLABELED = 10, 7  # a partial batch of each
BATCH = 4


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays, batch_size=BATCH):
        super().__init__()
        self.arrays, self.batch_size = arrays, batch_size

    def __len__(self):
        return -(-len(self.arrays[0]) // self.batch_size)

    def __getitem__(self, index):
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return tuple(array[part] for array in self.arrays)


def numpy_arrays(*arrays):
    return arrays


def tf_data(*arrays):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays).batch(BATCH)


def torch_loader(*arrays):
    import torch

    tensors = [torch.as_tensor(array) for array in arrays]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=BATCH)


def generator(*arrays):
    batches = Batches(*arrays)
    return (batches[index % len(batches)] for index in itertools.count())


KINDS = {
    "numpy": numpy_arrays,
    "pydataset": Batches,
    "tf.data": tf_data,
    "loader": torch_loader,
    "generator": generator,
}
NEEDS = {"tf.data": "tensorflow", "loader": "torch"}


class Seen(keras.layers.Layer):
    """Notes the first feature of what the augmentation gets, one batch after another."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def call(self, x):
        self.batches.append(ops.convert_to_numpy(x)[:, 0])
        return x


def numbered(n, start=0):
    x = np.zeros((n, 4), "float32")
    x[:, 0] = np.arange(start, start + n)
    return x / 100.0


def make(kind, *arrays):
    if kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
        pytest.skip(f"{NEEDS[kind]} is not installed")
    return KINDS[kind](*arrays)


def seen_in_training(labeled, unlabeled, *, epochs=2, **options):
    """The numbers of the samples in each batch of training, labeled first."""
    recorder = Seen()
    model = compiled(augment=recorder, run_eagerly=True)
    x, y = (labeled[0], labeled[1]) if isinstance(labeled, tuple) else (labeled, None)
    unlabeled = unlabeled[0] if isinstance(unlabeled, tuple) else unlabeled
    if isinstance(x, np.ndarray) or isinstance(unlabeled, np.ndarray):
        options.setdefault("batch_size", BATCH)
    model.fit(x, y, unlabeled=unlabeled, epochs=epochs, verbose=0, **{"shuffle": False} | options)
    first = len(recorder.batches) - 2 * model.step  # what Keras and the calibration looked at
    both = [np.rint(100 * batch).astype(int).tolist() for batch in recorder.batches[first:]]
    assert both[0::2] == both[1::2]  # both views are of the same inputs
    return both[0::2]


@pytest.mark.parametrize("unlabeled", KINDS)
@pytest.mark.parametrize("labeled", KINDS)
def test_labeled_and_unlabeled_data_of_all_kinds(labeled, unlabeled):
    y = data(LABELED)[1]
    options = {"steps_per_epoch": 3} if labeled == "generator" else {}
    found = seen_in_training(
        make(labeled, numbered(LABELED), y), make(unlabeled, numbered(UNLABELED, 100)), epochs=2, **options
    )
    assert len(found) == 6
    for epoch in (found[:3], found[3:]):
        assert [n for batch in epoch for n in batch if n < 100] == list(range(LABELED))
    rest = [n for batch in found for n in batch if n >= 100]
    assert rest == [100 + n % UNLABELED for n in range(len(rest))]  # in turn, none left out
    assert len(rest) == (24 if unlabeled == "numpy" else 21)  # arrays fill each batch


@pytest.mark.parametrize("n", [2, 30])
def test_unlabeled_data_may_be_shorter_than_a_batch_and_longer_than_an_epoch(n):
    found = seen_in_training((numbered(LABELED), data(LABELED)[1]), (numbered(n, 100),), epochs=3)
    rest = [number for batch in found for number in batch if number >= 100]
    assert rest == [100 + number % n for number in range(9 * BATCH)]


def test_shuffled_arrays_are_met_once_per_epoch():
    found = seen_in_training((numbered(LABELED), data(LABELED)[1]), (numbered(UNLABELED, 100),), shuffle=True)
    epochs = [[n for batch in part for n in batch if n < 100] for part in (found[:3], found[3:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(LABELED))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_steps_per_epoch_goes_on_where_the_last_epoch_ended():
    found = seen_in_training(Batches(numbered(16), data(16)[1]), (numbered(UNLABELED, 100),), steps_per_epoch=2)
    assert [n for batch in found for n in batch if n < 100] == list(range(16))


def test_an_epoch_that_starts_later_starts_at_the_beginning_of_the_data():
    found = seen_in_training(Batches(numbered(8), data(8)[1]), (numbered(4, 100),), initial_epoch=1)
    assert [n for batch in found for n in batch if n < 100] == list(range(8))


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str)
def test_compiled_steps_are_those_of_eager_ones(options):
    """Keras reads ahead, looks at shapes, and gathers batches; none of it may change what is trained on."""
    if options and keras.backend.backend() == "torch":
        pytest.skip("an option of the compiled engines")
    x, y = data(LABELED)
    results = []
    for each in ({"run_eagerly": True}, options):
        model = compiled(augment=lambda x: x + 0.1, **each)
        history = model.fit(
            Batches(x, y), unlabeled=data(UNLABELED, seed=1)[0], batch_size=BATCH, epochs=3, verbose=0, shuffle=False
        )
        assert model.step == 9
        results.append([history.history["loss"], *model.student.get_weights()])
    for mine, other in zip(*results, strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-5, atol=1e-6)


def test_the_task_loss_and_the_metrics_are_of_the_labeled_inputs():
    x, y = data()
    rest = data(8, seed=9)[0]
    plain, joint = (
        compiled(chosen=recipe(0.0), optimizer=keras.optimizers.SGD(0.0), metrics=["accuracy"], augment=lambda x: x)
        for _ in range(2)
    )
    fitted(joint, x, y, unlabeled=rest)  # sets the scales
    plain.set_weights(joint.get_weights())
    histories = [fitted(plain, x, y), fitted(joint, x, y, unlabeled=rest)]
    for name in ("accuracy", "task_loss"):
        assert histories[0][name] == pytest.approx(histories[1][name], rel=1e-5)


def test_the_unlabeled_inputs_take_part_in_the_consistency_term():
    x, y = data()
    terms = []
    for rest in (np.zeros((8, 4), "float32"), data(8, seed=9)[0]):
        model = compiled(chosen=recipe(1.0), optimizer=keras.optimizers.SGD(0.0), augment=lambda x: x, run_eagerly=True)
        fitted(model, x, y, unlabeled=rest)
        model.teacher.get_layer("head").bias.assign(np.array([3.0, 0.0, 0.0], "float32"))
        model.augment = ignore_the_first(4)
        terms.append(fitted(model, x, y, unlabeled=rest)["consistency_loss"][0])
    assert min(terms) > 0.01
    assert terms[0] != terms[1]


def ignore_the_first(n):
    """An augmentation that leaves nothing of the labeled inputs."""
    return lambda x: ops.concatenate([0.0 * x[:n], x[n:]])


@pytest.mark.parametrize("kind", ["sample_weight", "class_weight", "sample_weight in the data"])
def test_weights_count_for_the_labeled_inputs(kind):
    x, y = data(LABELED)
    rest = data(UNLABELED, seed=1)[0]
    model = compiled(chosen=recipe(1.0), optimizer=keras.optimizers.SGD(0.0))
    if kind == "sample_weight":
        found = fitted(model, x, y, unlabeled=rest, sample_weight=np.zeros(LABELED, "float32"))
    elif kind == "class_weight":
        found = fitted(model, x, y, unlabeled=rest, class_weight=dict.fromkeys(range(3), 0.0))
    else:
        weighted = Batches(x, y, np.zeros(LABELED, "float32"))
        found = model.fit(weighted, unlabeled=rest, verbose=0).history
    assert found["task_loss"] == [0.0]
    assert found["consistency_loss"][0] > 0


@pytest.mark.parametrize("kind", ["numpy", "tf.data", "loader", "pydataset"])
def test_data_with_two_views_each(kind):
    x, y = data(8)
    rest = data(8, seed=1)[0]
    if kind == "numpy":
        labeled, unlabeled, targets = (x, x + 0.1), (rest, rest + 0.1), y
    elif kind == "tf.data":
        tf = pytest.importorskip("tensorflow")
        labeled = tf.data.Dataset.from_tensor_slices(((x, x + 0.1), y)).batch(BATCH)
        unlabeled, targets = tf.data.Dataset.from_tensor_slices(((rest, rest + 0.1),)).batch(BATCH), None
    else:

        class Views(Batches):
            def __getitem__(self, index):
                x, *y = super().__getitem__(index)
                return ((x, x + 0.1), *y)

        labeled, unlabeled, targets = Views(x, y), Views(rest), None
        if kind == "loader":
            torch = pytest.importorskip("torch")
            load = torch.utils.data.DataLoader
            labeled = load([((a, a + 0.1), int(b)) for a, b in zip(x, y, strict=True)], batch_size=BATCH)
            unlabeled = load([((a, a + 0.1),) for a in rest], batch_size=BATCH)
    chosen = recipe(1.0)
    model = crk.ConsistencyModel(crk.prepare(dense(), chosen), chosen)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found = model.fit(
        labeled, targets, unlabeled=unlabeled, epochs=2, verbose=0, batch_size=BATCH if targets is not None else None
    )
    assert model.step == 4
    assert min(found.history["consistency_loss"]) > 0


def dense():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


def test_validation_takes_the_batch_size_that_fit_was_given():
    sizes = []

    class Sizes(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            sizes.append(batch)

    x, y = data(8)
    fitted(compiled(), x, y, unlabeled=x, validation_data=(x, y), batch_size=2, callbacks=[Sizes()])
    assert sizes == [0, 1, 2, 3]


def test_a_callback_list_and_a_single_callback_are_taken():
    x, y = data(8)
    model = compiled()
    for callbacks in (keras.callbacks.CallbackList(model=model, add_history=True), keras.callbacks.TerminateOnNaN()):
        model.fit(x, y, unlabeled=x, callbacks=callbacks, verbose=0)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "options", "message"),
    [
        (data(), data()[0], {"validation_split": 0.5}, "validation_split does not go with unlabeled=; give validation"),
        (data(), data(features=5)[0], {}, r"must have one shape, got \[\(4,\)\] and \[\(5,\)\] per sample"),
        (data(), np.zeros((0, 4), "float32"), {}, "the unlabeled data are empty"),
        (data(), [], {}, "the unlabeled data are empty"),
        ((generator(*data()), None), data()[0], {}, r"number of batches in generator is not known.*steps_per_epoch"),
    ],
    ids=["split", "shape", "no samples", "no batches", "length"],
)
def test_what_cannot_be_joined_is_an_error(labeled, unlabeled, options, message):
    with pytest.raises(cr.CRCoreError, match=message):
        compiled().fit(*labeled, unlabeled=unlabeled, verbose=0, **options)


def test_a_generator_that_ends_is_an_error():
    x, y = data()
    with pytest.raises(Exception, match="a generator must go on for as long as training does"):
        compiled().fit(iter([(x, y)]), unlabeled=x, steps_per_epoch=5, verbose=0)


def test_unlabeled_data_need_a_consistency_term():
    model = compiled(chosen=cr.Recipe(cr.LSQ(4), cr.LSQ(4)))
    with pytest.raises(cr.CRCoreError, match=r"give Recipe\(consistency=...\)"):
        model.fit(*data(), unlabeled=data()[0])


def test_unlabeled_data_with_one_view_beside_two_are_an_error():
    chosen = recipe()
    model = crk.ConsistencyModel(crk.prepare(dense(), chosen), chosen)
    model.compile("sgd", "mse")
    x, y = data()
    with pytest.raises(cr.CRCoreError, match=r"one shape, got .*\(view, other_view\),"):
        model.fit((x, x), y, unlabeled=x, verbose=0)
