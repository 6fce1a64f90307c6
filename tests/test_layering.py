"""The layering rules of the architecture page, and for each the proof that its test can fail."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crcore._typing import Namespace

ROOT = Path(__file__).resolve().parents[1]
CORE, BACKENDS = ROOT / "crcore", ROOT / "backends"
STANDARD = sys.stdlib_module_names | {"__future__"}
NAMESPACE = sorted(Namespace.__annotations__)

# Parts of crcore that may import more, and that the core does not import.
APART = ("crcore/cli/", "crcore/testing/", "crcore/deploy/", "crcore/flatness/")
# What a backend may import besides the standard library, NumPy, itself and crcore's public names. Keys are files or
# folders; the longest one that fits counts.
MAY_IMPORT = {
    "crcore_torch": {"torch"},
    "crcore_torch/lightning.py": {"torch", "lightning"},
    "crcore_torch/_portable.py": {"torch", "safetensors"},
    "crcore_torch/_quantized.py": {"torch", "safetensors"},
    "crcore_torch/_kernels/_triton": {"torch", "triton"},
    "crcore_keras": {"keras"},  # and no engine: not tensorflow, jax or torch
    "crcore_keras/_portable.py": {"keras", "safetensors"},
    "crcore_keras/_quantized.py": {"keras", "safetensors"},
    "crcore_keras/_graph": {"keras", "onnx"},
    # Keras has no gradient that is the same on every engine: the one that runs is asked by its own means.
    "crcore_keras/_derivatives.py": {"keras", "tensorflow", "jax", "torch"},
}
# What differentiates: `_bind.py` says how a quantizer is, `_derivatives.py` takes the derivatives of a network's loss.
AUTOGRAD = ("_bind.py", "_derivatives.py")
# A formula by the functions that it cannot do without, and the files that hold it.
FORMULAS = {
    "rounding to a grid": (
        {"round", "round_", "rint", "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "hardtanh"},
        # The reference, the fused kernels that the conformance kit holds to it, and the biases of exported files.
        (
            "crcore/_quantizers/",
            "backends/crcore_torch/_kernels/",
            "backends/crcore_keras/_kernels.py",
            "crcore/deploy/_qdq.py",
            "crcore/deploy/_runtimes.py",
        ),
    ),
    "softmax and what is made of it": (
        {"softmax", "log_softmax", "kl_div", "logsumexp", "logaddexp", "exp"},
        # The last one has a Gaussian's.
        ("crcore/_divergences.py", "crcore/_schedules.py", "crcore/flatness/_spectrum.py"),
    ),
    "the average": ({"lerp", "lerp_", "_foreach_lerp", "_foreach_lerp_"}, ("backends/crcore_torch/_teacher.py",)),
}


def sources(*folders: Path, without: tuple[str, ...] = ()) -> list[Path]:
    found = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    assert found or folders == (ROOT / "examples",), f"no sources in {folders}"
    return [path for path in found if not str(path.relative_to(ROOT)).startswith(without)]


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that the source imports, wherever it does; ``from a import b`` as ``a:b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def top(module: str) -> str:
    return re.split(r"[.:]", module)[0]


# Rule 1: crcore imports the standard library and NumPy


def core_imports_only_numpy(source: str) -> list[str]:
    return [
        module
        for module in imported(ast.parse(source))
        if top(module) not in STANDARD | {"numpy", "crcore"}
        or re.match(r"crcore[.:](cli|testing|deploy|flatness)\b", module)
    ]


@named(sources(CORE, without=APART))
def test_the_core_imports_the_standard_library_and_numpy(path: Path) -> None:
    assert core_imports_only_numpy(path.read_text()) == []


@pytest.mark.parametrize(
    "offence",
    [
        "import torch",
        "def f():\n    import jax.numpy as jnp",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from keras import ops",
        "import importlib\nimportlib.import_module('scipy.special')",
        "from crcore.testing import lattice_inputs",
        "from crcore import cli",
        "from crcore.deploy import to_onnx",
        "from crcore.flatness import trace",
        "import hypothesis",
    ],
)
def test_a_core_that_imports_more_is_noticed(offence: str) -> None:
    assert core_imports_only_numpy(offence)


def flatness_imports_only_scipy(source: str) -> list[str]:
    allowed = STANDARD | {"numpy", "scipy", "crcore"}
    private = private_uses(re.sub(r"\bcrcore\.flatness\._", "crcore.flatness.", source), ["crcore"])
    return [module for module in imported(ast.parse(source)) if top(module) not in allowed] + private


@named(sources(CORE / "flatness"))
def test_flatness_imports_numpy_scipy_and_cores_public_names(path: Path) -> None:
    assert flatness_imports_only_scipy(path.read_text()) == []


@pytest.mark.parametrize(
    "offence", ["import torch", "def f():\n    import crcore_torch", "from crcore._divergences import confidence"]
)
def test_a_flatness_that_imports_more_is_noticed(offence: str) -> None:
    assert flatness_imports_only_scipy(offence)


def run_without_frameworks(statement: str) -> subprocess.CompletedProcess[str]:
    """Run where only the standard library and NumPy can be imported, besides crcore."""
    program = f"""
        import re, sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] not in {{*sys.stdlib_module_names, "numpy", "crcore"}}:
                    raise ImportError("blocked: " + name)
        sys.path.insert(0, {str(ROOT)!r})
        import numpy
        sys.meta_path.insert(0, Refuse())
        {statement}
        assert not any(re.match("crcore.(testing|cli|deploy|flatness)", m) for m in sys.modules)
    """
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )


def test_the_core_works_where_nothing_but_numpy_is_installed() -> None:
    result = run_without_frameworks(
        "import crcore; crcore.Recipe(crcore.LSQ(4), crcore.LSQ(4)).assign(['a']); crcore.Consistency().weight_at(3)"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("offence", ["import torch", "import crcore.testing", "import crcore, hypothesis"])
def test_an_import_of_more_would_fail_there(offence: str) -> None:
    assert run_without_frameworks(offence).returncode != 0


# Rules 2 and 3: backends know crcore's public names, never each other, and Keras no engine


def public_names(package: str) -> set[str]:
    """``__all__`` and the public submodules of one of our packages, read without importing it."""
    folder = next(base / package for base in (ROOT, BACKENDS) if (base / package).is_dir())
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = set(ast.literal_eval(node.value))
            break
    else:
        raise AssertionError(f"{package} has no __all__")
    modules = {path.stem for path in folder.glob("[!_]*.py")} | {path.parent.name for path in folder.glob("[!_]*/*.py")}
    return names | modules | {"__version__"}


OURS = [
    package
    for package in ("crcore", "crcore_torch", "crcore_keras")
    if (BACKENDS / package).is_dir() or package == "crcore"
]


def private_uses(source: str, packages: list[str]) -> list[str]:
    """Names of our packages that the source uses and that are not public."""
    tree, found, aliases = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, *rest = alias.name.split(".")
                if package in packages:
                    aliases[alias.asname or package] = package
                    if any(part.startswith("_") for part in rest) or (rest and rest[0] not in public_names(package)):
                        found.append(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            package, *rest = node.module.split(".")
            if package in packages:
                for alias in node.names:
                    first = (*rest, alias.name)[0]
                    if any(part.startswith("_") for part in rest) or first not in public_names(package):
                        found.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if name in aliases:
                found += [ast.unparse(node)] if attr not in public_names(aliases[name]) else []
    return found


def backend_offences(source: str, place: str) -> list[str]:
    """``place``: the file's path below ``backends``, whose first folder is the backend."""
    backend = place.split("/")[0]
    key = max((key for key in MAY_IMPORT if place.startswith(key)), key=len)
    allowed = STANDARD | {"numpy", "crcore", backend} | MAY_IMPORT[key]
    foreign = [m for m in imported(ast.parse(source)) if top(m) not in allowed and not m.startswith(".")]
    through_keras = [
        m for m in imported(ast.parse(source)) if re.match(r"keras\.src|keras\.backend\.(tensorflow|jax|torch)", m)
    ]
    return foreign + through_keras + private_uses(source, ["crcore"])


