"""The meter, dampening and freezing on each engine: the toy of the paper, and NumPy as the oracle."""

from __future__ import annotations

import crcore_keras as crk
import keras
import numpy as np
import pytest
from keras import ops
from small_networks import mlp, numbers
from small_trainings import assert_same, compiled, data, dense_net, fitted, weights

import crcore as cr

LATE = cr.Freezing(cr.cosine_ramp(0.01, steps=100, start=0.9), momentum=0.03)
OFTEN = cr.Freezing(cr.linear_ramp(0.02, steps=16, start=0.1), momentum=0.2)


def recipe(bits=3, **options):
    return cr.Recipe(cr.LSQ(bits, per_channel=True), cr.LSQ(bits), first_last_bits=None, **options)


def model_of(chosen, lr=0.3, **options):
    return compiled(chosen=chosen, optimizer=keras.optimizers.SGD(lr, momentum=0.9), **options)


def codes_of(student):
    return [
        numbers(layer.weight_quantizer.codes(layer._kernel)) for layer in student.layers if hasattr(layer, "kernel")
    ]


class Watch(keras.callbacks.Callback):
    """The integers after each batch."""

    def __init__(self, student):
        super().__init__()
        self.student, self.codes = student, []

    def on_train_batch_end(self, batch, logs=None):
        assert self.model is not None  # on JAX, asking for it brings the variables up to date
        self.model.update_teacher()
        self.codes.append(codes_of(self.student))


# The toy: one weight, a target between two integers


class Toy:
    """``(target - quantized weight)^2`` on the grid of whole numbers, by gradient descent."""

    def __init__(self, **remedy):
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.45))
        chosen = cr.Recipe(cr.LSQ(3), None, first_last_bits=None, **remedy)
        self.student = crk.prepare(keras.Sequential([keras.Input((1,)), layer]), chosen)
        quantizer = self.student.layers[0].weight_quantizer
        quantizer.arrays[0].assign(1.0)
        quantizer.trainable = False
        self.model = crk.ConsistencyModel(self.student, chosen)
        self.model.compile(keras.optimizers.SGD(0.02), "mse")
        self.meter = crk.OscillationMeter(self.student)

    def run(self, steps):
        watch = Watch(self.student)
        x, target = np.ones((steps, 1), "float32"), np.full((steps, 1), 0.3, "float32")
        self.model.fit(x, target, batch_size=1, shuffle=False, verbose=0, callbacks=[watch, self.meter])
        return [codes[0].item() for codes in watch.codes]


def test_a_weight_between_two_integers_oscillates_for_ever():
    toy = Toy()
    toy.run(50)
    codes = toy.run(100)
    assert set(codes) == {0.0, 1.0}
    assert np.mean(codes) == pytest.approx(0.3, abs=0.03)
    assert toy.meter.total() == cr.OscillationRates(1, flipped=1.0, oscillating=1.0)


@pytest.mark.parametrize("remedy", [{"dampening": cr.Dampening(cr.cosine_ramp(2.0, steps=80))}, {"freezing": LATE}])
def test_a_remedy_ends_an_oscillation(remedy):
    toy = Toy(**remedy)
    assert set(toy.run(20)) == {0.0, 1.0}
    assert toy.model.frozen == 0.0
    toy.run(100)
    assert set(toy.run(40)) == {0.0}
    assert toy.meter.total() == cr.OscillationRates(1, flipped=0.0, oscillating=0.0)
    assert toy.model.frozen == ("freezing" in remedy)
    if "freezing" in remedy:
        assert numbers(toy.student.layers[0]._kernel) == 0.0


# The compiled step against a plain loop in NumPy


