"""Consistency on students that other libraries quantized: does it gain there what it gains on crcore's own?

For each seed one float network is trained, as `crcore compare` does; each library then makes its 4-bit student of it,
which is trained plainly (with its average beside it, the control) and with consistency, on the batches and views of the
command. Weight decay is on weights alone, not on BatchNorm and biases as in the command: every library has scales of
its own names and shapes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import crcore_torch as crt
import torch
import torch.nn.functional as F
import torch_students
from rich.console import Console
from shared import names_of, progress
from torch import nn

import crcore as cr
from crcore.cli._arguments import build_parser, settings_from
from crcore.cli._batches import Batches
from crcore.cli._files import write_text
from crcore.cli._history import check_finite
from crcore.cli._methods import METHODS, Method
from crcore.cli._progress import Progress
from crcore.cli._report import markdown
from crcore.cli._runs import SeedRuns
from crcore.cli._session import Session, open_session, recipe_of

LIBRARIES = ("brevitas", "torchao", "crcore")
TRAINED = ("qat+ema", "qat+cr", "qat+cr+unlabeled")


def main() -> None:
    """Read the options, train, write results.json and table.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="options that are not listed are those of crcore compare, --data and --out needed"
    )
    parser.add_argument("--libraries", type=names_of(LIBRARIES), default=LIBRARIES)
    parser.add_argument("--students", type=names_of(TRAINED), default=("qat+ema", "qat+cr"))
    options, others = parser.parse_known_args()
    arguments = build_parser("0").parse_args(["compare", "--methods", "fp32", *others])
    out = Path(arguments.out or parser.error("--out is needed: a folder"))
    settings = settings_from(arguments)
    if settings.freezing or settings.dampening or settings.reestimate_batchnorm or settings.amp:
        parser.error(
            "--freezing, --dampening, --reestimate-batchnorm and --amp are for crcore's own students; leave them out"
        )
    session = open_session(settings, out=out, resume=arguments.resume)
    records = [
        record for library in options.libraries for record in runs_of(library, options.students, session, Console())
    ]
    versions = session.versions | {name: importlib.metadata.version(name) for name in LIBRARIES}
    result = {
        "format": 1,
        "command": " ".join(["python", "benchmarks/other_students.py", *sys.argv[1:]]),
        "settings": session.settings.to_dict(),
        "versions": versions,
        "runs": records,
    }
    write_text(out / "results.json", json.dumps(result, indent=2) + "\n")
    write_text(out / "table.md", "\n".join(tables(records, session)))
    progress(f"wrote {out}/results.json and table.md")


def runs_of(library: str, students: tuple[str, ...], session: Session, console: Console) -> list[dict[str, Any]]:
    """The records of one library's students, each trained now or read from an earlier run."""
    return [run(library, name, session, seed, console) for seed in session.settings.seeds for name in students]


def run(library: str, name: str, session: Session, seed: int, console: Console) -> dict[str, Any]:
    """Train one student of one library with one method and one seed, unless that was done."""
    file = session.out / f"seed{seed}" / library / f"{name}.json"
    if file.exists():
        finished: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return finished
    file.parent.mkdir(parents=True, exist_ok=True)
    settings, method = session.settings, METHODS[name]
    batches, evaluation = session.batches(seed), session.evaluation()
    steps = settings.epochs * batches.steps_per_epoch
    with Progress(console, steps) as shown:
        network, float_record = SeedRuns(session, seed, shown).float_network()
        x, _ = batches.student(0)
        student = torch_students.student(library, network.train(), x)
        shown.title = f"seed {seed} {library} {name}"
        shown.start(steps, done=0)
        teacher = train(student, method, recipe_of(settings, method, steps=steps), session, batches, steps, shown)
    record = {
        "seed": seed,
        "method": name,
        "library": library,
        "differs": method.summary,
        "accuracy": evaluation.accuracy(student),
        "teacher_accuracy": evaluation.accuracy(teacher),
        "steps": steps,
        "float_steps": float_record["steps"],
    }
    write_text(file, json.dumps(record, indent=2) + "\n")
    print(f"seed {seed} {library} {name}: {record['accuracy']:.2f} %, average {record['teacher_accuracy']:.2f} %")
    return record


def train(
    student: nn.Module,
    method: Method,
    recipe: cr.Recipe,
    session: Session,
    batches: Batches,
    steps: int,
    shown: Progress,
) -> nn.Module:
    """The README's loop on a network that crcore did not quantize. Returns the average."""
    teacher = crt.Teacher(student, recipe.ema)
    consistency = None if recipe.consistency is None else crt.ConsistencyLoss(recipe.consistency)
    # Weight decay is for weights, not for whatever scales a library has: those are one number, or one for each channel.
    several = [p.numel() > p.shape[0] if p.ndim else False for p in student.parameters()]
    groups = [
        {
            "params": [p for p, s in zip(student.parameters(), several, strict=True) if s == weight],
            "weight_decay": decay,
        }
        for weight, decay in ((True, session.settings.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.SGD(groups, lr=session.settings.lr, momentum=0.9, nesterov=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    teacher.follow(optimizer)
    student.train()
    for step in range(steps):
        x, y = batches.student(step, unlabeled=method.unlabeled)
        logits = student(x)
        loss = F.cross_entropy(logits[: len(y)], y)
        if consistency is not None:
            view = batches.teacher(step, unlabeled=method.unlabeled)
            loss = loss + consistency(logits, teacher(view), step=teacher.step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        shown.advance()
        if (step + 1) % batches.steps_per_epoch == 0:
            epoch = (step + 1) // batches.steps_per_epoch
            check_finite(loss.item(), method, seed=batches.seed, epoch=epoch, lr=session.settings.lr)
    return teacher.model


def tables(records: list[dict[str, Any]], session: Session) -> list[str]:
    """A table for each library, in which the average's control stands for plain QAT: its student is plain QAT's."""
    found = []
    for library in dict.fromkeys(record["library"] for record in records):
        mine = [record for record in records if record["library"] == library]
        plain = [
            record | {"method": "qat", "teacher_accuracy": None} for record in mine if record["method"] == "qat+ema"
        ]
        settings = replace(session.settings, quantizer=library).to_dict()
        found.append(markdown([*plain, *mine], settings, session.data.to_dict()))
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # what the libraries import is deprecated in torch
    main()
