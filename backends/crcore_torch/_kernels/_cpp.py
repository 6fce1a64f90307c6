"""LSQ in C++, for CPUs: ``lsq.cpp``, built at its first use with the machine's compiler and kept for later ones."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
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
    asked = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, (asked,) if asked else _COMPILERS)), None)
    if compiler is None:
        return f"it needs a C++ compiler, and found none of {', '.join((asked,) if asked else _COMPILERS)}"
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        # A home folder may be that of many machines, and what was built for one processor be illegal on another.
        what = (_SOURCE.read_bytes(), *map(str.encode, _FLAGS), version, _processor().encode())
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crcore"
        library = folder / f"lsq-{hashlib.sha256(b'|'.join(what)).hexdigest()[:20]}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:  # processes that build at once do not meet
                made = Path(temporary) / library.name
                subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, check=True)
                made.replace(library)
        functions = ctypes.CDLL(str(library))
        for name in ("float32", "float64"):
            getattr(functions, f"forward_{name}").argtypes = (*[ctypes.c_void_p] * 3, *_SHAPE_AND_GRID)
            getattr(functions, f"backward_{name}").argtypes = (
                *[ctypes.c_void_p] * 5,
                *_SHAPE_AND_GRID,
                ctypes.c_double,
            )
        return functions
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.decode(errors='replace').strip()[:500]}"
    except (OSError, RuntimeError) as error:
        return f"{compiler}: {error}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
