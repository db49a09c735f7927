"""What a run does step by step: refusals, limits, schedules, evaluation, precision."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.attempts import read_attempts
from megatron_hybrid.training.metrics import METRICS_FILE
from megatron_hybrid.training.optimizer import optimizer_parts
from tests.training.runs import (
    GLOBAL_BATCH_SIZE,
    MOE,
    SEQ_LENGTH,
    losses,
    outcomes,
    records,
    same_tensors,
    tensors_of_all,
    trainer,
    words,
)

LR = 1e-3
# The first update throws every weight to +-1e30: the second step overflows.
EXPLODING = ["optimizer.lr=1e30", "optimizer.weight_decay=0"]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("iter_*"))


def test_nonfinite_stops(tmp_path: Path) -> None:
    """A loss that overflows ends the run with a clear error on every rank; it saves nothing."""
    found = run_distributed(outcomes, 2, [words(tmp_path, *EXPLODING)])
    assert found[0] == found[1]
    assert found[0][0].startswith("TrainingStoppedError: step 2: the loss or the gradient is")
    assert "training.nonfinite_action=skip" in found[0][0]
    assert not checkpoints(tmp_path)
    assert [record["nonfinite"] for record in records(tmp_path)] == [False, True]


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_nonfinite_is_skipped(overlap: str, tmp_path: Path) -> None:
    """Skipped steps change no parameter, router bias or optimizer state, and are marked."""
    line = words(
        tmp_path, *EXPLODING, *MOE, "training.nonfinite_action=skip",
        "checkpoint.save_interval=1", f"parallel.overlap_grad_reduce={overlap}",
        f"parallel.overlap_param_gather={overlap}",
    )  # fmt: skip
    assert run_distributed(outcomes, 2, [line]) == [["finished"]] * 2
    steps = records(tmp_path)
    assert [step["skipped"] for step in steps] == [False, True, True, True]
    assert [step["nonfinite"] for step in steps] == [False, True, True, True]
    folders = [tmp_path / "checkpoints" / name for name in checkpoints(tmp_path)]
    first, *others = run_distributed(tensors_of_all, 1, folders)[0]
    assert any("expert_bias" in key and value.any() for key, value in first.items())
    assert len(others) == 3
    assert all(same_tensors(first, other) for other in others)


def test_loss_spikes(tmp_path: Path) -> None:
    """A loss far over its mean stops the run, or is passed over and left out of the mean."""
    # A large step from good weights: the loss rises but stays finite.
    rising = ["optimizer.lr=3.0", "training.loss_spike_factor=1.5"]
    stop, skip = tmp_path / "stop", tmp_path / "skip"
    found = run_distributed(
        outcomes, 2, [words(stop, *rising), words(skip, *rising, "training.loss_spike_action=skip")]
    )
    assert found[0] == found[1]
    assert found[0][1] == "finished"
    loss = losses(stop)[-1]
    assert found[0][0].startswith(
        f"TrainingStoppedError: step 2: loss={loss:.4f} is over training.loss_spike_factor=1.5 "
        f"times its mean {losses(stop)[0]:.4f}"
    )
    assert not checkpoints(stop)
    steps = records(skip)
    assert [step["skipped"] for step in steps] == [False, True, True, True]
    assert not any(step["nonfinite"] for step in steps)


def test_a_run_that_stops_keeps_what_it_was_saving(tmp_path: Path) -> None:
    """A checkpoint that is on its way in the background when the run must stop becomes whole."""
    line = words(tmp_path, *EXPLODING, "checkpoint.save_interval=1", "checkpoint.async_save=true")
    found = run_distributed(outcomes, 1, [line])[0]
    assert "step 2: the loss or the gradient is not finite" in found[0]
    assert checkpoints(tmp_path) == ["iter_0000001"]


def test_limits(tmp_path: Path) -> None:
    """exit_interval and exit_duration_in_mins save and end; the next start goes on to the end."""
    interval, duration = tmp_path / "interval", tmp_path / "duration"
    lines = [
        words(interval, "training.exit_interval=3"),
        words(interval),
        words(duration, "training.exit_duration_in_mins=1e-9"),
    ]
    found = run_distributed(outcomes, 1, lines)[0]
    assert found == ["exit_interval", "finished", "exit_duration_in_mins"]
    assert checkpoints(interval) == ["iter_0000003", "iter_0000004"]
    assert [record["iteration"] for record in records(interval)] == [1, 2, 3, 4]
    assert checkpoints(duration) == ["iter_0000001"]


def evaluated_plainly(line: list[str]) -> tuple[float, float]:
    """On a rank: the validation loss that a run logs at its end, and the mean by hand."""
    from megatron_hybrid.data.datasets import open_windows

    with trainer(line) as run:
        run.run()
        _, valid = open_windows(run.config, run.tokenizer, run.data)
        assert valid is not None
        assert len(valid) == 3 * GLOBAL_BATCH_SIZE
        total = torch.zeros((), dtype=torch.float64)
        positions = torch.arange(SEQ_LENGTH)[None]
        for i in range(len(valid)):
            window = torch.from_numpy(valid.__getitems__([i]))
            with torch.no_grad():
                logits = run.model[0](window[:, :-1], positions, None)[0]
            total += torch.nn.functional.cross_entropy(logits, window[0, 1:]).double()
        logged = records(run.config.run_dir, "validation")[-1]
        assert logged["iteration"] == 4
        return logged["loss"], float(total) / len(valid)


def test_evaluation(tmp_path: Path) -> None:
    """The validation loss is the mean over the whole split; training does not notice it."""
    with_eval = words(tmp_path / "eval", "training.eval_interval=2", "training.eval_iters=3")
    logged, plain = run_distributed(evaluated_plainly, 1, with_eval)[0]
    assert logged == pytest.approx(plain, rel=1e-6)
    two_ranks = [words(tmp_path / "two", *with_eval[-2:]), words(tmp_path / "none")]
    run_distributed(outcomes, 2, two_ranks)
    assert [r["iteration"] for r in records(tmp_path / "two", "validation")] == [2, 4]
    assert records(tmp_path / "two", "validation")[-1]["loss"] == pytest.approx(plain, rel=1e-5)
    assert losses(tmp_path / "two") == losses(tmp_path / "none")


def cosine(ratio: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * ratio))


# Eight steps of 4 samples or 128 tokens: the expected rates are of steps 1 to 8, that is of
# 0, 4, ... 28 samples, as parts of the peak.
SCHEDULES: dict[str, tuple[list[str], list[float]]] = {
    "constant": (["lr_decay_style=constant"], [1.0] * 8),
    "warm-up in samples": (
        ["lr_decay_style=constant", "lr_warmup_samples=16"],
        [0, 0.25, 0.5, 0.75, 1, 1, 1, 1],
    ),
    "warm-up in tokens": (
        ["lr_decay_style=constant", "lr_warmup_tokens=512"],
        [0, 0.25, 0.5, 0.75, 1, 1, 1, 1],
    ),
    "linear to a floor": (
        ["lr_decay_style=linear", "min_lr=2e-4"],
        [0.2 + 0.8 * (1 - i / 8) for i in range(8)],
    ),
    "linear, shorter than the run": (
        ["lr_decay_style=linear", "lr_decay_samples=16"],
        [1, 0.75, 0.5, 0.25, 0, 0, 0, 0],
    ),
    "cosine after a fraction": (
        ["lr_decay_style=cosine", "lr_warmup_fraction=0.25", "min_lr=1e-4"],
        [0, 0.5, *(0.1 + 0.9 * cosine(i / 6) for i in range(6))],
    ),
    "cosine in tokens": (
        ["lr_decay_style=cosine", "lr_decay_tokens=512"],
        [*(cosine(i / 4) for i in range(4)), 0, 0, 0, 0],
    ),
    "WSD, linear, in samples": (
        ["lr_decay_style=WSD", "lr_wsd_decay_samples=16", "lr_wsd_decay_style=linear"],
        [1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
    ),
    "WSD, minus_sqrt, in tokens": (
        ["lr_decay_style=WSD", "lr_wsd_decay_tokens=512", "lr_wsd_decay_style=minus_sqrt"],
        [1, 1, 1, 1, *(1 - math.sqrt(i / 4) for i in range(4))],
    ),
    "WSD, exponential, after a warm-up": (
        ["lr_decay_style=WSD", "lr_wsd_decay_samples=16", "lr_warmup_samples=8"],
        [0, 0.5, 1, 1, *(2 * 0.5 ** (i / 4) - 1 for i in range(4))],
    ),
}


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The learning rates that a run of each schedule logs."""
    folders = {name: tmp_path_factory.mktemp("schedule") for name in SCHEDULES}
    lines = [
        words(
            folders[name], "training.train_iters=8", *(f"optimizer.{option}" for option in options)
        )
        for name, (options, _) in SCHEDULES.items()
    ]
    assert set(run_distributed(outcomes, 1, lines)[0]) == {"finished"}
    return {
        name: [record["learning_rate"] for record in records(folder)]
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name: str, rates: dict[str, list[float]]) -> None:
    """Logged learning rates are those worked out by hand, in samples, tokens and fractions."""
    expected = [LR * part for part in SCHEDULES[name][1]]
    assert rates[name] == pytest.approx(expected, abs=1e-12)


