"""`ConsistencyModel`: what a training step computes, on whatever engine is active."""

from __future__ import annotations

import crcore_keras as crk
import keras
import numpy as np
import pytest
from keras import ops
from small_trainings import Shift, assert_same, compiled, data, dense_net, fitted, recipe, weights

import crcore as cr
from crcore import testing

ROUNDING = 1e-5
compiles = pytest.param(
    True,
    marks=pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch's compiler warns on import"),
)


class Recorder(keras.layers.Layer):
    """An augmentation that keeps what it gave, where steps run eagerly."""

    def __init__(self):
        super().__init__()
        self.inner = keras.layers.GaussianNoise(1.0, seed=4)
        self.views = []

    def call(self, x, training=False):
        view = self.inner(x, training=training)
        self.views.append(ops.convert_to_numpy(view))
        return view


def forward(network, x):
    return ops.convert_to_numpy(network(x, training=False)).astype("float64")


def two_views(steps=4, n=4):
    rng = np.random.default_rng(7)
    return [((data(n, seed=s)[0], data(n, seed=s + 50)[0]), rng.integers(0, 3, n)) for s in range(steps)]


# --- one step after another, against NumPy ----------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, compiles])
def test_four_steps_are_those_of_the_formula(jit):
    """Task loss, term, lambda, decay and teacher, computed from the student's weights before and after each step."""
    ema = cr.EMA(0.9, warmup=100)
    chosen = recipe(cr.linear_ramp(2.0, steps=4, start=0.5), ema)
    model = crk.ConsistencyModel(crk.prepare(dense_net(), chosen), chosen)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.2), loss, jit_compile=jit)
    model.train_on_batch(*two_views()[0])  # builds the optimizer; the scales are from this batch
    average = [w.astype("float64") for w in weights(model.teacher)]
    for step, (views, y) in enumerate(two_views(), start=1):
        decay = ema.decay_at(step - 1)
        student = weights(model.student)
        average = [decay * mine + (1 - decay) * new for mine, new in zip(average, student, strict=True)]
        teacher = model.teacher
        logits = forward(model.student, views[0])
        logs = model.train_on_batch(views, y, return_dict=True)
        assert_same(weights(teacher), average, ROUNDING)
        task = -np.mean(log_softmax(logits)[np.arange(len(y)), y])
        term, _ = testing.reference_consistency(chosen.consistency, logits, forward(teacher, views[1]), step=step)
        expected = {
            "task_loss": task,
            "consistency_loss": term,
            "lambda": chosen.consistency.weight_at(step),
            "decay": decay,
            "loss": task + term,
        }
        model.reset_metrics()
        if step > 1:  # the means of the first step hold that of the step before
            assert {key: pytest.approx(float(logs[key]), rel=2e-5) for key in expected} == expected
        assert model.step == step


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_the_update_of_the_student_is_that_of_both_gradients():
    """In float64, for a student of float layers, SGD's step is lr * (softmax' and consistency' through the head)."""
    chosen = recipe(1.5)
    model = compiled(chosen=chosen, augment=lambda x: x, optimizer=keras.optimizers.SGD(1.0))
    x, y = data()
    model.train_on_batch(x, y)
    bias = np.array(ops.convert_to_numpy(model.student.get_layer("head").bias))
    teacher_bias = np.array(ops.convert_to_numpy(model.teacher.get_layer("head").bias))
    logits = forward(model.student, x)
    model.train_on_batch(x, y)
    assert np.any(teacher_bias != ops.convert_to_numpy(model.teacher.get_layer("head").bias))
    _, slope = testing.reference_consistency(chosen.consistency, logits, forward(model.teacher, x), step=1)
    task = (np.exp(log_softmax(logits)) - np.eye(3)[y]) / len(y)
    assert np.abs(slope).max() > 1e-4
    found = bias - ops.convert_to_numpy(model.student.get_layer("head").bias)
    np.testing.assert_allclose(found, np.sum(task + slope, axis=0), atol=2e-6)


