"""The quantized checkpoint in NumPy: what is written is read, in the bytes that it should take, or refused by name."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaged_files import described, description, flipped, flips, rewritten, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import crcore as cr

EMBED, CONV = cr.LSQ(4, signed=True), cr.DoReFa(3, per_channel=True).for_role("weight")


def network() -> dict[str, cr.PortableLayer]:
    """Two layers that share a weight, a convolution with a zero point, a layer in float, a quantizer of the user's."""
    random = np.random.default_rng(0)
    shared = random.integers(-8, 8, (5, 3)).astype("int8")
    scale = np.array(0.25, "float32")
    tied = {"weight": shared, "weight_quantizer.scale": scale}
    odd = (2 * random.integers(-4, 4, (4, 2, 3, 3)) + 1).astype("int8")
    channels = random.uniform(0.1, 1.0, (4, 1, 1, 1)).astype("float32")
    affine = cr.MinMax(2, signed=False, symmetric=False).for_role("weight")
    return {
        "embed": cr.PortableLayer(tied, {"kind": "embedding"}, {"weight_quantizer": EMBED}),
        "head": cr.PortableLayer(
            tied | {"bias": np.arange(5, dtype="float32"), "input_quantizer.alpha": np.array(2.5, "float32")},
            {"kind": "linear"},
            {"weight_quantizer": EMBED, "input_quantizer": cr.PACT(8, signed=False)},
            {"input_quantizer": {"initialized": True, "signed": False, "frozen": True}},
        ),
        "conv": cr.PortableLayer(
            {"weight": odd, "weight_quantizer.scale": channels}, {"kind": "conv"}, {"weight_quantizer": CONV}
        ),
        "affine": cr.PortableLayer(
            {
                "weight": random.integers(0, 4, (3, 7)).astype("int8"),
                "weight_quantizer.scale": np.array([[0.5], [1.0], [2.0]], "float32"),
                "weight_quantizer.zero_point": np.array([[0], [1], [3]], "int32"),
            },
            {"kind": "linear"},
            {"weight_quantizer": affine},
        ),
        "norm": cr.PortableLayer(
            {"weight": np.ones(4), "count": np.arange(3), "mask": np.array([True, False])},
            {"kind": "batch_norm", "eps": 1e-5},
        ),
        "own": cr.PortableLayer(
            {"weight_quantizer.low": np.array(-1.0, "float32"), "weight_quantizer.high": np.array(1.0, "float32")},
            {"kind": "quantizer"},
            {"weight_quantizer": cr.MinMax(4).for_role("weight")},
            {"weight_quantizer": {"initialized": True, "signed": True, "frozen": False}},
        ),
        "nothing": cr.PortableLayer({"weight": np.zeros((0, 3), "float32")}, {"kind": "other"}),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "net.safetensors"
    cr.QuantizedCheckpoint(path).write(network(), save_file)
    return path


def read(path: Path) -> dict[str, cr.PortableLayer]:
    return cr.QuantizedCheckpoint(path).read(safe_open)


def assert_same(mine: Any, theirs: Any) -> None:
    assert (str(mine.dtype), mine.shape) == (str(theirs.dtype), theirs.shape)
    np.testing.assert_array_equal(mine, theirs)


def test_what_is_written_is_read(path: Path) -> None:
    found = read(path)
    assert found.keys() == network().keys()
    for name, layer in network().items():
        assert found[name].settings == layer.settings
        assert found[name].quantizers == layer.quantizers
        for place, flags in layer.flags.items():
            assert found[name].flags[place] == flags
        for entry, array in layer.arrays.items():
            assert_same(found[name].arrays[entry], array)
        more = found[name].arrays.keys() - layer.arrays.keys()
        assert more <= {"weight_quantizer.zero_point"}  # of zeros, where none was given
        for entry in more:
            assert_same(found[name].arrays[entry], np.zeros(layer.arrays["weight_quantizer.scale"].shape, "int32"))


def test_what_two_layers_share_is_stored_once_and_shared_again(path: Path) -> None:
    found = read(path)
    assert found["embed"].arrays["weight"] is found["head"].arrays["weight"]
    assert found["embed"].arrays["weight_quantizer.scale"] is found["head"].arrays["weight_quantizer.scale"]


def test_each_tensor_has_the_bytes_of_its_parts(path: Path) -> None:
    tensors = load_file(path)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items() if name != "layers"}
    # Packed: 15 weights of 4 bits, 72 of 3 bits (odd numerators too), 21 of 2 bits.
    floats = 1 + 5 + 1 + 4 + 3 + 2
    assert sizes == {"codes": 8 + 27 + 6, "float32": 4 * floats, "float64": 32, "int64": 24, "int32": 12, "bool": 2}


