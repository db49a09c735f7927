"""The plot of a run: a real picture, right figures in it, clear errors where there is nothing."""

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_hybrid.errors import UserError
from megatron_hybrid.plotting import save_png
from megatron_hybrid.training.metrics import METRICS_FILE, rewound_steps
from megatron_hybrid.training.plot import _summary, load_run, plot_runs
from megatron_hybrid.training.plot_distillation import draw_distillation
from megatron_hybrid.training.plot_experts import _draw_shares, draw_expert_load
from megatron_hybrid.training.plot_float8 import draw_float8
from megatron_hybrid.training.step_metrics import StepMetrics
from tests.training.reports import reports
from tests.warm import python

SCRIPT = Path(__file__).parents[2] / "tools" / "plot_run.py"


def write_run(
    folder: Path, steps: int, nan_steps: range = range(0), phases: tuple[str, ...] = ()
) -> Path:
    """A run whose loss falls from 9 to 3, with four evaluations and phases of equal length."""
    with reports(folder, total_iterations=steps) as writer:
        for i in range(1, steps + 1):
            loss = math.nan if i in nan_steps else 3 + 6 * math.exp(-6 * i / steps)
            rate = 3e-4 * min(1, i / 10)
            phase = phases[(i - 1) * len(phases) // steps] if phases else None
            writer.train(
                StepMetrics(
                    i, 8 * i, 8192 * i, loss, rate, 1.0, 6e3, 0.1, 800.0, 1.2, 0.0, phase=phase
                )
            )
            if i % max(1, steps // 4) == 0:
                writer.validation(i, 8 * i, 8192 * i, loss + 0.1)
    return folder


def colors(path: Path) -> set[tuple[int, int, int]]:
    pixels = (imread(path)[:, :, :3] * 255).round().astype(int)
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3)}


def test_one_run_becomes_a_picture_beside_its_metrics(tmp_path: Path) -> None:
    """The script prints where the PNG is; both curves are in it, in their colours."""
    run = write_run(tmp_path / "run", 60)
    done = subprocess.run([python(), SCRIPT, run], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(run / "plot.png")
    height, width, _ = imread(run / "plot.png").shape
    assert 1200 < width < 4000
    assert 800 < height < 3000
    assert {(0x25, 0x63, 0xEB), (0xEA, 0x58, 0x0C)} <= colors(run / "plot.png")
    assert 20e3 < (run / "plot.png").stat().st_size < 1e6


def test_time_of_steps_that_are_not_recorded(tmp_path: Path) -> None:
    """With `training.log_interval` a record stands for the steps since the one before it: in the
    picture's heading."""
    run = write_run(tmp_path / "run", 60)
    lines = (run / METRICS_FILE).read_bytes().splitlines(keepends=True)
    trained = [line for line in lines if b'"kind":"train"' in line]
    (run / METRICS_FILE).write_bytes(b"".join(trained[9::10]))
    assert _summary(load_run(run)).endswith("00:00:48 of training")
    assert rewound_steps(run, 20)[0] == 40
    # Of a run that goes on from step 40 of another.
    (run / METRICS_FILE).write_bytes(b"".join(trained[40:]))
    assert _summary(load_run(run)).endswith("00:00:16 of training")


def test_several_runs_are_overlaid_in_their_own_colours(tmp_path: Path) -> None:
    """Runs of different lengths share one picture."""
    runs = [write_run(tmp_path / name, steps) for name, steps in (("a", 40), ("b", 60), ("c", 1))]
    plot_runs(runs, tmp_path / "new" / "all.png")
    assert {(0x25, 0x63, 0xEB), (0xDB, 0x27, 0x77)} <= colors(tmp_path / "new" / "all.png")


def test_steps_that_diverged_and_a_torn_line_do_not_keep_the_rest_from_view(
    tmp_path: Path,
) -> None:
    """A run that was killed while its loss was NaN is still drawn; the NaN stays a gap."""
    run = write_run(tmp_path / "run", 40, nan_steps=range(30, 41))
    with (run / METRICS_FILE).open("ab") as file:
        file.write(b'{"kind":"train","iteration":41,"lo')
    loss = load_run(run).train["loss"]
    assert len(loss) == 40
    assert np.isnan(loss[29:]).all()
    assert np.isfinite(loss[:29]).all()
    plot_runs([run], tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png").ndim == 3


def test_phases_are_marked(tmp_path: Path) -> None:
    """Where a phase of the data begins is read from the steps, and drawn into each panel."""
    plain = write_run(tmp_path / "plain", 60)
    phased = write_run(tmp_path / "phased", 60, phases=("broad", "code", "end"))
    assert load_run(plain).phases == []
    starts = [(0, "broad"), (20 * 8192, "code"), (40 * 8192, "end")]
    assert load_run(phased).phases == starts
    pictures = []
    for run in (plain, phased):
        run = run.rename(tmp_path / "run")  # its name is in the picture
        plot_runs([run], tmp_path / "plot.png")
        pictures.append(imread(tmp_path / "plot.png"))
        run.rename(tmp_path / f"done{len(pictures)}")
    assert pictures[0].shape == pictures[1].shape
    changed = (pictures[0] != pictures[1]).any(axis=2)
    columns = changed.sum(axis=0)
    assert (columns > 0.2 * changed.shape[0]).sum() >= 2  # two dashed lines through the panels
    assert changed.mean() < 0.02


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl does not exist: is it the folder of a training run?"),
        ("", "metrics.jsonl holds no training step yet"),
        ('{"kind":"event","iteration":0,"name":"start","message":""}\n', "no training step yet"),
        ("not json\n{}\n", "metrics.jsonl:1 is not a metrics record: 'not json'"),
    ],
)
def test_nothing_to_draw_is_one_clear_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    """Missing, empty and damaged files are named; no picture and no traceback appear."""
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / METRICS_FILE).write_text(content)
    with pytest.raises(UserError) as error:
        plot_runs([run], run / "plot.png")
    assert message in str(error.value)
    assert str(run) in str(error.value)
    assert not (run / "plot.png").exists()