@named(sources(BACKENDS))
def test_a_backend_imports_its_framework_and_cores_public_names(path: Path) -> None:
    assert backend_offences(path.read_text(), path.relative_to(BACKENDS).as_posix()) == []


@pytest.mark.parametrize(
    ("place", "offence"),
    [
        ("crcore_torch/_x.py", "import crcore_keras"),
        ("crcore_torch/_x.py", "from crcore._ema import ema_update"),
        ("crcore_torch/_x.py", "import crcore._grid"),
        ("crcore_torch/_x.py", "from crcore import _grid"),
        ("crcore_torch/_x.py", "import crcore as cr\ncr._quantizers"),
        ("crcore_torch/_x.py", "from crcore import no_such_name"),
        ("crcore_torch/_x.py", "import lightning"),
        ("crcore_torch/_x.py", "import keras"),
        ("crcore_keras/_x.py", "from crcore_torch import prepare"),
        ("crcore_keras/_x.py", "import tensorflow as tf"),
        ("crcore_keras/_derivatives.py", "import crcore_torch"),
        ("crcore_keras/_x.py", "def f():\n    import jax"),
        ("crcore_keras/_x.py", "from torch import nn"),
        ("crcore_keras/_x.py", "from keras.src.backend.tensorflow import core"),
    ],
)
def test_a_backend_that_reaches_elsewhere_is_noticed(place: str, offence: str) -> None:
    assert backend_offences(offence, place)


