"""Memory of a training step: `memory` of torch_step.py. On a CPU each variant has a process of its own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared import progress
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_measures import Settings, Step, attempt, batches, clean, float_network
from torch_students import NotMeasuredError, student


def memory(name: str, given: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Bytes by variant, over float."""
    missing: dict[str, str] = {}
    rows: dict[str, dict[str, float]] = {}
    here = partial(memory_of, name=name, batch=given.memory_batch, settings=settings)
    measure = here if given.device == "cuda" else partial(in_own_process, name=name)
    for variant in given.variants:
        if row := attempt(variant, missing, measure):
            rows[variant] = row
            progress(f"memory, {name}: {variant} {row['peak'] / 2**20:.0f} MiB at the peak")
        clean(settings)
    return {
        "network": name,
        "batch": given.memory_batch,
        "bytes": rows,
        "ratios": {
            variant: {what: value / rows["float"][what] for what, value in row.items()}
            for variant, row in rows.items()
            if variant != "float"
        },
        "not measured": missing,
    }


def in_own_process(variant: str, name: str) -> dict[str, float]:
    """`memory_of` where nothing else has been."""
    command = [sys.executable, *sys.argv, "--networks", name, "--worker", variant]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"its process failed with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "not measured" in found:
        raise NotMeasuredError(found["not measured"])
    return found


def worker(given: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The one measurement that this process is for."""
    missing: dict[str, str] = {}
    options = {"name": given.networks[0], "batch": given.memory_batch, "settings": settings}
    row = attempt(given.worker, missing, partial(memory_of, **options))
    return row or {"not measured": missing[given.worker]}


def memory_of(variant: str, name: str, batch: int, settings: Settings) -> dict[str, float]:
    """Bytes of one step at its peak, and bytes kept for backward.

    On CUDA the peak is the allocator's. On a CPU it is the peak of the resident memory in the step (VmHWM, which
    clear_refs sets back) over what was resident before, plus the tensors that live from step to step (parameters,
    buffers, momentum): so imports and what compilers left do not count. It needs a process of its own, in which
    MALLOC_MMAP_THRESHOLD_ is set, so that freed tensors are not resident.
    """
    clean(settings)
    before = torch.cuda.memory_allocated() if settings.cuda else 0
    net = float_network(name, settings)
    made = student(variant, net, batches(min(batch, 32), settings, 1)[0][0])
    del net
    work = Step(made, batch, settings)
    inputs = sum(storages(itertools.chain(*batches(batch, settings))).values())
    work()
    saved = saved_bytes(work)
    clean(settings)
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
        work()
        return {"peak": torch.cuda.max_memory_allocated() - before - inputs, "saved": saved}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = status("VmRSS")
    work()
    momentum = (state["momentum_buffer"] for state in work.optimizer.state.values())
    lasting = storages(itertools.chain(made.parameters(), made.buffers(), momentum))
    return {"peak": status("VmHWM") - resident + sum(lasting.values()), "saved": saved}


def status(field: str) -> int:
    """Bytes, of what Linux says about this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise NotMeasuredError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address, so that what is shared counts once."""
    return {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}


class Made(TorchDispatchMode):
    """Within it, every tensor that an operation returns is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[StorageWeakRef] = []
        self.sizes: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages.append(StorageWeakRef(storage))
                self.sizes.append((storage.data_ptr(), storage.nbytes()))
        return out

    def alive(self) -> dict[int, int]:
        """Bytes by address of what is still there."""
        pairs = zip(self.storages, self.sizes, strict=True)
        return dict(size for reference, size in pairs if not reference.expired())


def saved_bytes(work: Step) -> int:
    """Bytes of what the forward pass made and left for the backward pass, by whatever it is kept."""
    x, other, y = next(work.batches)
    own = storages(itertools.chain(work.net.parameters(), work.net.buffers(), (x, other, y)))
    with Made() as made:
        loss = work.loss(x, other, y)
    gc.collect()
    total = sum(size for address, size in made.alive().items() if address not in own)
    loss.backward()
    work.optimizer.zero_grad(set_to_none=True)
    return total
