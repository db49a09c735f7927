"""The Dockerfile, its scripts and its pins, as far as they can be checked without Docker."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from megatron_hybrid import cli

ROOT = Path(__file__).parents[2]
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
STAGES = ("cpu", "gpu")
SCRIPTS = [ENTRYPOINT, ROOT / ".ci/run"] + [
    path
    for glob in ("tools/*.sh", "slurm/*", "examples/*/run.sh", "tests/gpu/*.sh")
    for path in sorted(ROOT.glob(glob))
]


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile; lines that go on are joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, its FROM first; what stands before any is in no stage."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = None
    for instruction, words in instructions():
        if instruction == "FROM":
            name = words.split()[-1]
        if name is not None:
            found.setdefault(name, []).append((instruction, words))
    return found


def pins() -> dict[str, str]:
    """{package: version} of the constraints."""
    lines = (ROOT / "docker/constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def linter(name: str) -> str:
    """The program, from this Python's environment or the PATH; skips the test without it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install '.[dev]' brings it")
    return found


def requirements(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docker/requirements.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_hadolint() -> None:
    """hadolint finds nothing to say."""
    done = subprocess.run(
        [linter("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck() -> None:
    """Nor does shellcheck of any shell script."""
    done = subprocess.run([linter("shellcheck"), *SCRIPTS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_base_has_a_tag() -> None:
    """The images they are built on are named with a release, `latest` is none."""
    arguments = dict(
        words.split("=", 1) for name, words in instructions() if name == "ARG" and "=" in words
    )
    assert tuple(stages()) == STAGES
    for stage in stages().values():
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], stage[0][1].split()[0])
        tag = image.rpartition(":")[2]
        assert re.search(r"\d", tag), image
        assert "latest" not in tag, image


@pytest.mark.parametrize("stage", STAGES)
def test_every_install_is_pinned(stage: str) -> None:
    """Each `pip install` is held to the constraints, and none reads from a cache or keeps one."""
    runs = [words for name, words in stages()[stage] if name == "RUN"]
    installs = [part for run in runs for part in run.split("&&") if "pip install" in part]
    assert len(installs) >= 2
    for install in installs:
        words = shlex.split(install)
        file = words[words.index("--constraint") + 1]
        assert file in ("docker/constraints.txt", "/tmp/lacking.txt"), install
        assert "--no-cache-dir" in words, install
        if file == "/tmp/lacking.txt":
            made = "requirements.py lacking docker/constraints.txt > /tmp/lacking.txt"
            assert any(made in run and install in run for run in runs)


@pytest.mark.parametrize("stage", STAGES)
def test_does_not_run_as_root(stage: str) -> None:
    """The last user of each image is not root, by number, and is made with that number."""
    users = [words for name, words in stages()[stage] if name == "USER"]
    assert users[-1].isdigit()
    assert int(users[-1]) > 0
    assert any(f"--uid {users[-1]} " in words for _, words in stages()[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_packages_are_installed_before_the_source_is_copied(stage: str) -> None:
    """What is copied exists, and before the packages only what says which they are."""
    copies = [(i, words) for i, (name, words) in enumerate(stages()[stage]) if name == "COPY"]
    sources = {i: [w for w in words.split()[:-1] if w[0] != "-"] for i, words in copies}
    for source in (each for some in sources.values() for each in some):
        assert (ROOT / source).exists(), source
    (everything,) = [i for i, some in sources.items() if some == ["."]]
    before = {each for i, some in sources.items() if i < everything for each in some}
    assert before == {"setup.py", "docker/constraints.txt", "docker/requirements.py"}
    after = [words for name, words in stages()[stage][everything:] if name == "RUN"]
    assert all("--no-deps" in words for words in after if "pip install" in words)


def test_labels_agree_with_setup() -> None:
    """The labels' version and licence are setup.py's."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for stage in stages().values():
        (labels,) = [words for name, words in stage if name == "LABEL"]
        values = dict(part.split("=", 1) for part in shlex.split(labels))
        prefix = "org.opencontainers.image."
        assert f'version="{values[prefix + "version"]}"' in setup
        assert f'license="{values[prefix + "licenses"]}"' in setup


@pytest.mark.parametrize("extra", ["dev", "convert", "gpu"])
def test_the_pins_fit_setup(extra: str) -> None:
    """Each package that setup.py asks for is pinned, to a version that it allows."""
    done = requirements("wanted", "setup.py", "--extra", extra)
    assert done.returncode == 0, done.stderr
    found = [Requirement(line) for line in done.stdout.splitlines()]
    assert {"torch", "megatron-core", "transformers"} <= {each.name for each in found}
    for each in found:
        assert each.specifier.contains(pins()[canonicalize_name(each.name)]), each


def test_packages_for_gpus_have_caps_and_no_flash_attn() -> None:
    """Of each kernel's package it is said which release is too new; nothing here imports
    flash-attn, whose build ends the installation; docs/install.md installs all that is pinned.
    """
    core = requirements("wanted", "setup.py").stdout.splitlines()
    lines = requirements("wanted", "setup.py", "--extra", "gpu").stdout.splitlines()
    added = [Requirement(line) for line in lines if line not in core]
    assert "flash-attn" not in {each.name for each in added}
    for each in added:
        if each.name != "transformers":
            assert any(part.operator == "<" for part in each.specifier), each
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (block,) = [text for text in page.split("```") if "transformer-engine-torch" in text]
    commands = re.sub(r"\\\n\s*", "", block)
    installs = [line for line in commands.splitlines() if "pip install --no-deps" in line]
    named = {word for line in installs for word in line.split("pip install")[1].split()}
    kernels = {each.name for each in added} - {"transformers"}
    assert kernels < named and named - {"--no-deps", "--no-build-isolation"} <= set(pins())


def test_wanted_leaves_out_and_refuses() -> None:
    """`--without` drops a package whatever the spelling; an unknown extra is an error."""
    done = requirements("wanted", "setup.py", "--without", "Megatron_Core")
    assert "megatron-core" not in done.stdout
    assert "torch==" in done.stdout
    done = requirements("wanted", "setup.py", "--extra", "nonsense")
    assert done.returncode == 1
    assert "--extra nonsense: setup.py has no such extra; allowed: ['gpu'" in done.stderr


def test_lacking_is_what_is_not_installed(tmp_path: Path) -> None:
    """What there is, in whatever version, is left out; the rest stays pinned."""
    file = tmp_path / "constraints.txt"
    file.write_text("# a remark\nPyYAML==0.1\n\nsurely.not_installed==2.0\n")
    done = requirements("lacking", str(file))
    assert done.stdout == "surely.not_installed==2.0\n"
    done = requirements("lacking", str(tmp_path / "none.txt"))
    assert done.returncode == 1
    assert "No such file" in done.stderr


def run_entrypoint(folder: Path, *words: str) -> list[str]:
    """What the entry point runs, with a program `megatron-hybrid` that prints its words."""
    program = folder / "megatron-hybrid"
    program.write_text('#!/bin/sh\necho "$$ megatron-hybrid $*"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "BASE_ENTRYPOINT": "/nowhere"}
    process = subprocess.Popen(
        [ENTRYPOINT, *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    pid, *ran = out.split()
    assert int(pid) == process.pid  # by exec: there is no shell between
    return ran


def test_entrypoint(tmp_path: Path) -> None:
    """Commands go to megatron-hybrid, everything else runs as it is; both in place of the shell."""
    names = sorted(get_command(cli.app).commands)  # type: ignore[attr-defined]
    for name in names:
        assert run_entrypoint(tmp_path, name, "a b") == ["megatron-hybrid", name, "a", "b"]
    assert run_entrypoint(tmp_path) == ["megatron-hybrid"]
    assert run_entrypoint(tmp_path, "--help") == ["megatron-hybrid", "--help"]
    assert run_entrypoint(tmp_path, "bash", "-c", 'echo $$ "$1"', "-", "shell") == ["shell"]


def test_entrypoint_goes_through_that_of_the_base(tmp_path: Path) -> None:
    """NVIDIA's entry point, where there is one, gets the whole command."""
    base = tmp_path / "base.sh"
    base.write_text('#!/bin/sh\necho "base: $*"\n')
    base.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "BASE_ENTRYPOINT": str(base)}
    done = subprocess.run(
        [ENTRYPOINT, "pretrain", "tiny"], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "base: megatron-hybrid pretrain tiny\n"
