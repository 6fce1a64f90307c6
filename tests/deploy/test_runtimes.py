"""Exported files open and run in their runtimes; what is no such file is one error, whatever is in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_graphs import GraphMaker

from crcore import CRCoreError
from crcore.deploy import expanded, float_twin, open_runtime, prepared_graph, to_litert, to_onnx, with_metadata
from crcore.deploy._contents import integers
from crcore.deploy._litert_file import _read, _written

IMAGE = (3, 6, 6)
SUFFIXES = (".onnx", ".tflite")


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    make = GraphMaker({"image": IMAGE})
    x = make.signed("image", 0.03, layer="first")
    x = make.node("Relu", make.conv(x, (5, 3, 3, 3), layer="first", bits=4))
    x = make.quantized(make.node("Flatten", x, axis=1), 0.01, layer="second")
    return make.model(make.gemm(x, 80, 4, layer="second", scale=0.01))


@pytest.fixture(scope="module")
def sample() -> Any:
    return np.random.default_rng(0).standard_normal((150, *IMAGE), np.float32)


@pytest.fixture(scope="module")
def folder(graph: onnx.ModelProto, sample: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as integers and in float, for both runtimes, with metadata."""
    out = tmp_path_factory.mktemp("files")
    text = json.dumps({"classes": ["a", "b", "c", "d"]})
    written, _ = to_onnx(prepared_graph(graph, {"image": sample}))
    onnx.helper.set_model_props(written, {"crcore": text})
    (out / "net.onnx").write_bytes(written.SerializeToString())
    (out / "float.onnx").write_bytes(float_twin(graph).SerializeToString())
    tflite = to_litert(prepared_graph(graph, {"image": sample}, entire=True))
    (out / "net.tflite").write_bytes(with_metadata(tflite, text))
    (out / "float.tflite").write_bytes(
        to_litert(float_twin(prepared_graph(graph, {"image": sample}, integer_only=False)))
    )
    (out / "trained.onnx").write_bytes(expanded(graph).SerializeToString())
    return out


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_computes_what_was_trained(folder: Path, sample: Any, suffix: str) -> None:
    runtime = open_runtime(folder / f"net{suffix}")
    trained = open_runtime(folder / "trained.onnx").run(sample)
    found = runtime.run(sample)
    assert (found.dtype, found.shape) == (np.float32, (150, 4))
    assert np.abs(found - trained).max() < 0.02 * np.abs(trained).max()
    assert runtime.inputs == {"image": (None, *IMAGE)}
    assert (runtime.step is None) == (suffix == ".onnx")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_float_files_run_too(folder: Path, sample: Any, suffix: str) -> None:
    runtime = open_runtime(folder / f"float{suffix}")
    onnx_runtime = open_runtime(folder / "float.onnx")
    np.testing.assert_allclose(runtime.run(sample), onnx_runtime.run(sample), rtol=1e-4, atol=1e-5)
    assert runtime.step is None
    assert runtime.metadata() is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_size_of_the_batch_changes_nothing(folder: Path, sample: Any, suffix: str) -> None:
    runtime = open_runtime(folder / f"net{suffix}", threads=2)
    whole = runtime.run({"image": sample})
    for size in (1, 7, 64, 65):
        np.testing.assert_array_equal(runtime.run(sample[:size]), whole[:size])


def test_litert_rounds_its_input_half_to_even_as_training_does(tmp_path: Path) -> None:
    make = GraphMaker({"x": (4,)})
    x = make.quantized("x", 0.5, lo=-128, hi=127, layer="only")
    weight = make.weight(100 * np.eye(4, dtype=np.int8), 0.01, layer="only")
    graph = make.model(make.node("MatMul", x, weight))
    ties = np.array([[0.25, 0.75, -0.25, -0.75], [60.0, -60.0, 63.5, -64.0]], np.float32)
    (tmp_path / "net.tflite").write_bytes(to_litert(prepared_graph(graph, {"x": ties}, entire=True)))
    found = open_runtime(tmp_path / "net.tflite").run(ties)
    np.testing.assert_allclose(found, [[0.0, 1.0, 0.0, -1.0], [60.0, -60.0, 63.5, -64.0]], atol=0.26)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_come_back(folder: Path, suffix: str) -> None:
    assert open_runtime(folder / f"net{suffix}").metadata() == {"classes": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(("text", "words"), [("{", "damaged"), ("[1]", "no JSON object")])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_of_another_kind_are_an_error(
    folder: Path, tmp_path: Path, suffix: str, text: str, words: str
) -> None:
    path = tmp_path / f"net{suffix}"
    if suffix == ".onnx":
        model = onnx.load(folder / "net.onnx")
        onnx.helper.set_model_props(model, {"crcore": text})
        onnx.save(model, path)
    else:
        path.write_bytes(with_metadata((folder / "net.tflite").read_bytes(), text))
    with pytest.raises(CRCoreError, match=words):
        open_runtime(path).metadata()


def test_integers_are_read_by_layer_or_by_tensor(folder: Path, graph: onnx.ModelProto) -> None:
    found = integers(folder / "net.onnx")
    assert found["first"].shape == (5, 3, 3, 3)
    assert found["first"].dtype == np.int32
    assert (found["first"].min(), found["first"].max()) == (-7, 7)
    in_litert = list(integers(folder / "net.tflite").values())
    np.testing.assert_array_equal(in_litert[0], found["first"].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (np.zeros((2, 3, 6, 7), np.float32), r"\[N, 3, 6, 6\], got the shape \(2, 3, 6, 7\)"),
        (np.zeros((3, 6, 6), np.float32), r"got the shape \(3, 6, 6\)"),
        (np.zeros((0, *IMAGE), np.float32), r"got the shape \(0, 3, 6, 6\)"),
        ({"picture": np.zeros((1, *IMAGE), np.float32)}, "takes the inputs image; got picture"),
    ],
)
def test_inputs_that_do_not_fit_are_an_error(folder: Path, suffix: str, inputs: Any, words: str) -> None:
    with pytest.raises(CRCoreError, match=words):
        open_runtime(folder / f"net{suffix}").run(inputs)


