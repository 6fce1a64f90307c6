"""Portable checkpoints: what one backend saves the other loads, with the same integers and the same outputs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crcore_keras as crk
import crcore_torch as crt
import keras
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keras import layers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn
from twin_networks import PAIRS, RECIPES, TorchNet, channels_first, images, keras_net, predicted, recipe_of

import crcore as cr

RECIPE = pytest.mark.parametrize("recipe", RECIPES)


def trained_in_keras(recipe: str) -> tuple[Any, Any]:
    """Student and teacher after three steps."""
    given = recipe_of(recipe)
    model = crk.ConsistencyModel(crk.prepare(keras_net(), given), given, augment=layers.GaussianNoise(0.1))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*images(12), batch_size=4, epochs=1, verbose=0)
    return model.student, model.teacher


def trained_in_torch(recipe: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    student = crt.prepare(TorchNet(), recipe_of(recipe))
    teacher = crt.Teacher(student, cr.EMA(0.5))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher.follow(optimizer)
    for seed in range(3):
        x, y = images(4, seed)
        F.cross_entropy(student(channels_first(x)), torch.from_numpy(y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student, teacher


def fresh_torch(recipe: str = "LSQ") -> Any:
    return crt.prepare(TorchNet(), recipe_of(recipe))


def fresh_keras(recipe: str = "LSQ") -> Any:
    return crk.prepare(keras_net(), recipe_of(recipe))


def assert_same_network(student: Any, mine: Any) -> None:
    """``student``: torch's, ``mine``: Keras'."""
    student.eval()  # in which ranges stay as they are
    with torch.no_grad():
        for name, codes in torch_codes(student).items():
            np.testing.assert_array_equal(keras_codes(mine.get_layer(name)), codes, err_msg=name)
        x = images(2, seed=9)[0]
        expected = student(channels_first(x)).numpy()
    np.testing.assert_allclose(predicted(mine, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def torch_codes(model: Any) -> dict[str, Any]:
    return {
        name: layer.weight_quantizer.codes(layer._parameters["weight"]).numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "weight_quantizer")
    }


def keras_codes(layer: Any) -> Any:
    """In PyTorch's axis order, written down once more, element by element where that is less plain."""
    kernel = layer._kernel if "_kernel" in vars(layer) else vars(layer)["kernel"]
    codes = keras.ops.convert_to_numpy(keras.ops.stop_gradient(layer.weight_quantizer.codes(kernel)))
    if isinstance(layer, layers.Dense):
        return codes.T
    if isinstance(layer, layers.DepthwiseConv2D):
        each = [codes[:, :, c, m] for c in range(codes.shape[2]) for m in range(codes.shape[3])]
        return np.stack(each)[:, None]
    return np.einsum("hwab->bahw", codes)


def assert_defaults_are_gone(model: Any) -> None:
    """Otherwise a test could pass because nothing was loaded."""
    state = model.state_dict()
    assert all(state[key].abs().min() > 0 for key in ("norm.running_mean", "norm.bias"))


def test_keras_saves_and_torch_loads(tmp_path: Path) -> None:
    for mine in trained_in_keras("all of them"):
        crk.save_portable(mine, tmp_path / "first")
        student = fresh_torch("all of them")
        assert crt.load_portable(student, tmp_path / "first") is student
        assert_defaults_are_gone(student)
        assert_same_network(student, mine)
        crt.save_portable(student, tmp_path / "second")
        assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()


@RECIPE
def test_torch_saves_and_keras_loads(recipe: str, tmp_path: Path) -> None:
    student, teacher = trained_in_torch(recipe)
    assert_defaults_are_gone(student)
    for saved in (student, teacher):
        crt.save_portable(saved, tmp_path / "first")
        mine = fresh_keras(recipe)
        assert crk.load_portable(mine, tmp_path / "first") is mine
        assert_same_network(getattr(saved, "model", saved), mine)
        crk.save_portable(mine, tmp_path / "second")
        assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()