# Rule 4: examples, documentation and the command use public names


def code_blocks(markdown: str) -> list[str]:
    """The Python of a page: fenced blocks, and what follows ``>>>`` in them."""
    blocks = re.findall(r"^ *```(?:python|py|pycon)[^\n]*\n(.*?)^ *```", markdown, flags=re.DOTALL | re.MULTILINE)
    code = []
    for block in map(textwrap.dedent, blocks):
        if ">>>" in block:
            block = "\n".join(line[4:] for line in block.splitlines() if line.startswith((">>> ", "... ")))
        code.append(block)
    return code


@named([ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
def test_documentation_uses_public_names(path: Path) -> None:
    assert [use for block in code_blocks(path.read_text()) for use in private_uses(block, OURS)] == []


@named([*sources(ROOT / "examples"), *sources(CORE / "cli")])
def test_examples_and_the_command_use_public_names(path: Path) -> None:
    packages = [package for package in OURS if package != "crcore"] if "cli" in path.parts else OURS
    source = re.sub(r"\bcrcore\.cli\._", "crcore.cli.", path.read_text())
    assert private_uses(source, packages) == []


@pytest.mark.parametrize(
    "offence",
    [
        "from crcore_torch._bind import fake_quantize",
        "import crcore as cr\ncr._ema.ema_update(1, 2, 0.5)",
        "import crcore_torch as crt\ncrt.fake_quantise",
        "from crcore import LSQQ",
    ],
)
def test_a_page_with_a_private_name_is_noticed(offence: str) -> None:
    page = f"Text\n\n```python\n{offence}\n```\n"
    session = "```pycon\n" + "".join(f">>> {line}\n" for line in offence.splitlines()) + "1\n```\n"
    for text in (page, session):
        assert [use for block in code_blocks(text) for use in private_uses(block, OURS)]


# Rule 5: no side effects at import, no global state

SNAPSHOT = """
    import gc, logging, locale, os, random, signal, sys, threading, warnings
    import numpy as np, torch
    def state():
        return {
            "environment": dict(os.environ), "directory": os.getcwd(), "warnings": list(warnings.filters),
            "path": [p for p in sys.path], "recursion": sys.getrecursionlimit(), "threads": threading.active_count(),
            "locale": locale.setlocale(locale.LC_ALL), "signal": signal.getsignal(signal.SIGINT),
            "hooks": (sys.excepthook, sys.displayhook), "logging": (logging.root.level, list(logging.root.handlers)),
            "random": random.getstate(), "numpy errors": np.geterr(), "numpy print": str(np.get_printoptions()),
            "numpy random": str(np.random.get_state()), "gc": gc.isenabled(),
            "torch dtype": torch.get_default_dtype(), "torch random": torch.get_rng_state().tolist(),
            "torch grad": torch.is_grad_enabled(), "torch threads": torch.get_num_threads(),
            "torch deterministic": torch.are_deterministic_algorithms_enabled(),
            "torch matmul": torch.get_float32_matmul_precision(), "torch device": torch.get_default_device(),
            "torch flush": torch.tensor([1e-310], dtype=torch.float64).mul(1.0).item(),
            "torch anomaly": torch.is_anomaly_enabled(), "cudnn": torch.backends.cudnn.benchmark,
        }
"""


def changed_by(statements: list[str]) -> list[list[str]]:
    """For each statement, run one after the other in one process, the names of what it changed."""
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(BACKENDS)]}\n"
        + textwrap.dedent(SNAPSHOT)
        + f"for statement in {statements}:\n"
        + "    before = state(); exec(statement); after = state()\n"
        + "    print(*(name for name in before if before[name] != after[name]), sep=',')\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [line.split(",") if line else [] for line in result.stdout.splitlines()]


