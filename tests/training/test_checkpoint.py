"""Ways to start from a checkpoint and to save one; what is not this run's, or cannot be written."""

import re
import resource
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_hybrid.config import load_config
from megatron_hybrid.errors import UserError
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.metrics import read_records
from tests.training.own_callbacks import SEEN
from tests.training.runs import (
    MOE,
    losses,
    outcomes,
    records,
    same_tensors,
    tensors_of_all,
    trainer,
    words,
)

TRACKER = "latest_checkpointed_iteration.txt"


def test_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    """Every field that makes another model is named, with both values; nothing else is."""
    other = [
        "model.hidden_size=64", "model.hybrid_layer_pattern=M*M-", "model.mamba_state_dim=16",
        "model.position_embedding_type=rope", f"checkpoint.load={saved}",
    ]  # fmt: skip
    text = run_distributed(outcomes, 1, [words(tmp_path, *other)])[0][0]
    lines = text.splitlines()
    assert lines[0] == f"UserError: {saved}/iter_0000004 holds another model:"
    expected = {
        "model.hybrid_layer_pattern='M*M-', in the checkpoint 'M*-'",
        "model.hidden_size=64, in the checkpoint 32",
        "model.mamba_state_dim=16, in the checkpoint 8",
    }
    assert {line.removeprefix("  - ") for line in lines[1:]} == expected


def steps_of(run_dir: Path) -> list[int]:
    return [record["iteration"] for record in records(run_dir)]


def test_ways_to_start(saved: Path, tmp_path: Path) -> None:
    """A checkpoint goes on, is fine-tuned from step 1, or goes on with a fresh optimizer."""
    runs = {
        "resumed": [], "finetuned": ["checkpoint.finetune=true"],
        "no-optim": ["checkpoint.load_optim=false"], "no-rng": ["checkpoint.load_rng=false"],
    }  # fmt: skip
    folders = {name: tmp_path / name for name in runs}
    lines = [
        words(folders[name], f"checkpoint.load={saved}", "training.train_iters=6", *more)
        for name, more in runs.items()
    ]
    again = [
        # Interrupted and started again with the same words: now its own checkpoint counts, whole.
        [*line, f"run_dir={tmp_path / 'again' / name}", *exit_early]
        for name, line in zip(runs, lines, strict=True)
        for exit_early in (["training.exit_interval=5"], [])
    ]
    found = run_distributed(outcomes, 1, [*lines, *again])[0]
    assert found == ["finished"] * 4 + ["exit_interval", "finished"] * 4
    for name in runs:
        assert losses(tmp_path / "again" / name) == losses(folders[name]), name
    for name in ("resumed", "no-optim", "no-rng"):
        assert steps_of(folders[name]) == [5, 6]
    assert steps_of(folders["finetuned"]) == [1, 2, 3, 4, 5, 6]
    whole, fresh = losses(folders["resumed"]), losses(folders["no-optim"])
    assert losses(folders["no-rng"]) == whole  # nothing is drawn at random
    assert fresh[0] == whole[0]  # the same weights and data
    assert fresh[1] != whole[1]  # another update
    assert losses(folders["finetuned"])[0] < losses(saved.parent)[0] - 0.01


def test_load_needs_no_other_word(saved: Path, tmp_path: Path) -> None:
    """`--load DIR` alone takes the stored config and goes on where the run stood."""
    shutil.copytree(saved.parent, tmp_path / "run")
    load = ["--load", str(tmp_path / "run" / "checkpoints")]
    stored = load_config(words(saved.parent))
    config = load_config(load)
    assert config.model_dump(exclude={"checkpoint"}) == stored.model_dump(exclude={"checkpoint"})
    line = [*load, "--train-iters", "6", f"run_dir={tmp_path / 'new'}"]
    assert run_distributed(outcomes, 1, [line]) == [["finished"]]
    assert steps_of(tmp_path / "new") == [5, 6]


