"""Killed, stopped, or out of disk at any moment: the old pair, or the whole new pair."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_hybrid.config import RunConfig, load_config
from megatron_hybrid.config.rules.common import Facts
from megatron_hybrid.config.rules.files import data_files
from megatron_hybrid.config.token_files import prefixes, set_aside
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import IndexedFileWriter, open_indexed
from megatron_hybrid.data.inspection.prefixes import find_prefixes
from megatron_hybrid.data.tokenizing import TokenizeSettings, tokenize
from tests.data.tokenizing import kill_target
from tests.data.tokenizing.samples import (
    contents,
    documents,
    leftovers,
    settings_in,
    write_lines,
)
from tests.training.runs import words
from tests.warm import program_of, python

OLD = [[1, 2, 3], [4, 5]]
CHUNK_BYTES = 4 << 10
KILLS = 50


@pytest.fixture
def old_pair(tmp_path: Path) -> TokenizeSettings:
    """An older pair of other documents is in place; the settings would write the new one."""
    write_lines(tmp_path / "in.jsonl", OLD)
    tokenize(settings_in(tmp_path))
    write_lines(tmp_path / "in.jsonl", [[n % 999] * (n % 100 + 1) for n in range(400)])
    return settings_in(
        tmp_path, shuffle_seed=1, shuffle_memory_bytes=5_000, append_eod=True, workers=2
    )


def state(prefix: Path, old: tuple[bytes, ...], new: tuple[bytes, ...]) -> str:
    """What loads: the old pair, or the new one. Anything else fails the test."""
    open_indexed(prefix)
    found = contents(prefix)
    assert found in (old, new)
    return "old" if found == old else "new"


def test_kills_at_random_moments(tmp_path: Path, old_pair: TokenizeSettings) -> None:
    """50 kills -9, with two workers and with one: nothing half-made loads, and a rerun succeeds.

    The moments are drawn among the calls that a whole run makes, and a few beyond.
    """
    prefix = tmp_path / "out"
    names = ("out.bin", "out.idx", "out.meta.json")
    (tmp_path / "old").mkdir()
    for name in names:
        shutil.copy(tmp_path / name, tmp_path / "old" / name)
    old = contents(prefix)
    tokenize(replace(old_pair, workers=1))
    new = contents(prefix)
    # A server that has imported what the process needs: then most kills hit its work.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([kill_target.__name__])
    draw = random.Random(0)
    outcomes: Counter[str] = Counter()
    for settings, kills in ((replace(old_pair, workers=1), KILLS - 12), (old_pair, 12)):
        target, counted = (settings, CHUNK_BYTES), tmp_path / "calls"
        whole_run = context.Process(target=kill_target.run, args=(*target, None, counted))
        whole_run.start()
        whole_run.join()
        assert whole_run.exitcode == 0
        calls = int(counted.read_text())
        for _ in range(kills):
            for name in names:
                shutil.copy(tmp_path / "old" / name, tmp_path / name)
            moment = draw.randint(1, calls * 11 // 10)
            process = context.Process(target=kill_target.run, args=(*target, moment, counted))
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            outcomes[state(prefix, old, new)] += 1
            outcomes["left in the middle"] += bool(leftovers(tmp_path))
            tokenize(replace(old_pair, workers=1))
            assert contents(prefix) == new
            assert leftovers(tmp_path) == []
    assert outcomes["old"] + outcomes["new"] == KILLS
    assert outcomes["left in the middle"] >= KILLS // 10, outcomes


# Who may be the first to look for a pair after a kill.
LOOKS = (
    open_indexed,
    lambda prefix: prefixes(f"{prefix.parent}/ou*"),
    lambda prefix: list(data_files(data_config(prefix), Facts())),
    lambda prefix: find_prefixes([str(prefix)]),
)


def data_config(prefix: Path) -> RunConfig:
    line = [*words(prefix.parent / "run"), "data.mock_data=false", f"data.data_path={prefix}"]
    return load_config(line, which=())


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_puts_it_back(
    look: Callable[[Path], object], tmp_path: Path, old_pair: TokenizeSettings
) -> None:
    """Killed at each step of setting the old pair aside, and of moving the new one in."""
    prefix, old = tmp_path / "out", contents(tmp_path / "out")
    ends = (".idx", ".meta.json", ".bin")
    for step in range(len(ends) + 3):
        for end in ends[: step if step < 3 else 3]:
            Path(f"{prefix}{end}").rename(f"{prefix}{end}.old.part")
        for end in (".bin", ".meta.json")[: max(0, step - 3)]:
            Path(f"{prefix}{end}").write_bytes(b"new")
        look(prefix)
        assert contents(prefix) == old
        open_indexed(prefix)
        assert not list(tmp_path.glob("*.old.part"))


def test_not_while_the_writer_lives(tmp_path: Path, old_pair: TokenizeSettings) -> None:
    """The old pair is put back for want of a writer only; a writer that fails does it itself."""
    prefix, old = tmp_path / "out", contents(tmp_path / "out")
    writer = IndexedFileWriter(prefix, 1000)
    set_aside(str(prefix))
    with pytest.raises(DataError, match="is missing"):
        open_indexed(prefix)
    writer.discard()
    assert contents(prefix) == old
    assert leftovers(tmp_path) == []


def test_files_of_other_programs(tmp_path: Path, old_pair: TokenizeSettings) -> None:
    """A pair without our facts is another program's, and stays."""
    facts = tmp_path / "out.meta.json"
    facts.rename(tmp_path / "kept")
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(DataError, match=r"--output .*/out: the files there have no out.meta.json"):
        tokenize(old_pair)
    assert (tmp_path / "out.bin").read_bytes() == before


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_killed_while_publishing(tmp_path: Path, step: int) -> None:
    """A kill between any two moves leaves the old pair, whoever looks for it, or the new one."""
    prefix = tmp_path / "out"
    write_lines(tmp_path / "in.jsonl", [[1] * 5, [2] * 5])
    tokenize(settings_in(tmp_path))
    old = contents(prefix)
    write_lines(tmp_path / "in.jsonl", [[3] * 4, [3] * 6])  # as many bytes: sizes tell nothing
    new_settings = settings_in(tmp_path)
    script = f"""
import os
from pathlib import Path, PosixPath
from megatron_hybrid.data import indexed
from megatron_hybrid.data.tokenizing import TokenizeSettings, tokenize
calls = 0
def sync_or_die(folder):
    global calls
    if calls == {step}:
        os.kill(os.getpid(), 9)
    calls += 1
indexed.sync_folder = sync_or_die
tokenize({new_settings!r})
"""
    result = subprocess.run([sys.executable, "-c", script])
    assert result.returncode == -signal.SIGKILL
    (look := LOOKS[step])(prefix)
    assert documents(prefix) == ([[1] * 5, [2] * 5] if step < 2 else [[3] * 4, [3] * 6]), look
    assert (contents(prefix) == old) == (step < 2)
    tokenize(new_settings)
    assert documents(prefix) == [[3] * 4, [3] * 6]
    assert contents(prefix) != old


