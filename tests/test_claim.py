"""One writer a folder: who lives is not disturbed, who is dead stands in nobody's way."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid import claim
from megatron_hybrid.claim import Claim, claim_file, claimed, refuse_if_alive, refuse_if_lost
from megatron_hybrid.config import load_config
from megatron_hybrid.errors import UserError


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits half a minute here."""
    monkeypatch.setattr(claim, "DEAD_AFTER_S", 0.5)
    monkeypatch.setattr(claim, "_POLL_S", 0.01)
    monkeypatch.setattr(claim, "_SETTLE_S", 0.0)
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def put(folder: Path, **other: Any) -> Claim:
    """A claim of somebody else, as of this process but for what is given."""
    folder.mkdir(parents=True, exist_ok=True)
    found = replace(claim._new_claim("pretrain"), **other)
    claim_file(folder).write_bytes(found.encoded())
    return found


def taken(folder: Path) -> bool:
    """Whether a start gets the claim."""
    try:
        with claimed([claim_file(folder)], "test"):
            assert claim_file(folder).is_file()
    except UserError as error:
        assert f"{folder} is being written by pretrain on " in str(error)
        return False
    assert not claim_file(folder).exists()
    return True


def watchless(path: Path, seen: Claim | None) -> Claim | None:
    raise AssertionError("this is known at once")