def test_lengths_and_log_interval(tmp_path: Path) -> None:
    """Samples and tokens are rounded up to whole global batches; only some steps are logged, and
    of the others the file's time tells that they were done."""
    samples, tokens = tmp_path / "samples", tmp_path / "tokens"
    sparse, unseen = tmp_path / "sparse", tmp_path / "unseen"
    without = [word for word in words(samples) if "train_iters" not in word]
    lines = [
        [*without, "training.train_samples=9"],
        [*without, "training.train_tokens=257", f"run_dir={tokens}"],
        words(sparse, "training.log_interval=3", "training.train_iters=7"),
        words(unseen, "training.log_interval=100", "training.train_iters=2"),
    ]
    unseen.mkdir()
    (unseen / METRICS_FILE).touch()
    os.utime(unseen / METRICS_FILE, (1.0, 1.0))
    assert run_distributed(outcomes, 1, lines)[0] == ["finished"] * 4
    for folder in (samples, tokens):
        assert records(folder)[-1]["iteration"] == 3
        assert records(folder)[-1]["consumed_samples"] == 12
        assert records(folder)[-1]["consumed_tokens"] == 12 * SEQ_LENGTH
    assert [record["iteration"] for record in records(sparse)] == [3, 6]
    assert records(unseen) == []
    times = {event["event"]: event["time"] for event in read_attempts(unseen)}
    assert times["training"] <= (unseen / METRICS_FILE).stat().st_mtime <= times["end"]


