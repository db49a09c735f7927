"""The command line as users meet it: help, dry run, counts, doctor, exit codes, import time."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from megatron_hybrid import cli
from megatron_hybrid.config import build_config, presets, rules
from megatron_hybrid.config.flags import flags
from megatron_hybrid.config.yaml_text import parse_yaml
from tests.config import GOOD
from tests.warm import python


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), "-m", "megatron_hybrid.cli", *words],
        env=os.environ | {"COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_loads_neither_torch_nor_the_engine() -> None:
    """The package, its config and its command line load in a moment: of other packages, only those
    that a config and a command line are made of.
    """
    code = (
        "import sys; before = set(sys.modules)\n"
        "import megatron_hybrid, megatron_hybrid.config, megatron_hybrid.cli\n"
        "from sysconfig import get_path\n"
        "places = (get_path('purelib'), get_path('platlib'))\n"
        "for name in set(sys.modules) - before:\n"
        "    if (getattr(sys.modules[name], '__file__', None) or '').startswith(places):\n"
        "        print(name.partition('.')[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {
        "annotated_doc", "annotated_types", "pydantic", "pydantic_core", "rich", "shellingham",
        "typer", "typing_extensions", "typing_inspection", "yaml",
    }  # fmt: skip


def test_help_loads_no_config() -> None:
    """Whoever asks what there is does not wait for the fields and rules of a config."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['megatron-hybrid', '--help']\n"
        "try:\n"
        "    runpy.run_module('megatron_hybrid.cli', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, sorted(m for m in sys.modules if 'hybrid.config' in m), 'pydantic' "
        "in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 [] False", done


# Commands that read a folder; {} is none, or one with nothing in it.
FOLDERS = (
    "convert to-hf {} out", "convert from-hf {} out", "convert verify {} out", "status {}",
    "upcycle --load {} --save out --experts 2 --granularity 1 --topk 1", "track {}",
    "compress prune {} --save out --drop-layers 1", "compress score {} --output out",
    "pretrain --load {} run_dir=out", "data verify {}/web", "data show {}/web 0",
    "generate {} --prompt a", "preflight {}/run.yaml", "submit {}/run.yaml --nodes 1",
    "plan {}/run.yaml --gpus 8",
)  # fmt: skip


