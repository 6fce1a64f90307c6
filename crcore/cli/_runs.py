"""One run for each (seed, method), and what is kept of it (torch)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from crcore.cli._checkpoints import load_state, read_network, save_network, write_text
from crcore.cli._errors import CommandError, one_line
from crcore.cli._methods import METHODS, Method
from crcore.cli._progress import Progress
from crcore.cli._session import Session, load_init, prepare, recipe_of
from crcore.cli._training import train

FLOAT = METHODS["fp32"]


def all_runs(session: Session, progress: Progress) -> Iterator[dict[str, Any]]:
    """Train what is not finished yet, and yield the record of every run that was asked for."""
    for seed in session.settings.seeds:
        runs = SeedRuns(session, seed, progress)
        for name in session.settings.methods:
            yield runs.run(METHODS[name])


def total_steps(session: Session) -> int:
    """Optimizer steps of all runs, the float networks that QAT starts from included."""
    settings, per_epoch = session.settings, session.batches(session.settings.seeds[0]).steps_per_epoch
    quantized = [name for name in settings.methods if METHODS[name].quantized]
    train_float = not quantized or settings.init is None
    epochs = settings.epochs * len(quantized) + settings.float_epochs * train_float
    return epochs * per_epoch * len(settings.seeds)


# What the reports need of a finished run.
RECORDED = {"seed", "method", "differs", "accuracy", "teacher_accuracy", "float_steps", "steps", "history"}


class SeedRuns:
    """The runs of one seed. The float network is trained first, whichever method asks for it."""

    def __init__(self, session: Session, seed: int, progress: Progress) -> None:
        self.session, self.seed, self.progress = session, seed, progress
        self.folder = session.out / f"seed{seed}"
        self.batches = session.batches(seed)
        self.evaluation = session.evaluation()
        self._float: tuple[nn.Module, dict[str, Any]] | None = None

    def run(self, method: Method) -> dict[str, Any]:
        """The record of one method, trained now or read from an earlier, finished run."""
        if not method.quantized:
            return self.float_network()[1]
        folder, finished = self._begin(method)
        if finished is not None:
            return finished
        settings = self.session.settings
        steps = settings.epochs * self.batches.steps_per_epoch
        recipe = recipe_of(settings, method, steps=steps)
        if settings.init is None:
            network, float_record = self.float_network()
            student = prepare(network, recipe)
            float_steps = float_record["steps"]
            self.progress.title = self._title(method)
        else:
            network = self.session.network(self.seed)
            student = load_init(self.session, network, method, steps=steps)
            float_steps = None  # unknown: it was trained elsewhere
        teacher, record = train(
            student,
            method,
            recipe=recipe,
            reference=network.eval() if method.distillation else None,
            epochs=settings.epochs,
            lr=settings.lr,
            progress_file=folder / "progress.safetensors",
            **self._common(),
        )
        save_network(folder / "student.safetensors", student, self.session.info("student", recipe))
        if teacher is not None:
            save_network(folder / "teacher.safetensors", teacher.model, self.session.info("teacher", recipe))
        return self._finish(method, folder, record, recipe=recipe.to_dict(), float_steps=float_steps)

    def float_network(self) -> tuple[nn.Module, dict[str, Any]]:
        """The float network that every QAT method of this seed starts from, and its record."""
        if self._float is None:
            folder, record = self._begin(FLOAT)
            file = folder / "float.safetensors"
            network = self.session.network(self.seed)
            if record is not None:
                load_state(network, read_network(file)[0], file)
            else:
                settings = self.session.settings
                if settings.init is not None:
                    load_init(self.session, network, FLOAT, steps=0)
                _, record = train(
                    network,
                    FLOAT,
                    recipe=None,
                    reference=None,
                    epochs=settings.float_epochs,
                    lr=settings.float_lr,
                    progress_file=folder / "progress.safetensors",
                    **self._common(),
                )
                save_network(file, network, self.session.info("float", None))
                record = self._finish(FLOAT, folder, record, recipe=None, float_steps=0)
            for parameter in network.parameters():
                parameter.grad = None
            self._float = network, record
        return self._float

    def _common(self) -> dict[str, Any]:
        settings = self.session.settings
        return {
            "batches": self.batches,
            "evaluation": self.evaluation,
            "weight_decay": settings.weight_decay,
            "evaluate_every": settings.evaluate_every,
            "amp": settings.amp,
            "progress": self.progress,
        }

    def _title(self, method: Method) -> str:
        return f"seed {self.seed} {method.name}"

    def _begin(self, method: Method) -> tuple[Path, dict[str, Any] | None]:
        self.progress.title = self._title(method)
        folder = self.folder / method.name
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "run.json"
        if not file.exists():
            return folder, None
        try:
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            missing = RECORDED - set(record)
        except (ValueError, TypeError) as error:
            raise CommandError(
                f"--resume: {file} is damaged ({one_line(error)}); delete the folder {folder} to train that run again"
            ) from error
        if missing:
            raise CommandError(
                f"--resume: {file} is damaged ({', '.join(sorted(missing))} missing); "
                f"delete the folder {folder} to train that run again"
            )
        self.progress.skip(record["steps"])
        return folder, record

    def _finish(
        self,
        method: Method,
        folder: Path,
        trained: dict[str, Any],
        *,
        recipe: dict[str, Any] | None,
        float_steps: int | None,
    ) -> dict[str, Any]:
        final = trained["history"][-1]
        record = {
            "seed": self.seed,
            "method": method.name,
            "differs": method.summary,
            "accuracy": final["accuracy"],
            "teacher_accuracy": final["teacher_accuracy"],
            "float_steps": float_steps,  # steps of the float network that this run started from
            **trained,
            "recipe": recipe,
            "checkpoints": sorted(
                f"{self.folder.name}/{folder.name}/{file.name}"
                for file in folder.glob("*.safetensors")
                if file.name != "progress.safetensors"
            ),
        }
        # In this order: a run counts as finished when run.json is there.
        write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")
        (folder / "progress.safetensors").unlink(missing_ok=True)
        return record
