"""Folders that are replaced whole, and writers that are killed while they do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxrl_llm.models.checkpoints.hf import replace_folder


def write(folder: Path, text: str) -> None:
    with replace_folder(folder) as staging:
        (staging / "weights").write_text(text)


def killed(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, *, renames: int) -> None:
    """A writer that is killed after so many renames: nothing of its is cleaned up."""
    done, rename = [], os.rename

    def counted(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        rename(source, target)
        done.append(target)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", counted)
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                write(folder, text)
        else:
            write(folder, text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_the_next_writer_removes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    folder, other = tmp_path / "model", tmp_path / ".model.v2.abcdefgh.partial"
    write(folder, "first")
    other.mkdir()  # of a writer of model.v2
    killed(folder, "second", monkeypatch, renames=renames)
    assert len(names(folder)) == 3  # whichever of the two is whole, what is left of the other, and the stranger
    write(folder, "third")
    assert names(folder) == [other.name, "model"]
    assert (folder / "weights").read_text() == "third"


def test_a_replacement_that_was_killed_in_its_middle_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    write(folder, "first")
    killed(folder, "second", monkeypatch, renames=1)
    assert not folder.exists()
    with pytest.raises(ValueError, match="third"), replace_folder(folder):
        raise ValueError("the third cannot be written")
    assert names(folder) == ["model"]
    assert (folder / "weights").read_text() == "second"