@pytest.mark.parametrize("ema", [None, cr.EMA(0.9)])
@pytest.mark.parametrize("jit", [False, compiles])
def test_lambda_zero_is_plain_qat_to_the_bit(ema, jit):
    chosen = recipe(0.0, ema)
    plain = crk.prepare(dense_net(norm=True), chosen)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, jit_compile=jit)
    model = compiled(dense_net(norm=True), chosen, lambda x: x, jit_compile=jit)
    histories = [fitted(each, epochs=3) for each in (plain, model)]
    assert_same(weights(plain), weights(model.student))
    assert histories[0]["loss"] == histories[1]["loss"] == histories[1]["task_loss"]
    assert histories[1]["consistency_loss"] == histories[1]["lambda"] == [0.0] * 3


def test_without_consistency_it_is_qat_with_an_average():
    chosen = cr.Recipe(cr.LSQ(4), cr.LSQ(4), ema=cr.EMA(0.5))
    model = compiled(chosen=chosen)
    history = fitted(model)
    assert set(history) == {"loss", "decay"}
    assert model.step == 2
    assert compiled(chosen=cr.Recipe(cr.LSQ(4), cr.LSQ(4))).teacher is None


def test_the_gradient_never_reaches_the_teacher():
    chosen = recipe(5.0, cr.EMA(1.0))  # the average stays where it began
    model = compiled(chosen=chosen)
    x, y = data()
    model.train_on_batch(x, y)
    before = weights(model.teacher)
    fitted(model, x, y, epochs=2)
    assert_same(before, weights(model.teacher))
    assert not model.teacher.trainable_variables
    ids = {id(v) for v in model.trainable_variables}
    assert ids == {id(v) for v in model.student.trainable_variables}


