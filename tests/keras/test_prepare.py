"""`prepare`: which layers are quantized, how, and what is said where they cannot be."""

from __future__ import annotations

import re
from typing import Any

import crcore_keras as crk
import keras
import numpy as np
import pytest
from keras import layers, ops
from small_networks import (
    MODELS,
    assert_same_bits,
    compiled,
    convnet,
    images,
    kernel_of,
    labels,
    mlp,
    numbers,
    quantized,
    quantizers,
    random,
    recipe,
    snapshot,
    subclassed,
    tokens,
    trained,
    transformer,
    vectors,
)

import crcore as cr

EACH = pytest.mark.parametrize("name", MODELS)


class UsersConv(layers.Conv2D):
    """A subclass with a call of its own."""

    def call(self, inputs):
        return 2.0 * super().call(inputs)


class UsersDense(layers.Dense):
    """Reads its kernel itself."""

    def call(self, inputs):
        return ops.matmul(inputs, 3.0 * self.kernel) + self.bias


# Name: the layer, the shape of one sample, the shape of its scales.
KINDS: dict[str, Any] = {
    "Dense": (lambda: layers.Dense(4, "gelu"), (6,), (1, 4)),
    "Dense on sequences": (lambda: layers.Dense(4, use_bias=False), (5, 6), (1, 4)),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cd->abd", (None, 4), "relu", bias_axes="d"), (5, 6), (1, 4)),
    "EinsumDense heads": (lambda: layers.EinsumDense("...d,dnh->...nh", (2, 3)), (5, 6), (1, 2, 3)),
    "EinsumDense contracted": (lambda: layers.EinsumDense("abnh,nhd->abd", (None, 4)), (5, 2, 3), (1, 1, 4)),
    "EinsumDense grouped": (lambda: layers.EinsumDense("abn,ncb->abc", (5, 3)), (5, 6), (1, 3, 5)),
    "Conv1D": (lambda: layers.Conv1D(4, 3, activation="tanh"), (7, 6), (1, 1, 4)),
    "causal Conv1D": (lambda: layers.Conv1D(4, 3, padding="causal"), (7, 6), (1, 1, 4)),
    "Conv2D": (lambda: layers.Conv2D(4, 3, padding="same", activation="relu"), (7, 7, 6), (1, 1, 1, 4)),
    "grouped Conv2D": (lambda: layers.Conv2D(4, 3, groups=2, use_bias=False), (7, 7, 6), (1, 1, 1, 4)),
    "dilated Conv2D": (lambda: layers.Conv2D(4, 3, dilation_rate=2), (7, 7, 6), (1, 1, 1, 4)),
    "Conv3D": (lambda: layers.Conv3D(4, 2), (3, 3, 3, 2), (1, 1, 1, 1, 4)),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (7, 6), (1, 6, 2)),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, activation="relu"),
        (7, 7, 6),
        (1, 1, 6, 2),
    ),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(4, 3), (7, 6), (1, 4, 1)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(4, 3, strides=2, activation="relu"), (5, 5, 6), (1, 1, 4, 1)),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(4, 2), (3, 3, 3, 2), (1, 1, 1, 4, 1)),
    "a user's Conv2D": (lambda: UsersConv(4, 3), (7, 7, 6), (1, 1, 1, 4)),
    "a user's Dense": (lambda: UsersDense(4), (6,), (1, 4)),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def one_layer(kind: str) -> Any:
    make, shape, _ = KINDS[kind]
    return keras.Sequential([keras.Input(shape), make()])