def test_a_training_with_both_remedies_is_a_plain_loop_in_numpy():
    steps, lr = 30, np.float32(0.2)
    freezing = cr.Freezing(cr.linear_ramp(0.0, steps=16, start=0.83), momentum=0.3)  # no frequency is a threshold
    dampening = cr.Dampening(cr.linear_ramp(0.3, steps=20))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, 4, 6)).astype("float32")
    y = rng.normal(size=(steps, 4, 3)).astype("float32")
    chosen = cr.Recipe(cr.LSQ(3), None, first_last_bits=None, freezing=freezing, dampening=dampening)
    layer = keras.layers.Dense(3, use_bias=False, kernel_initializer="glorot_uniform")
    student = crk.prepare(keras.Sequential([keras.Input((6,)), layer]), chosen)
    layer = student.layers[0]
    model = crk.ConsistencyModel(student, chosen)
    model.compile(keras.optimizers.SGD(float(lr)), "mse")

    w, scale = numbers(layer._kernel), numbers(layer.weight_quantizer.arrays[0]).reshape(1, 1)
    quantizer = layer.weight_quantizer.quantizer
    lo, hi = cr.code_limits(quantizer)
    state = cr.FreezingState.start(quantizer.codes(w, scale))
    losses = []
    for step in range(steps):
        quantized = quantizer.forward(w, scale)
        error = x[step] @ quantized - y[step]
        distance = np.clip(w, lo * scale, hi * scale) - quantized
        factor = np.float32(dampening.weight_at(step))
        losses.append(np.mean(error**2) + factor * np.sum(distance**2))
        dw, dscale = quantizer.vjp(x[step].T @ error * np.float32(2 / error.size), w, scale, elements=w.size)
        w = w - lr * (dw + 2 * factor * distance)
        scale = scale - lr * dscale
        state = freezing.update(state, w, quantizer, scale, step=step)
        w = freezing.apply(state, w, quantizer, scale)

    history = model.fit(x.reshape(-1, 6), y.reshape(-1, 3), batch_size=4, shuffle=False, verbose=0).history
    assert history["loss"][-1] == pytest.approx(np.mean(losses), rel=1e-4)
    assert model.frozen == state.frozen.mean() > 0.0
    np.testing.assert_allclose(numbers(layer._kernel), w, atol=1e-5)
    np.testing.assert_allclose(numbers(layer.weight_quantizer.scale), scale.item(), atol=1e-5)


@pytest.mark.parametrize("remedy", [{}, {"freezing": OFTEN}])
def test_the_meter_counts_what_a_loop_over_the_weights_counts(remedy):
    model = model_of(recipe(**remedy), lr=1.0)
    meter, watch = crk.OscillationMeter(model.student), Watch(model.student)
    fitted(model, epochs=2, batch_size=1, callbacks=[meter, watch])
    start = codes_of(model.student)
    fitted(model, epochs=1, batch_size=1, callbacks=[meter, watch])
    states = [cr.Oscillation.start(codes) for codes in start]
    for codes in watch.codes[-8:]:
        states = [cr.oscillation_update(state, each) for state, each in zip(states, codes, strict=True)]
    assert meter.total() == cr.OscillationRates.of(*states)
    assert list(meter.layers()) == ["hidden", "head"]
    assert meter.layers()["hidden"] == cr.OscillationRates.of(states[0])
    assert 0.0 < meter.total().flipped < 1.0


@pytest.mark.parametrize("remedy", [{}, {"freezing": OFTEN}])
def test_the_meter_changes_nothing(remedy):
    found = []
    for measured in (False, True):
        keras.utils.set_random_seed(0)
        model = model_of(recipe(ema=cr.EMA(0.9), **remedy))
        callbacks = [crk.OscillationMeter(model.student)] if measured else []
        fitted(model, epochs=4, callbacks=callbacks)
        found.append(weights(model.student))
    assert_same(*found, tolerance=1e-6 if remedy else 0.0)


def test_what_is_logged_tells_the_losses_apart():
    logs = fitted(model_of(recipe(dampening=cr.Dampening(0.5))), epochs=2)
    assert set(logs) == {"loss", "task_loss", "dampening_loss"}
    assert min(logs["dampening_loss"]) > 0.0
    np.testing.assert_allclose(np.add(logs["task_loss"], logs["dampening_loss"]), logs["loss"], rtol=1e-5)
    consistent = recipe(dampening=cr.Dampening(0.5), consistency=cr.Consistency())
    logs = fitted(model_of(consistent), epochs=1)
    assert set(logs) == {"loss", "task_loss", "dampening_loss", "consistency_loss", "lambda", "decay"}
    total = logs["task_loss"][0] + logs["dampening_loss"][0] + logs["consistency_loss"][0]
    assert logs["loss"][0] == pytest.approx(total, rel=1e-5)


