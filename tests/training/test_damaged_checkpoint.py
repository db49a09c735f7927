"""Checkpoints that are damaged, hostile or foreign: refused, with the file, before a step."""

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hybrid.config import TRACKER_FILE
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.checkpoint import _reason
from tests.training.runs import (
    outcomes,
    trainer,
    words,
)


class Evil(str):
    """A path, at which there is a file once this is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self}",)


def flip_a_bit(folder: Path) -> None:
    path = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def without_config(folder: Path) -> None:
    """Damaged, and nothing says any more who wrote it: what is left of its guarantees counts."""
    flip_a_bit(folder)
    (folder / "run_config.yaml").unlink()


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add_a_field(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    else:
        path.write_text(path.read_text() + "from_the_future: 1\n")


UNVERIFIED = "checkpoint.verify_integrity=false"
# name: (what is done to SAVE/iter_0000004, further words, the error)
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "flipped bit": (flip_a_bit, [], "cannot be loaded: .*distcp: hash mismatch"),
    "truncated": (truncate, [], "cannot be loaded: .*distcp: hash mismatch"),
    "truncated, unverified": (truncate, [UNVERIFIED], "iter_0000004 cannot be loaded: "),
    "no data": (
        lambda folder: [path.unlink() for path in folder.glob("*.distcp")],
        [UNVERIFIED],
        "cannot be loaded: .*No such file",
    ),
    "no index": (lambda folder: (folder / ".metadata").unlink(), [], "it has no .metadata"),
    "garbled index": (
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04garbage"), [],
        r"\.metadata is damaged",
    ),
    "no sums": (
        lambda folder: (folder / "integrity.json").unlink(), [],
        "integrity.json is missing, .*checkpoint.verify_integrity=false",
    ),
    "garbled sums": (
        lambda folder: (folder / "integrity.json").write_text("{"), [],
        "cannot be loaded: .*integrity.json is damaged",
    ),
    "sums of nothing": (
        lambda folder: (folder / "integrity.json").write_text('{"files": {}}'), [],
        r"cannot be loaded: .*distcp: not in integrity.json",
    ),
    "no format": (
        lambda folder: (folder / "metadata.json").unlink(), [UNVERIFIED],
        "cannot be loaded: .*metadata.json is missing",
    ),
    "flipped bit, no config": (
        without_config, [], "cannot be loaded: .*run_config.yaml: missing.*distcp: hash mismatch",
    ),
    "no config, unverified": (
        without_config, [UNVERIFIED], "cannot be loaded: run_config.yaml is missing, which the run",
    ),
    "garbled config": (
        lambda folder: (folder / "run_config.yaml").write_text("model: ["), [], "run_config.yaml",
    ),
    "missing folder": (shutil.rmtree, [], "names iter_0000004, .*there: iter_0000002"),
    "garbage in the tracker": (
        lambda folder: (folder.parent / TRACKER_FILE).write_text("release\n"), [],
        f"{TRACKER_FILE} cannot be used: .*'release'.*must be the number of an iteration",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How a run ends that meets each damage."""
    lines = []
    for damage, more, _ in DAMAGE.values():
        run_dir = tmp_path_factory.mktemp("damaged")
        shutil.copytree(saved, run_dir / "checkpoints")
        damage(run_dir / "checkpoints" / "iter_0000004")
        lines.append(words(run_dir, *more))
    return dict(zip(DAMAGE, run_distributed(outcomes, 1, lines)[0], strict=True))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, refusals: dict[str, str]) -> None:
    """Each damage is a UserError of a few lines that says what is wrong, never a silent start."""
    found, pattern = refusals[name], DAMAGE[name][2]
    assert re.match(r"(User|Config)Error: ", found), found
    assert re.search(pattern, found, re.DOTALL), found
    assert "Traceback" not in found
    assert len(found) < 700


def small_files(folder: Path) -> list[Path]:
    """All files of a checkpoint but the tensors', and the list of those that the run saved.

    Not the stamp, which says nothing but that it is the one in the list.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix != ".distcp")
    found = [path for path in found if path.name != "stamp"]
    found.append(folder.parent / "checkpoints.json")
    assert {"run_config.yaml", "integrity.json", "metadata.json"} <= {path.name for path in found}
    return found


def test_small_files_are_named(saved: Path, tmp_path: Path) -> None:
    """Of every file of a checkpoint: half of it, or a field that nobody knows, is said by name."""
    lines, names = [], []
    for number, path in enumerate(small_files(saved / "iter_0000004")):
        for damage in (halve, add_a_field):
            if damage is add_a_field and path.suffix not in (".json", ".yaml"):
                continue
            run_dir = tmp_path / f"{number}-{damage.__name__}"
            shutil.copytree(saved, run_dir / "checkpoints")
            damaged = run_dir / "checkpoints" / path.relative_to(saved)
            damage(damaged)
            lines.append(words(run_dir, *([] if path.stem == "integrity" else [UNVERIFIED])))
            names.append(str(damaged))
    for name, found in zip(names, run_distributed(outcomes, 1, lines)[0], strict=True):
        assert re.match(r"\w+Error: ", found), found
        assert name in found, found
        assert "Traceback" not in found


def hostile(run_dir: Path, place: str, mark: Path) -> tuple[str, bool, bool]:
    """On a rank: a run meets a checkpoint with code hidden in it.

    Returns:
        How the run ended, whether the code ran, and whether it does where nobody minds.
    """
    from megatron.core import dist_checkpointing

    from megatron_hybrid.training.checkpoint_state import model_state, rng_state, tensor_layout

    folder = run_dir / "checkpoints" / "iter_0000004"
    with trainer(words(run_dir)) as run:
        folder.mkdir(parents=True)
        metadata = tensor_layout()
        state = {"rng_state": rng_state(), **model_state(run.model, metadata)}
        state["optimizer"] = run.optimizer.sharded_state_dict(state, metadata=metadata)
        if place == "common state":
            state["progress"] = Evil(mark)
        if place == "generators":
            state["rng_state"].data = Evil(mark)
        dist_checkpointing.save(state, str(folder), async_strategy="mcore")
        (folder / "run_config.yaml").write_text(run.config.to_yaml())
        run.tokenizer.save_copy(folder)
    if place == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    (folder.parent / TRACKER_FILE).write_text("4")
    mark.unlink(missing_ok=True)
    ended = outcomes([words(run_dir, UNVERIFIED)])[0]
    ran = mark.exists()
    with trainer(words(run_dir / "other")):
        with contextlib.suppress(Exception, CheckpointException):
            dist_checkpointing.load({"rng_state": rng_state()}, str(folder))
        return ended, ran, mark.exists()


def test_an_interrupt_is_no_damage() -> None:
    """Which torch gathers with the failures of ranks."""
    told = {0: (ValueError("no"), None), 1: (KeyboardInterrupt(), None)}
    with pytest.raises(KeyboardInterrupt):
        _reason(CheckpointException("load", told))


@pytest.mark.parametrize("place", ["index", "common state", "generators"])
def test_code_in_a_checkpoint_does_not_run(place: str, tmp_path: Path) -> None:
    """Neither the index nor any pickled object runs code, though plain readers do run it."""
    ended, ran, works = run_distributed(hostile, 1, tmp_path / "run", place, tmp_path / "mark")[0]
    assert works, "the attack is none"
    assert not ran
    assert ended.startswith("UserError: ")
    assert "system" in ended