@KIND
def test_each_kind_of_layer_multiplies_quantized_input_with_quantized_weight(kind):
    """The float layer, given by hand what an integer layer would see."""
    model = one_layer(kind)
    student = crk.prepare(model, recipe(3, first_last_bits=None))
    x = random(2, *KINDS[kind][1])
    out = student(x, training=True)
    layer, oracle = student.layers[0], model.layers[0]
    assert tuple(layer.weight_quantizer.scale.shape) == KINDS[kind][2]
    assert isinstance(layer, type(oracle))
    in_float = numbers(oracle(x))
    oracle.kernel.assign(layer.weight_quantizer(ops.convert_to_tensor(numbers(oracle.kernel))))
    expected = oracle(layer.input_quantizer(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(numbers(out), numbers(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(numbers(out), numbers(student(x)))
    assert np.abs(numbers(out) - in_float).max() > 1e-3


@KIND
def test_training_moves_kernel_and_scales(kind):
    student = crk.prepare(one_layer(kind), recipe(3, first_last_bits=None))
    student.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=keras.backend.backend() != "jax")
    x = random(2, *KINDS[kind][1])
    y = 1.0 + 0.0 * numbers(student(x, training=True))
    layer = student.layers[0]
    watched = {v.path: v for v in [kernel_of(layer), layer.weight_quantizer.arrays[0], layer.input_quantizer.arrays[0]]}
    before = {path: numbers(variable) for path, variable in watched.items()}
    student.train_on_batch(x, y)
    assert all(np.any(numbers(variable) != before[path]) for path, variable in watched.items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "user" not in kind])
def test_the_scale_of_a_channel_depends_on_that_channel_alone(kind):
    """One output channel made a thousand times larger changes the output of that channel and its scale alone."""
    model = one_layer(kind)
    shape = KINDS[kind][2]
    place = tuple(1 if size > 1 else slice(None) for size in shape)
    before = numbers(crk.prepare(model, recipe()).layers[0].weight_quantizer.scale)
    kernel = kernel_of(model.layers[0])
    x = random(2, *KINDS[kind][1])
    out = numbers(model(x))
    changed = numbers(kernel)
    changed[place] *= 1000.0
    kernel.assign(changed)
    after = numbers(crk.prepare(model, recipe()).layers[0].weight_quantizer.scale)
    moved = np.abs(after / before - 1.0) > 1e-3
    assert moved[place].all()
    assert moved.sum() == 1
    where = np.argwhere(np.abs(numbers(model(x)) - out) > 1e-6)
    if "heads" not in kind and kind != "EinsumDense grouped":
        assert len(set(where[:, -1])) == 1, "the axis is not that of the layer's output channels"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.SeparableConv1D(4, 3, strides=2, padding="same", activation="relu"), (7, 6)),
        (lambda: layers.SeparableConv2D(4, 3, padding="same", depth_multiplier=2, activation="relu"), (7, 7, 6)),
        (lambda: layers.SeparableConv2D(4, 3, strides=2, use_bias=False), (7, 7, 6)),
        (lambda: layers.SeparableConv2D(4, 3, dilation_rate=2), (7, 7, 6)),
    ],
)
def test_a_separable_convolution_quantizes_what_lies_between_its_two(make, shape):
    model = keras.Sequential([keras.Input(shape), make()])
    student = crk.prepare(model, recipe(3, first_last_bits=None))
    x = random(2, *shape)
    out = student(x, training=True)
    layer, oracle = student.layers[0], model.layers[0]
    assert len(quantizers(student)) == 4
    channels = shape[-1] * oracle.depth_multiplier
    assert tuple(layer.weight_quantizer.scale.shape)[-2:] == (shape[-1], oracle.depth_multiplier)
    assert tuple(layer.pointwise_weight_quantizer.scale.shape)[-2:] == (1, 4)
    kind = layers.DepthwiseConv1D if len(shape) == 2 else layers.DepthwiseConv2D
    first = kind(
        oracle.kernel_size if len(shape) == 3 else oracle.kernel_size[0],
        strides=oracle.strides[0],
        padding=oracle.padding,
        depth_multiplier=oracle.depth_multiplier,
        dilation_rate=oracle.dilation_rate[0],
        use_bias=False,
    )
    seen = ops.convert_to_tensor(x)
    seen = layer.input_quantizer(seen)
    first.build(seen.shape)
    first.kernel.assign(layer.weight_quantizer(ops.convert_to_tensor(numbers(oracle.depthwise_kernel))))
    between = layer.pointwise_input_quantizer(first(seen))
    assert between.shape[-1] == channels
    pointwise = layer.pointwise_weight_quantizer(ops.convert_to_tensor(numbers(oracle.pointwise_kernel)))
    expected = ops.matmul(between, ops.reshape(pointwise, (channels, 4)))
    expected = oracle.activation(expected + oracle.bias if oracle.use_bias else expected)
    np.testing.assert_allclose(numbers(out), numbers(expected), rtol=1e-5, atol=1e-6)
    student.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=keras.backend.backend() != "jax")
    before = [numbers(quantizer.arrays[0]) for quantizer in quantizers(student)]
    student.train_on_batch(x, 1.0 + 0.0 * numbers(out))
    assert all(np.any(numbers(q.arrays[0]) != old) for q, old in zip(quantizers(student), before, strict=True))