def test_who_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of this machine is seen; the scheduler has ended an earlier start of a job."""
    monkeypatch.setattr(claim, "_watch", watchless)
    assert taken(tmp_path / "nobody" / "was" / "there")
    assert not (tmp_path / "nobody").exists()  # what was made for the claim alone
    put(tmp_path)
    assert not taken(tmp_path)  # this process lives
    with pytest.raises(UserError, match="is being written by"):
        refuse_if_alive([claim_file(tmp_path)])
    put(tmp_path, ticks=1)  # its number was given out again
    refuse_if_alive([claim_file(tmp_path)])
    assert taken(tmp_path)
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    put(tmp_path, pid=ended.pid)
    assert taken(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    put(tmp_path, machine="another", job="17", restarts=1)
    assert taken(tmp_path)
    for other in ({"job": "16", "restarts": 1}, {"job": "17", "restarts": 2}):
        put(tmp_path, machine="another", **other)
        with pytest.raises(AssertionError):
            taken(tmp_path)


def test_killed_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process holds it, is killed, and the next start has it at once."""
    monkeypatch.setattr(claim, "_watch", watchless)
    code = (
        "import sys, time; from pathlib import Path; from megatron_hybrid.claim import *\n"
        "with claimed([claim_file(Path(sys.argv[1]))], 'pretrain'):\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert not taken(tmp_path)
        holder.kill()  # and not waited for: a zombie is as dead
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        assert taken(tmp_path)


def elsewhere(tmp_path: Path, change: Callable[[Claim], bytes | None], at: int) -> bool:
    """Whether a claim of another machine is taken over, which changes at the n-th look."""
    other = put(tmp_path, machine="another", host="node2")
    looks = 0

    def look(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == at:
            content = change(other)
            if content is None:
                claim_file(tmp_path).unlink()
            else:
                claim_file(tmp_path).write_bytes(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim.time, "sleep", look)
        ticks = iter(range(10_000))
        patch.setattr(claim.time, "monotonic", lambda: next(ticks) / 100)
        return taken(tmp_path)


def test_who_is_watched(tmp_path: Path) -> None:
    """On another machine: a claim that changes is of the living, one that stands still is not."""
    assert not elsewhere(tmp_path, lambda c: replace(c, beats=c.beats + 1).encoded(), at=20)
    assert not elsewhere(tmp_path, lambda c: replace(c, token="0" * 32).encoded(), at=20)
    assert elsewhere(tmp_path, lambda c: c.encoded(), at=20)
    assert elsewhere(tmp_path, lambda c: None, at=20)  # it ended meanwhile
    claim_file(tmp_path).write_bytes(b'{"half')
    assert taken(tmp_path)


def test_a_holder_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file changes by itself, in place, and is as long as before."""
    monkeypatch.setattr(claim, "BEAT_S", 0.001)
    path = claim_file(tmp_path)
    with claimed([path], "pretrain"):
        first, beaten = path.read_bytes(), threading.Event()
        while json.loads(path.read_bytes() or b"{}").get("beats", "0") <= "000000000002":
            beaten.wait(0.01)
        assert len(path.read_bytes()) == len(first)


def test_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that lost its claim touches nothing of the new one, and says so before it writes."""
    path = claim_file(tmp_path)
    with claimed([path], "pretrain"):
        refuse_if_lost(path)
        held = claim._HELD[path]
        new = put(tmp_path, host="node7")
        with pytest.raises(UserError, match="was taken over by pretrain on node7"):
            refuse_if_lost(path)
        held.beat()
    assert path.read_bytes() == new.encoded()


def test_one_of_many_starts(tmp_path: Path) -> None:
    """Of eight starts at the same time one gets it; with a dead one's claim there, at most one."""
    for dead in (False, True):
        if dead:
            put(tmp_path, ticks=1)
        barrier, ended, got = threading.Barrier(8), threading.Barrier(8), []

        def start(
            barrier: threading.Barrier = barrier,
            ended: threading.Barrier = ended,
            got: list[bool] = got,
        ) -> None:
            barrier.wait()
            try:
                with claimed([claim_file(tmp_path)], "pretrain"):
                    ended.wait()
                    got.append(True)
            except UserError:
                ended.wait()

        threads = [threading.Thread(target=start) for _ in range(8)]
        with pytest.MonkeyPatch.context() as patch:
            if dead:
                patch.setattr(claim, "_SETTLE_S", 0.3)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(got) == 1
        claim_file(tmp_path).unlink(missing_ok=True)


# Where folders of checkpoints and models are written, and who holds the claim then.
WRITERS = {
    "checkpoints_converter/importing.py": "checkpoints_converter/importing.py",
    "checkpoints_converter/output_folder.py": "checkpoints_converter/output_folder.py",
    "megatron_hybrid/training/checkpoint.py": "megatron_hybrid/training/pretrain.py",
    "megatron_hybrid/checkpoint/derived.py": "megatron_hybrid/checkpoint/derived.py",
}


def test_every_writer_claims() -> None:
    """A module that makes checkpoints or model folders claims them, or its caller does."""
    tree = Path(claim.__file__).parent.parent
    writers = {
        str(path.relative_to(tree))
        for package in ("megatron_hybrid", "checkpoints_converter", "launchers", "tools")
        for path in (tree / package).rglob("*.py")
        if re.search(r"\b(start_partial|replace_folder)\(", path.read_text(encoding="utf-8"))
    }
    assert writers - {"megatron_hybrid/checkpoint/files.py", "megatron_hybrid/fileio.py"} == set(
        WRITERS
    )
    for holder in WRITERS.values():
        assert "claimed(" in (tree / holder).read_text(encoding="utf-8")


@pytest.mark.parametrize("save", ["checkpoints", "../shared"])
def test_a_second_pretrain(save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both folders of a run are held before anything of it is read; another start is refused."""
    from megatron_hybrid import cli
    from megatron_hybrid.training import pretrain as module
    from tests.training.runs import words

    run_dir = tmp_path / "run"
    folder = run_dir / save
    line = words(run_dir, f"checkpoint.save={folder}")
    config = load_config(line)
    held = []

    def reading(*_: object) -> None:
        held.extend([claim_file(run_dir).exists(), claim_file(folder).exists()])
        for other in (config, load_config(words(tmp_path / "other", f"checkpoint.save={folder}"))):
            with pytest.raises(UserError, match="is being written by pretrain"):
                cli._check_files(other, 2)
            with pytest.raises(UserError, match="is being written by pretrain"):
                module.pretrain(other)
        raise UserError("so far")

    monkeypatch.setattr(module, "open_run", reading)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="so far"):
        module.pretrain(config)
    assert held == [True, True]
    assert list(tmp_path.iterdir()) == []
