"""How long the largest eigenvalues of a quantized network take: the command's ResNet-20, LSQ, on CPU threads.

The network is trained for some steps on scikit-learn's digits, which need no download, made 32x32 and three channels:
an untrained one has another spectrum. Written are the seconds of one Hessian-vector product, the number of products and
their time, the eigenvalues, and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import crcore_torch as crt
import numpy as np
import torch
import torch.nn.functional as F
from shared import processor, progress
from sklearn.datasets import load_digits
from torch import Tensor, nn

import crcore as cr
from crcore.cli._models import build_model
from crcore.flatness import top_eigenvalues

SIZE = 32


def digits() -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] in [0, 1], and labels."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(small, size=(SIZE, SIZE), mode="bilinear").repeat(1, 3, 1, 1), torch.tensor(data.target)


def trained(name: str, bits: int, steps: int, x: Tensor, y: Tensor) -> nn.Module:
    """The quantized network after some steps of SGD."""
    model = build_model(name, num_classes=10, in_channels=3, size=(SIZE, SIZE))
    model = crt.prepare(model, cr.Recipe(cr.LSQ(bits, per_channel=True), cr.LSQ(bits))).train()
    model(x[:64])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What is written."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    x, y = digits()
    model = trained(options.model, options.bits, options.steps, x[options.samples :], y[options.samples :])
    progress(f"{options.model} trained for {options.steps} steps")
    landscape = crt.Landscape(
        model, x[: options.samples], y[: options.samples], batch_size=options.batch or options.samples
    )
    vector = np.random.default_rng(0).normal(size=landscape.size)
    landscape.hvp(vector)  # makes the graph
    seconds = []
    for _ in range(5):
        start = time.process_time()
        landscape.hvp(vector)
        seconds.append(time.process_time() - start)
    progress(f"{statistics.median(seconds):.2f} s of CPU per product")
    products, start, cpu = 0, time.perf_counter(), time.process_time()

    def count(done: int) -> None:
        nonlocal products
        products = done
        if done % 10 == 0:
            progress(f"{done} products, {time.perf_counter() - start:.0f} s")

    values = top_eigenvalues(landscape, options.k, progress=count)
    return {
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "processor": processor(),
        "torch": torch.__version__,
        "weights": landscape.size,
        "loss": float(landscape.evaluate()[0].mean()),
        "cpu seconds per product": seconds,
        "products": products,
        "seconds": time.perf_counter() - start,
        "cpu seconds": time.process_time() - cpu,  # of all threads; less than seconds where the machine is shared
        "most memory in MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "eigenvalues": values.tolist(),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, help="less than samples: the graph is not kept, which takes less memory")
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/flatness_time.json")
    options = parser.parse_args()
    options.out.write_text(json.dumps(measured(options), indent=1) + "\n")


if __name__ == "__main__":
    main()
