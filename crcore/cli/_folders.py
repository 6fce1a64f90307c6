"""Images on disk or on the hub, read with the `datasets` library and decoded here, so that an error names the image."""

import io
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crcore.cli._errors import CommandError, one_line

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [N, C, H, W] and labels [N]
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image"), ("label", "labels", "fine_label")


def read_splits(name: str, *, image_size: int | None) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The splits "train" and, where there are, "test" and "validation"; and the names of the classes."""
    # A throw-away cache for local folders: streaming reads the files in place, but leaves a lock file behind.
    with tempfile.TemporaryDirectory(prefix="crcore-") as cache:
        sources = _open(name, cache)
        if "train" not in sources:
            raise CommandError(
                f"--data {name}: found the splits {', '.join(sources) or 'none'}, but no train images; files or "
                "folders must be called train..., and test... or validation... where there is a test set"
            )
        read = {split: _read(name, split, source, image_size) for split, source in sources.items()}
    grey = all(image.ndim == 2 for images, _ in read.values() for image in images)
    splits = {split: (_stack(name, images, grey), labels) for split, (images, labels) in read.items()}
    return splits, _class_names(name, sources["train"], splits)


def _open(name: str, cache: str) -> dict[str, Any]:
    datasets.disable_progress_bars()
    folder = Path(name)
    if folder.is_file():
        raise CommandError(f"--data {name} is a file; give the folder that holds it")
    if not folder.is_dir():
        return _open_hub(name)
    files = sorted(folder.rglob("*.parquet"))
    try:
        if files:
            by_split: dict[str, list[str]] = {}
            for file in files:
                split = _split_of(file.relative_to(folder))
                if split:
                    by_split.setdefault(split, []).append(str(file))
            by_split = by_split or {"train": [str(file) for file in files]}
            loaded = datasets.load_dataset("parquet", data_files=by_split, streaming=True, cache_dir=cache)
        else:
            loaded = datasets.load_dataset(
                "imagefolder", data_dir=str(folder), drop_labels=False, streaming=True, cache_dir=cache
            )
    except Exception as error:  # the library raises its own and its readers' classes
        raise CommandError(
            f"--data {name}: no images could be read ({type(error).__name__}: {one_line(error)}); the folder must "
            "hold parquet files (train-*.parquet, test-*.parquet) or one sub-folder of images for each class"
        ) from error
    return dict(loaded)


def _open_hub(name: str) -> dict[str, Any]:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise CommandError(f"--data {name}: no such folder; give a folder, 'digits', or a name on the Hugging Face hub")
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:
        raise CommandError(
            f"--data {name}: neither a folder here nor readable from the Hugging Face hub "
            f"({type(error).__name__}: {one_line(error)}); give a folder, 'digits', or check name and network"
        ) from error
    return {SPLITS[split]: source for split, source in loaded.items() if split in SPLITS}


def _split_of(path: Path) -> str | None:
    """The split that a file belongs to, by its name or else by the folder it is in.

    >>> _split_of(Path("plain_text/test-00000-of-00001.parquet"))
    'test'
    """
    for part in (path.stem, *reversed(path.parts[:-1])):
        word = re.match(r"[a-z]+", part.lower())
        if word and word.group() in SPLITS:
            return SPLITS[word.group()]
    return None


def _read(
    name: str, split: str, source: Any, image_size: int | None
) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    columns = source.features or {}
    image_column = next((column for column in IMAGE_COLUMNS if column in columns), None)
    label_column = next((column for column in LABEL_COLUMNS if column in columns), None)
    if image_column is None or label_column is None:
        raise CommandError(
            f"--data {name}: the {split} split has the columns {', '.join(columns) or 'none'}; "
            "an image column (img or image) and an integer label column (label) are needed"
        )
    images, labels = [], []
    try:
        rows: Iterable[Any] = source.cast_column(image_column, datasets.Image(decode=False))
        for number, row in enumerate(rows):
            label, where = row[label_column], f"--data {name}: image {number} of the {split} split"
            if not isinstance(label, int) or label < 0:
                raise CommandError(f"{where} has the label {label!r}; labels are integers from 0")
            images.append(_decode(row[image_column], image_size, where))
            labels.append(label)
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(
            f"--data {name}: the {split} split cannot be read ({type(error).__name__}: {one_line(error)}); "
            "is a file damaged or not complete? fetch it again"
        ) from error
    if not images:
        raise CommandError(
            f"--data {name}: the {split} split holds no image; the folder must hold parquet files (train-*.parquet, "
            "test-*.parquet) or one sub-folder of images for each class"
        )
    return images, np.array(labels, dtype=np.int64)


def _decode(value: Any, image_size: int | None, where: str) -> NDArray[np.uint8]:
    """Pixels [H, W] of a grey image, [H, W, 3] of any other."""
    path = value.get("path") if isinstance(value, dict) else None
    try:
        content = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            decoded = image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB")
            if image_size is not None:
                decoded = ImageOps.fit(decoded, (image_size, image_size), Image.Resampling.BILINEAR)
            return np.array(decoded)
    except Exception as error:
        raise CommandError(
            f"{where}{f' ({path})' if path else ''} cannot be read ({type(error).__name__}: {one_line(error)}); "
            "repair or remove it"
        ) from error


def _stack(name: str, images: list[NDArray[np.uint8]], grey: bool) -> NDArray[np.uint8]:
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise CommandError(
            f"--data {name}: images come in {len(sizes)} sizes, from {sizes[0][1]}x{sizes[0][0]} to "
            f"{sizes[-1][1]}x{sizes[-1][0]}; --image-size N scales and crops them to NxN"
        )
    if grey:
        return np.stack(images)[:, None]
    colour = np.stack([image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images])
    return np.ascontiguousarray(colour.transpose(0, 3, 1, 2))


def _class_names(name: str, source: Any, splits: dict[str, Split]) -> tuple[str, ...]:
    column = next(column for column in LABEL_COLUMNS if column in source.features)
    highest = max(int(labels.max()) for _, labels in splits.values())
    names = getattr(source.features[column], "names", None) or [str(label) for label in range(highest + 1)]
    present = np.unique(splits["train"][1])
    if highest >= len(names) or len(present) < 2:
        raise CommandError(
            f"--data {name}: labels go up to {highest}, with {len(names)} class names and {len(present)} classes "
            "among the training images; at least two classes are needed, numbered from 0"
        )
    return tuple(names)