def test_a_picture_takes_the_place_of_pictures_alone(tmp_path: Path) -> None:
    """-o with the name of a config leaves the config."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {}")
    with pytest.raises(UserError, match=r"run\.yaml is there, and no PNG: .*run\.png"):
        save_png(Figure(), path)
    assert path.read_text() == "model: {}"
    path.write_bytes(b"")
    for _ in range(2):
        save_png(Figure(), path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_folder_in_place_of_a_picture(tmp_path: Path) -> None:
    """Of any picture of ours: one sentence, and the folder stays."""
    with pytest.raises(
        UserError, match=r"is a folder; name the picture in it, such as .*plot\.png"
    ):
        save_png(Figure(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_script_exits_with_the_error_and_no_traceback(tmp_path: Path) -> None:
    """On the command line a user error is one line on stderr and exit status 1."""
    done = subprocess.run([python(), SCRIPT, tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_several_runs_need_a_named_output(tmp_path: Path) -> None:
    """A comparison has no folder of its own, so the script asks where it goes."""
    done = subprocess.run(
        [python(), SCRIPT, tmp_path, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "-o PNG" in done.stderr


def test_draws_the_load_of_experts(tmp_path: Path) -> None:
    """--experts makes a picture of a MoE run's load, of layers of fewer experts too, and says so
    where a run has no experts."""
    load = {"layers": [2, 5], "max_over_mean": [1.5, 2.0], "dropped": [0.0, 0.1], "dead": [0, 1]}
    steps = [
        {"kind": "train", "iteration": n, "consumed_tokens": 100 * n, "expert_load": load}
        for n in range(1, 4)
    ]
    shares = {"kind": "expert_load", "iteration": 3, "consumed_tokens": 300, "layers": [2, 5],
              "shares": [[0.25, 0.75, 0.0], [0.5, 0.5]]}  # fmt: skip
    metrics = tmp_path / METRICS_FILE
    metrics.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in [*steps, shares]))
    done = subprocess.run(
        [python(), SCRIPT, tmp_path, "--experts"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "expert_load.png")
    assert len(colors(tmp_path / "expert_load.png")) > 20
    axes = Figure().add_subplot()
    _draw_shares(axes, [2, 5], [shares | {"shares": [[0.2, 0.3, 0.5], [1.0, 0.0]]}])
    [dead] = [text for text in axes.texts if text.get_text() == "1 dead"]
    assert dead.xy == (2, 1.5)  # in a cell that layer 5 has
    metrics.write_bytes(orjson.dumps(steps[0] | {"expert_load": None}) + b"\n")
    with pytest.raises(UserError, match="holds no load of experts"):
        draw_expert_load(tmp_path, tmp_path / "again.png")
    assert not (tmp_path / "again.png").exists()


@pytest.mark.parametrize("draw", [draw_expert_load, draw_float8, draw_distillation])
@pytest.mark.parametrize(
    "record",
    [
        {"expert_load": {}},
        {"expert_load": 3},
        {"linears": 3},
        {"extra": {"teacher_lm_loss": 1}},
        {},
    ],
)
def test_a_record_of_another_shape_is_named(
    draw: Callable[[Path, Path], None], record: dict[str, Any], tmp_path: Path
) -> None:
    """Lines that other hands have edited: the file is said, and there is no picture."""
    kinds = [{"kind": kind, "iteration": 1} | record for kind in ("train", "float8")]
    metrics = tmp_path / METRICS_FILE
    metrics.write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in kinds))
    with pytest.raises(UserError, match=r"metrics\.jsonl (is damaged|holds no)"):
        draw(tmp_path, tmp_path / "it.png")
    assert not (tmp_path / "it.png").exists()