def test_a_frozen_integer_stays_while_the_scale_trains():
    model = model_of(recipe(freezing=OFTEN))
    fitted(model, epochs=8)
    masks = [numbers(ops.cast(variables[-1], "float32")) > 0 for variables in model._freezer._states]
    scales = [numbers(layer.weight_quantizer.scale) for layer in model.student.layers]
    before = codes_of(model.student)
    fitted(model, epochs=4)
    assert any(mask.any() for mask in masks)
    for mask, old, new in zip(masks, before, codes_of(model.student), strict=True):
        np.testing.assert_array_equal(old[mask], new[mask])
    for layer, scale in zip(model.student.layers, scales, strict=True):
        assert np.any(scale != numbers(layer.weight_quantizer.scale))
    for layer, mask, codes in zip(model.student.layers, masks, codes_of(model.student), strict=True):
        kernel, scale = numbers(layer._kernel), numbers(layer.weight_quantizer.scale)
        np.testing.assert_array_equal(kernel[mask], (codes * scale)[mask])


def test_a_saved_model_goes_on_to_the_same_bits(tmp_path):
    model = model_of(recipe(freezing=OFTEN, dampening=cr.Dampening(0.1), ema=cr.EMA(0.9)))
    fitted(model, epochs=5)
    model.save(tmp_path / "model.keras")
    loaded = crk.load_model(tmp_path / "model.keras")
    assert loaded.recipe == model.recipe
    assert loaded.frozen == model.frozen > 0.0
    for each in (model, loaded):
        fitted(each, epochs=4)
    assert loaded.frozen == model.frozen
    assert_same(weights(loaded), weights(model))


def test_a_model_saved_during_fit_holds_frozen_weights(tmp_path):
    model = model_of(recipe(freezing=OFTEN))
    saved = tmp_path / "model.keras"
    fitted(model, epochs=8, callbacks=[keras.callbacks.ModelCheckpoint(saved)])
    assert model.frozen > 0.0
    assert_same(weights(crk.load_model(saved).student), weights(model.student))


def test_batches_of_one_optimizer_step_are_one_update():
    def run(batch_size, **options):
        keras.utils.set_random_seed(0)
        chosen = cr.Recipe(cr.LSQ(3), None, first_last_bits=None, freezing=OFTEN)
        model = compiled(chosen=chosen, optimizer=keras.optimizers.SGD(0.3, **options))
        fitted(model, epochs=8, batch_size=batch_size)
        return model

    whole, halves = run(8), run(4, gradient_accumulation_steps=2)
    assert int(numbers(halves._updates)) == int(numbers(whole._updates)) == 8
    assert halves.frozen == whole.frozen
    assert_same(weights(halves.student), weights(whole.student), tolerance=1e-5)


def test_frozen_weights_are_written_in_the_middle_of_an_optimizer_step_too():
    optimizer = keras.optimizers.SGD(0.3, weight_decay=0.05, gradient_accumulation_steps=2)
    model = compiled(chosen=cr.Recipe(cr.LSQ(3), None, first_last_bits=None, freezing=OFTEN), optimizer=optimizer)
    fitted(model, *data(20), epochs=7)  # 35 batches
    assert int(numbers(model._batches)) == 1
    assert model.frozen > 0.0
    for layer, variables in zip(model.student.layers, model._freezer._states, strict=True):
        mask = numbers(ops.cast(variables[-1], "float32")) > 0
        frozen = numbers(variables[0]) * numbers(layer.weight_quantizer.scale)
        np.testing.assert_array_equal(numbers(layer._kernel)[mask], frozen[mask])


def test_the_teacher_averages_frozen_weights():
    model = model_of(recipe(freezing=OFTEN, ema=cr.EMA(0.0)))
    fitted(model, epochs=8)
    assert model.frozen > 0.0
    assert_same(weights(model.teacher), weights(model.student))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crk.OscillationMeter(dense_net()), "Sequential has no quantized weight; give a student from"),
        (
            lambda: crk.ConsistencyModel(
                crk.prepare(mlp(), cr.Recipe(cr.MinMax(4), None)), recipe(freezing=cr.Freezing(0.1))
            ),
            "freezing holds weights to the grid of a learned scale, but MinMax",
        ),
        (
            lambda: crk.ConsistencyModel(
                crk.prepare(mlp(), cr.Recipe(cr.DoReFa(4), None)), recipe(dampening=cr.Dampening(0.1))
            ),
            "dampening holds weights to the grid of a learned scale, but DoReFa",
        ),
        (
            lambda: crk.ConsistencyModel(
                crk.prepare(mlp(), cr.Recipe(None, cr.LSQ(4))), recipe(dampening=cr.Dampening(0.1))
            ),
            "has no quantized weight",
        ),
    ],
)
def test_what_is_refused_is_named(make, message):
    with pytest.raises(cr.CRCoreError, match=message):
        make()
