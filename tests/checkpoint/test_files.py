"""Folders of checkpoints: what is there, what a run may remove or replace, and kills in between."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hybrid import fileio
from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.files import latest_checkpoint, publish, start_partial
from megatron_hybrid.checkpoint.saved_here import saved_here
from megatron_hybrid.config import TRACKER_FILE
from megatron_hybrid.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the disk is not looked at here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder: Path, iteration: int, content: str, keep_last: int | None = None) -> list[str]:
    """As a run does, with a file for a checkpoint's tensors."""
    start_partial(folder, iteration)
    (files.partial_folder(folder, iteration) / "data").write_text(content)
    return publish(folder, iteration, keep_last=keep_last)


def put(folder: Path, iteration: int, content: str) -> None:
    """As somebody does who copies a checkpoint there."""
    there = files.iteration_folder(folder, iteration)
    there.mkdir(parents=True)
    (there / "data").write_text(content)


def found(folder: Path) -> dict[str, str]:
    """The content of every checkpoint that can be seen, by name."""
    return {path.name: (path / "data").read_text() for path in sorted(folder.glob("iter_*"))}


def test_without_the_tracker(tmp_path: Path) -> None:
    """Checkpoints of the run itself are found without it; others are never passed over."""
    assert latest_checkpoint(tmp_path / "none") is None
    save(tmp_path, 2, "a")
    save(tmp_path, 10, "b")
    (tmp_path / TRACKER_FILE).unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000010"
    put(tmp_path, 4, "copied")
    with pytest.raises(UserError, match=rf"holds iter_0000004, and no {TRACKER_FILE}"):
        latest_checkpoint(tmp_path)
    (tmp_path / TRACKER_FILE).write_text("4")
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000004"
    # Another one under a name of ours is not ours.
    (tmp_path / TRACKER_FILE).unlink()
    (tmp_path / "iter_0000004").rename(tmp_path / "iter_0000005")
    shutil.copytree(tmp_path / "iter_0000002", tmp_path / "iter_0000004")
    with pytest.raises(UserError, match="holds iter_0000004, iter_0000005, and no"):
        latest_checkpoint(tmp_path)


def test_a_checkpoint_beside_its_place(tmp_path: Path) -> None:
    """What a kill left there between two renames is named, with the way on."""
    save(tmp_path, 2, "a")
    folder = tmp_path / "iter_0000002"
    with pytest.raises(UserError, match=r"no checkpoint$"):
        folder.rename(tmp_path / "elsewhere")
        latest_checkpoint(tmp_path)
    (tmp_path / "elsewhere").rename(fileio.replaced_folder(folder))
    expected = r"\.iter_0000002\.old\.part is the older one, .*: renamed to iter_0000002"
    with pytest.raises(UserError, match=expected):
        latest_checkpoint(tmp_path)


def test_only_its_own_are_removed(tmp_path: Path) -> None:
    """The newest N of what the run saved stay; what was copied there, or put back, all stays."""
    put(tmp_path, 1, "copied")
    for iteration in (2, 3, 4):
        save(tmp_path, iteration, "own", keep_last=2)
    own = {"iter_0000003": "own", "iter_0000004": "own"}
    assert found(tmp_path) == {"iter_0000001": "copied"} | own
    shutil.copytree(tmp_path / "iter_0000003", tmp_path / "backup")
    save(tmp_path, 5, "own", keep_last=2)
    (tmp_path / "backup").rename(tmp_path / "iter_0000003")
    save(tmp_path, 6, "own", keep_last=1)
    assert found(tmp_path) == {
        "iter_0000001": "copied", "iter_0000003": "own", "iter_0000006": "own",
    }  # fmt: skip
    assert saved_here(tmp_path).keys() == {"iter_0000006"}


@pytest.mark.parametrize("damage", ["", "0", "\0" * 33, "0" * 31 + "\n", "0" * 33 + "\n"])
def test_a_damaged_stamp(damage: str, tmp_path: Path) -> None:
    """Told with the file; without one the checkpoint is somebody else's, as it says."""
    save(tmp_path, 1, "own")
    stamp = tmp_path / "iter_0000001" / "stamp"
    stamp.write_text(damage)
    with pytest.raises(UserError, match="iter_0000001/stamp is damaged"):
        saved_here(tmp_path)
    stamp.unlink()
    assert saved_here(tmp_path) == {}