def test_statistics_are_averaged_and_other_state_is_copied():
    class Counter(keras.layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

        def call(self, x, training=False):
            if training:
                self.count.assign(self.count + 1.0)
            return x

    net = dense_net(norm=True)
    net.add(Counter())
    net.build((None, 4))
    model = compiled(net, recipe(ema=cr.EMA(0.5)))
    fitted(model)
    norms = [network.get_layer("norm") for network in (model.student, model.teacher)]
    means = [ops.convert_to_numpy(norm.moving_mean) for norm in norms]
    assert np.abs(means[1]).max() > 0
    assert np.any(means[0] != means[1])
    assert float(model.student.layers[-1].count) == float(model.teacher.layers[-1].count) == 2.0


def test_batchnorm_statistics_are_copied_where_the_average_says_so():
    models = {policy: compiled(dense_net(norm=True), recipe(ema=cr.EMA(0.5, batchnorm=policy))) for policy in POLICIES}
    for model in models.values():
        fitted(model)
    for statistic in ("moving_mean", "moving_variance"):
        found = {policy: read(model.teacher, "norm", statistic) for policy, model in models.items()}
        students = read(models["copy"].student, "norm", statistic)
        np.testing.assert_array_equal(found["copy"], students)
        assert np.any(found["average"] != students)
    for policy in POLICIES:
        assert np.any(read(models[policy].teacher, "head", "kernel") != read(models[policy].student, "head", "kernel"))


POLICIES = ("average", "copy")


def read(network, layer, variable):
    return ops.convert_to_numpy(getattr(network.get_layer(layer), variable))


def test_copied_statistics_are_those_of_optimizer_steps_where_gradients_are_accumulated():
    chosen = recipe(ema=cr.EMA(0.5, batchnorm="copy"))
    model = compiled(dense_net(norm=True), chosen, optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    means = []
    for batch in range(4):
        model.train_on_batch(*data(4, seed=batch))
        means.append((read(model.student, "norm", "moving_mean"), read(model.teacher, "norm", "moving_mean")))
    start, after_second = means[0][1], means[1][0]
    np.testing.assert_array_equal(means[1][1], start)  # no optimizer step was made yet
    np.testing.assert_array_equal(means[2][1], after_second)
    np.testing.assert_array_equal(means[3][1], after_second)
    assert np.any(after_second != start)


def test_a_frozen_range_is_frozen_in_the_teacher_too():
    chosen = cr.Recipe(cr.MinMax(4), cr.MinMax(4), consistency=cr.Consistency(), ema=cr.EMA(0.5))
    model = compiled(chosen=chosen)
    fitted(model)
    model.student.get_layer("head").weight_quantizer.freeze()
    fitted(model)
    assert model.teacher.get_layer("head").weight_quantizer.frozen


def test_a_float_teacher_averages_a_quantized_student():
    model = compiled(chosen=recipe(ema=cr.EMA(0.5, quantized=False), bits=2))
    fitted(model)
    x, _ = data()
    plain = dense_net()
    for name in ("hidden", "head"):
        layer = model.teacher.get_layer(name)
        plain.get_layer(name).set_weights([ops.convert_to_numpy(layer.kernel), ops.convert_to_numpy(layer.bias)])
    np.testing.assert_allclose(forward(plain, x), forward(model.teacher, x), rtol=1e-6)


# --- views ------------------------------------------------------------------------------------------------------------


def test_the_augmentation_is_drawn_twice_and_anew_in_each_step():
    recorder = Recorder()
    model = compiled(augment=recorder, run_eagerly=True)
    x, y = data()
    for _ in range(2):
        model.train_on_batch(x, y)
    views = recorder.views[-4:]
    assert len(views) == 4
    assert len({view.tobytes() for view in views}) == 4


def shifts():
    """A layer, a function and an object, each with draws of its own."""
    generator = keras.random.SeedGenerator(3)

    def function(x):
        return x + keras.random.normal((1,), seed=generator)

    class Object:
        def __init__(self):
            self.generator = keras.random.SeedGenerator(3)

        def __call__(self, x):
            return x + keras.random.normal((1,), seed=self.generator)

    return {"layer": Shift(), "function": function, "object": Object(), "bound": Object().__call__}


@pytest.mark.parametrize("kind", ["layer", "function", "object", "bound"])
def test_draws_differ_between_views_and_steps_inside_of_the_compiled_step(kind):
    """With a student that never changes, equal views would give no distance, and equal draws equal distances."""
    model = compiled(augment=shifts()[kind], optimizer=keras.optimizers.SGD(0.0), chosen=recipe(1.0))
    x, y = data()
    terms = []
    for _ in range(4):
        model.reset_metrics()
        terms.append(float(model.train_on_batch(x, y, return_dict=True)["consistency_loss"]))
    assert min(terms) > 1e-6
    assert len({round(term, 7) for term in terms}) == 4


def test_training_is_reproducible():
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(4)
        model = compiled(augment=keras.layers.GaussianNoise(0.5))
        fitted(model, epochs=2, shuffle=True)
        runs.append(weights(model))
    assert_same(*runs)


def test_a_network_with_two_inputs_is_no_pair_of_views():
    inputs = [keras.Input((4,)), keras.Input((4,))]
    net = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Concatenate()(inputs)))
    chosen = recipe()
    x, y = data()
    alone = crk.ConsistencyModel(crk.prepare(net, chosen), chosen)
    alone.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(cr.CRCoreError, match="needs two views of each input, the data give one"):
        alone.fit([x, x], y, verbose=0)
    alone.fit(((x, x), (x + 0.1, x)), y, verbose=0)
    model = compiled(net, augment=lambda pair: [each + 0.1 for each in pair])
    fitted(model, [x, x], y)
    assert model.step == 1


def test_two_views_from_the_data_with_validation_on_the_input_itself():
    chosen = recipe(1.0)
    model = crk.ConsistencyModel(crk.prepare(dense_net(), chosen), chosen)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = data()
    history = model.fit((x, x + 0.2), y, batch_size=4, validation_data=(x, y), verbose=0).history
    assert history["consistency_loss"][0] > 0
    assert {"val_loss", "val_accuracy"} <= set(history)