def test_equal_contents_make_equal_files(path: Path, tmp_path: Path) -> None:
    cr.QuantizedCheckpoint(tmp_path / "again").write(dict(reversed(network().items())), save_file)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    cr.QuantizedCheckpoint(tmp_path / "of what was read").write(read(path), save_file)
    assert (tmp_path / "of what was read").read_bytes() == path.read_bytes()


def test_names_are_those_of_the_file(path: Path, tmp_path: Path) -> None:
    cr.QuantizedCheckpoint(tmp_path / "file", {"conv": "stem.0"}).write(network(), save_file)
    assert read(tmp_path / "file").keys() == {*network(), "stem.0"} - {"conv"}


def test_reading_takes_no_framework(path: Path) -> None:
    script = (
        "import sys, crcore, safetensors\n"
        f"head = crcore.QuantizedCheckpoint({str(path)!r}).read(safetensors.safe_open)['head'].arrays\n"
        "print(((head['weight'] - head['weight_quantizer.zero_point']) * head['weight_quantizer.scale']).sum())\n"
        "assert not {'torch', 'keras', 'tensorflow', 'jax'} & set(sys.modules), sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) == network()["head"].arrays["weight"].astype(float).sum() * 0.25


# What cannot be written


UNWRITABLE: list[tuple[str, dict[str, Any]]] = [
    ("'embed' has codes", {"weight": np.array([[8]], "int8")}),
    ("'embed' has a scale that is not a positive", {"weight_quantizer.scale": np.array(np.nan, "float32")}),
    ("'embed' has a scale that is not a positive", {"weight_quantizer.scale": np.array(0, "float32")}),
    (r"'embed' has a scale float32 \[2\]", {"weight_quantizer.scale": np.ones(2, "float32")}),
    ("'embed' has more of type complex64", {"more": np.ones(2, "complex64")}),
]


@pytest.mark.parametrize(("text", "arrays"), UNWRITABLE)
def test_what_no_file_can_hold_is_named_and_nothing_is_written(
    text: str, arrays: dict[str, Any], tmp_path: Path
) -> None:
    layer = network()["embed"]
    changed = cr.PortableLayer({**layer.arrays, **arrays}, layer.settings, layer.quantizers)
    with pytest.raises(cr.CRCoreError, match=text):
        cr.QuantizedCheckpoint(tmp_path / "file").write({"embed": changed}, save_file)
    unknown = cr.PortableLayer({}, {"kind": "linear"}, {"input_quantizer": cr.LSQ(4)})
    with pytest.raises(cr.CRCoreError, match=r"'embed' has .*'input_quantizer'.* do not know whether"):
        cr.QuantizedCheckpoint(tmp_path / "file").write({"embed": unknown}, save_file)
    assert not [*tmp_path.iterdir()]


# What cannot be read


def refused(path: Path, text: str) -> None:
    with pytest.raises(cr.CRCoreError, match=text) as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_files_that_are_no_quantized_checkpoints_are_refused(path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    refused(bad, "no such file; give a checkpoint that save_quantized wrote")
    for content in (b"", b"\0" * 9, pickle.dumps({"weight": 1}), np.random.default_rng(0).bytes(999)):
        bad.write_bytes(content)
        refused(bad, "no safetensors file")
    save_file({"weight": np.ones(2, "float32")}, bad)
    refused(bad, "save_quantized has not written")
    for text in ("{", "[]", "{}", "[" * 100_000):
        save_file({"weight": np.ones(2, "float32")}, bad, metadata={"crcore": text})
        refused(bad, "damaged")
    tensors = load_file(path)
    refused(saved(tensors, bad, {"kind": "portable"}), "a checkpoint of kind 'portable', no quantized one")
    refused(saved(tensors, bad, {"version": 2}), "quantized checkpoint of version 2")
    refused(saved(tensors, bad, {"crc32": 1}), "checksum is another")
    refused(saved({}, bad), "does not end")


def test_a_file_that_was_cut_short_anywhere_is_refused(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole)):
        (tmp_path / "bad").write_bytes(whole[:size])
        with pytest.raises(cr.CRCoreError, match="cut short"):
            read(tmp_path / "bad")


# The error, and what is done to a file's tensors and description to get it.
DAMAGES: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("fewer codes than its layers say", lambda tensors, file: shape_of(file, "embed").__setitem__(0, 50)),
    ("fewer float32 than its layers say", lambda tensors, file: file["layers"]["head"]["arrays"].update(bias=[10**30])),
    ("more .'codes'. than its layers say", lambda tensors, file: shape_of(file, "embed").__setitem__(0, 0)),
    ("more .*'float64'.* than its layers say", lambda tensors, file: file["layers"].pop("norm")),
    ("more .'float32'.", lambda tensors, file: tensors.update(float32=np.append(tensors["float32"], np.float32(1)))),
    ("fewer int64", lambda tensors, file: tensors.pop("int64")),
    ("are not of this form", lambda tensors, file: tensors.update(float32=tensors["float32"][None])),
    ("are not of this form", lambda tensors, file: tensors.update(float32=tensors["float32"].astype("float64"))),
    ("are not of this form", lambda tensors, file: tensors.update({"head.weight": np.ones(2, "float32")})),
    ("of shape", lambda tensors, file: shape_of(file, "conv").__setitem__(0, -4)),
    ("of shape", lambda tensors, file: shape_of(file, "conv").__setitem__(0, 4.0)),
    ("of shape", lambda tensors, file: shape_of(file, "conv").__setitem__(0, True)),
    ("of shape", lambda tensors, file: shape_of(file, "norm").__setitem__(0, "object")),
    ("cannot be read", lambda tensors, file: file["layers"]["nothing"]["arrays"].update(weight=[0, 10**30])),
    ("cannot be read", lambda tensors, file: file["layers"]["nothing"]["arrays"].update(weight=[0] * 99)),
    ("cannot be read", lambda tensors, file: file["layers"]["head"]["arrays"].update(weight=["tied", "no", "weight"])),
    ("cannot be read", lambda tensors, file: file["layers"]["head"]["arrays"].update(weight=["tied", [], {}])),
    ("cannot be read", lambda tensors, file: file["layers"]["head"]["arrays"].update(weight=["tied"])),
    ("description of its layers is damaged", lambda tensors, file: file.pop("quantizers")),
    ("description of its layers is damaged", lambda tensors, file: file.update(layers=[])),
    ("description of its layers is damaged", lambda tensors, file: file["layers"].update(head=1)),
    ("description of its layers is damaged", lambda tensors, file: file["layers"]["head"].pop("live")),
    ("description of its layers is damaged", lambda tensors, file: file["layers"]["head"].update(more=1)),
    ("description of its layers is damaged", lambda tensors, file: file["layers"]["head"]["settings"].update(a=[[]])),
    ("description of its layers is damaged", lambda tensors, file: file["layers"]["head"]["arrays"].update(bias=5)),
    ("description of its layers is damaged", lambda tensors, file: places_of(file).update(input_quantizer=99)),
    ("description of its layers is damaged", lambda tensors, file: places_of(file).update(input_quantizer=-1)),
    ("description of its layers is damaged", lambda tensors, file: places_of(file).update(os=1)),
    ("a recipe of version", lambda tensors, file: file["quantizers"].__setitem__(0, [[[]]])),
    ("can name", lambda tensors, file: file["quantizers"][0].update(weights={"type": "os.system"})),
    ("bits must be", lambda tensors, file: file["quantizers"][0]["weights"].update(bits=10**9)),
    ("do not know whether", lambda tensors, file: quantizer_of(file, "head", "activations").update(signed=None)),
    ("codes that .* cannot give", lambda tensors, file: quantizer_of(file, "embed", "weights").update(narrow=True)),
    (
        "integers for a weight and no weight_quantizer.scale",
        lambda tensors, file: file["layers"]["conv"]["arrays"].pop("weight_quantizer.scale"),
    ),
    ("not a positive number", lambda tensors, file: tensors["float32"].fill(np.inf)),
    ("not a positive number", lambda tensors, file: tensors["float32"].fill(-1.0)),
]


