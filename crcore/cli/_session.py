"""What is checked before the first file is written: data, model, recipe, backend and output folder."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import crcore as cr
from crcore.cli._backends import Backend, Evaluation, Network, open_backend
from crcore.cli._batches import Batches
from crcore.cli._data import DIGITS, ImageData, load_data
from crcore.cli._errors import CommandError, one_line
from crcore.cli._files import write_text
from crcore.cli._methods import METHODS, Method
from crcore.cli._network_info import NetworkInfo, network_recipe
from crcore.cli._recipes import build_recipe, quantization_of
from crcore.cli._settings import NEWER, STRONG_FROM, Settings, check_same_settings

BEFORE_BACKENDS = {"backend": "torch", "engine": "torch"}  # what settings.json left out then
DIGITS_LABELS = 200  # of 1,198 training images: few enough that methods differ


@dataclass(frozen=True)
class Session:
    """Checked settings and what was loaded for them."""

    settings: Settings  # nothing left to decide
    data: ImageData
    backend: Backend
    out: Path
    versions: dict[str, str]

    def batches(self, seed: int) -> Batches:
        """The batches of one seed, common to its methods."""
        s = self.settings
        return Batches(
            self.data,
            seed=seed,
            labels=s.labels,
            unlabeled=s.unlabeled,
            batch_size=s.batch_size,
            student_view=str(s.student_view),
            teacher_view=s.teacher_view,
            flip=bool(s.flip),
            device=self.backend.device,
        )

    def evaluation(self) -> Evaluation:
        """The test images."""
        return self.backend.evaluation(self.data.test, mean=self.data.mean, std=self.data.std)

    def network(self, seed: int) -> Network:
        """A float network with the random weights of this seed."""
        return self.backend.network(
            self.settings.model,
            num_classes=len(self.data.classes),
            in_channels=self.data.channels,
            size=self.data.size,
            seed=seed,
        )

    def info(self, role: str, recipe: cr.Recipe | None, *, seed: int) -> NetworkInfo:
        """What is stored with a network."""
        return NetworkInfo(
            role=role,
            model=self.settings.model,
            recipe=None if recipe is None else recipe.to_dict(),
            classes=self.data.classes,
            channels=self.data.channels,
            size=self.data.size,
            image_size=self.settings.image_size,
            mean=self.data.mean,
            std=self.data.std,
            data=self.settings.data,
            versions=self.versions,
            labels=self.settings.labels,
            seed=seed,
        )


def open_session(settings: Settings, *, out: Path, resume: bool) -> Session:
    """Check everything, then create the output folder, or find that it can be continued."""
    backend = open_backend(settings.backend, device=settings.device)
    data = load_data(settings.data, image_size=settings.image_size)
    session = decided_session(settings, data, backend, out=out)
    check_network(session, [METHODS[name] for name in session.settings.methods])
    settings = session.settings
    stored = {"settings": settings.to_dict(), "fingerprint": data.fingerprint}
    if check_folder(out, resume=resume):
        _check_resume(out, stored, unlabeled=len(data.train.labels) - (settings.labels or 0))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "settings.json", json.dumps(stored, indent=2) + "\n")
    return session


def decided_session(settings: Settings, data: ImageData, backend: Backend, *, out: Path) -> Session:
    """A session in which what was left to the data is decided. Nothing is written yet."""
    return Session(_decide(settings, data, backend), data, backend, out, versions(backend))


def check_folder(out: Path, *, resume: bool) -> bool:
    """Whether there is something in the output folder to continue; an error where there is, and nobody asked to."""
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file; give a folder")
    if not out.exists() or not any(out.iterdir()):
        return False  # with --resume: killed before its first file, or never started
    if not resume:
        raise CommandError(f"--out {out} is not empty; continue that run with --resume, or give another --out")
    return True


def versions(backend: Backend) -> dict[str, str]:
    """What decides a result to the last bit, beside the settings: versions, and how many threads share a sum."""
    packages = {name: importlib.metadata.version(name) for name in ("crcore", "torch", "numpy")}
    return {
        "python": platform.python_version(),
        **packages,
        **backend.versions(),
        "cpu threads": str(torch.get_num_threads()),
    }


def _decide(settings: Settings, data: ImageData, backend: Backend) -> Settings:
    """Replace what was left to the data by values."""
    images, classes = len(data.train.labels), len(data.classes)
    labels = settings.labels
    if labels is None and data.name == DIGITS:
        labels = DIGITS_LABELS
    labels = images if labels in (None, 0) else labels
    assert labels is not None
    if not classes <= labels <= images:
        raise CommandError(
            f"--labels {labels}: must be between {classes} (one for each class) and {images} (all training images)"
        )
    unlabeled = settings.unlabeled or images - labels
    if unlabeled > images - labels:
        raise CommandError(
            f"--unlabeled {unlabeled}: {labels} of {images} training images are labeled, which leaves "
            f"{images - labels}; give at most that, or fewer --labels"
        )
    methods = settings.methods or tuple(m.name for m in METHODS.values() if labels < images or not m.unlabeled)
    for name in methods:
        if METHODS[name].unlabeled and labels == images:
            raise CommandError(
                f"method {name} needs unlabeled images, and all {images} training images are labeled; "
                "give --labels N to keep only N labels, or leave the method out"
            )
    return replace(
        settings,
        labels=labels,
        unlabeled=unlabeled,
        methods=methods,
        flip=data.name != DIGITS if settings.flip is None else settings.flip,
        engine=backend.engine,
        # Keras does not say where its engine computes.
        device="auto" if backend.name == "keras" else backend.device.type,
        evaluate_every=settings.evaluate_every or max(settings.epochs // 20, 1),
        student_view=settings.student_view or ("strong" if settings.epochs >= STRONG_FROM else "weak"),
    )


def check_network(session: Session, methods: Sequence[Method]) -> None:
    """Build what will be trained once, so that a failure comes before the first epoch."""
    network = session.network(session.settings.seeds[0])
    if session.settings.reestimate_batchnorm and not session.backend.has_batchnorm(network):
        raise CommandError(
            f"--reestimate-batchnorm {session.settings.reestimate_batchnorm}: --model {session.settings.model} has no "
            "BatchNorm; leave the option out"
        )
    for method in methods:
        if method.quantized:
            session.backend.prepare(network, recipe_of(session.settings, method, steps=1))
    if session.settings.init is not None:
        load_init(session, network, methods[0], steps=1, seed=session.settings.seeds[0])


def recipe_of(settings: Settings, method: Method, *, steps: int) -> cr.Recipe:
    """The recipe, with the options named where the library refuses one."""
    try:
        return build_recipe(settings, method, steps=steps)
    except cr.CRCoreError as error:
        raise CommandError(
            f"--quantizer {settings.quantizer} --weight-bits {settings.weight_bits} --activation-bits "
            f"{settings.activation_bits}: {one_line(error)}"
        ) from error


def load_init(session: Session, network: Network, method: Method, *, steps: int, seed: int) -> Network:
    """The network to train, from the `--init` checkpoint: float, or already quantized in the same way.

    A float checkpoint is loaded into `network`, which stays the float reference; a quantized one gives a student.
    """
    path, backend = Path(session.settings.init or ""), session.backend
    state, info = backend.read_network(path)
    if info.model != session.settings.model:
        raise CommandError(f"--init {path} holds a {info.model}, asked for is --model {session.settings.model}")
    if (len(info.classes), info.channels) != (len(session.data.classes), session.data.channels):
        raise CommandError(
            f"--init {path} is a network for {len(info.classes)} classes and {info.channels} channels; "
            f"the data have {len(session.data.classes)} and {session.data.channels}"
        )
    stored = network_recipe(info, path)
    if stored is None:
        backend.load_state(network, state, path)
        if not method.quantized:
            return network
        return backend.prepare(network, recipe_of(session.settings, method, steps=steps), seed=seed)
    if not method.quantized or method.distillation:
        raise CommandError(
            f"--init {path} holds a quantized network; method {method.name} needs a float one (float{backend.suffix})"
        )
    recipe = recipe_of(session.settings, method, steps=steps)
    check_same_quantization(stored, recipe, what=f"--init {path}")
    student = backend.prepare(network, recipe, seed=seed)
    backend.load_state(student, state, path)
    return student


def describe(recipe: cr.Recipe) -> str:
    """The quantizers of a recipe in a few words, as "4-bit LSQ weights, 4-bit PACT activations"."""
    parts = (("weights", recipe.weights), ("activations", recipe.activations))
    return ", ".join(f"float {what}" if q is None else f"{q.bits}-bit {type(q).__name__} {what}" for what, q in parts)


def check_same_quantization(stored: cr.Recipe, asked: cr.Recipe, *, what: str) -> None:
    """Two recipes quantize alike; how their networks are trained (consistency, average) may differ."""
    if quantization_of(stored) != quantization_of(asked):
        raise CommandError(
            f"{what} was made with another recipe: {describe(stored)}; asked for: {describe(asked)}; "
            "give the same --quantizer, --weight-bits and --activation-bits"
        )


def _check_resume(out: Path, asked: dict[str, Any], *, unlabeled: int) -> None:
    """`unlabeled` is how many images have no label; earlier versions used all of them."""
    file = out / "settings.json"
    if not file.is_file():
        raise CommandError(f"--resume: {out} holds no run of crcore (no settings.json); give another --out")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        check_same_settings(
            NEWER
            | BEFORE_BACKENDS
            | {"unlabeled": unlabeled}
            | {k: v for k, v in stored["settings"].items() if k != "data"},
            {k: v for k, v in asked["settings"].items() if k != "data"},
            folder=str(out),
        )
        fingerprint = stored["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CommandError):
            raise
        raise CommandError(f"--resume: {file} is damaged ({one_line(error)}); give another --out") from error
    if fingerprint != asked["fingerprint"]:
        raise CommandError(
            f"--resume: {out} was made with the images of --data {stored['settings']['data']}, those of --data "
            f"{asked['settings']['data']} are others; give the same data, or another --out"
        )
