"""Which checkpoint a file, a run, a seed or a method's folder stands for."""

from pathlib import Path

from crcore.cli._errors import CommandError

ROLES = ("teacher", "student")  # in the order in which they are taken
_SUFFIXES = (".safetensors", ".keras")


def chosen_checkpoint(run: Path, role: str | None) -> Path:
    """The checkpoint that a path names.

    Args:
        run: a checkpoint, or the folder of a method, a seed or a run that holds one method that trained a quantized
            network.
        role: "student" or "teacher"; None: the teacher, the average, where there is one.
    """
    if run.is_file() or run.suffix in _SUFFIXES:
        if role is not None and run.stem != role:
            raise CommandError(f"--role {role}: {run} is a file; leave --role out, or give the folder that it is in")
        return run
    if not run.is_dir():
        raise CommandError(f"{run}: no such checkpoint or folder; give the --out folder of crcore compare or train")
    folders = sorted({file.parent for pattern in ("", "*/", "*/*/") for file in _checkpoints(run, pattern)})
    if not folders:
        raise CommandError(
            f"{run} holds no student or teacher checkpoint; give the --out folder of crcore compare or train, or a "
            "folder in it, of a method that trains a quantized network"
        )
    if len(folders) > 1:
        raise CommandError(f"{run} holds {len(folders)} quantized networks; give one of {_listed(folders)}")
    found = {file.stem: file for file in _checkpoints(folders[0], "")}
    if role is not None and role not in found:
        raise CommandError(f"--role {role}: {folders[0]} holds {' and '.join(sorted(found))} only; leave --role out")
    return found[role] if role is not None else next(found[name] for name in ROLES if name in found)


def _checkpoints(folder: Path, pattern: str) -> list[Path]:
    return [file for role in ROLES for suffix in _SUFFIXES for file in folder.glob(f"{pattern}{role}{suffix}")]


def _listed(folders: list[Path], most: int = 12) -> str:
    more = f" and {len(folders) - most} more" if len(folders) > most else ""
    return ", ".join(map(str, folders[:most])) + more
