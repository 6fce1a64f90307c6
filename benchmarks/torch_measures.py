"""How torch_step.py measures: the clocks, the rounds, and each of its measures. What is measured is in torch_students.

Every measure returns what goes into the JSON file. A variant that cannot be measured stands under "not measured" with
its reason; only the float network must not fail.
"""

from __future__ import annotations

import copy
import gc
import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from shared import progress
from torch import Tensor, nn
from torch_layers import KINDS, network
from torch_students import NotMeasuredError, crcore, student

Work = Callable[[], Any]
COMPILED = ("float", "crcore", "detach")  # those that `compiled` measures; its kernels are one when compiled


@dataclass(frozen=True)
class Settings:
    """What all measures have in common."""

    device: str = "cpu"
    rounds: int = 9
    steps: int = 1  # timed together, in each round
    autocast: str | None = None
    channels_last: bool = False
    compile_mode: str | None = None

    @property
    def cuda(self) -> bool:
        """Whether work is queued, and done later."""
        return self.device == "cuda"


# --- clocks and rounds ---


def timed(work: Work, times: int, *, cuda: bool) -> dict[str, float]:
    """Seconds of one call, from `times` calls in a row."""
    if not cuda:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            work()
        return {"cpu": (time.process_time() - cpu) / times, "wall": (time.perf_counter() - wall) / times}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    wall = time.perf_counter()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    return {"event": begin.elapsed_time(end) / 1e3 / times, "wall": wall / times}