@pytest.mark.parametrize("packed", ["false", "true"])
def test_accumulation(packed: str, tmp_path: Path) -> None:
    """Four micro batches of 1 are two of 2 and one of 4, packed (tokens masked) or not."""
    folders = [tmp_path / str(size) for size in (1, 2, 4)]
    lines = [
        words(folder, f"training.micro_batch_size={folder.name}", f"data.packed_documents={packed}")
        for folder in folders
    ]
    assert run_distributed(outcomes, 1, lines)[0] == ["finished"] * 3
    for folder in folders[1:]:
        assert losses(folder) == pytest.approx(losses(folders[0]), rel=1e-6)


def test_overlap(tmp_path: Path) -> None:
    """Reducing and gathering while computing gives what doing so afterwards gives, in bf16 too."""
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    for recipe in ("fp32", "bf16"):
        plain, overlapped = tmp_path / f"plain-{recipe}", tmp_path / f"overlapped-{recipe}"
        common = [*MOE, f"precision.recipe={recipe}", "training.eval_interval=2"]
        lines = [words(plain, *common), words(overlapped, *common, *overlap)]
        assert run_distributed(outcomes, 2, lines)[0] == ["finished"] * 2
        assert losses(overlapped) == pytest.approx(losses(plain), rel=1e-6)


def precisions(line: list[str]) -> tuple[dict[str, Any], set[str]]:
    """On a rank: train, and tell the dtypes of the parameters, and which of them decay."""
    with trainer(line) as run:
        run.run()
        named = dict(run.model[0].named_parameters())
        decay = set()
        for part in optimizer_parts(run.optimizer):
            groups = part.optimizer.param_groups
            for name, parameter in named.items():
                place = part.model_param_group_index_map.get(parameter)
                if place is not None and groups[place[0]]["wd_mult"]:
                    decay.add(name.rpartition("decoder.")[2])
        return {name: parameter.dtype for name, parameter in named.items()}, decay


def test_bf16(tmp_path: Path) -> None:
    """Training in bf16 follows fp32; what the state space is sensitive to stays fp32, and its decay
    rates, of Mamba-1 a matrix, do not decay themselves."""
    both = ["model.hybrid_layer_pattern=MM*-", "model.layers.1.mamba_version=1"]
    fp32, bf16 = (
        words(tmp_path / recipe, "training.train_iters=20", *both, f"precision.recipe={recipe}")
        for recipe in ("fp32", "bf16")
    )
    run_distributed(outcomes, 1, [fp32])
    dtypes, decay = run_distributed(precisions, 1, bf16)[0]
    for number, projections in enumerate(({"x_proj_weight", "dt_proj_weight"}, set())):
        own = {name.rpartition(".")[2] for name in decay if f"layers.{number}.mixer." in name}
        assert own == {"weight", "conv1d_weight"} | projections
    in_fp32 = {name.rpartition(".")[2] for name in dtypes if dtypes[name] == torch.float32}
    assert in_fp32 == {"A_log", "D", "dt_bias"}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=5e-3)
    assert losses(tmp_path / "bf16")[-1] < losses(tmp_path / "bf16")[0] - 0.05