def test_a_teacher_is_filled_and_keeps_its_own_state(tmp_path: Path) -> None:
    student, teacher = trained_in_torch("LSQ")
    crt.save_portable(teacher, tmp_path / "teacher")
    other = crt.Teacher(student)
    assert crt.load_portable(other, tmp_path / "teacher") is other
    assert torch.equal(other.model.stem._parameters["weight"], teacher.model.stem._parameters["weight"])
    assert not torch.equal(other.model.stem._parameters["weight"], student.stem._parameters["weight"])


def test_a_float_teacher_fills_a_float_teacher_only(tmp_path: Path) -> None:
    teacher = crt.Teacher(fresh_torch(), cr.EMA(quantized=False))
    crt.save_portable(teacher, tmp_path / "file")
    with pytest.raises(cr.CRCoreError, match="enabled is False in the file, True in the network"):
        crk.load_portable(fresh_keras(), tmp_path / "file")
    recipe = cr.Recipe(*RECIPES["LSQ"], consistency=cr.Consistency(), ema=cr.EMA(quantized=False))
    model = crk.ConsistencyModel(crk.prepare(keras_net(), recipe), recipe, augment=layers.GaussianNoise(0.1))
    crk.load_portable(model.teacher, tmp_path / "file")


def test_a_frozen_range_stays_frozen(tmp_path: Path) -> None:
    student, _ = trained_in_torch("MinMax")
    student.stem.input_quantizer.freeze()
    crt.save_portable(student, tmp_path / "file")
    mine = crk.load_portable(fresh_keras("MinMax"), tmp_path / "file")
    quantizer = mine.get_layer("stem").input_quantizer
    assert quantizer.frozen
    quantizer(np.full((1, 6, 6, 3), 99.0, "float32"), training=True)
    assert float(quantizer.arrays[0]) == float(student.stem.input_quantizer._buffers["low"])
    crk.save_portable(mine, tmp_path / "file")
    assert crt.load_portable(fresh_torch("MinMax"), tmp_path / "file").stem.input_quantizer.frozen


def test_what_has_not_seen_data_is_still_to_be_set_after_loading(tmp_path: Path) -> None:
    crt.save_portable(fresh_torch(), tmp_path / "file")
    mine = crk.load_portable(fresh_keras(), tmp_path / "file")
    with pytest.raises(cr.CRCoreError, match="is not initialized"):
        mine(images()[0], training=False)


# Every kind of layer


@pytest.mark.parametrize(("pair", "skip"), [*((pair, False) for pair in PAIRS), ("1d", True), ("separable", True)])
def test_every_kind_of_layer_goes_both_ways(pair: str, skip: bool, tmp_path: Path) -> None:
    make_torch, make_keras, shape, names = PAIRS[pair]
    random = np.random.default_rng(0)
    x = random.integers(0, 9, (3, 7)) if shape is None else random.normal(size=(3, *shape)).astype("float32")
    for_torch = torch.from_numpy(x if shape is None or pair == "1d" else np.moveaxis(x, -1, 1).copy())
    weights, activations = cr.LSQ(6, per_channel=True), cr.LSQPlus(6)
    net, theirs = make_torch(), make_keras()
    first = {"1d": "1", "separable": "sep.depthwise"}.get(pair, "0")
    student = crt.prepare(net, cr.Recipe(weights, activations, skip=names.get(first, first) if skip else ()))
    mine = crk.prepare(theirs, cr.Recipe(weights, activations, skip=first.split(".")[0] if skip else ()))
    if skip and names:  # Keras skips a separable convolution as a whole
        student = crt.prepare(net, cr.Recipe(weights, activations, skip=("0", "1")))
    with torch.no_grad():
        for parameter in student.parameters():  # biases and normalization are not their defaults
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape)).add_(0.01)
        student(for_torch)
        expected = student.eval()(for_torch).numpy()

    crt.save_portable(student, tmp_path / "torch")
    crk.load_portable(mine, tmp_path / "torch", names=names)
    np.testing.assert_allclose(predicted(mine, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    crk.save_portable(mine, tmp_path / "keras", names=names)
    assert (tmp_path / "keras").read_bytes() == (tmp_path / "torch").read_bytes()
    fresh = crt.load_portable(crt.prepare(net, recipe_as(student)), tmp_path / "keras")
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in fresh.state_dict().items())


def recipe_as(student: Any) -> cr.Recipe:
    """The recipe that quantizes what is quantized in ``student``."""
    known = [n for n, m in student.named_modules() if "weight" in m._parameters and not isinstance(m, NORMS)]
    skip = [name for name in known if not hasattr(student.get_submodule(name), "weight_quantizer")]
    return cr.Recipe(cr.LSQ(6, per_channel=True), cr.LSQPlus(6), skip=skip)


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)