def test_how_a_run_began_is_not_how_it_goes_on(saved: Path, tmp_path: Path) -> None:
    """A fine-tuned run is resumed by `--load` as any other: its config no longer says finetune."""
    line = words(tmp_path, f"checkpoint.load={saved}", "checkpoint.finetune=true")
    assert run_distributed(outcomes, 1, [line]) == [["finished"]]
    resumed = ["--load", str(tmp_path / "checkpoints"), "--train-iters", "6"]
    assert run_distributed(outcomes, 1, [resumed]) == [["finished"]]
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_finetuning_into_the_same_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    """A run cannot both start from weights and save over the run that they are of."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    line = words(tmp_path, f"checkpoint.load={tmp_path}/checkpoints", "checkpoint.finetune=true")
    text = run_distributed(outcomes, 1, [line])[0][0]
    assert "checkpoint.finetune=true cannot start from checkpoint.load=" in text
    assert "run_dir" in text


def test_keep_last(tmp_path: Path) -> None:
    """The newest N checkpoints stay, and whatever else is in the folder; half-written ones go."""
    save = tmp_path / "checkpoints"
    (save / "iter_0000001.bak").mkdir(parents=True)
    (save / ".iter_0000099.part").mkdir()
    line = words(tmp_path, "checkpoint.save_interval=1", "checkpoint.keep_last=2")
    assert run_distributed(outcomes, 1, [line]) == [["finished"]]
    expected = [
        "checkpoints.json", "iter_0000001.bak", "iter_0000003", "iter_0000004", TRACKER,
    ]  # fmt: skip
    assert sorted(path.name for path in save.iterdir()) == expected


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tracker_lost(run_dir: Path) -> list[tuple[str, dict[str, bytes]]]:
    """On a rank: starts that find checkpoints without a tracker, or no checkpoints any more.

    Returns:
        How each ended, and what was in the run's folder then.
    """
    save = run_dir / "checkpoints"
    keep_one = words(run_dir, "checkpoint.save_interval=2", "checkpoint.keep_last=1")

    def start(*more: str) -> tuple[str, dict[str, bytes]]:
        return outcomes([[*keep_one, *more]])[0], content(run_dir)

    found = [start()]
    (save / TRACKER).unlink()
    found.append(start("training.train_iters=5"))
    (save / TRACKER).unlink()
    shutil.copytree(save / "iter_0000005", save / "iter_0000002")
    found.append(start("training.train_iters=6"))
    save.rename(run_dir / "moved")
    found.append(start("training.seed=7"))
    return found


def test_tracker_lost(tmp_path: Path) -> None:
    """The run's own checkpoints are found; others stop it; nothing that was there is lost."""
    run_dir = tmp_path / "run"
    found = run_distributed(tracker_lost, 1, run_dir)[0]
    ends, trees = zip(*found, strict=True)
    assert ends[:2] == ("finished", "finished")
    assert re.match(rf"UserError: {run_dir}/checkpoints holds iter_0000002, and no {TRACKER}",
                    ends[2])  # fmt: skip
    assert ends[3] == "finished"
    checkpoints = [{name.split("/")[1] for name in tree if name.startswith("ch")} for tree in trees]
    assert {"iter_0000004"} == checkpoints[0] - {"checkpoints.json", TRACKER}
    assert {"iter_0000005"} == checkpoints[1] - {"checkpoints.json", TRACKER}
    # The whole run: what one start has written, the next ones keep, wherever it is.
    assert steps_of(run_dir) == [1, 2, 3, 4]
    again = read_records(run_dir / "metrics_rewound.jsonl")
    assert [r["iteration"] for r in again if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    before = trees[2]["metrics.jsonl"].splitlines()
    after = b"".join(trees[3][name] for name in ("metrics_rewound.jsonl", "metrics.jsonl"))
    assert set(before) <= set(after.splitlines())
    for name, data in trees[2].items():
        name = re.sub("^checkpoints/", "moved/", name)
        if name != "metrics.jsonl":
            grown = name == "attempts.jsonl"
            assert trees[3][name].startswith(data) if grown else trees[3][name] == data, name


def saved_at_once(line: list[str]) -> tuple[bool, bool]:
    """On a rank: save before the first step; was it named before and after it was finished?"""
    from megatron_hybrid.checkpoint.progress import Progress
    from megatron_hybrid.training.checkpoint import Checkpointer

    with trainer(line) as run:
        checkpointer = Checkpointer(
            run.config, run.model, run.optimizer, run.tokenizer, lambda *_: None
        )
        checkpointer.save(Progress())
        tracker = run.config.checkpoint.save / TRACKER
        early = tracker.exists()
        checkpointer.finish()
        return early, tracker.exists()


@pytest.mark.parametrize("background", [False, True])
def test_saved_before_the_first_step(background: bool, tmp_path: Path) -> None:
    """A fresh run can be saved and goes on from it; it is named only once it is whole."""
    line = words(tmp_path / "saved", f"checkpoint.async_save={str(background).lower()}")
    assert run_distributed(saved_at_once, 2, line) == [(not background, True)] * 2
    assert run_distributed(outcomes, 2, [line, words(tmp_path / "plain")])[0] == ["finished"] * 2
    assert losses(tmp_path / "saved") == losses(tmp_path / "plain")


def test_background_saves_are_the_same(tmp_path: Path) -> None:
    """What is written while training goes on is the state at the time of the save."""
    lines = [
        words(tmp_path / mode, "checkpoint.save_interval=1", f"checkpoint.async_save={mode}")
        for mode in ("false", "true")
    ]
    assert run_distributed(outcomes, 1, lines)[0] == ["finished"] * 2
    names = [f"iter_{step:07d}" for step in (1, 2, 3, 4)]
    folders = [tmp_path / m / "checkpoints" / name for m in ("false", "true") for name in names]
    found = run_distributed(tensors_of_all, 1, folders)[0]
    for one, other in zip(found[:4], found[4:], strict=True):
        assert same_tensors(one, other)


def test_saved_with_overlap(tmp_path: Path) -> None:
    """Parameters still to be gathered when the run is saved are saved as they will be, and a
    callback has them so."""
    weighs = "training.callbacks=[tests.training.own_callbacks:Weighs]"
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", weighs]
    lines = [
        words(tmp_path / "plain", "checkpoint.save_interval=2", weighs),
        words(tmp_path / "overlap", *overlap, "training.exit_interval=2"),
        words(tmp_path / "overlap", *overlap),
    ]
    found = run_distributed(outcomes, 2, lines)[0]
    assert found == ["finished", "exit_interval", "finished"]
    assert losses(tmp_path / "overlap") == losses(tmp_path / "plain")
    sums = [(tmp_path / name / SEEN).read_text() for name in ("plain", "overlap")]
    assert sums[0] == sums[1] and len(set(sums[0].splitlines())) == 4
    folders = [tmp_path / name / "checkpoints/iter_0000002" for name in ("plain", "overlap")]
    assert same_tensors(*run_distributed(tensors_of_all, 1, folders)[0])


def in_buckets(lines: list[list[str]], size: int, *, counted: bool) -> list[str]:
    """On a rank: `outcomes` of runs whose gradients are reduced in buckets of so many numbers; of
    those, whether their padding is counted.
    """
    from megatron_hybrid.training import optimizer

    config = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = partial(config, bucket_size=size)  # type: ignore[misc]
    if not counted:
        optimizer.count_padding = lambda chunk: None
    return outcomes(lines)


# The embedding, which two stages have, is a bucket of its own; numbers that fill up none.
IN_BUCKETS = {
    "tied": ["model.hybrid_layer_pattern=*-|M-", "parallel.pipeline_model_parallel_size=2",
             "model.untie_embeddings_and_output_weights=false", "training.micro_batch_size=1",
             "model.vocab_size=50", "model.make_vocab_size_divisible_by=2"],
    "many": [*MOE, "parallel.overlap_grad_reduce=true", "precision.recipe=bf16"],
}  # fmt: skip


@pytest.mark.parametrize("name", IN_BUCKETS)
def test_states_of_many_buckets(name: str, tmp_path: Path) -> None:
    """Each parameter's state is saved under its name, whatever buckets it lies in: the run goes on
    as if never interrupted. What was saved otherwise is refused."""
    more = [*IN_BUCKETS[name], "checkpoint.save_interval=2"]
    whole, parts, wrong = (tmp_path / each for each in ("whole", "parts", "wrong"))
    lines = [words(whole, *more), words(parts, *more, "training.exit_interval=2"),
             words(parts, *more)]  # fmt: skip
    found = run_distributed(in_buckets, 2, lines, 500, counted=True)[0]
    assert found == ["finished", "exit_interval", "finished"]
    assert losses(parts) == losses(whole)
    folders = [folder / "checkpoints/iter_0000004" for folder in (whole, parts)]
    one, other = run_distributed(tensors_of_all, 1, folders)[0]
    assert same_tensors(one, other)
    prefix = "optimizer.state.param."
    mains = {key.removeprefix(prefix): t for key, t in one.items() if key.startswith(prefix)}
    assert len(mains) > 10
    for key, main in mains.items():
        assert torch.equal(main.to(one[key].dtype), one[key]), key
    lines = [words(wrong, *more, "training.exit_interval=2"), words(wrong, *more),
             words(wrong, *more, "checkpoint.load_optim=false")]  # fmt: skip
    found = run_distributed(in_buckets, 2, lines, 500, counted=False)[0]
    assert (found[0], found[2]) == ("exit_interval", "finished")
    assert "its optimizer's state is of other weights than its model's: " in found[1]
    assert "checkpoint.load_optim=false goes on" in found[1]


def full_disk(line: list[str]) -> tuple[str, list[str]]:
    """On a rank: a save for which there is no room; its error, and what is left in the folder."""
    from megatron_hybrid.checkpoint.progress import Progress
    from megatron_hybrid.training.checkpoint import Checkpointer

    with trainer(line) as run:
        run.run()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
        checkpointer = Checkpointer(
            run.config, run.model, run.optimizer, run.tokenizer, lambda *_: None
        )
        try:
            checkpointer.save(Progress(9, 36))
            checkpointer.finish()
        except UserError as error:
            torch.distributed.barrier()
            return str(error), sorted(path.name for path in run.config.checkpoint.save.iterdir())
        return "saved", []


@pytest.mark.parametrize("background", ["false", "true"])
def test_full_disk(background: str, tmp_path: Path) -> None:
    """A save that fails midway is an error on every rank and leaves the one before as it was."""
    line = words(tmp_path, f"checkpoint.async_save={background}")
    for text, left in run_distributed(full_disk, 2, line):
        assert f"checkpoint.save={tmp_path}/checkpoints: step 9 could not be saved: " in text
        assert "rank 0: " in text
        assert len(text) < 500
        assert left == ["checkpoints.json", "iter_0000004", TRACKER]
    assert run_distributed(outcomes, 2, [[*line, "training.train_iters=5"]])[0] == ["finished"]
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def no_folder(line: list[str]) -> str:
    """On a rank: the error of a run whose folder for checkpoints went away."""
    with trainer(line) as run:
        save = run.config.checkpoint.save
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            save.parent.mkdir(exist_ok=True)
            save.write_text("not a folder")
        with pytest.raises(UserError) as caught:
            run.run()
        return str(caught.value)


def test_nowhere_to_save(tmp_path: Path) -> None:
    """A folder that cannot be made is an error on every rank, and none waits for another."""
    for text in run_distributed(no_folder, 2, words(tmp_path)):
        assert f"checkpoint.save={tmp_path}/checkpoints: step 4 could not be saved: " in text
        assert "Not a directory" in text or "File exists" in text


def save_as_megatron_lm(line: list[str], folder: Path) -> None:
    """On a rank: a checkpoint with what Megatron-LM puts into one, and nothing of ours."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    folder.mkdir(parents=True)
    (folder.parent / TRACKER).write_text("7")
    with trainer(line) as run:
        run.run()
        generators = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": 0}]
        state = {
            "args": Namespace(hidden_size=32, params_dtype=torch.float32),
            "checkpoint_version": 3.0,
            "iteration": 7,
            "model": run.model[0].module.sharded_state_dict(),
            "rng_state": ShardedObject("rng_state", generators, (1, 1), (0, 0), replica_id=0),
        }
        dist_checkpointing.save(state, str(folder), async_strategy="mcore")


def test_megatron_lm_s_own(tmp_path: Path) -> None:
    """A checkpoint without our files loads with a given config, and goes on at its iteration."""
    save = tmp_path / "theirs"
    run_distributed(save_as_megatron_lm, 1, words(tmp_path / "run"), save / "iter_0000007")
    load = [f"checkpoint.load={save}", "training.train_iters=8"]
    lines = [
        words(tmp_path / "on", *load, "checkpoint.load_optim=false"),
        words(tmp_path / "fine", *load, "checkpoint.finetune=true"),
        words(tmp_path / "optim", *load),
        *(words(tmp_path / "other", *load, "model.hidden_size=64", *more)
          for more in ([], ["checkpoint.finetune=true"])),
    ]  # fmt: skip
    found = run_distributed(outcomes, 1, lines)[0]
    for text in found[3:]:
        assert f"{save}/iter_0000007 holds another model:" in text
        assert "  - model.hidden_size=64, in the checkpoint 32" in text
    assert found[:2] == ["finished"] * 2
    assert steps_of(tmp_path / "on") == [8]
    assert records(tmp_path / "on")[0]["consumed_samples"] == 32
    assert steps_of(tmp_path / "fine") == list(range(1, 9))
    assert losses(tmp_path / "fine")[0] < losses(tmp_path / "run")[0]
    assert found[2].startswith(f"UserError: {save}/iter_0000007 cannot be loaded: ")
    assert "checkpoint.load_optim=false" in found[2]