def in_turn(works: dict[str, Work], settings: Settings, what: str) -> dict[str, dict[str, list[float]]]:
    """Seconds by clock, work and round. Each round starts with another of them."""
    samples: dict[str, dict[str, list[float]]] = {}
    names = list(works)
    for round_ in range(settings.rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            for clock, seconds in timed(works[name], settings.steps, cuda=settings.cuda).items():
                samples.setdefault(clock, {each: [] for each in names})[name].append(seconds)
        progress(f"{what}: round {round_ + 1} of {settings.rounds}")
    return samples


def spread(values: list[float]) -> dict[str, Any]:
    """The median and the quartiles."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "quartiles": [quartiles[0], quartiles[2]]}


def ratios(samples: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Of the ratio within a round."""
    return {
        name: spread([a / b for a, b in zip(values, samples[base], strict=True)])
        for name, values in samples.items()
        if name != base
    }


def report(samples: dict[str, dict[str, list[float]]], base: str) -> dict[str, Any]:
    """Rounds, medians, and ratios to ``base``, by clock."""
    return {
        "median seconds": {
            clock: {name: statistics.median(values) for name, values in by_name.items()}
            for clock, by_name in samples.items()
        },
        "ratios": {clock: ratios(by_name, base) for clock, by_name in samples.items()},
        "seconds by round": samples,
    }


# --- one training step ---


class Step:
    """A call makes one training step: forward, backward, SGD with momentum; with a teacher also its part."""

    def __init__(self, net: nn.Module, batch: int, settings: Settings) -> None:
        self.net, self.settings = net, settings
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        self.batches = itertools.cycle(batches(batch, settings))

    def __call__(self) -> None:
        """One step."""
        if self.settings.compile_mode:
            torch.compiler.cudagraph_mark_step_begin()
        self.loss(*next(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, x: Tensor, other: Tensor, y: Tensor) -> Tensor:
        """On the batch ``x``; a second view of it is there too."""
        with autocast(self.settings):
            logits = self.net(x)
        return F.cross_entropy(logits.float(), y)


class ConsistencyStep(Step):
    """The step of the documentation, docs/pytorch.md."""

    def __init__(self, net: nn.Module, batch: int, settings: Settings, *, term: bool) -> None:
        super().__init__(net, batch, settings)
        import crcore_torch as crt

        import crcore as cr

        self.term = term
        self.teacher = crt.Teacher(net, cr.EMA(0.999))
        self.teacher.follow(self.optimizer)
        self.consistency = crt.ConsistencyLoss(cr.Consistency(weight=1.0))

    def loss(self, x: Tensor, other: Tensor, y: Tensor) -> Tensor:
        """Cross entropy, and the teacher on the second view."""
        with autocast(self.settings):
            logits = self.net(x)
            target = self.teacher(other) if self.term else None
        loss = F.cross_entropy(logits.float(), y)
        return loss if target is None else loss + self.consistency(logits, target, step=self.teacher.step)


def autocast(settings: Settings) -> Any:
    """The context that was asked for."""
    if not settings.autocast:
        return nullcontext()
    return torch.autocast(settings.device, dtype=getattr(torch, settings.autocast))


def batches(batch: int, settings: Settings, number: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two views of random images, and labels; as many as keep the loss away from zero."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format

    def images() -> Tensor:
        return torch.randn(batch, 3, 32, 32, generator=generator).to(settings.device, memory_format=layout)

    return [
        (images(), images(), torch.randint(10, (batch,), generator=generator).to(settings.device))
        for _ in range(number)
    ]


def float_network(name: str, settings: Settings) -> nn.Module:
    """On the device, in the memory format."""
    net = network(name).to(settings.device)
    return net.to(memory_format=torch.channels_last) if settings.channels_last else net  # type: ignore[call-overload]


def attempt(variant: str, missing: dict[str, str], make: Callable[[str], Any]) -> Any:
    """What ``make(variant)`` returns, or None and the reason under the variant's name."""
    try:
        return make(variant)
    except NotMeasuredError as error:
        missing[variant] = str(error)
    except Exception as error:
        if variant == "float":
            raise
        traceback.print_exc()
        missing[variant] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    progress(f"{variant} is not measured: {missing[variant]}")
    return None


def clean(settings: Settings) -> None:
    """Give memory back before the next measurement."""
    gc.collect()
    if settings.cuda:
        torch.cuda.empty_cache()


def step(name: str, variants: tuple[str, ...], batch: int, settings: Settings) -> dict[str, Any]:
    """Training steps, over the float step."""
    net, missing = float_network(name, settings), {}
    x = batches(batch, settings, 1)[0][0]

    def made(variant: str) -> Work:
        work = Step(student(variant, net, x), batch, settings)
        for _ in range(2):  # momentum; and what else is made once
            work()
        return work

    works = {variant: work for variant in variants if (work := attempt(variant, missing, made))}
    found = report(in_turn(works, settings, f"step, {name}, batch {batch}"), "float")
    images = {variant: batch / seconds for variant, seconds in found["median seconds"]["wall"].items()}
    clean(settings)
    return {"network": name, "batch": batch, **found, "images per second": images, "not measured": missing}


def compiled(name: str, variants: tuple[str, ...], batch: int, settings: Settings) -> dict[str, Any]:
    """The same with each network compiled whole, over the compiled float step."""
    net, missing = float_network(name, settings), {}
    x = batches(batch, settings, 1)[0][0]
    breaks: dict[str, int] = {}
    first: dict[str, float] = {}

    def counted(variant: str) -> nn.Module:
        eager = student(variant, net, x)
        breaks[variant] = torch._dynamo.explain(eager)(x).graph_break_count  # which forgets what was compiled before
        return eager

    def made(variant: str) -> Work:
        began = time.perf_counter()
        work = Step(torch.compile(students[variant], fullgraph=True, mode=settings.compile_mode), batch, settings)  # type: ignore[arg-type]
        for _ in range(2):
            work()
        first[variant] = time.perf_counter() - began
        progress(f"compiled, {name}: {variant}, first steps {first[variant]:.0f} s")
        return work

    torch._dynamo.reset()
    students = {variant: eager for variant in variants if (eager := attempt(variant, missing, counted))}
    works = {variant: work for variant in students if (work := attempt(variant, missing, made))}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def stays(variant: str) -> Work:
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                works[variant]()
        return works[variant]

    works = {variant: work for variant in works if (work := attempt(variant, missing, stays))}
    found = report(in_turn(works, settings, f"compiled, {name}, batch {batch}"), "float")
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    clean(settings)
    return {
        "network": name,
        "batch": batch,
        **found,
        "fullgraph": True,
        "graph breaks": breaks,
        "recompilations after the first steps": again,
        "seconds of the first steps": first,
        "not measured": missing,
    }


def parts(name: str, batch: int, settings: Settings) -> dict[str, Any]:
    """What the teacher adds to a QAT step: all of it, its average, and these by themselves."""
    net = float_network(name, settings)
    x = batches(batch, settings, 1)[0][0]
    average = ConsistencyStep(student("crcore", net, x), batch, settings, term=False)
    works: dict[str, Work] = {
        "qat": Step(student("crcore", net, x), batch, settings),
        "average": average,
        "consistency": ConsistencyStep(student("crcore", net, x), batch, settings, term=True),
        "update alone": average.teacher.update,
        "teacher's forward alone": lambda: average.teacher(x),
    }
    for work in [*works.values()] * 2:
        work()
    found = report(in_turn(works, settings, f"parts, {name}"), "qat")
    clean(settings)
    return {"network": name, "batch": batch, **found}


# --- scaling ---


def scaling(settings: Settings, *, small: bool = False) -> list[dict[str, Any]]:
    """QAT over float as the batch, the depth and the number of quantized layers grow, of small ResNets."""
    cases = [("batch", size, "resnet-1", size, None) for size in ((2,) if small else (8, 32, 128))]
    cases += [("blocks per stage", n, f"resnet-{n}", 32, None) for n in (() if small else (1, 3, 5))]
    cases += [("quantized layers", n, "resnet-3", 32, n) for n in (() if small else (5, 10, 22))]
    rows = []
    for what, value, name, batch, quantized in cases:
        net = float_network(name, settings)
        names = [own for own, module in net.named_modules() if isinstance(module, KINDS)]
        made = crcore(net, "auto", skip=() if quantized is None else tuple(names[quantized:])).train()
        works = {"float": Step(copy.deepcopy(net), batch, settings), "crcore": Step(made, batch, settings)}
        for work in [*works.values()] * 2:
            work()
        found = report(in_turn(works, settings, f"scaling, {what} {value}"), "float")
        rows.append({"what": what, "value": value, "network": name, "batch": batch, "layers": len(names), **found})
    clean(settings)
    return rows