# --- through Keras' doors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"jit_compile": True}, marks=compiles.marks),
        {"jit_compile": False},
        {"run_eagerly": True},
        {"steps_per_execution": 3},
    ],
    ids=str,
)
def test_every_way_to_run_a_step_gives_the_same_numbers(options):
    if "steps_per_execution" in options and keras.backend.backend() == "torch":
        pytest.skip("Keras has no steps_per_execution > 1 on torch")
    chosen = recipe(cr.linear_ramp(1.0, steps=10))
    x, y = data(20)
    # No random numbers: XLA may draw others than TensorFlow does without it.
    reference, model = (compiled(chosen=chosen, augment=lambda x: 1.1 * x, **each) for each in ({}, options))
    expected, found = (fitted(each, x, y, epochs=2) for each in (reference, model))
    assert model.step == reference.step == 10
    assert found["lambda"] == pytest.approx(expected["lambda"])
    assert found["lambda"][-1] == pytest.approx(0.9)
    assert_same(weights(model), weights(reference), 1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_accumulated_gradients_are_one_step(scaled):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    chosen = recipe(cr.linear_ramp(1.0, steps=10), cr.EMA(0.5))
    model = compiled(chosen=chosen, optimizer=optimizer)
    start = None
    steps, lambdas = [], []
    for batch in range(7):
        x, y = data(4, seed=batch)
        model.reset_metrics()
        lambdas.append(float(model.train_on_batch(x, y, return_dict=True)["lambda"]))
        steps.append(model.step)
        start = start or weights(model.teacher)
        if batch < 3:
            assert_same(start, weights(model.teacher))
    assert steps == [0, 0, 0, 1, 1, 1, 2]
    np.testing.assert_allclose(lambdas, [0, 0, 0, 0.1, 0.1, 0.1, 0.2], atol=1e-6)


def test_weights_of_samples_act_on_the_task_loss_alone():
    x, y = data()
    histories = []
    for options in ({}, {"sample_weight": np.zeros(8, "float32")}, {"class_weight": {0: 0.0, 1: 0.0, 2: 0.0}}):
        model = compiled(chosen=recipe(1.0), optimizer=keras.optimizers.SGD(0.0))
        histories.append(fitted(model, x, y, **options))
    plain, weighted, by_class = histories
    assert plain["task_loss"][0] > 0
    assert weighted["task_loss"] == by_class["task_loss"] == [0.0]
    assert weighted["consistency_loss"] == plain["consistency_loss"] == by_class["consistency_loss"]
    assert plain["consistency_loss"][0] > 0


def branched(form):
    inputs = keras.Input((4,), name="x")
    hidden = keras.layers.Dense(6, "relu", name="hidden")(inputs)
    outputs = {"kind": keras.layers.Dense(3, name="kind")(hidden), "size": keras.layers.Dense(1, name="size")(hidden)}
    return keras.Model(inputs, outputs if form == "dict" else list(outputs.values()))


@pytest.mark.parametrize("form", ["dict", "list"])
def test_one_of_several_outputs_is_held_to_the_teacher(form):
    x, y = data()
    targets = {"kind": y, "size": x[:, :1]}
    losses = {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"}
    metrics = {"kind": ["accuracy"], "size": ["mae"]}
    if form == "list":
        targets, losses, metrics = (list(each.values()) for each in (targets, losses, metrics))
    model = compiled(branched(form), recipe(1.0), output="kind", loss=losses, metrics=metrics)
    found = model.fit(
        x, targets, verbose=0, validation_data=(x, targets), unlabeled=x, callbacks=[crk.ConsistencyCallback("both")]
    ).history
    for name in ("kind_loss", "size_loss", "kind_accuracy", "size_mae", "consistency_loss"):
        assert name in found
    for name in ("val_kind_accuracy", "val_teacher_kind_accuracy", "val_teacher_size_mae"):
        assert name in found
    with pytest.raises(cr.CRCoreError, match=r"has the outputs .*output='kind'"):
        compiled(branched(form), recipe())
    with pytest.raises(cr.CRCoreError, match="output='colour' is no output of"):
        compiled(branched(form), recipe(), output="colour")


def test_probabilities_give_the_loss_of_their_logits():
    histories = [
        fitted(compiled(dense_net(softmax=softmax), recipe(2.0), Shift(), logits=not softmax), epochs=2)
        for softmax in (False, True)
    ]
    for name in ("loss", "consistency_loss"):
        np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=2e-5)


def test_evaluation_and_prediction_do_not_call_the_teacher():
    model = compiled(metrics=["accuracy"])
    fitted(model)

    def refuse(*arguments, **options):
        raise AssertionError("the teacher was called")

    model.teacher.call = refuse
    x, y = data()
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    assert set(found) == {"loss", "accuracy"}
    np.testing.assert_allclose(model.predict(x, verbose=0), forward(model.student, x), rtol=1e-5)
    assert set(model.test_on_batch(x, y, return_dict=True)) == {"loss", "accuracy"}


def test_training_logs_return_after_an_evaluation():
    model = compiled()
    x, y = data()
    names = {"loss", "task_loss", "consistency_loss", "lambda", "decay"}
    for _ in range(2):
        assert set(model.train_on_batch(x, y, return_dict=True)) == names
        assert set(model.test_on_batch(x, y, return_dict=True)) == {"loss"}
    for _ in range(2):
        found = fitted(model, x, y, epochs=2, validation_data=(x, y))
        assert set(found) == names | {"val_loss"}


def test_the_average_goes_on_when_the_optimizer_is_replaced():
    model = compiled(chosen=recipe(cr.linear_ramp(1.0, steps=10)))
    fitted(model)
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), model.loss)
    assert model.step == 2
    assert fitted(model)["lambda"] == pytest.approx([0.2])
    assert model.step == 3
    model.compile(keras.optimizers.Adam(), model.loss)
    assert fitted(model)["lambda"] == pytest.approx([0.4])
    assert model.step == 5


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains(policy):
    with DtypePolicy(policy):
        model = compiled(dense_net(norm=True), recipe(1.0))
        found = fitted(model, epochs=3)
    assert np.isfinite(found["loss"]).all()
    assert found["consistency_loss"][-1] > 0
    assert {v.dtype for v in model.teacher.weights if v.name != "flags"} == {"float32"}