def test_what_is_not_there_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    """It takes seconds, and the engine tens of them."""
    (tmp_path / "empty").mkdir()
    lines = [line.format(tmp_path / name) for line in FOLDERS for name in ("nowhere", "empty")]
    code = (
        "import sys\n"
        "from megatron_hybrid import cli\n"
        f"for line in {lines!r}:\n"
        "    sys.argv = ['megatron-hybrid', *line.split()]\n"
        "    try:\n"
        "        cli.main()\n"
        "    except SystemExit as ended:\n"
        "        print(ended.code, 'torch' in sys.modules, line)\n"
        "    else:\n"
        "        print('no error', line)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    said = [line for line in done.stdout.splitlines() if line.endswith(tuple(lines))]
    assert said == [f"1 False {line}" for line in lines]
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_dry_run_prints_the_resolved_config() -> None:
    """Its output is YAML that reads back, with the preset, typed values and derived fields."""
    done = run("pretrain", *GOOD, "--lr", "8e-4", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    values = parse_yaml(done.stdout)
    assert (values["preset"], values["optimizer"]["lr"]) == ("tiny", 8e-4)
    assert values["model"]["kv_channels"] == 32
    assert build_config(values, which=rules.NO_FILES).to_yaml() == done.stdout
    assert yaml.safe_load(done.stdout)["model"] == values["model"]


def test_dry_run_of_a_preset_needs_no_data() -> None:
    """One looks at a preset before one has data for it."""
    assert run("pretrain", "nemotron_h_56b", "--dry-run").returncode == 0


def test_dry_run_checks_the_ranks() -> None:
    """`--nproc`, or a launcher's WORLD_SIZE, is held against the layout."""
    words = ("pretrain", *GOOD, "--pipeline-model-parallel-size", "2", "--dry-run")
    for done in (run(*words, "--nproc", "3"), run(*words, WORLD_SIZE="3")):
        assert done.returncode == 1
        assert "the number of ranks, 3, must be a multiple of" in done.stderr
    assert run(*words, "--nproc", "4").returncode == 0


def test_help_of_pretrain_lists_every_flag_and_preset() -> None:
    """The help is made from the fields, so nothing is missing from it."""
    done = run("pretrain", "--help")
    assert done.returncode == 0
    listed = done.stdout.replace(",", " ").split()
    assert set(flags()) <= set(listed)
    assert set(presets()) <= set(listed)
    assert "[section.field=value | --flag value]..." in done.stdout


def test_counts() -> None:
    """The table shows the exact total; without a vocabulary it says what to set."""
    done = run("counts", "nemotron_h_8b")
    assert done.returncode == 0
    assert "8,100,852,736" in done.stdout
    done = run("counts", "tiny")
    assert done.returncode == 1
    assert "model.vocab_size is not set" in done.stderr


def test_doctor() -> None:
    """What is required is there, so it exits 0 and names the backend that would run."""
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    for word in ("torch", "megatron-core", "transformer-engine", "apex", "backend=auto", "bf16"):
        assert word in done.stdout
    assert "ready to train" in done.stdout


def test_doctor_tells_the_two_apexes_apart_and_what_is_broken() -> None:
    """PyPI's apex is named as what it is; a missing requirement makes the conclusion red."""
    from packaging.requirements import Requirement
    from rich.console import Console

    from megatron_hybrid.doctor import Finding, _apex, _required, report

    assert "unrelated web package" in _apex("unrelated").note
    assert _apex("nvidia").status == "ok"
    assert "github.com/NVIDIA/apex" in _apex(None).note
    broken = _required(Requirement("pydantic<1"), {})
    assert (broken.status, broken.note) == ("broken", "must be <1")
    absent = _required(Requirement("surely-not-installed>=2"), {})
    assert absent.note == 'pip install "surely-not-installed>=2"'
    console = Console(file=io.StringIO())
    assert report([Finding("x", "1", "ok"), Finding("y", "-", "missing")], console)
    assert not report([Finding("x", "1", "ok"), broken], console)


def test_doctor_takes_nvidias_build_for_the_release_it_is_of() -> None:
    """The torch of NVIDIA's images is called a pre-release; others stay what they are."""
    from megatron_hybrid.doctor import _release

    assert _release("2.13.0a0+9186a08b2c.nv26.07") == "2.13.0"
    assert _release("2.13.0+cu130") == "2.13.0+cu130"
    assert _release("2.13.0a0+git8f9a6c8") == "2.13.0a0+git8f9a6c8"


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("generate",),
        ("generate", "somewhere"),
        ("generate", "somewhere", "--prompt", "a", "--max-new-tokens", "0"),
        ("pretrain", "tiny", "--nproc", "0"),
        ("doctor", "--nonsense"),
    ],
)
def test_wrong_usage_exits_2(words: tuple[str, ...]) -> None:
    """Words that no command has are usage errors, told from wrong configs."""
    done = run(*words)
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_nproc_inside_a_launched_rank_is_refused() -> None:
    """Starting ranks within ranks would multiply them."""
    done = run(
        "pretrain",
        *GOOD,
        "--nproc",
        "2",
        WORLD_SIZE="2",
        RANK="0",
        MASTER_ADDR="localhost",
        MASTER_PORT="1",
    )
    assert done.returncode == 2
    assert "a launcher has started this rank already" in done.stderr.replace("\n", " ")


def test_launcher_refuses_before_any_rank_starts() -> None:
    """What depends on the device is found by the launcher too, once the config asks for it."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("the config is right where there is a GPU")
    done = run("pretrain", *GOOD, "--expert-tensor-parallel-size", "2", "--nproc", "2")
    assert done.returncode == 1
    assert "parallel.expert_tensor_parallel_size=2 needs GPUs" in done.stderr


def _commands(group: TyperGroup, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def test_whatever_encodes_a_users_text_can_parse_special_tokens() -> None:
    """Every command that takes a prompt, or text to tokenise, has --parse-special-tokens."""
    root = typer.main.get_command(cli.app)
    assert isinstance(root, TyperGroup)
    encodes = {
        name: {option.name for option in command.params}
        for name, command in _commands(root)
        if {"prompt", "inputs"} & {option.name for option in command.params}
    }
    assert {"generate", "convert verify", "data tokenize"} <= encodes.keys()
    assert [name for name, has in encodes.items() if "parse_special_tokens" not in has] == []