def test_an_embedding_has_a_quantized_table_and_no_input_quantizer():
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(9, 4), layers.Dense(2)])
    student = crk.prepare(model, recipe(2, first_last_bits=None))
    embed = student.layers[0]
    assert embed.input_quantizer is None
    assert tuple(embed.weight_quantizer.scale.shape) == (9, 1)
    rows = numbers(embed(np.arange(9)))
    np.testing.assert_array_equal(rows, numbers(embed.weight_quantizer(numbers(embed._embeddings))))
    assert all(len(set(row.tolist())) <= 4 for row in rows)  # two bits


def test_the_projections_of_an_attention_layer_are_quantized():
    x = random(2, 5, 8)
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4, name="mha")(inputs, inputs, use_causal_mask=True))
    student = crk.prepare(model, recipe(3, first_last_bits=None))
    out = student(x, training=True)
    names = {"query", "key", "value", "attention_output"}
    attention, oracle = student.get_layer("mha"), model.get_layer("mha")
    assert quantized(student).keys() == names
    shapes = {name: tuple(layer.weight_quantizer.scale.shape) for name, layer in quantized(student).items()}
    assert shapes == dict.fromkeys(names, (1, 2, 4)) | {"attention_output": (1, 1, 8)}
    seen = {n: numbers(getattr(attention, f"_{n}_dense").input_quantizer(x)) for n in ("query", "key", "value")}
    for name in names:
        theirs = getattr(oracle, "_output_dense" if name == "attention_output" else f"_{name}_dense")
        theirs.kernel.assign(quantized(student)[name].weight_quantizer(numbers(theirs.kernel)))
    output = oracle._output_dense.call
    oracle._output_dense.call = lambda heads: output(quantized(student)["attention_output"].input_quantizer(heads))
    expected = oracle(query=seen["query"], key=seen["key"], value=seen["value"], use_causal_mask=True)
    np.testing.assert_allclose(numbers(out), numbers(expected), rtol=1e-5, atol=1e-6)


def test_grouped_query_attention_and_wrapped_layers_are_quantized():
    inputs = keras.Input((5, 8))
    x = layers.GroupQueryAttention(4, 4, 2, name="gqa")(inputs, inputs)
    x = layers.TimeDistributed(layers.Dense(3, name="each"), name="over_time")(x)
    student = crk.prepare(keras.Model(inputs, x), recipe())
    assert quantized(student).keys() == {"query", "key", "value", "attention_output", "each"}
    trained_before = student(random(2, 5, 8), training=True)
    assert np.isfinite(numbers(trained_before)).all()
    assert all(quantizer.initialized for quantizer in quantizers(student))


def test_a_layer_used_twice_is_quantized_once():
    student = crk.prepare(convnet(), recipe())
    assert len(quantizers(student)) == 2 * 4 + 4
    assert len({id(q) for q in quantizers(student)}) == 12
    names = [variable.path for variable in student.trainable_variables]
    assert sum("shared" in name and "weight_quantizer" in name for name in names) == 1
    assert len(names) == len(set(names))


@EACH
def test_prepare_copies_and_inplace_changes_the_model_itself(name):
    make, batch = MODELS[name]
    model = make()
    before, kinds, config = snapshot(model), [type(each) for each in model._flatten_layers()], model.to_json()
    student = crk.prepare(model, recipe())
    trained(student, batch())
    assert_same_bits(before, snapshot(model))
    assert [type(each) for each in model._flatten_layers()] == kinds
    assert model.to_json() == config
    same = crk.prepare(model, recipe(), inplace=True)
    assert same is model
    assert isinstance(model, kinds[0])
    assert quantized(model).keys() == quantized(student).keys()


@EACH
def test_every_layer_of_a_model_is_quantized_and_trains(name):
    make, batch = MODELS[name]
    expected = {
        "Sequential": ["first", "middle", "last"],
        "Functional": ["stem", "shared", "depthwise", "separable", "head"],
        "attention": ["embed", "query", "key", "value", "attention_output", "each", "einsum", "head"],
        "subclassed": ["stem", "dense", "head"],
    }[name]
    student = compiled(crk.prepare(make(), recipe()), run_eagerly=False, jit_compile=keras.backend.backend() == "jax")
    assert sorted(quantized(student)) == sorted(expected)
    before = snapshot(student)
    student.fit(batch(8), labels(8), batch_size=4, epochs=2, verbose=0)
    after = snapshot(student)
    frozen = [
        key for key in before if np.array_equal(before[key], after[key]) and "seed" not in key and "key/bias" not in key
    ]
    signs = [key for key in frozen if "flags" in key]
    assert not set(frozen) - set(signs), set(frozen) - set(signs)
    assert np.isfinite(student.predict(batch(), verbose=0)).all()