class DtypePolicy:
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        keras.config.set_dtype_policy(self.name)

    def __exit__(self, *error):
        keras.config.set_dtype_policy("float32")


# --- distillation -----------------------------------------------------------------------------------------------------


def test_a_frozen_float_teacher_sees_the_students_view():
    chosen = recipe(cr.linear_ramp(1.0, steps=4), ema=None)
    net, recorder = dense_net(), Recorder()
    model = compiled(dense_net(), chosen, recorder, teacher=net, run_eagerly=True)
    before = weights(net)
    seen = []
    call = model.teacher.call
    model.teacher.call = lambda x, **options: (seen.append(ops.convert_to_numpy(x)), call(x, **options))[1]
    found = fitted(model, epochs=2)
    assert_same(recorder.views[-4:], seen[-4:])
    assert found["lambda"] == pytest.approx([0.25, 0.75])  # the ramp runs without an average too
    assert model.step == 4
    assert_same(before, weights(net))
    assert_same(before, weights(model.teacher))
    assert net.trainable
    assert len(net.trainable_variables) == 4
    assert "decay" not in found


@pytest.mark.parametrize(
    ("chosen", "teacher", "message"),
    [
        (recipe(), dense_net, r"takes Recipe\(consistency=..., ema=None\)"),
        (cr.Recipe(cr.LSQ(4), cr.LSQ(4)), dense_net, r"takes Recipe\(consistency=..., ema=None\)"),
        (recipe(ema=None), lambda: "resnet", "teacher must be a built keras.Model, got 'resnet'"),
        (recipe(ema=None), lambda: keras.Sequential([keras.layers.Dense(3)]), "teacher must be a built keras.Model"),
        (
            recipe(ema=None),
            lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(5)]),
            "give a teacher for the same classes",
        ),
    ],
)
def test_a_teacher_that_cannot_be_followed_is_refused(chosen, teacher, message):
    with pytest.raises(cr.CRCoreError, match=message):
        crk.ConsistencyModel(crk.prepare(dense_net(), chosen), chosen, teacher=teacher())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["average", "distillation"])
