from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from trainer import files
from trainer.checkpoint import load_latest, remove_leftovers, save_checkpoint
from trainer.errors import CheckpointError
from trainer.files import write_atomically


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((50, 50), float(step)), "names": ["a"], "none": None}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_keeps_the_last_two(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, state(step))
    assert names(tmp_path) == ["step-00000010.json", "step-00000010.pt", "step-00000015.json", "step-00000015.pt"]
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded.pop("weights"), state(15)["weights"])
    assert loaded == {"step": 15, "names": ["a"], "none": None}


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    assert load_latest(tmp_path) is None


class FaultyFile:
    """A file whose disk is full after `limit` bytes."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file, self.left = file, limit

    def write(self, content: bytes) -> int:
        self.file.write(content[: self.left])
        if len(content) > self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= len(content)
        return len(content)

    def __enter__(self) -> FaultyFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("limit", [0, 100, 9000])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    save_checkpoint(tmp_path, 5, state(5))
    before = names(tmp_path)
    monkeypatch.setattr(files, "open", lambda *a: FaultyFile(open(*a), limit), raising=False)  # noqa: SIM115
    with pytest.raises(CheckpointError, match=r"00000010.pt could not be written .*No space left.*free some space"):
        save_checkpoint(tmp_path, 10, state(10))
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert load_latest(tmp_path)["step"] == 5


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, lambda file: file.write(b"new"))
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_what_a_kill_leaves_behind_is_never_loaded_and_then_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, state(5))
    (tmp_path / "step-00000010.pt.tmp").write_bytes(b"half")
    torch.save(state(15), tmp_path / "step-00000015.pt")  # killed before its record was written
    assert load_latest(tmp_path)["step"] == 5
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000005.json", "step-00000005.pt"]


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(damage_truncate, "has .* bytes, its record says"), (damage_bit, "SHA-256"), (Path.unlink, "No such file")],
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, reason: str
) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, step, state(step))
    damage(tmp_path / "step-00000010.pt")
    assert load_latest(tmp_path)["step"] == 5
    assert "skipping a damaged checkpoint" in capsys.readouterr().err
    damage(tmp_path / "step-00000005.pt")
    with pytest.raises(CheckpointError, match=f"no checkpoint of this run is whole(.|\n)*{reason}(.|\n)*from a backup"):
        load_latest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2, "bytes": 1, "sha256": ""}'])
def test_a_damaged_record_is_a_damaged_checkpoint(tmp_path: Path, text: str) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, step, state(step))
    (tmp_path / "step-00000010.json").write_text(text)
    assert load_latest(tmp_path)["step"] == 5