def test_first_and_last_layer_have_eight_bits_and_overrides_and_skip_go_by_dotted_names():
    overrides = {"block.separable": {"weights": cr.LSQ(2)}, "block.separable.pointwise": {"weights": cr.LSQ(3)}}
    student = crk.prepare(convnet(), recipe(skip="block.depthwise", overrides=overrides))
    bits = {
        name: tuple(q.quantizer.bits for q in (layer.weight_quantizer, layer.input_quantizer))
        for name, layer in quantized(student).items()
    }
    assert bits == {"stem": (8, 8), "shared": (4, 4), "separable": (2, 4), "head": (8, 8)}
    assert student.get_layer("block").get_layer("separable").pointwise_weight_quantizer.quantizer.bits == 3
    assert type(student.get_layer("block").get_layer("depthwise")) is layers.DepthwiseConv2D

    nested = crk.prepare(transformer(), recipe(skip="attention", overrides={"over_time": {"weights": cr.LSQ(5)}}))
    assert quantized(nested).keys() == {"embed", "each", "einsum", "head"}
    assert quantized(nested)["each"].weight_quantizer.quantizer.bits == 5
    blocks = crk.prepare(subclassed(), recipe(skip="block_0"))
    assert not hasattr(blocks.blocks[0].dense, "weight_quantizer")
    assert blocks.blocks[1].dense.weight_quantizer.quantizer.bits == 4


def test_only_weights_or_only_inputs():
    weights = crk.prepare(mlp(), cr.Recipe(cr.LSQ(4), None))
    inputs = crk.prepare(mlp(), cr.Recipe(None, cr.LSQ(4)))
    assert weights.get_layer("middle").input_quantizer is None
    assert inputs.get_layer("middle").weight_quantizer is None
    for student in (weights, inputs):
        trained(student, vectors())


# --- what prepare cannot quantize ------------------------------------------------------------------------------------


class OwnMatrix(layers.Layer):
    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], shape[-1]), name="table")

    def call(self, x):
        return ops.matmul(x, self.table)


def everything() -> Any:
    tokens = keras.Input((5,), dtype="int32")
    embed = layers.ReversibleEmbedding(9, 8, name="reversible")
    x = layers.Dense(8, name="stem")(embed(tokens))
    x = layers.SpectralNormalization(layers.Dense(8, name="inner"), name="spectral")(x)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both")(x)
    x = layers.LSTM(8, name="lstm")(OwnMatrix(name="own")(x))
    x = layers.PReLU()(layers.LayerNormalization()(x))
    return keras.Model(tokens, layers.Dense(3, name="head")(x))


def skip_of(message: str) -> tuple[str, ...]:
    """What a reader would paste from the message."""
    pasted = re.search(r"Recipe\(\.\.\., skip=(\(.*?\))\)", message)
    assert pasted, message
    return eval(pasted[1], {})


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_it_does_not_know_are_named_in_one_message_whose_skip_works(inplace):
    model = everything()
    before, kinds = snapshot(model), [type(layer) for layer in model._flatten_layers()]
    with pytest.raises(cr.CRCoreError) as raised:
        crk.prepare(model, recipe(), inplace=inplace)
    message = str(raised.value)
    for named in (
        "'reversible' (ReversibleEmbedding): a kind that",
        "'spectral' (SpectralNormalization): a kind that",
        "'lstm' (LSTM): a kind that",
        "'table' (8, 8) of 'own' (OwnMatrix): used by code",
    ):
        assert named in message
    assert "PReLU" not in message
    assert_same_bits(before, snapshot(model))
    assert [type(layer) for layer in model._flatten_layers()] == kinds
    student = crk.prepare(model, recipe(skip=skip_of(message)), inplace=inplace)
    assert quantized(student).keys() == {"stem", "head"}
    trained(student, np.arange(10).reshape(2, 5) % 9, steps=1)