@contextmanager
def running(
    settings: TokenizeSettings,
) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """The command of `settings`, stopped in the middle of its work on a large input; what was
    started, and the process that works.
    """
    write_lines(Path(settings.inputs[0]), [[n % 999] * 900 for n in range(6000)])
    words = [python(), "-m", "megatron_hybrid.cli", "data", "tokenize"]
    words += ["--input", *settings.inputs, "--output", str(settings.outputs["text"])]
    words += ["--tokenizer-type", "null", "--vocab-size", "1000", "--workers", "2"]
    words += ["--shuffle-memory-gib", "0.001"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    runs = Path(f"{settings.outputs['text']}.shuffle.part")
    deadline = time.monotonic() + 60
    while not any(runs.glob("*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    program = psutil.Process(program_of(process.pid))
    program.send_signal(signal.SIGSTOP)
    try:
        yield process, program
    finally:
        process.kill()
        process.wait()


def test_killed_command(tmp_path: Path, old_pair: TokenizeSettings) -> None:
    """A second run is refused meanwhile; a kill leaves no process behind, a rerun no remains."""
    before = contents(tmp_path / "out")
    with running(old_pair) as (_, program):
        children = program.children(recursive=True)
        assert len(children) >= 2
        with pytest.raises(DataError, match=r"another process is writing .*/out.idx"):
            IndexedFileWriter(tmp_path / "out", 1000)
        with pytest.raises(DataError, match="another process is writing"):
            tokenize(old_pair)
        assert len(leftovers(tmp_path)) >= 4
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert contents(tmp_path / "out") == before
    # Without shuffling there would be no reason to look at the runs.
    write_lines(tmp_path / "in.jsonl", [[7]])
    tokenize(settings_in(tmp_path))
    assert documents(tmp_path / "out") == [[7]]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_command(tmp_path: Path, old_pair: TokenizeSettings, number: int) -> None:
    """A stopped run takes its workers along and removes what it wrote."""
    before = contents(tmp_path / "out")
    with running(old_pair) as (process, program):
        children = program.children(recursive=True)
        program.send_signal(number)
        program.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    assert b"Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert contents(tmp_path / "out") == before
    assert leftovers(tmp_path) == []


def test_killed_worker(tmp_path: Path, old_pair: TokenizeSettings) -> None:
    """Where the system kills a worker, as for lack of memory, the run ends with that word."""
    with running(old_pair) as (process, program):
        workers = [
            child
            for child in program.children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        program.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"error: a worker process died (out of memory?); nothing was published" in errors
    assert leftovers(tmp_path) == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("seed", [None, 1], ids=["in order", "shuffled"])
def test_disk_full(tmp_path: Path, old_pair: TokenizeSettings, seed: int | None) -> None:
    """Whichever file does not fit, one error names the output, and only the old pair is left."""
    settings = replace(old_pair, workers=1, shuffle_seed=seed, max_rejected_fraction=0.9)
    with Path(settings.inputs[0]).open("ab") as file:
        file.write(b"bad\n" * 500)  # a list of its own
    prefix = tmp_path / "out"
    old = contents(prefix)
    tokenize(settings)
    sizes = {path.stat().st_size for path in tmp_path.glob("out*")}
    assert len(sizes) == 4
    for name in ("out.bin", "out.idx", "out.meta.json"):
        (tmp_path / name).unlink()
    write_old = [path.write_bytes for path in map(tmp_path.joinpath, ("out.bin", "out.idx"))]
    for write, content in zip(write_old, old, strict=False):
        write(content)
    (tmp_path / "out.meta.json").write_bytes(old[2])
    settings.rejected_path.unlink()
    for size in sorted({0, 1, 7_000, *(size - 1 for size in sizes)}):
        with files_of_at_most(size), pytest.raises(DataError) as error:
            tokenize(settings)
        assert str(error.value).startswith(f"cannot write {prefix}")
        assert str(error.value).endswith("File too large; nothing was published")
        assert contents(prefix) == old
        assert leftovers(tmp_path) == []
    with files_of_at_most(max(*sizes, 50_000)):
        tokenize(settings)
    assert contents(prefix) != old
