"""`replaced`: a file is replaced as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from crcore import CRCoreError
from crcore._files import replaced


def write_half(path: Path, error: BaseException) -> None:
    with replaced(path) as temporary:
        temporary.write_text("half")
        raise error


def test_the_file_is_there_when_the_block_has_ended_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replaced(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError("no space left"), "cannot be written.*no space left"), (CRCoreError("as it was"), "^as it was$")],
)
def test_an_error_leaves_what_was_there(error: Exception, raised: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(CRCoreError, match=raised):
        write_half(path, error)
    assert [(each, each.read_text()) for each in tmp_path.iterdir()] == [(path, "old")]


def test_an_interrupted_block_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "file", KeyboardInterrupt())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["no/such/folder", "a file/of a folder", "", "a folder", "n" * 300, "null\0byte"])
def test_a_path_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").write_text("old")
    path = tmp_path / name
    with pytest.raises(CRCoreError, match="cannot be written"), replaced(path) as temporary:
        temporary.write_text("new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a file", "a folder"]