def test_a_path_that_cannot_be_opened_is_an_error(folder: Path, tmp_path: Path) -> None:
    for path, words in {
        tmp_path / "none.onnx": "No such file",
        tmp_path / "net.pb": r"ends in \.onnx or \.tflite",
    }.items():
        with pytest.raises(CRCoreError, match=words):
            open_runtime(path)
    (tmp_path / "folder.tflite").mkdir()
    with pytest.raises(CRCoreError, match="directory"):
        open_runtime(tmp_path / "folder.tflite")
    with pytest.raises(CRCoreError, match="threads must be a whole number from 1, got 0"):
        open_runtime(folder / "net.onnx", threads=0)


def test_weights_in_another_file_are_refused(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "float.onnx")
    (tmp_path / "secret").write_bytes(bytes(4096))
    tensor = next(t for t in model.graph.initializer if len(t.dims) > 1)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CRCoreError, match="in another file"):
        open_runtime(tmp_path / "net.onnx")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"TFL3", b"\x1c\x00\x00\x00TFL3" + bytes(60), b"not a network", bytes(1000)])
def test_a_foreign_file_is_an_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"net{suffix}").write_bytes(content)
    with pytest.raises(CRCoreError, match=rf"net{suffix} cannot be used \(.*export it again"):
        open_runtime(tmp_path / f"net{suffix}")


# Each case in a process that is forked for it: a runtime that crashes must not take the tests along.
DAMAGED = """
import os, sys
from pathlib import Path
import numpy as np
from crcore import CRCoreError
from crcore.deploy import open_runtime
path, whole = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
random = np.random.default_rng(0)
def attempt(content):
    path.write_bytes(content)
    child = os.fork()
    if child == 0:
        try:
            runtime = open_runtime(path)
            sizes = next(iter(runtime.inputs.values()))[1:]
            if all(size is not None and size < 100 for size in sizes):
                runtime.run(np.zeros((1, *sizes), np.float32))
            runtime.metadata()
        except CRCoreError as error:
            os._exit(0 if str(error).count("\\n") == 0 else 2)
        except BaseException as error:
            os.write(2, repr(error).encode() + b"\\n")
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]
for number in range(120):
    content = bytearray(whole[: len(whole) * number // 120] if number % 3 == 0 else whole)
    for _ in range(0 if number % 3 == 0 else number % 5 + 1):
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    status = attempt(bytes(content))
    if status:
        print(number, status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each case needs a process that starts at once")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_bytes_are_an_error_and_no_crash(folder: Path, tmp_path: Path, suffix: str) -> None:
    command = [sys.executable, "-c", DAMAGED, str(tmp_path / f"damaged{suffix}"), str(folder / f"net{suffix}")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_litert_file_without_a_network_is_an_error(tmp_path: Path) -> None:
    """LiteRT itself reads the missing part without looking for it, and the process ends."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    builder = flatbuffers.Builder(64)
    builder.Finish(schema.ModelT(version=3).Pack(builder), b"TFL3")
    path = tmp_path / "empty.tflite"
    path.write_bytes(bytes(builder.Output()))
    script = (
        f"from ai_edge_litert.interpreter import Interpreter as I; I(model_content=open({str(path)!r}, 'rb').read())"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == -signal.SIGSEGV
    )
    with pytest.raises(CRCoreError, match="holds no network"):
        open_runtime(path)


def test_a_litert_file_that_asks_for_all_memory_is_an_error(folder: Path, tmp_path: Path) -> None:
    model = _read((folder / "net.tflite").read_bytes())
    tensor = model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]]
    tensor.shape = np.array([2**28, *tensor.shape[1:]], np.int32)
    (tmp_path / "net.tflite").write_bytes(_written(model))
    with pytest.raises(CRCoreError, match="more than 2147483648 elements"):
        open_runtime(tmp_path / "net.tflite")


@pytest.mark.parametrize(
    ("suffix", "package", "extra"), [(".tflite", "ai_edge_litert", "litert"), (".onnx", "onnxruntime", "onnx")]
)
def test_a_missing_runtime_names_the_extra(folder: Path, suffix: str, package: str, extra: str) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from crcore import CRCoreError\n"
        f"try:\n    from crcore.deploy import open_runtime; open_runtime({str(folder / f'net{suffix}')!r})\n"
        "except CRCoreError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"pip install 'crcore[{extra}]'" in done.stdout, done.stdout + done.stderr
