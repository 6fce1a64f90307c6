"""One run for each (seed, method), and what is kept of it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crcore as cr
from crcore.cli._backends import Network
from crcore.cli._errors import CommandError, one_line
from crcore.cli._files import write_text
from crcore.cli._methods import METHODS, Method
from crcore.cli._progress import Progress
from crcore.cli._session import Session, load_init, recipe_of

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


@dataclass(frozen=True)
class Place:
    """Where a run is kept, and what it is called while it lasts."""

    folder: Path
    title: str


def place_in_comparison(session: Session, seed: int, method: Method) -> Place:
    """A folder for each seed, in it one for each method."""
    return Place(session.out / f"seed{seed}" / method.name, f"seed {seed} {method.name}")


class SeedRuns:
    """The runs of one seed. The float network is trained first, whichever method asks for it."""

    def __init__(
        self,
        session: Session,
        seed: int,
        progress: Progress,
        *,
        place: Callable[[Session, int, Method], Place] = place_in_comparison,
        floats: dict[Path, tuple[Network, dict[str, Any]]] | None = None,
    ) -> None:
        """`floats` keeps float networks by their folder; sessions that share them give the same one."""
        self.session, self.seed, self.progress = session, seed, progress
        self.backend = session.backend
        self.batches = session.batches(seed)
        self.evaluation = session.evaluation()
        self._place = place
        self._floats = {} if floats is None else floats

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
            student = self.backend.prepare(network, recipe, seed=self.seed)
            float_steps = float_record["steps"]
            self.progress.title = self._place(self.session, self.seed, method).title
        else:
            network = self.session.network(self.seed)
            student = load_init(self.session, network, method, steps=steps, seed=self.seed)
            float_steps = None  # unknown: it was trained elsewhere
        teacher, record = self.backend.train(
            student,
            method,
            recipe=recipe,
            reference=network if method.distillation else None,
            epochs=settings.epochs,
            lr=settings.lr,
            reestimate_batchnorm=settings.reestimate_batchnorm,
            **self._common(folder),
        )
        self._save(folder, "student", student, recipe)
        if teacher is not None:
            self._save(folder, "teacher", teacher, recipe)
        return self._finish(method, folder, record, recipe=recipe.to_dict(), float_steps=float_steps)

    def float_network(self) -> tuple[Network, dict[str, Any]]:
        """The float network that every QAT method of this seed starts from, and its record."""
        place = self._place(self.session, self.seed, FLOAT)
        if place.folder not in self._floats:
            folder, record = self._begin(FLOAT)
            file = folder / f"float{self.backend.suffix}"
            network = self.session.network(self.seed)
            if record is not None:
                self.backend.load_state(network, self.backend.read_network(file)[0], file)
            else:
                settings = self.session.settings
                if settings.init is not None:
                    load_init(self.session, network, FLOAT, steps=0, seed=self.seed)
                _, record = self.backend.train(
                    network,
                    FLOAT,
                    recipe=None,
                    reference=None,
                    epochs=settings.float_epochs,
                    lr=settings.float_lr,
                    reestimate_batchnorm=0,
                    **self._common(folder),
                )
                self._save(folder, "float", network, None)
                record = self._finish(FLOAT, folder, record, recipe=None, float_steps=0)
            self._floats[folder] = network, record
        return self._floats[place.folder]

    def _save(self, folder: Path, role: str, network: Network, recipe: cr.Recipe | None) -> None:
        self.backend.save_network(
            folder / f"{role}{self.backend.suffix}", network, self.session.info(role, recipe, seed=self.seed)
        )

    def _common(self, folder: Path) -> dict[str, Any]:
        settings = self.session.settings
        return {
            "batches": self.batches,
            "evaluation": self.evaluation,
            "weight_decay": settings.weight_decay,
            "evaluate_every": settings.evaluate_every,
            "amp": settings.amp,
            "progress": self.progress,
            "progress_file": folder / self.backend.progress_name,
        }

    def _begin(self, method: Method) -> tuple[Path, dict[str, Any] | None]:
        place = self._place(self.session, self.seed, method)
        self.progress.title, folder = place.title, place.folder
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
                file.relative_to(self.session.out).as_posix()
                for file in folder.glob(f"*{self.backend.suffix}")
                if file.name != self.backend.progress_name
            ),
        }
        # In this order: a run counts as finished when run.json is there.
        write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")
        (folder / self.backend.progress_name).unlink(missing_ok=True)
        return record
