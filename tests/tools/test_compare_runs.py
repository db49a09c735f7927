"""Two runs held against each other: where they part, and what cannot be compared."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import orjson
import pytest
from matplotlib.image import imread

from megatron_hybrid.errors import UserError
from megatron_hybrid.training.comparison import compare, draw_comparison
from tests.training.runs import records, words
from tests.warm import python

SCRIPT = Path(__file__).parents[2] / "tools" / "compare_runs.py"
NAMES = ("a", "b")


def write(run_dir: Path, losses: list[float | None], first: int = 1, tokens: int = 64) -> Path:
    run_dir.mkdir()
    lines = [
        {
            "kind": "train", "iteration": step, "consumed_tokens": step * tokens, "loss": loss,
            "grad_norm": 1.0, "step_ms": 100.0 * (1 + len(losses) % 2),
        }
        for step, loss in enumerate(losses, first)
    ]  # fmt: skip
    (run_dir / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return run_dir


def test_where_two_runs_part(tmp_path: Path) -> None:
    """The first step that differs at all, and those from which it is more than 1e-6 and 1e-3; a
    loss that is not finite in both is no difference, in one it is the largest.
    """
    one = write(tmp_path / "one", [4.0, 3.0, None, 2.0, 1.0])
    other = write(tmp_path / "other", [4.0, 3.0, None, 2.0 + 2e-7, 1.0 + 1e-4, 9.0])
    found = compare(one, other, NAMES)
    assert found.steps.tolist() == [1, 2, 3, 4, 5]
    assert [found.parts_at(above) for above in (0, 1e-6, 1e-3)] == [4, 5, None]
    assert found.worst == pytest.approx(1e-4)
    assert found.time_ratio == pytest.approx(0.5)
    assert found.lines()[0] == "the same numbers up to step 3; they part at step 4"
    same = compare(one, one, NAMES)
    assert same.lines()[0] == "the same numbers in all 5 steps, to the last bit"
    draw_comparison(found, tmp_path / "comparison.png")
    assert imread(tmp_path / "comparison.png").shape[:2] == (1280, 1760)
    broken = write(tmp_path / "broken", [4.0, None])
    assert compare(one, broken, NAMES).parts_at(1e-3) == 2
    for run_dir in (one, other):  # as with training.log_interval=2
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run_dir / "metrics.jsonl").write_bytes(b"".join(lines[1::2]))
    few = compare(one, other, NAMES).lines()
    assert few[0] == "the same numbers up to step 2; they have parted by step 4"


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    """Runs without a common step, or of other batches."""
    one = write(tmp_path / "one", [4.0, 3.0])
    with pytest.raises(UserError, match="no training step in common"):
        compare(one, write(tmp_path / "later", [2.0], first=3), NAMES)
    with pytest.raises(UserError, match="step 1 comes after 64 tokens in a and after 128 in b"):
        compare(one, write(tmp_path / "larger", [2.0], tokens=128), NAMES)


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), SCRIPT, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_commit_is_trained_by_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one is in a source tree, as whoever compares commits is."""
    for name in ("commit", "here"):
        folder = tmp_path / name / "megatron_hybrid"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "cli.py").write_text(f"open({str(tmp_path / 'who')!r}, 'a').write('{name}')")
    monkeypatch.chdir(tmp_path / "here")
    arguments = argparse.Namespace(words=[], steps=1, nproc=1)
    tool()._train(tmp_path / "commit", "tiny", tmp_path / "run", arguments)
    assert (tmp_path / "who").read_text() == "commit"


@pytest.mark.parametrize("text", ["nan", "inf", "-1"])
def test_a_tolerance_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is above NaN: all runs would be near enough."""
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number of at least 0"):
        tool()._tolerance(text)
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "a", "b", f"--tolerance={text}"])
    with pytest.raises(SystemExit) as ended:
        tool().main()
    assert ended.value.code == 1  # not 2, which says that the runs are too far apart


def test_runs_that_are_there_are_only_read(tmp_path: Path) -> None:
    """What says how to train is refused, all at once."""
    names = [str(write(tmp_path / name, [4.0])) for name in NAMES]
    given = {"config": None, "steps": 20, "nproc": 1, "words": [], "output": tmp_path / "out"}
    tool()._found(argparse.Namespace(first=names[0], second=names[1], **given))
    given |= {"config": "tiny", "steps": 9, "nproc": 2, "words": ["training.seed=1"]}
    with pytest.raises(UserError, match=r"^--config, --steps, --nproc, training.seed=1: .*there"):
        tool()._found(argparse.Namespace(first=names[0], second=names[1], **given))


def test_what_is_set_for_both_is_not_typed(tmp_path: Path) -> None:
    """It would be passed over."""
    given = argparse.Namespace(
        first="tiny", second="tiny", config=None, words=["training.exit_interval=3"],
        output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"training\.exit_interval=3: what is compared decides it"):
        tool()._found(given)


def test_configs_of_two_seeds(tmp_path: Path) -> None:
    """What else differs would not be seen; a word for both mends it."""
    names = ["tiny", str(tmp_path / "other.yaml")]
    Path(names[1]).write_text("preset: tiny\ntraining: {seed: 7}\n")
    with pytest.raises(UserError, match=r"training\.seed=1234 in tiny and 7 in "):
        tool()._refuse_other_seeds(names, [])
    tool()._refuse_other_seeds(names, ["training.seed=5"])


def test_two_configs_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For so many steps, from the same seed: only the weight decay is another, from step 2 on."""
    for name, decay in zip(NAMES, (0.1, 0.2), strict=True):
        fields = [word.split("=") for word in words(tmp_path, f"optimizer.weight_decay={decay}")]
        sections: dict[str, dict[str, str]] = {}
        for path, value in fields:
            section, _, field = path.rpartition(".")
            if section:
                sections.setdefault(section, {})[field] = value
        text = "".join(
            f"{section}:\n" + "".join(f"  {k}: {v!s}\n" for k, v in values.items())
            for section, values in sections.items()
        ).replace("tokenizer_type: null", 'tokenizer_type: "null"')
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", python())
    line = ["compare_runs.py", "a.yaml", "b.yaml", "--steps=3", "--tolerance=1e-9"]
    monkeypatch.setattr(sys, "argv", line)
    code = tool().main()
    said = capfd.readouterr()
    assert code == 2, said.err
    assert "the same numbers up to step 1; they part at step 2" in said.out
    assert (tmp_path / "comparison" / "comparison.png").exists()
    assert len(records(tmp_path / "comparison" / "a")) == 3
    again = run("a.yaml", "b.yaml", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr == "error: --output=comparison is there already; name a new folder\n"
