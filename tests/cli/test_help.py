"""`--help` teaches and is quick; `--version` is the package's."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import crcore as cr
from crcore.cli import main
from crcore.cli._methods import METHODS

HEAVY = (
    "torch",
    "kornia",
    "datasets",
    "matplotlib",
    "jinja2",
    "scipy",
    "sklearn",
    "rich",
    "safetensors",
    "PIL",
    "keras",
    "tensorflow",
    "jax",
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["compare", "--help"],
        *([command, "-h"] for command in ("train", "sweep", "evaluate", "export", "report", "flatness", "sensitivity")),
    ],
)
def test_help_needs_no_heavy_package(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom crcore.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        f"    assert end.code == 0\nprint(sorted(set(sys.modules) & set({HEAVY})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_help_names_every_method_group_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["compare", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for method in METHODS.values():
        assert method.name in text
        assert method.summary in text
    for group in ("data:", "network and quantization:", "training:", "run:", "examples:", "the output folder holds:"):
        assert group in text
    assert "(default: lsq)" in text
    assert "default: 200 for digits" in text.lower()
    assert max(map(len, text.splitlines())) <= 120


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"crcore {version('crcore')}\n"
    assert version("crcore") == cr.__version__
