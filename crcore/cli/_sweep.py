"""The command sweep: `compare` at each point of a grid, where a run that points have in common is trained once."""

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from crcore.cli._axes import Axis
from crcore.cli._backends import Backend, Network, open_backend
from crcore.cli._data import ImageData, load_data
from crcore.cli._errors import CommandError, one_line
from crcore.cli._files import write_text
from crcore.cli._methods import METHODS, Method
from crcore.cli._progress import Progress
from crcore.cli._runs import FLOAT, Place, SeedRuns
from crcore.cli._session import Session, check_folder, check_network, decided_session
from crcore.cli._settings import NEWER, STRONG_FROM, Settings
from crcore.cli._sweep_plot import draw_sweep
from crcore.cli._sweep_report import Grid, Point, markdown, results, shown
from crcore.cli._verdict import command_line


def sweep(axes: Sequence[Axis], settings: Sequence[Settings], *, out: Path, resume: bool) -> None:
    """Train every method at every point with every seed, and write sweep.json, table.md and sweep.png."""
    sessions = _open_sessions(settings, out)
    grid = _grid(axes, settings, sessions)
    if check_folder(out, resume=resume):
        _check_resume(out, grid)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{grid.title}; {len(sessions)} points, {len(_shared(sessions))} runs for each of {len(grid.seeds)} "
        f"seeds; results go to {out}",
        highlight=False,
    )
    out.mkdir(parents=True, exist_ok=True)
    _write(out, grid)
    with Progress(console, _total_steps(sessions)) as progress:
        for seed in grid.seeds:
            _train_seed(seed, sessions, axes, grid, progress)
            draw_sweep(out / "sweep.png", grid)
    console.print((out / "table.md").read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
    console.print(f"wrote {out / 'sweep.json'}, table.md, sweep.png and the checkpoints", highlight=False)


def run_folder(session: Session, method: Method) -> str:
    """Where the runs of a method are kept, below the output folder: named after all that decides them but the seed."""
    deciding = method.deciding(session.settings)
    del deciding["data"], deciding["image_size"]  # the images themselves decide
    # Without what has its default, so that a setting of a later version leaves the names as they are.
    deciding = {name: value for name, value in deciding.items() if name not in NEWER or value != NEWER[name]}
    text = json.dumps(deciding | {"fingerprint": session.data.fingerprint}, sort_keys=True)
    return f"runs/{method.name}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def sweep_line(axes: Sequence[Axis], settings: Sequence[Settings], *, engine: str | None) -> str:
    """The command that gives a sweep: the settings that its points have in common, then each axis as it was typed."""
    first, *others = (point.to_dict() for point in settings)
    varied = {setting for axis in axes for setting in axis.settings}
    common = {n: v for n, v in first.items() if n not in varied and all(other[n] == v for other in others)}
    vary = shlex.join(word for axis in axes for word in ("--vary", f"{axis.name}={','.join(axis.values)}"))
    return f"{command_line('sweep', common, engine=engine)} {vary}"


def _open_sessions(settings: Sequence[Settings], out: Path) -> list[Session]:
    """A checked session for each point. Data are read once, networks that points share are checked once."""
    backends: dict[tuple[str, str], Backend] = {}
    data: dict[tuple[str, int | None], ImageData] = {}
    sessions: list[Session] = []
    checked: set[str] = set()
    for point in settings:
        library, images = (point.backend, point.device), (point.data, point.image_size)
        if library not in backends:
            backends[library] = open_backend(point.backend, device=point.device)
        if images not in data:
            data[images] = load_data(point.data, image_size=point.image_size)
        session = decided_session(point, data[images], backends[library], out=out)
        sessions.append(session)
        folders = {run_folder(session, METHODS[name]): METHODS[name] for name in session.settings.methods}
        new = [method for folder, method in folders.items() if folder not in checked]
        if new:
            check_network(session, new)
        checked |= folders.keys()
    if any(point.student_view is None for point in settings) and len({s.settings.student_view for s in sessions}) > 1:
        raise CommandError(
            f"--vary epochs: without --student-view, points of {STRONG_FROM} epochs and more would see strong views, "
            "the others weak ones; give --student-view, so that epochs alone are compared"
        )
    return sessions


def _grid(axes: Sequence[Axis], settings: Sequence[Settings], sessions: Sequence[Session]) -> Grid:
    """What is swept; `settings` are the points as they were asked for, `sessions` as they were decided."""
    points = [
        Point(
            values={axis.name: axis.value(session.settings) for axis in axes},
            settings=session.settings.to_dict(),
            data=session.data.name,
            runs={name: run_folder(session, METHODS[name]) for name in session.settings.methods},
        )
        for session in sessions
    ]
    data = {session.data.fingerprint: session.data for session in sessions}
    engines = {session.settings.engine for session in sessions if session.settings.backend == "keras"} or {None}
    versions = {name: version for session in sessions for name, version in session.versions.items()}
    names = tuple(axis.name for axis in axes)
    return Grid(names, points, list(data.values()), versions, {}, sweep_line(axes, settings, engine=engines.pop()))


def _place(axes: Sequence[Axis], session: Session, seed: int, method: Method) -> Place:
    """The folder of a shared run, and the axes that decide it."""
    deciding = method.deciding(session.settings)
    values = [
        f"{axis.name} {shown(axis.value(session.settings))}" for axis in axes if deciding.keys() & {*axis.settings}
    ]
    title = ", ".join([f"seed {seed} {method.name}", *values])
    return Place(session.out / run_folder(session, method) / f"seed{seed}", title)


def _shared(sessions: Sequence[Session]) -> dict[str, tuple[Session, Method]]:
    """Each run of a seed once, the float networks that QAT starts from included, with a session that asks for it."""
    runs: dict[str, tuple[Session, Method]] = {}
    for session in sessions:
        for method in (FLOAT, *(METHODS[name] for name in session.settings.methods)):
            runs.setdefault(run_folder(session, method), (session, method))
    return runs


def _total_steps(sessions: Sequence[Session]) -> int:
    steps = 0
    for session, method in _shared(sessions).values():
        settings = session.settings
        epochs = settings.epochs if method.quantized else settings.float_epochs
        steps += epochs * session.batches(settings.seeds[0]).steps_per_epoch * len(settings.seeds)
    return steps


def _train_seed(seed: int, sessions: Sequence[Session], axes: Sequence[Axis], grid: Grid, progress: Progress) -> None:
    floats: dict[Path, tuple[Network, dict[str, Any]]] = {}
    for session in sessions:
        runs = SeedRuns(session, seed, progress, place=lambda *where: _place(axes, *where), floats=floats)
        for name in session.settings.methods:
            folder = run_folder(session, METHODS[name])
            if seed not in grid.records.setdefault(folder, {}):
                grid.records[folder][seed] = runs.run(METHODS[name])
                _write(session.out, grid)


def _write(out: Path, grid: Grid) -> None:
    """After every run, so that a long sweep can be looked at while it lasts."""
    write_text(out / "sweep.json", json.dumps(results(grid), indent=2) + "\n")
    write_text(out / "table.md", markdown(grid))


def _check_resume(out: Path, grid: Grid) -> None:
    """Each value that the folder was made with must still be asked for; there may be more."""
    file = out / "sweep.json"
    if not file.is_file():
        raise CommandError(f"--resume: {out} holds no sweep of crcore (no sweep.json); give another --out")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        before = _values([NEWER | stored["settings"] | point["settings"] for point in stored["points"]])
        images = {data["fingerprint"]: data["name"] for data in stored["data"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"--resume: {file} is damaged ({one_line(error)}); give another --out") from error
    gone = images.keys() - {data.fingerprint for data in grid.data}
    if gone:
        raise CommandError(
            f"--resume: {out} was made with the images of --data {images[gone.pop()]}, which are none of those that "
            "are asked for now; give the same data (more may be added), or another --out"
        )
    now = _values([point.settings for point in grid.points])
    for name in sorted(before.keys() - {"data"}):
        missing = [shown(value) for value in before[name] if value not in now.get(name, ())]
        if missing:
            option = "KERAS_BACKEND" if name == "engine" else f"--{name.replace('_', '-')}"
            raise CommandError(
                f"--resume: {out} was made with {option} {', '.join(missing)}, which is now missing; keep "
                "it (more may be added), or give another --out"
            )


def _values(points: Sequence[dict[str, Any]]) -> dict[str, dict[Any, None]]:
    """The values of each setting over the points, each once and in order; of methods and seeds, each one."""
    found: dict[str, dict[Any, None]] = {}
    for point in points:
        for name, value in point.items():
            found.setdefault(name, {}).update(dict.fromkeys(value if isinstance(value, list) else [value]))
    return found