def test_a_skip_that_is_there_already_is_kept_in_the_message():
    model = everything()
    with pytest.raises(cr.CRCoreError) as raised:
        crk.prepare(model, recipe(skip=("lstm", "both")))
    assert skip_of(str(raised.value)) == ("both", "lstm", "reversible", "spectral", "own")
    assert "'lstm' (LSTM)" not in str(raised.value)


def test_a_layer_that_keras_quantized_or_gave_lora_weights_is_refused():
    by_keras, lora = mlp(), mlp()
    by_keras.get_layer("middle").quantize("int8")
    lora.get_layer("middle").enable_lora(2)
    with pytest.raises(cr.CRCoreError, match=r"'middle' \(Dense\): it is quantized by Keras already \(int8\)"):
        crk.prepare(by_keras, recipe())
    with pytest.raises(cr.CRCoreError, match=r"'middle' \(Dense\): it has LoRA weights"):
        crk.prepare(lora, recipe())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras.Sequential([layers.Dense(3)]), r"no weights yet; call it on a batch, or model\.build"),
        (lambda: type(subclassed())(), r"no weights yet; call it on a batch, or model\.build"),
        (lambda: layers.Dense(3), "prepare takes a keras.Model, got Dense"),
        (lambda: None, "prepare takes a keras.Model, got NoneType"),
        (lambda: keras.Sequential([keras.Input((3,)), layers.ReLU()]), "no layer that prepare can quantize"),
        (lambda: crk.prepare(mlp(), recipe()), "'first' is prepared already; prepare the float model"),
        (lambda: crk.convert(crk.prepare(mlp(), cr.Recipe(cr.LSQ(4), None))), "'first' is prepared already"),
    ],
)
def test_what_cannot_be_prepared_is_one_clear_error(make, message):
    with pytest.raises(cr.CRCoreError, match=message):
        crk.prepare(make(), recipe())


def test_what_is_no_recipe_is_named():
    with pytest.raises(cr.CRCoreError, match=r"takes a crcore.Recipe, got LSQ; for example Recipe"):
        crk.prepare(mlp(), cr.LSQ(4))
    with pytest.raises(cr.CRCoreError, match="nosuch"):
        crk.prepare(mlp(), recipe(skip="nosuch"))


class NoConfig(keras.Model):
    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def call(self, x):
        return self.dense(x)


def test_a_model_that_cannot_be_copied_says_so_and_can_be_prepared_in_place():
    model = NoConfig(layers.Dense(3))
    model(vectors())
    with pytest.raises(cr.CRCoreError, match=r"NoConfig cannot be copied .*get_config.*inplace=True"):
        crk.prepare(model, recipe())
    trained(crk.prepare(model, recipe(), inplace=True), vectors())


def test_a_kernel_with_nan_fails_before_anything_is_changed():
    model = mlp()
    model.get_layer("last").kernel.assign(np.full((8, 3), np.nan))
    before, kinds = snapshot(model), [type(layer) for layer in model._flatten_layers()]
    with pytest.raises(cr.CRCoreError, match=r"\['last'\] hold NaN or infinity"):
        crk.prepare(model, recipe(), inplace=True)
    assert [type(layer) for layer in model._flatten_layers()] == kinds
    assert_same_bits(before, snapshot(model))
    trained(crk.prepare(model, cr.Recipe(None, cr.LSQ(4))), vectors(), steps=1)  # weights play no part here


@keras.saving.register_keras_serializable("test_prepare")
def doubled(x):
    return 2.0 * x


class Unregistered(layers.Layer):
    def __init__(self, factor, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, x):
        return self.factor * x

    def get_config(self):
        return super().get_config() | {"factor": self.factor}


def test_lambda_layers_and_unregistered_classes_are_copied_too():
    inputs = keras.Input((6,))
    x = layers.Lambda(lambda x: x + 1.0)(Unregistered(3.0)(inputs))
    x = UsersDense(4, doubled)(layers.Activation(doubled)(x))
    model = keras.Model(inputs, layers.Dense(3)(x))
    before = numbers(model(vectors()))
    student = crk.prepare(model, recipe())
    assert type(student) is not type(model)
    np.testing.assert_array_equal(numbers(model(vectors())), before)
    trained(student, vectors(), steps=1)


