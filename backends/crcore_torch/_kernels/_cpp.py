"""LSQ in C++, for CPUs: ``lsq.cpp``, built at its first use with the machine's compiler and kept for later ones."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crcore import LSQ
from crcore_torch._kernels._layout import Rows, limits, rows

NAME = "cpp"
DTYPES = (torch.float32, torch.float64)
CHEAP_FORWARD = True
layout = rows

_SOURCE = Path(__file__).with_name("lsq.cpp")
# No -ffast-math: a division must stay one, and a rounding half to even.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")
_WORTH_A_THREAD = 1 << 15  # elements
_PATIENCE = 120  # seconds, for what takes one


_SHAPE_AND_GRID = (ctypes.c_int64,) * 3 + (ctypes.c_int,) + (ctypes.c_double,) * 4


def why_not() -> str | None:
    """What keeps it from being built."""
    built = _built()
    return built if isinstance(built, str) else None


def runs_on(device: torch.device) -> bool:
    """CPUs."""
    return device.type == "cpu"


def forward(quantizer: LSQ, x: Tensor, scale: Tensor, layout: Rows) -> Tensor:
    """``quantizer.forward(x, scale)``, to the bit."""
    y = torch.empty_like(x)
    _call("forward", quantizer, (x, scale.contiguous(), y), layout)
    return y


def vjp(
    quantizer: LSQ, cotangent: Tensor, x: Tensor, scale: Tensor, layout: Rows, *, elements: float
) -> tuple[Tensor, Tensor]:
    """``quantizer.vjp(cotangent, x, scale)``: dx to the bit, dscale up to the order of summation."""
    dx, dscale = torch.empty_like(x), torch.empty_like(scale, memory_format=torch.contiguous_format)
    grad_scale = (elements * quantizer.grid.hi) ** -0.5
    _call("backward", quantizer, (x, cotangent, scale.contiguous(), dx, dscale), layout, grad_scale)
    return dx, dscale


def _call(what: str, quantizer: LSQ, tensors: tuple[Tensor, ...], layout: Rows, *more: float) -> None:
    x = tensors[0]
    threads = torch.get_num_threads() if x.numel() > _WORTH_A_THREAD else 1
    function: Any = _built()
    function = getattr(function, f"{what}_float32" if x.dtype == torch.float32 else f"{what}_float64")
    pointers = [tensor.data_ptr() for tensor in tensors]
    function(*pointers, *layout, threads, *limits(quantizer), *more)


@functools.cache
def _built() -> ctypes.CDLL | str:
    """The library, built now or earlier; or why there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    found = shutil.which(asked[0]) if asked else next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        return f"it needs a C++ compiler, and found none of {', '.join(asked[:1] or _COMPILERS)}"
    compiler = [found, *asked[1:]]
    try:
        folder = _private(_cache_folder())
        version = _run([*compiler, "--version"])
        # A home folder may be that of many machines, and what was built for one processor be illegal on another.
        what = (_SOURCE.read_bytes(), *map(str.encode, (*compiler, *_FLAGS)), version, _processor().encode())
        library = folder / f"lsq-{hashlib.sha256(b'|'.join(what)).hexdigest()[:20]}.so"
        if library.exists():
            try:
                return _loaded(library)
            except (OSError, AttributeError):  # damaged; below it is made again
                pass
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # processes that build at once do not meet
            made = Path(temporary) / library.name
            _run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(made)])
            made.replace(library)
        return _loaded(library)
    except subprocess.CalledProcessError as error:
        return f"{found} failed: {error.stderr.decode(errors='replace').strip()[:500]}"
    except subprocess.TimeoutExpired:
        return f"{found} took longer than {_PATIENCE} s"
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{found}: {error}"


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=_PATIENCE).stdout


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "crcore"


def _private(folder: Path) -> Path:
    """The folder, made if need be. What is loaded from it is run: nobody else may write there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise OSError(f"others can write to {folder}; make it yours alone, or name another in XDG_CACHE_HOME")
    return folder


def _loaded(library: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(library))
    for name in ("float32", "float64"):
        getattr(functions, f"forward_{name}").argtypes = (*[ctypes.c_void_p] * 3, *_SHAPE_AND_GRID)
        getattr(functions, f"backward_{name}").argtypes = (*[ctypes.c_void_p] * 5, *_SHAPE_AND_GRID, ctypes.c_double)
    return functions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