def shape_of(file: Any, layer: str) -> list[Any]:
    return file["layers"][layer]["arrays"]["weight"]  # type: ignore[no-any-return]


def places_of(file: Any) -> dict[str, Any]:
    return file["layers"]["head"]["quantizers"]  # type: ignore[no-any-return]


def quantizer_of(file: Any, layer: str, role: str) -> dict[str, Any]:
    place = {"weights": "weight_quantizer", "activations": "input_quantizer"}[role]
    return file["quantizers"][file["layers"][layer]["quantizers"][place]][role]  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_files_that_lie_are_refused(number: int, path: Path, tmp_path: Path) -> None:
    text, change = DAMAGES[number]
    refused(rewritten(path, tmp_path / "bad", change), text)


def test_descriptions_that_are_no_json_of_layers_are_refused(path: Path, tmp_path: Path) -> None:
    tensors, bad = load_file(path), tmp_path / "bad"
    for text in (b"", b"\xff", b"[]", b"1" * 5000, b"[" * 100_000, b'{"layers": {}}'):
        refused(saved(tensors | {"layers": described(text)}, bad), "damaged")
    refused(saved(tensors | {"layers": tensors["layers"][:-1]}, bad), "does not end")
    refused(saved(tensors | {"layers": np.frombuffer(b"not zlib's", np.uint8)}, bad), "damaged")