def test_an_adapted_normalization_computes_the_same_in_every_copy():
    net = keras.Sequential([keras.Input((6,)), layers.Normalization(name="scaled"), layers.Dense(3)])
    x = 3.0 * vectors() + 1.0
    net.get_layer("scaled").adapt(x)
    expected = numbers(net.get_layer("scaled")(x))
    assert np.abs(expected.mean()) < 1e-5
    with_average = recipe(ema=cr.EMA(0.9))
    student = crk.prepare(net, with_average)
    student(x, training=True)
    for copy in (student, crk.convert(student), crk.ConsistencyModel(student, with_average).teacher):
        np.testing.assert_array_equal(numbers(copy.get_layer("scaled")(x)), expected)


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.AdamW(0.0, weight_decay=0.5),
        lambda: keras.optimizers.SGD(0.0, weight_decay=0.5),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0, weight_decay=0.5)),
    ],
)
@pytest.mark.parametrize("name", ["Sequential", "subclassed"])
def test_weight_decay_leaves_scales_alone_and_the_users_own_exclusions_stay(optimizer, name):
    make, batch = MODELS[name]
    student = crk.prepare(make(), recipe())
    student(batch(), training=True)
    chosen = optimizer()
    getattr(chosen, "inner_optimizer", chosen).exclude_from_weight_decay(var_names=["bias"])
    biases = [v for v in student.trainable_variables if v.name == "bias"]
    kernels = [v for v in student.trainable_variables if v.name == "kernel"]
    for bias in biases:
        bias.assign(np.ones(bias.shape))
    scales = [numbers(array) for quantizer in quantizers(student) for array in quantizer.arrays]
    first = [numbers(kernel) for kernel in kernels]
    # A learning rate of zero leaves decay alone in SGD; in Keras it multiplies decay too, hence a small one.
    getattr(chosen, "inner_optimizer", chosen).learning_rate = 1e-6
    getattr(chosen, "inner_optimizer", chosen).weight_decay = 1e5
    trained_ = compiled(student, chosen)
    trained_.train_on_batch(batch(), labels())
    for old, kernel in zip(first, kernels, strict=True):
        assert np.abs(numbers(kernel)).mean() < 0.95 * np.abs(old).mean()
    now = [numbers(array) for quantizer in quantizers(student) for array in quantizer.arrays]
    for old, new in zip(scales, now, strict=True):
        np.testing.assert_allclose(old, new, rtol=1e-2)
    for bias in biases:
        np.testing.assert_allclose(numbers(bias), 1.0, rtol=1e-2)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="what torch's own training loop sees")
def test_parameters_of_torch_are_those_of_keras():
    student = crk.prepare(convnet(), recipe())
    values = {id(parameter) for parameter in student.parameters()}
    assert {id(variable.value) for variable in student.trainable_variables} <= values
    student(images(), training=True)
    converted = crk.convert(student)
    assert {id(p) for p in converted.parameters()} == {id(variable.value) for variable in converted.variables}


def test_the_decay_of_an_optimizer_without_exclusions_leaves_scales_alone():
    student = compiled(crk.prepare(mlp(), recipe()), keras.optimizers.AdamW(1e-6, weight_decay=1e5))
    student(vectors(), training=True)
    scales = [numbers(array) for quantizer in quantizers(student) for array in quantizer.arrays]
    bias = student.get_layer("first").bias
    bias.assign(np.ones(8))
    student.train_on_batch(vectors(), labels())
    for old, array in zip(scales, [a for q in quantizers(student) for a in q.arrays], strict=True):
        np.testing.assert_allclose(old, numbers(array), rtol=1e-2)
    assert numbers(bias).max() < 0.95


def test_a_frozen_layer_stays_frozen_with_its_scales():
    model = mlp()
    model.get_layer("middle").trainable = False
    student = crk.prepare(model, recipe())
    assert not student.get_layer("middle").trainable_variables
    assert not [v.path for v in student.trainable_variables if "middle" in v.path]
    trained(student, vectors(), steps=1)


@pytest.mark.parametrize("call", ["model", "predict", "evaluate"])
def test_inference_before_any_batch_names_the_quantizer_and_the_remedy(call):
    student = compiled(crk.prepare(transformer(), recipe(skip="embed")))
    calls = {
        "model": lambda: student(tokens()),
        "predict": lambda: student.predict(tokens(), verbose=0),
        "evaluate": lambda: student.evaluate(tokens(), labels(), verbose=0),
    }
    message = r"FakeQuantize 'attention\.(query|key|value)\.input_quantizer' is not initialized; call the student once"
    with pytest.raises(cr.CRCoreError, match=message):
        calls[call]()
