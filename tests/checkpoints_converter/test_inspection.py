"""What is in a checkpoint: tools/inspect_checkpoint.py as a program, on real folders."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints_converter import peer_models
from tests.checkpoints_converter.conftest import ROOT, run_python
from tools import inspect_checkpoint

PATTERN = "M-M*E-"


def inspect(*words: object) -> subprocess.CompletedProcess[str]:
    return run_python(ROOT / "tools" / "inspect_checkpoint.py", *words)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = peer_models.nemotron_h(PATTERN)
    return peer_models.saved(model, tmp_path_factory.mktemp("exported"))


def test_a_run(trained: Path) -> None:
    """Pattern, steps, samples, tokens, sizes by kind; its parts are all there is."""
    done = inspect(trained, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pattern"] == PATTERN
    assert found["layout"] == {}
    assert found["progress"] == {"steps": 30, "samples": 120, "tokens": 120 * 64}
    parts = found["parts"]
    assert {kind: parts[kind]["layers"] for kind in "M*-E"} == {"M": 2, "*": 1, "-": 2, "E": 1}
    # q, k, v: (4 + 2 * 2) * 10 rows; the output 4 * 10 columns; the norm.
    assert parts["*"]["parameters"] == 80 * 48 + 48 * 40 + 48
    assert parts["embeddings"]["parameters"] == parts["output layer"]["parameters"] > 0
    assert "other" not in parts
    model = [name for name in found["tensors"] if not name.startswith("optimizer.")]
    assert sum(part["tensors"] for part in parts.values()) == len(model)
    text = inspect(trained).stdout
    for expected in ("distributed checkpoint", PATTERN, "30 steps", "optimizer's state"):
        assert expected in text


def test_a_hugging_face_folder(exported: Path) -> None:
    """The same pattern and sizes from other names; --tensors lists all of them."""
    done = inspect(exported, "--tensors")
    assert done.returncode == 0, done.stderr
    for expected in ("Hugging Face folder", PATTERN, "nemotron_h", "float32"):
        assert expected in done.stdout
    for name in load_file(exported / "model.safetensors"):
        assert name in done.stdout


def test_no_difference(exported: Path) -> None:
    """A folder does not differ from itself: exit status 0."""
    done = inspect(exported, exported, "--values")
    assert (done.returncode, "the same names, shapes, dtypes and values" in done.stdout) == (
        0,
        True,
    )


def test_differences(exported: Path, tmp_path: Path) -> None:
    """A value, a shape, a dtype, a missing tensor and a config field, each named; status 1."""
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    tensors = load_file(other / "model.safetensors")
    tensors["backbone.norm_f.weight"][3] += 0.25
    tensors["backbone.layers.0.mixer.D"] = tensors["backbone.layers.0.mixer.D"][:-1].clone()
    tensors["backbone.layers.1.norm.weight"] = tensors["backbone.layers.1.norm.weight"].half()
    del tensors["lm_head.weight"]
    save_file(tensors, other / "model.safetensors")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"chunk_size": 16', '"chunk_size": 32'))
    done = inspect(exported, other, "--values")
    assert done.returncode == 1, done.stderr
    rows = [line for line in done.stdout.splitlines() if "│" in line]

    def row(name: str) -> str:
        (found,) = [line for line in rows if name in line and "values" not in line]
        return found

    (value,) = [line for line in rows if "norm_f" in line]
    assert "2.500e-01" in value
    assert "[8], [7]" in row("layers.0.mixer.D")
    assert "float32, torch.float16" in row("layers.1.norm.weight")
    assert "only in the first" in row("lm_head.weight")
    assert "16" in row("chunk_size") and "32" in row("chunk_size")
    without_values = inspect(exported, other).stdout
    assert "norm_f" not in without_values


def test_two_kinds_and_nothing(trained: Path, exported: Path, tmp_path: Path) -> None:
    """What cannot be compared or read is an error in a line, with status 2."""
    for words, expected in (
        ([trained, exported], "convert verify"),
        ([tmp_path], "is no checkpoint"),
    ):
        done = inspect(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and expected in done.stderr


@pytest.mark.parametrize(
    "words", ["a --values", "a b --tensors", "a b --json", "a --json --tensors"]
)
def test_what_would_not_be_read_is_refused(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is opened, by its name."""
    monkeypatch.setattr("sys.argv", ["inspect_checkpoint.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        inspect_checkpoint.main()
    assert ended.value.code == 2
    assert words.split("--")[1].strip() in capsys.readouterr().err


def test_compares_in_blocks(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest difference is found in any block of rows; nan against a number is one."""
    from checkpoints_converter import inspection

    monkeypatch.setattr(inspection, "BLOCK_BYTES", 8 * 48 * 3)
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] += 2
    tensors["backbone.embeddings.weight"][0, 0] = torch.nan
    save_file(tensors, other / "model.safetensors")
    opened = [inspection.open_any(path) for path in (exported, other)]
    found = {
        it.name: it.detail
        for it in inspection.tensor_differences(*opened, values=True, optimizer=False)
    }
    assert found == {"lm_head.weight": "2.000e+00", "backbone.embeddings.weight": "nan"}