def test_what_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old checkpoint that is a link elsewhere, or that a file system keeps."""
    save(tmp_path, 1, "a")
    (tmp_path / "iter_0000001").rename(tmp_path / "archive")
    (tmp_path / "iter_0000001").symlink_to(tmp_path / "archive")
    assert save(tmp_path, 2, "b", keep_last=1) == []
    assert found(tmp_path) == {"iter_0000002": "b"}
    assert (tmp_path / "archive" / "data").read_text() == "a"

    def busy(path: Path, *more: object, **options: object) -> None:
        raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(fileio.shutil, "rmtree", busy)
        [note] = save(tmp_path, 3, "c", keep_last=1)
        assert "iter_0000002, an older checkpoint, could not be removed: " in note
        save(tmp_path, 4, "d")
    save(tmp_path, 5, "e", keep_last=1)
    assert found(tmp_path) == {"iter_0000005": "e"}
    assert not list(tmp_path.glob(".iter*"))


def test_the_same_step_again(tmp_path: Path) -> None:
    """A rewound run replaces its own checkpoint; another of that name is moved, and said."""
    for iteration in (2, 4):
        save(tmp_path, iteration, "first")
    assert save(tmp_path, 4, "again") == []
    assert found(tmp_path) == {"iter_0000002": "first", "iter_0000004": "again"}
    for number in (1, 2):
        shutil.rmtree(tmp_path / "iter_0000004")
        put(tmp_path, 4, f"copied {number}")
        (note,) = save(tmp_path, 4, "own")
        assert f"iter_0000004 was not saved by this run: it is {tmp_path}/iter_0000004" in note
    assert found(tmp_path) == {
        "iter_0000002": "first", "iter_0000004": "own",
        "iter_0000004.other1": "copied 1", "iter_0000004.other2": "copied 2",
    }  # fmt: skip
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000004"


def killed_at_each_change(
    make: Callable[[Path], None], act: str, look: Callable[[Path], None], tmp_path: Path
) -> int:
    """Kill `act` before each of its calls that change a folder, and look at what is left.

    Real kills of a forked process: `os.rename` and so on, one after the other.

    Returns:
        Before how many calls it was killed.
    """
    names = ("rename", "replace", "unlink", "rmdir", "mkdir")
    for number in range(100):
        folder = tmp_path / str(number)
        make(folder)
        process = os.fork()
        if not process:
            calls = 0

            def counted(name: str, call: Callable) -> Callable:
                def counting(*args: object, **more: object) -> object:
                    nonlocal calls
                    if calls == number:  # noqa: B023
                        os.kill(os.getpid(), 9)
                    calls += 1
                    return call(*args, **more)

                return counting

            for name in names:
                setattr(os, name, counted(name, getattr(os, name)))
            fileio._exchange = counted("exchange", fileio._exchange)  # type: ignore[assignment]
            eval(act, globals() | {"folder": folder})
            os._exit(0)
        _, status = os.waitpid(process, 0)
        look(folder)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return number
    raise AssertionError("it does not end")


@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_while_publishing(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment the newest whole checkpoint is found, and the next save succeeds."""
    if not exchanges:
        monkeypatch.setattr(fileio, "_exchange", lambda one, other: False)

    def make(folder: Path) -> None:
        for iteration in (2, 3, 4):
            save(folder, iteration, "old")
        (folder / TRACKER_FILE).write_text("3")

    def look(folder: Path) -> None:
        latest = latest_checkpoint(folder)
        assert latest is not None
        content = (latest / "data").read_text()
        assert (latest.name, content) in (("iter_0000003", "old"), ("iter_0000004", "new"))
        save(folder, 4, "newer", keep_last=1)
        own = {name: text for name, text in found(folder).items() if "other" not in name}
        assert own == {"iter_0000004": "newer"} or own.keys() == {"iter_0000003", "iter_0000004"}
        assert not list(folder.glob(".iter_*"))

    count = killed_at_each_change(make, "save(folder, 4, 'new', keep_last=1)", look, tmp_path)
    assert count > 8


def test_killed_at_the_first_checkpoint(tmp_path: Path) -> None:
    """Between its name and the tracker's: it is found."""

    def look(folder: Path) -> None:
        latest = latest_checkpoint(folder)
        assert latest is None or (latest / "data").read_text() == "new"
        assert (latest is None) == (not (folder / "iter_0000001").exists())

    killed_at_each_change(lambda folder: None, "save(folder, 1, 'new')", look, tmp_path)


@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_while_a_folder_is_replaced(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one or the new one, always; where names cannot be exchanged, once it is put back."""
    if not exchanges:
        monkeypatch.setattr(fileio, "_exchange", lambda one, other: False)
    seen = []

    def make(folder: Path) -> None:
        for name in ("new", "old"):
            (folder / name).mkdir(parents=True)
            (folder / name / "data").write_text(name)

    def look(folder: Path) -> None:
        if exchanges:
            assert (folder / "old").is_dir()
        fileio.restore_folder(folder / "old")
        seen.append((folder / "old" / "data").read_text())

    act = "fileio.replace_folder(folder / 'new', folder / 'old')"
    killed_at_each_change(make, act, look, tmp_path)
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old", "new"}


def test_exchange(tmp_path: Path) -> None:
    """Two names, in one step; what is not there is an error."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if fileio._exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
    with pytest.raises(OSError, match="No such file"):
        fileio._exchange(tmp_path / "none", tmp_path / "b")
