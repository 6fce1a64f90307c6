"""The command export: a trained network as a file for a runtime, or packed; proved before it is put in place."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import crcore as cr
from crcore.cli._backends import Backend, Network, backend_name_of, open_backend
from crcore.cli._choose import ROLES, chosen_checkpoint
from crcore.cli._data import Images
from crcore.cli._errors import CommandError
from crcore.cli._network_info import NetworkInfo
from crcore.cli._networks import (
    RUNTIME_SUFFIXES,
    add_info,
    data_for,
    described,
    load_checkpoint,
    load_packed,
    packed_info,
    view_of,
)

ENDINGS = {"onnx": ".onnx", "litert": ".tflite", "safetensors": "-packed.safetensors"}  # of `--to`, for default names
# What the libraries' messages call the command's options.
_OPTIONS = {
    "integer_only=False": "--no-integer-only",
    "minimum_agreement": "--minimum-agreement",
    "opset=": "--opset ",
    "opset must": "--opset must",
}


def export(
    run: Path,
    *,
    to: str,
    out: Path | None,
    role: str | None,
    opset: int | None,
    integer_only: bool | None,
    minimum_agreement: float,
    verify: bool,
    data_name: str | None,
    samples: int,
    as_json: bool,
) -> None:
    """Write a file and say what was found in it."""
    _check_options(to, opset, integer_only, samples, minimum_agreement)
    checkpoint = chosen_checkpoint(run, role)
    if checkpoint.suffix in RUNTIME_SUFFIXES:
        raise CommandError(f"{checkpoint} is exported already; give the checkpoint or the run that it was made of")
    out = _checked_out(checkpoint, out, to)
    if checkpoint.suffix == ".safetensors" and packed_info(checkpoint) is not None:
        raise CommandError(f"{checkpoint} is exported already; give the checkpoint or the run that it was made of")
    name = backend_name_of(checkpoint)
    backend = open_backend(name, device="cpu" if name == "torch" else "auto")
    info, network = load_checkpoint(backend, checkpoint)
    if info.recipe is None:
        raise CommandError(f"{checkpoint} holds a float network; give a student or a teacher, of a QAT method")
    data = data_for(info, checkpoint, data_name)
    sample = _some(data.train, samples)
    with _put_in_place(out) as temporary, Console(stderr=True).status(f"writing and running {out}"):
        if to == "safetensors":
            found = _packed(backend, network, info, temporary, data.test if verify else sample, checkpoint)
        else:
            found = _for_runtime(
                backend,
                network,
                info,
                temporary,
                sample,
                data.test if verify else None,
                {"opset": opset, "integer_only": integer_only, "minimum_agreement": minimum_agreement},
            )
    found["path"] = str(out)
    images = f"{'test' if verify else 'training'} images of {data.name}"
    if as_json:
        result = {
            "checkpoint": str(checkpoint),
            "to": to,
            "role": info.role,
            "model": info.model,
            "data": data.name,
            "images": images,
            "recipe": info.recipe,
            **found,
        }
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(found, images, info, verify)) + "\n")


def _for_runtime(
    backend: Backend,
    network: Network,
    info: NetworkInfo,
    path: Path,
    sample: Images,
    test: Images | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Write a file whose ranges come from the sample; prove it there, and on the test images where they are given."""
    view = view_of(info)
    found = backend.export(network, path, view(sample.images, 0), metadata=described(info, backend), **options)
    if test is not None:
        found = replace(backend.verify(network, path, view(test.images, 0), test.labels), notices=found.notices)
        found.check(options["minimum_agreement"])
    return {**found.to_dict(), "table": found.table().partition("\n")[2]}  # its first line names the file


