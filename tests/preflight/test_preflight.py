"""Planted faults, each of which a preflight names; and a run that has none."""

import ast
import json
import os
import shutil
import socket
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from megatron_hybrid.commands.preflight import _report
from megatron_hybrid.config.rules import Facts
from megatron_hybrid.preflight.checks import Check
from megatron_hybrid.preflight.files import check_files
from megatron_hybrid.preflight.nodes import compare, own_facts
from megatron_hybrid.smoke.layouts import LAYOUTS, Layout, pretrain_words
from tests.training.runs import words
from tests.warm import python

ROOT = Path(__file__).parents[2]


def test_names_in_brackets_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder may be called what is markup elsewhere."""
    _report([Check("disk space", "runs/[web] and [/red]", problems=("[bold]x",))])
    printed = capsys.readouterr().out
    assert "runs/[web] and [/red]" in printed and "[bold]x" in printed


def command(*line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), "-m", "megatron_hybrid.cli", *line],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text as tokens with checksums, and its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "in.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"page {n} of a book " * 20}) + "\n" for n in range(50))
    SentencePieceTrainer.train(
        sentence_iterator=iter(["page 0123456789 of a book"] * 100), model_type="bpe",
        model_prefix=str(folder / "tokenizer"), vocab_size=40, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    done = command(
        "data", "tokenize", "--input", str(folder / "in.jsonl"), "--output", str(folder / "web"),
        "--tokenizer-type", "sentencepiece", "--tokenizer-model", str(folder / "tokenizer.model"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def line(data: Path, run_dir: Path, *more: str) -> list[str]:
    return words(
        run_dir, "data.mock_data=false", "model.vocab_size=null",
        "data.tokenizer_type=sentencepiece", f"data.tokenizer_model={data / 'tokenizer.model'}",
        f"data.data_path={data / 'web'}", "data.split=90,10,0", *more,
    )  # fmt: skip


def problems(checks: list[Check]) -> dict[str, str]:
    return {check.name: "\n".join(check.problems) for check in checks if check.problems}


def look(data: Path, tmp_path: Path, *more: str, world_size: int = 2) -> dict[str, str]:
    return problems(check_files(line(data, tmp_path / "run", *more), world_size, 20)[1])


def test_nothing_is_wrong(data: Path, tmp_path: Path) -> None:
    """A sound run passes, and says what was looked at."""
    config, checks = check_files(line(data, tmp_path / "run"), 2, 20)
    assert config is not None and not problems(checks)
    found = {check.name: check.found for check in checks}
    assert "1 of 1 pairs" in found["data checksums"]
    assert not (tmp_path / "run").exists()


def test_missing_shard(data: Path, tmp_path: Path) -> None:
    """A .bin that is not there."""
    (data / "web.bin").unlink()
    assert str(data / "web.bin") in str(look(data, tmp_path))


def test_wrong_checksum(data: Path, tmp_path: Path) -> None:
    """One flipped bit of a token."""
    content = bytearray((data / "web.bin").read_bytes())
    content[100] ^= 1
    (data / "web.bin").write_bytes(content)
    found = look(data, tmp_path)
    assert "web.bin" in found["data checksums"] and "checksum" in found["data checksums"].lower()


def test_time_for_checksums_runs_out(data: Path, tmp_path: Path) -> None:
    """What was not compared is not said to be good."""
    _, checks = check_files(line(data, tmp_path / "run"), 2, 1e-9)
    (found,) = [check.found for check in checks if check.name == "data checksums"]
    assert found.startswith("0 of 1 pairs") and "`data verify` reads all" in found


def test_layout_that_does_not_divide(data: Path, tmp_path: Path) -> None:
    """A rule of the config, and all that could not be looked at for it."""
    more = ["parallel.tensor_model_parallel_size=2", "model.mamba_num_groups=1"]
    _, checks = check_files(line(data, tmp_path / "run", *more), 3, 20)
    assert "parallel.tensor_model_parallel_size=2" in problems(checks)["config"]
    assert all(check.skipped for check in checks if check.name != "config")


@pytest.mark.parametrize(
    ("more", "count"),
    [
        (["checkpoint.keep_last=2"], "3 checkpoints (checkpoint.keep_last=2 and the one"),
        (["checkpoint.save_interval=1"], "4 checkpoints (checkpoint.keep_last=null keeps all"),
        (["checkpoint.save_interval=3"], "2 checkpoints (checkpoint.keep_last=null keeps all"),
        ([], "1 checkpoints (checkpoint.keep_last=null keeps all"),
    ],
)
def test_full_disk(more: list[str], count: str, data: Path, tmp_path: Path) -> None:
    """A model whose checkpoints do not fit on the real disk: as many as the run will keep."""
    sizes = ["model.hidden_size=65536", "model.ffn_hidden_size=4194304"]
    assert f"GiB free, and {count}" in look(data, tmp_path, *sizes, *more)["disk space"]


def test_room_for_some_of_the_checkpoints(data: Path, tmp_path: Path) -> None:
    """All of a long run fit on no disk: who keeps all moves them away, and is told how many fit."""
    more = ["checkpoint.save_interval=1", "training.train_iters=30000000"]
    config, checks = check_files([*line(data, tmp_path / "run"), *more], 1, 0)
    assert config is not None
    [disk] = [check for check in checks if check.name == "disk space"]
    assert disk.problems == ()
    assert "checkpoints that are to be kept (checkpoint.keep_last=null keeps all" in disk.notes[0]
    more[1:1] = ["checkpoint.keep_last=29999999"]
    _, checks = check_files([*line(data, tmp_path / "run"), *more], 1, 0)
    [disk] = [check for check in checks if check.name == "disk space"]
    assert "30000000 checkpoints (checkpoint.keep_last=29999999" in disk.problems[0]


def test_damaged_tokenizer(data: Path, tmp_path: Path) -> None:
    """It leaves the model's size open, and hides nothing else."""
    (data / "tokenizer.model").write_bytes(b"no tokenizer")
    _, checks = check_files(line(data, tmp_path / "run"), 2, 20)
    assert problems(checks).keys() == {"tokenizer"}
    assert {c.name for c in checks if c.skipped} == {"plan and checkpoint", "disk space"}
    assert checks[-1].found.endswith("can be written")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_an_unknown_number_of_ranks(layout: Layout, tmp_path: Path) -> None:
    """Every layout, without and with the number: the same, but for the rules about it."""
    words = pretrain_words(tmp_path / "run", layout, layout.ranks, has_gpu=False)
    (_, unknown), (_, known) = (check_files(words, ranks, 0) for ranks in (None, layout.ranks))
    assert not problems(unknown) and not problems(known)
    assert unknown[0].found.endswith("but those about the number of ranks: --world-size tells it")
    assert [check.found for check in unknown[1:]] == [check.found for check in known[1:]]