def test_a_file_holds_everything_and_training_goes_on(kind, tmp_path):
    options = {"teacher": dense_net()} if kind == "distillation" else {}
    ema = None if kind == "distillation" else cr.EMA(0.9, warmup=9, quantized=False)
    chosen = recipe(cr.linear_ramp(1.0, steps=10), ema)
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)
    model = compiled(
        dense_net(norm=True) if kind == "average" else dense_net(), chosen, Shift(), optimizer=optimizer, **options
    )
    x, y = data(12)
    fitted(model, x, y)  # three batches: in the middle of an optimizer step
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert (twin.step, twin.recipe) == (model.step, model.recipe)
    assert_same(weights(model), weights(twin))
    if kind == "average":
        np.testing.assert_array_equal(forward(model.teacher, x), forward(twin.teacher, x))
    histories = [fitted(each, x, y, epochs=2) for each in (model, twin)]
    assert histories[0] == histories[1]
    assert_same(weights(model), weights(twin))
    np.testing.assert_array_equal(model.predict(x, verbose=0), twin.predict(x, verbose=0))


def test_weights_alone_round_trip_also_before_compile(tmp_path):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model = compiled(optimizer=optimizer)
    x, y = data(16)
    fitted(model, x, y, epochs=2)
    model.save_weights(tmp_path / "model.weights.h5")
    twin = crk.ConsistencyModel(crk.prepare(dense_net(), model.recipe), model.recipe, keras.layers.GaussianNoise(0.3))
    twin.load_weights(tmp_path / "model.weights.h5", skip_mismatch=False)
    twin.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), model.loss)
    assert twin.step == model.step == 4
    assert_same(weights(model.teacher), weights(twin.teacher))


def test_a_model_is_what_its_config_says():
    model = compiled(dense_net(), recipe(), Shift(), output=None)
    twin = crk.ConsistencyModel.from_config(model.get_config())
    assert (twin.recipe, twin.name, type(twin.augment)) == (model.recipe, model.name, Shift)
    assert twin.get_config()["recipe"] == model.get_config()["recipe"]


@pytest.mark.parametrize("kind", ["function", "object", "bound"])
def test_an_augmentation_that_no_file_can_name_is_an_error_at_saving(kind, tmp_path):
    model = compiled(augment=shifts()[kind])
    with pytest.raises(cr.CRCoreError, match=r"cannot be saved; make it a keras layer, or decorate"):
        model.save(tmp_path / "model.keras")


@keras.saving.register_keras_serializable("crcore_tests")
def registered(x):
    return x + 1.0


def test_a_registered_function_is_saved(tmp_path):
    model = compiled(augment=registered)
    fitted(model)
    model.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").augment is registered


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named_with_their_remedy():
    student = crk.prepare(dense_net(), recipe())
    for arguments, message in [
        ((student, "lsq"), "takes a crcore.Recipe, got str; for example Recipe"),
        ((dense_net(), recipe()), r"student from crcore_keras.prepare\(model, recipe\), got Sequential"),
        (("student", recipe()), r"student from crcore_keras.prepare\(model, recipe\), got str"),
        ((student, recipe(), 3), "augment must be a layer or a function of a batch, or None for two views; got 3"),
    ]:
        with pytest.raises(cr.CRCoreError, match=message):
            crk.ConsistencyModel(*arguments)


def test_one_view_where_two_are_needed_is_an_error():
    chosen = recipe()
    model = crk.ConsistencyModel(crk.prepare(dense_net(), chosen), chosen)
    model.compile("sgd", "mse")
    x, y = data()
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(cr.CRCoreError, match=r"needs two views.*shape \(8, 4\).*augment=layer"):
            train(x, y)


def test_a_sigmoid_is_refused():
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    with pytest.raises(cr.CRCoreError, match=r"ends in a sigmoid.*two for a yes or no"):
        compiled(net)


def test_a_single_class_is_refused_or_has_no_distance():
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Activation("sigmoid")])
    with pytest.raises(cr.CRCoreError, match="ends in a sigmoid"):
        compiled(net)


def test_a_subclassed_teacher_of_other_classes_is_refused_in_the_first_step():
    class Own(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.head = keras.layers.Dense(5)

        def call(self, x):
            return self.head(x)

    teacher = Own()
    teacher(data()[0])
    model = compiled(dense_net(), recipe(ema=None), teacher=teacher, run_eagerly=True)
    with pytest.raises(cr.CRCoreError, match="for the same classes"):
        fitted(model)