def test_importing_changes_nothing() -> None:
    statements = [f"import {package}" for package in (*OURS, "crcore.cli")]
    assert changed_by(["import keras", *statements])[1:] == [[]] * len(statements)


OFFENCES = {
    "torch dtype": "torch.set_default_dtype(torch.float64)",
    "torch random": "torch.manual_seed(0)",
    "torch grad": "torch.set_grad_enabled(False)",
    "torch matmul": "torch.set_float32_matmul_precision('high')",
    "numpy random": "np.random.seed(0)",
    "numpy errors": "np.seterr(all='ignore')",
    "random": "random.seed(0)",
    "warnings": "warnings.simplefilter('ignore')",
    "environment": "os.environ['A_NAME'] = '1'",
    "logging": "logging.basicConfig()",
    "path": "sys.path.append('x')",
}


def test_an_import_that_changes_something_would_be_noticed() -> None:
    found = changed_by([*OFFENCES.values()])
    assert all(what in names for what, names in zip(OFFENCES, found, strict=True)), found


MUTATORS = {"append", "add", "update", "pop", "popitem", "setdefault", "clear", "extend", "insert", "remove", "discard"}


def global_state(source: str) -> list[str]:
    """Module-level names that functions write to, caches, and calls that do something while a module is imported."""
    tree = ast.parse(source)
    at_top = {
        target.id
        for node in tree.body
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Global():
                found.append(ast.unparse(node))
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()) if name in at_top:
                found.append(ast.unparse(node))
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)) if (
                name in at_top and attr in MUTATORS
            ):
                found.append(ast.unparse(node))
            case ast.FunctionDef(decorator_list=decorators):
                found += [ast.unparse(d) for d in decorators if re.search(r"\b(lru_)?cache\b", ast.unparse(d))]
    found += [
        ast.unparse(node) for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    return found


MEMOS = {
    # One class for each kind of layer, whoever asks: without it two quantized Conv2d would be of different types.
    **{f"backends/crcore_{backend}/_layers.py": ["functools.cache"] for backend in ("torch", "keras")},
    # Asked for at every call of every quantizer, and always the same.
    "backends/crcore_torch/_kernels/__init__.py": ["functools.lru_cache(maxsize=1024)"],
    "backends/crcore_torch/_kernels/_layout.py": ["functools.cache"],
    "backends/crcore_torch/_kernels/_cpp.py": ["functools.cache"],  # the library, built once
}


@named(sources(CORE, BACKENDS, without=("crcore/cli/",)))
def test_no_module_keeps_global_state(path: Path) -> None:
    assert global_state(path.read_text()) == MEMOS.get(path.relative_to(ROOT).as_posix(), [])


@pytest.mark.parametrize(
    "offence",
    [
        "n = 0\ndef f():\n    global n\n    n += 1",
        "SEEN = {}\ndef f(x):\n    SEEN[x] = 1",
        "SEEN: list = []\ndef f(x):\n    SEEN.append(x)",
        "import functools\n@functools.lru_cache\ndef f(x): ...",
        "import torch\ntorch.manual_seed(0)",
    ],
)
def test_global_state_is_noticed(offence: str) -> None:
    assert global_state(offence)


# Rule 6: only _bind.py and _derivatives.py touch autograd, only _xp.py renames array functions


def autograd_uses(source: str) -> list[str]:
    tree = ast.parse(source)
    uses = [m for m in imported(tree) if re.match(r"torch[.:]autograd|keras\.ops:custom_gradient", m)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {
            "autograd", "custom_gradient", "custom_vjp", "save_for_backward", "GradientTape", "register_hook",
        }:  # fmt: skip
            uses.append(ast.unparse(node))
    return uses


def renames(source: str) -> list[str]:
    """Array functions of the core's namespace under a name given here: ``amax = torch.amax``, ``def _amax(...)``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                found += [alias.name for alias in aliases if alias.asname in {"xp", "np"} and alias.name != "numpy"]
            case ast.ImportFrom(module=str(module), names=aliases):
                is_framework = top(module) in {"torch", "keras"}
                found += [
                    a.name for a in aliases if is_framework and (a.asname or a.name).strip("_") in {*NAMESPACE, "xp"}
                ]
            case ast.Assign(targets=[ast.Name(id=name)], value=value) | ast.keyword(arg=str(name), value=value):
                owner = ast.unparse(value).split(".")[0]
                if name.strip("_") in {*NAMESPACE, "xp"} and owner in {"torch", "keras", "ops"}:
                    found.append(f"{name} = {ast.unparse(value)}")
            case ast.FunctionDef(name=name) if name.strip("_") in NAMESPACE:
                found.append(name)
    return found


@named([path for path in sources(BACKENDS) if path.name not in AUTOGRAD])
def test_only_bind_and_derivatives_touch_autograd(path: Path) -> None:
    assert autograd_uses(path.read_text()) == []


@pytest.mark.parametrize(
    "offence",
    [
        "import torch\nclass F(torch.autograd.Function): ...",
        "from torch.autograd import Function",
        "from torch import autograd",
        "import torch\ntorch.autograd.grad(loss, weights)",
        "from keras.ops import custom_gradient",
        "import keras\n@keras.ops.custom_gradient\ndef f(x): ...",
    ],
)
def test_autograd_elsewhere_is_noticed(offence: str) -> None:
    assert autograd_uses(offence)


@named([path for path in sources(BACKENDS) if path.name != "_xp.py"])
def test_only_xp_renames_array_functions(path: Path) -> None:
    assert renames(path.read_text()) == []


@pytest.mark.parametrize(
    "offence",
    [
        "import torch as np",
        "import keras.ops as xp",
        "import torch\namax = torch.amax",
        "import torch\nfrom types import SimpleNamespace\nspace = SimpleNamespace(clip=torch.clamp)",
        "from keras import ops as xp",
        "from torch import clamp as clip",
        "def _amax(x, axis): ...",
    ],
)
def test_renaming_elsewhere_is_noticed(offence: str) -> None:
    assert renames(offence)


def test_the_core_calls_only_what_its_namespace_lists() -> None:
    called = {
        node.attr
        for path in sources(CORE, without=APART)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "xp"
    }
    assert called == set(NAMESPACE)


# Rule 7: a formula stands once


def formulas(source: str, path: str) -> list[str]:
    """Calls that mark a formula, in a file that is not the formula's."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            for formula, (marks, homes) in FORMULAS.items():
                if node.func.attr in marks and not path.startswith(homes):
                    found.append(f"{formula}: {ast.unparse(node)}")
    return found


@named(
    [
        path
        for path in sources(CORE, BACKENDS, without=("crcore/testing/_references.py",))  # which repeats on purpose
        # Data, views, tables and learning rates are no formulas of the method.
        if path.name not in ("_xp.py", "_data.py", "_views.py") and "testing" not in path.parts
    ]
)
def test_a_formula_stands_once(path: Path) -> None:
    assert formulas(path.read_text(), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    ("path", "offence"),
    [
        ("backends/crcore_torch/_layers.py", "y = torch.round(torch.clamp(x / s, -8, 7)) * s"),
        ("backends/crcore_torch/_layers.py", "y = (x / s).round_()"),
        ("backends/crcore_torch/_loss.py", "loss = F.kl_div(a.log_softmax(-1), b, reduction='none')"),
        ("backends/crcore_torch/_prepare.py", "average.lerp_(value, 0.1)"),
        ("backends/crcore_keras/_layers.py", "y = ops.round(x / s) * s"),
        ("crcore/cli/_training.py", "loss = torch.nn.functional.kl_div(student, teacher)"),
        ("crcore/_consistency.py", "p = xp.exp(logits)"),
    ],
)
def test_a_second_copy_of_a_formula_is_noticed(path: str, offence: str) -> None:
    assert formulas(offence, path)


# What the suite itself promises


@named([*sources(ROOT / "tests" / "parity"), *sources(CORE / "testing")])
def test_parity_is_never_skipped(path: Path) -> None:
    """A backend that is missing is an error."""
    assert not re.search(r"importorskip|pytest\.skip|mark\.skip|xfail", path.read_text())


def test_no_test_is_left_out() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    (keras,) = re.findall(r"^KERAS_TESTS = (.*)$", (ROOT / "Makefile").read_text(), re.M)
    run = (*configured, *keras.split())
    every = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_*.py")]
    assert [path for path in every if not path.startswith(run)] == []


def test_no_source_is_large() -> None:
    long = {str(path): n for path in sources(CORE, BACKENDS) if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}