def test_nothing_unknown_becomes_a_number() -> None:
    """What may be not known (the facts of the rules, and fields that say "all" or "the tokenizer's"
    by null) is nowhere replaced by a number, but where a run is started alone.
    """
    unknown = {field.name for field in fields(Facts)} | {
        "vocab_size", "padded_vocab_size", "keep_last", "save_interval",
    }  # fmt: skip
    found = []
    for path in sorted([*ROOT.glob("megatron_hybrid/**/*.py"), *ROOT.glob("launchers/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or)):
                continue
            first, last = node.values[0], node.values[-1]
            name = first.attr if isinstance(first, ast.Attribute) else getattr(first, "id", None)
            number = isinstance(last, ast.Constant) and isinstance(last.value, int | float)
            if name in unknown and (number or (isinstance(last, ast.Name) and last.id.isupper())):
                found.append((path.name, ast.unparse(node)))
    assert found == [("cli.py", "world_size or 1")]


def test_missing_tokenizer(data: Path, tmp_path: Path) -> None:
    """A tokenizer's file that is not there."""
    (data / "tokenizer.model").unlink()
    assert str(data / "tokenizer.model") in str(look(data, tmp_path))


def test_checkpoint_of_another_model(data: Path, tmp_path: Path) -> None:
    """Its config says so."""
    done = command("pretrain", *line(data, tmp_path / "other", "training.train_iters=1"))
    assert done.returncode == 0, done.stderr
    load = f"checkpoint.load={tmp_path / 'other' / 'checkpoints'}"
    found = look(data, tmp_path, load, "model.hidden_size=64")
    assert "model.hidden_size=64, in the checkpoint 32" in found["plan and checkpoint"]


def test_nodes_that_differ(tmp_path: Path) -> None:
    """Another version, a clock that is off, too few GPUs, another folder: each with its node."""
    first = replace(own_facts(0), host="node1", gpus=8, local_world_size=8)
    good = replace(first, rank=1, host="node2", skew_s=0.01)
    assert not problems(compare([first, good], tmp_path, needs_gpus=True))
    bad = replace(
        good, versions=first.versions | {"torch": "2.9.0"}, gpus=7, skew_s=-61.0,
        sees_run_dir=False,
    )  # fmt: skip
    found = problems(compare([first, bad], tmp_path, needs_gpus=True))
    torch = first.versions["torch"]
    assert found["versions"] == f"node2 has torch 2.9.0, node1 has {torch}"
    assert found["clocks"] == "the clock of node2 is -61.0 s off that of node1; allowed: 2 s"
    assert found["GPUs"] == "node2 shows 7 GPUs to 8 ranks; allowed: at most one rank a GPU"
    assert "is not what node2 sees there" in found["shared folder"]
    untold = [replace(first, rank=n, gpus=1, local_world_size=1) for n in (0, 1)]
    found = problems(compare(untold, tmp_path, needs_gpus=True))
    assert found["GPUs"] == "node1 shows 1 GPUs to 2 ranks; allowed: at most one rank a GPU"


def test_blocked_port(tmp_path: Path) -> None:
    """Nobody listens where rank 0 should: the rank, the address and the time are named."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    done = command(
        "preflight", *words(tmp_path / "run"), "--timeout-s", "1",
        MASTER_ADDR="127.0.0.1", **place,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"could not reach 127.0.0.1:{port} within 1 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_of_a_layout(data: Path, tmp_path: Path) -> None:
    """Two ranks of TP2: each kind of collective on each group, right, and nothing left behind."""
    done = command("preflight", *line(data, tmp_path / "run"), "--nproc", "2",
                   "parallel.tensor_model_parallel_size=2")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("1 nodes, 2 ranks", "tensor group", "world group", "all-reduce", "all-to-all",
                 "send and receive"):  # fmt: skip
        assert text in done.stdout
    assert "wrong" not in done.stdout
    assert list((tmp_path / "run").glob(".*")) == []