def test_attention_projections_are_matrices(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.attention_output = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Any) -> Any:
            q, k, v = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.query, self.key, self.value))
            return self.attention_output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    recipe = cr.Recipe(cr.LSQ(6, per_channel=True), cr.LSQ(6))
    mine = crk.prepare(keras.Model(inputs, attention(inputs, inputs)), recipe)
    student = crt.prepare(Attention(), recipe)
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    student(torch.from_numpy(x))
    with torch.no_grad():
        expected = student.eval()(torch.from_numpy(x)).numpy()
    crt.save_portable(student, tmp_path / "file")
    # The order of Keras' layers is not that of torch's, and so another one is the first.
    overrides = {
        f"attention.{name}": dict.fromkeys(("weights", "activations")) | {
            "weights": layer.weight_quantizer._given, "activations": layer.input_quantizer._given,
        }
        for name, layer in student.named_children()
    }  # fmt: skip
    mine = crk.prepare(keras.Model(inputs, attention(inputs, inputs)), cr.Recipe(None, None, overrides=overrides))
    names = {f"attention.{name}": name for name, _ in student.named_children()}
    crk.load_portable(mine, tmp_path / "file", names=names)
    np.testing.assert_allclose(predicted(mine, x), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# Bad input


BACKENDS = {"torch": (crt, fresh_torch, TorchNet), "keras": (crk, fresh_keras, keras_net)}
EITHER = pytest.mark.parametrize("backend", BACKENDS)


def values(model: Any) -> list[Any]:
    if isinstance(model, nn.Module) and not isinstance(model, keras.Model):
        return [value.detach().numpy().copy() for value in model.state_dict().values()]
    return [np.array(value) for value in model.get_weights()]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Which no test changes."""
    return {"torch": fresh_torch(), "keras": fresh_keras()}


@pytest.fixture
def refused(models: dict[str, Any]) -> Callable[..., None]:
    """Loading says so and changes nothing."""

    def check(backend: str, path: Path, text: str, model: Any = None, **options: Any) -> None:
        model = models[backend] if model is None else model
        before = values(model)
        with pytest.raises(cr.CRCoreError, match=text):
            BACKENDS[backend][0].load_portable(model, path, **options)
        for old, new in zip(before, values(model), strict=True):
            np.testing.assert_array_equal(old, new)

    return check


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "file.safetensors"
    crt.save_portable(trained_in_torch("LSQ")[0], path)
    return path


def rewritten(saved: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file with other tensors or metadata."""
    arrays = load_file(saved)
    with safe_open(saved, "numpy") as file:
        metadata = json.loads(file.metadata()["crcore"])
    change(arrays, metadata)
    save_file(arrays, path, metadata={"crcore": json.dumps(metadata)})
    return path


@EITHER
def test_files_that_are_no_portable_checkpoints_are_refused(
    backend: str, refused: Any, saved: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    refused(backend, bad, "no such file")
    bad.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    refused(backend, bad, "cut short")
    bad.write_bytes(saved.read_bytes()[:40])
    refused(backend, bad, "cut short")
    bad.write_bytes(b"")
    refused(backend, bad, "cut short")
    bad.write_bytes(pickle.dumps({"weight": 1}))
    refused(backend, bad, "no safetensors file")
    save_file({"weight": np.ones(2, "float32")}, bad)
    refused(backend, bad, "save_portable has not written")
    save_file({"weight": np.ones(2, "float32")}, bad, metadata={"crcore": '{"kind": "network"}'})
    refused(backend, bad, "kind 'network'")
    portable = {"kind": "portable", "version": 1}
    for text in ("{", "[]", "{}", json.dumps(portable), json.dumps(portable | {"layers": {"head": 1}})):
        save_file({"weight": np.ones(2, "float32")}, bad, metadata={"crcore": text})
        refused(backend, bad, "metadata are damaged")


# The error, and what is done to a file's tensors and metadata to get it.
DAMAGES: list[tuple[str, Any]] = [
    ("version 2", lambda arrays, file: file.update(version=2)),
    ("are not those of its metadata", lambda arrays, file: arrays.pop("head.bias")),
    ("are not those of its metadata", lambda arrays, file: arrays.update(more=np.ones(1, "float32"))),
    ("metadata are damaged", lambda arrays, file: file["layers"]["head"].pop("flags")),
    ("metadata are damaged", lambda arrays, file: flags_of(file).update(initialized=1)),
    ("a recipe of version", lambda arrays, file: quantizer_of(file).update(version=7)),
    ("can name", lambda arrays, file: quantizer_of(file).update(weights={"type": "os.system"})),
    ("signed=False of weight_quantizer", lambda arrays, file: flags_of(file).update(signed=False)),
    ("eps is 0.001 in the file", lambda arrays, file: file["layers"]["norm"]["settings"].update(eps=1e-3)),
    ("kind is 'linear'", lambda arrays, file: file["layers"]["stem"]["settings"].update(kind="linear")),
    (r"bias is float32 \[5\] in", lambda arrays, file: arrays.update({"head.bias": np.ones(5, "float32")})),
    (r"bias is float64 \[4\] in", lambda arrays, file: arrays.update({"head.bias": np.ones(4)})),
]


@EITHER
def test_files_that_are_damaged_or_do_not_fit_are_refused(
    backend: str, refused: Any, saved: Path, tmp_path: Path
) -> None:
    for number, (text, change) in enumerate(DAMAGES):
        refused(backend, rewritten(saved, tmp_path / f"bad{number}", change), text)


def quantizer_of(file: Any) -> dict[str, Any]:
    return file["layers"]["head"]["quantizers"]["weight_quantizer"]  # type: ignore[no-any-return]


def flags_of(file: Any) -> dict[str, Any]:
    return file["layers"]["head"]["flags"]["weight_quantizer"]  # type: ignore[no-any-return]


@EITHER
def test_another_recipe_is_refused_by_layer_and_with_both_quantizers(backend: str, refused: Any, saved: Path) -> None:
    text = r"(?s)layer 'grouped': input_quantizer is LSQ\(bits=4.*in the file, MinMax\(bits=8.*Recipe\(overrides="
    refused(backend, saved, text, BACKENDS[backend][1]("MinMax"))


@EITHER
def test_layers_of_other_names_are_listed_and_matched_by_names(
    backend: str, refused: Any, saved: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    package, file = BACKENDS[backend][0], tmp_path / "file"
    package.save_portable(models[backend], file, names={"stem": "first", "head": "last"})
    refused(backend, file, r"(?s)network: 'stem', 'head'.*file: 'first', 'last'.*\{'stem': 'first'\}")
    refused(backend, file, r"(?s)network: 'head'.*file: 'last'", names={"stem": "first"})
    package.load_portable(models[backend], file, names={"stem": "first", "head": "last"})
    refused(backend, saved, "'stam'.*for example 'stem'", names={"stam": "stem"})
    refused(backend, saved, "two layers the name 'head'", names={"stem": "head"})
    refused(backend, saved, "names maps", names=[("stem", "head")])
    refused(backend, saved, "names maps", names={"stem": 1})


@EITHER
def test_a_layer_that_one_side_lacks_is_named(backend: str, refused: Any, saved: Path, tmp_path: Path) -> None:
    def drop(arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
        for entry in metadata["layers"].pop("norm")["arrays"]:
            del arrays[f"norm.{entry}"]

    refused(backend, rewritten(saved, tmp_path / "bad", drop), "(?s)only in the network: 'norm'.*names=")


@EITHER
def test_models_that_are_not_prepared_are_refused(backend: str, tmp_path: Path) -> None:
    package, _, make = BACKENDS[backend]
    with pytest.raises(cr.CRCoreError, match="is not prepared"):
        package.save_portable(make(), tmp_path / "file")
    with pytest.raises(cr.CRCoreError, match="is not prepared"):
        package.load_portable("a model", tmp_path / "file")
    weights_only = package.prepare(make(), cr.Recipe(cr.LSQ(4), None))
    with pytest.raises(cr.CRCoreError, match="converted to integers"):
        package.save_portable(package.convert(weights_only), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_consistency_model_is_asked_which_network(tmp_path: Path) -> None:
    model = crk.ConsistencyModel(fresh_keras(), recipe_of("LSQ"), augment=layers.GaussianNoise(0.1))
    with pytest.raises(cr.CRCoreError, match=r"model\.student or model\.teacher"):
        crk.save_portable(model, tmp_path / "file")


@EITHER
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    backend: str, models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, model = BACKENDS[backend][0], models[backend]
    package.save_portable(model, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    def broken(arrays: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.numpy.save_file", broken)
    with pytest.raises(cr.CRCoreError, match="no space left"):
        package.save_portable(model, tmp_path / "file")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", before)]
    monkeypatch.undo()
    with pytest.raises(cr.CRCoreError, match="cannot be written"):
        package.save_portable(model, tmp_path / "no" / "folder")


def test_tensors_without_a_place_in_the_file_are_named(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.table = nn.Linear(3, 2), nn.Parameter(torch.ones(1, 4, 3))

    class KerasTable(layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(shape=(1, 4, 3), name="table")

        def call(self, x: Any) -> Any:
            return x + self.table

    recipe = cr.Recipe(cr.LSQ(4), None, skip="table")
    with pytest.raises(cr.CRCoreError, match=r"table \[1, 4, 3\] of layer '' \(Table\)"):
        crt.save_portable(crt.prepare(Table(), recipe), tmp_path / "file")
    net = keras.Sequential([keras.Input((4, 3)), KerasTable(name="table"), layers.Dense(2)])
    with pytest.raises(cr.CRCoreError, match=r"table \[1, 4, 3\] of layer 'table' \(KerasTable\)"):
        crk.save_portable(crk.prepare(net, recipe), tmp_path / "file")
    batched = layers.EinsumDense("abc,bcd->abd", (4, 2))
    net = keras.Sequential([keras.Input((4, 3)), batched])
    with pytest.raises(cr.CRCoreError, match="is no matrix"):
        crk.save_portable(crk.prepare(net, cr.Recipe(cr.LSQ(4), None)), tmp_path / "file")


def test_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cr.CRCoreError, match=r"is torch\.bfloat16.*cast the network to float32"):
        crt.save_portable(fresh_torch().bfloat16(), tmp_path / "file")


def test_tied_weights_take_one_value_only(tmp_path: Path) -> None:
    def net(tied: bool) -> Any:
        net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        if tied:
            net[1].weight = net[0].weight
        return crt.prepare(net, cr.Recipe(cr.LSQ(4), None))

    crt.save_portable(net(True), tmp_path / "file")
    crt.load_portable(net(True), tmp_path / "file")
    crt.save_portable(net(False), tmp_path / "file")
    with pytest.raises(cr.CRCoreError, match="are one tensor in this model"):
        crt.load_portable(net(True), tmp_path / "file")