def _packed(
    backend: Backend, network: Network, info: NetworkInfo, path: Path, images: Images, checkpoint: Path
) -> dict[str, Any]:
    """Write a packed file, and read it back for proof."""
    backend.save_quantized(network, path)
    add_info(path, backend, info)
    evaluation = backend.evaluation(images, mean=info.mean, std=info.std)
    expected, found = (evaluation.predictions(each) for each in (network, load_packed(backend, path, info)))
    labels = images.labels.numpy()
    agreement = 100 * float((expected == found).mean())
    if agreement < 100:  # the file holds all that was trained, so it is no question of degree
        raise CommandError(f"{path} does not compute what was trained ({agreement:.2f} % agreement); please report it")
    return {
        "samples": len(labels),
        "agreement": agreement,
        "expected_accuracy": 100 * float((expected == labels).mean()),
        "accuracy": 100 * float((found == labels).mean()),
        "size": path.stat().st_size,
        "float_size": checkpoint.stat().st_size,
    }


def _lines(found: dict[str, Any], images: str, info: NetworkInfo, verify: bool) -> list[str]:
    """What people read: a table of what was measured on test images, or one line."""
    wrote = f"wrote {found['path']} ({info.role} network, {info.model})"
    if not verify:
        ratio = found["size"] / found["float_size"]
        kept = f"{found['size'] / 1e3:.1f} kB, {ratio:.3f} of the float network"
        same = f"the class of the trained network on {found['agreement']:.2f} % of {found['samples']} {images}"
        return [wrote, f"{kept}; {same}", *map(_in_options, found.get("notices", ()))]
    if "table" in found:
        return [wrote, f"on {images}:", _in_options(found["table"])]
    return [
        wrote,
        f"on {images}:",
        f"accuracy    {found['accuracy']:.2f} %, as trained {found['expected_accuracy']:.2f} %",
        f"same class  {found['agreement']:.2f} % of {found['samples']} images",
        f"size        {found['size'] / 1e3:.2f} kB, checkpoint {found['float_size'] / 1e3:.2f} kB, "
        f"ratio {found['size'] / found['float_size']:.3f}",
    ]


def _in_options(text: str) -> str:
    """A message of the libraries, with the command's options in place of their arguments."""
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    return text


def _check_options(
    to: str, opset: int | None, integer_only: bool | None, samples: int, minimum_agreement: float
) -> None:
    for name, given in (("--opset", opset is not None), ("--integer-only", integer_only is not None)):
        if given and to != "onnx":
            raise CommandError(f"{name} goes with --to onnx alone; leave it out")
    if samples < 1:
        raise CommandError(f"--samples must be 1 or more, got {samples}; a few hundred give good ranges")
    if not 0 <= minimum_agreement <= 100:
        raise CommandError(f"--minimum-agreement is in percent, from 0 to 100; got {minimum_agreement:g}")


def _checked_out(checkpoint: Path, out: Path | None, to: str) -> Path:
    if out is None:
        return checkpoint.with_name(checkpoint.stem + ENDINGS[to])
    suffix = Path(f"name{ENDINGS[to]}").suffix
    if out.suffix != suffix:
        raise CommandError(f"--out {out}: with --to {to} the name must end in {suffix}")
    if out.is_dir() or not out.parent.is_dir():
        why = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise CommandError(f"--out {out}: {why}; name a file in a folder that exists")
    if out.resolve() == checkpoint.resolve():
        raise CommandError(f"--out {out} is the checkpoint itself; give another name")
    if out.exists() and out.stem in (*ROLES, "float", "progress") and out.suffix == checkpoint.suffix:
        raise CommandError(f"--out {out} exists and has the name of a checkpoint; give another name")
    return out


def _some(images: Images, count: int) -> Images:
    """Images from all over a set, which may be in the order of its classes."""
    size = len(images.labels)
    chosen = np.arange(min(count, size)) * size // min(count, size)
    return Images(images.images[chosen], images.labels[chosen])


@contextmanager
def _put_in_place(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder of its own, which is moved to `path` if all goes well."""
    if path.is_symlink():  # it stays one, and what it leads to may lie on another disk
        path = path.resolve()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".crcore-") as folder:
        temporary = Path(folder) / path.name
        try:
            yield temporary
        except cr.CRCoreError as error:  # in the words of the libraries
            raise CommandError(_in_options(str(error).replace(str(temporary), str(path)))) from error
        temporary.replace(path)