def test_a_few_bytes_that_claim_to_be_gigabytes_are_refused_before_they_are(path: Path, tmp_path: Path) -> None:
    stream = zlib.compressobj(9)
    block = b" " * 2**20
    bomb = b"".join([stream.compress(block) for _ in range(200)]) + stream.flush()
    assert len(bomb) < 2**20
    bad = saved(load_file(path) | {"layers": np.frombuffer(bomb, np.uint8)}, tmp_path / "bad")
    refused(bad, "does not end")


FUZZ = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def is_read(path: Path) -> bool:
    """Whether it is; any error but CRCoreError is one of the test."""
    try:
        return bool(read(path))
    except cr.CRCoreError:
        return False


@FUZZ
@given(st.data())
def test_any_change_to_a_file_is_noticed(path: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Wherever it is but for the padding and the form of the header, in which numbers may be spelled otherwise."""
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = st.one_of(flips(header), flips(len(whole)))
    drawn = data.draw(places)
    (tmp_path / "bad").write_bytes(flipped(whole, drawn))
    assert not is_read(tmp_path / "bad") or max(drawn) < header


@FUZZ
@given(st.data())
def test_a_description_with_any_other_bytes_is_read_or_refused(path: Path, tmp_path: Path, data: st.DataObject) -> None:
    text = description(path)
    changed = flipped(text, data.draw(flips(len(text))))
    is_read(saved(load_file(path) | {"layers": described(changed)}, tmp_path / "bad"))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(st.data())
def test_a_description_with_any_other_value_is_read_or_refused(path: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = json.loads(description(path))
    where: Any = content
    while isinstance(where, (dict, list)) and where:
        keys = list(where) if isinstance(where, dict) else range(len(where))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(where[key], (dict, list)) or data.draw(st.integers(0, 3)) == 0:
            where[key] = data.draw(JUNK)
            break
        where = where[key]
    tensors = load_file(path) | {"layers": described(json.dumps(content).encode())}
    is_read(saved(tensors, tmp_path / "bad"))
