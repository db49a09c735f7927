"""`megatron-hybrid upcycle`: what it makes, what it refuses, and what it leaves when it dies."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.derived import derived_tokenizer
from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.source_model import source_config
from megatron_hybrid.cli import main
from megatron_hybrid.config import CONFIG_FILE, UpcyclingConfig, load_config
from megatron_hybrid.data.tokenizer import NullTokenizer
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.testing.distributed import RankError
from megatron_hybrid.training.start import open_run
from megatron_hybrid.upcycling.request import Request, upcycled_config
from megatron_hybrid.upcycling.write import Upcycling
from tests.upcycling.models import dense_words, dying, train, upcycle

# (what is typed beside --load and --save, every problem that is reported)
REFUSED = {
    "not divisible": (
        "--experts 2 --granularity 5 --topk 4",
        ["--granularity 5 must divide the MLPs' model.ffn_hidden_size=48; allowed: 1, 2, 3, 4, 6"],
    ),
    "too many a token": (
        "--experts 2 --granularity 4 --topk 9",
        ["--topk 9 must be at most the number of experts, 2 * 4 = 8; allowed: 1 to 8"],
    ),
    "two at once": (
        "--experts 2 --granularity 5 --topk 11",
        ["--granularity 5 must divide", "--topk 11 must be at most the number of experts, 2 * 5"],
    ),
    "with shared ones": (
        "--experts 2 --granularity 4 --topk 7 --shared-experts 1",
        ["--topk 7 must be at most the number of experts, 2 * (4 - 1) = 6; allowed: 1 to 6"],
    ),
    "all shared": (
        "--experts 2 --granularity 4 --topk 2 --shared-experts 4",
        ["--shared-experts 4 must leave some of the --granularity 4 shards to the router; "
         "allowed: 0 to 3"],
    ),
    "not an MLP": (
        "--experts 2 --granularity 4 --topk 2 --layers 1,2,9",
        ["--layers 1, 9: not an MLP; '-' layers are 2, 4, 6"],
    ),
    "EP": (
        "--experts 3 --granularity 1 --topk 2 --expert-model-parallel-size 2",
        ["parallel.expert_model_parallel_size=2 must divide model.num_moe_experts=3; "
         "allowed: 1, 3"],
    ),
    "no gradient": (
        "--experts 3 --granularity 1 --topk 1 --router-order topk-softmax",
        ["--topk 1 with --router-order topk-softmax", "allowed: --topk 2 and more"],
    ),
    "said twice": (
        "--experts 2 --granularity 4 --topk 4 --num-experts 4 upcycling.from=/tmp "
        "--no-load-optim",
        ["model.num_moe_experts=4 cannot be set here: --experts with --granularity decides it",
         "upcycling.from=/tmp cannot be set here: --load decides it",
         "checkpoint.load_optim=False cannot be set here: pretrain, which loads what is made"],
    ),
    "said twice, of layers": (
        "--experts 2 --granularity 4 --topk 4 model.layers.E.moe_ffn_hidden_size=4 "
        "model.layers.2-4.moe_router_topk=1",
        ["model.layers.E.moe_ffn_hidden_size=4 cannot be set here: --granularity decides it",
         "model.layers.2-4.moe_router_topk=1 cannot be set here: --topk decides it"],
    ),
    "another pattern": (
        "--experts 2 --granularity 4 --topk 4 model.hybrid_layer_pattern=M-*EME",
        ["model.hybrid_layer_pattern='M-*EME' must be 'ME*EME', which --layers decides"],
    ),
    "unknown field": (
        "--experts 2 --granularity 4 --topk 4 optimizer.learning_rate=1",
        ["optimizer.learning_rate"],
    ),
    "both kinds": (
        "--experts 2 --granularity 5 --topk 4 training.train_iters=-1",
        ["--granularity 5 must divide", "training.train_iters=-1 must be"],
    ),
    "a word": (
        "--experts 2 --granularity 4 --topk 4 tiny",
        ["'tiny' is no section.field=value"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of one step."""
    run_dir = tmp_path_factory.mktemp("dense") / "run"
    run_distributed(train, 1, dense_words(run_dir, "training.train_iters=1"))
    return run_dir


class Command:
    """Runs `megatron-hybrid upcycle` in this process; afterwards `output` and `errors` are text."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture

    def __call__(self, load: Path, save: Path, typed: str) -> int:
        words = ["upcycle", "--load", str(load), "--save", str(save), *typed.split()]
        self._patch.setattr(sys, "argv", ["megatron-hybrid", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        self.output, self.errors = self._capture.readouterr()
        return int(ended.value.code or 0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_requests_are_refused(
    name: str, dense: Path, tmp_path: Path, command: Command
) -> None:
    """One message with the numbers and what is allowed; no traceback, and nothing is left."""
    typed, problems = REFUSED[name]
    assert command(dense, tmp_path / "moe", typed) == 1
    assert "Traceback" not in command.errors
    for problem in problems:
        assert problem in command.errors
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ("--layers 1-99999999999", "not like 2,4,10-20"),
        ("--router-noise inf", "not a finite number"),
        ("--router-std 1e400", "not a finite number"),
    ],
)
def test_values_beyond_reason(
    typed: str, problem: str, dense: Path, tmp_path: Path, command: Command
) -> None:
    """A usage error in a line, not a traceback or a full memory."""
    line = f"--experts 2 --granularity 4 --topk 4 {typed}"
    assert command(dense, tmp_path / "moe", line) == 2
    assert problem in " ".join(command.errors.split())


def test_no_mlp_is_refused(tmp_path: Path, command: Command) -> None:
    """There is nothing to upcycle in a pattern without MLPs."""
    line = dense_words(tmp_path / "run", "model.hybrid_layer_pattern=M*M", "training.train_iters=1")
    run_distributed(train, 1, line)
    command(tmp_path / "run", tmp_path / "moe", "--experts 2 --granularity 4 --topk 4")
    assert "model.hybrid_layer_pattern='M*M' has no '-' layer to upcycle" in command.errors


def test_a_target_that_exists_is_refused(dense: Path, tmp_path: Path, command: Command) -> None:
    """Whatever is there stays as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    assert command(dense, tmp_path, "--experts 2 --granularity 4 --topk 4") == 1
    assert "holds notes.txt; give a folder that is empty or not there" in command.errors
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_data_than_were_counted_are_refused(
    dense: Path, tmp_path: Path, command: Command
) -> None:
    """The run goes on at the dense one's sample, which must be the one that was counted: as where
    `pretrain` upcycles. What changes no sample may be typed.
    """
    typed = "--experts 2 --granularity 4 --topk 4 --dry-run"
    assert command(dense, tmp_path / "moe", f"{typed} training.seed=99 data.seq_length=16") == 1
    assert "has counted other samples" in command.errors
    assert "training.seed=99, in the checkpoint 1234" in command.errors
    assert "data.seq_length=[16], in the checkpoint [32]" in command.errors
    assert command(dense, tmp_path / "moe", f"{typed} optimizer.weight_decay=0.2") == 0
    assert "another function" not in command.errors
    assert command(dense, tmp_path / "moe", f"{typed} model.layernorm_epsilon=1e-3") == 0
    assert "function of the same weights: model.layernorm_epsilon=0.001 (there" in command.errors


def test_a_dry_run_finds_what_stands_against_it(
    dense: Path, tmp_path: Path, command: Command
) -> None:
    """A checkpoint of another model than its config says is refused before anything is written."""
    copy = tmp_path / "dense"
    shutil.copytree(dense, copy)
    path = find_checkpoint(copy) / CONFIG_FILE
    path.write_text(path.read_text().replace("ffn_hidden_size: 48", "ffn_hidden_size: 96"))
    typed = "--experts 2 --granularity 4 --topk 4 --dry-run"
    assert command(copy, tmp_path / "moe", typed) == 1
    assert "run_config.yaml: hash mismatch" in command.errors
    typed += " checkpoint.verify_integrity=false"
    assert command(copy, tmp_path / "moe", typed) == 1
    assert "does not hold the model of its config" in command.errors
    assert (
        "decoder.layers.1.mlp.linear_fc1.weight is (48, 32); it must be (96, 32)" in command.errors
    )


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """What is made could not be gone on from; the dense run's own may be on another machine."""
    NullTokenizer(64).save_copy(tmp_path)
    config = load_config(dense_words(tmp_path), which=())
    there = config.model_copy(
        update={"data": config.data.model_copy(
            update={"tokenizer_type": "huggingface", "tokenizer_model": Path("gone")})}
    )  # fmt: skip
    assert derived_tokenizer(tmp_path, there, there).vocab_size == 64
    words = config.model.model_copy(update={"vocab_size": 60})
    other = config.model_copy(update={"model": words})
    with pytest.raises(UserError, match=r"data\.tokenizer_model=None is not the tokenizer of"):
        derived_tokenizer(tmp_path, there, other)


def test_a_dry_run_says_what_would_be_done(dense: Path, tmp_path: Path, command: Command) -> None:
    """Layers, experts, scale, counts and memory; nothing is written. E8G8T8 has the scale 4."""
    typed = "--experts 8 --granularity 8 --topk 8 --layers 2,6 --dry-run"
    assert command(dense, tmp_path / "moe", typed) == 0
    for text in (
        "M-*-M- -> ME*-ME", "64 of 6 channels: 8 copies of an MLP of 48, cut into 8",
        "8 experts a token; softmax, then top-k", "4.0000 on both matrices", "dense", "upcycled",
        "goes on at step 1, sample 4; NOTHING IS LEFT of the 4",
    ):  # fmt: skip
        assert text in command.output
    assert re.search(r"layers +2, 6", command.output)
    assert not (tmp_path / "moe").exists()


def test_the_command_makes_what_pretrain_loads(
    dense: Path, tmp_path: Path, command: Command
) -> None:
    """With changes to the config on top; the config found by --load is that of the MoE model."""
    typed = "--experts 2 --granularity 4 --topk 4 --shared-experts 1"
    typed += " --lr 2e-4 model.moe_z_loss_coeff=0.001"
    assert command(dense, tmp_path / "moe", typed) == 0
    config = load_config(["--load", str(tmp_path / "moe")])
    assert config.optimizer.lr == 2e-4
    assert config.model.moe_z_loss_coeff == 0.001
    assert config.model.hybrid_layer_pattern == "ME*EME"
    assert config.model.moe_shared_expert_intermediate_size == 12
    assert config.model.num_moe_experts == 6
    with CheckpointReader(find_checkpoint(tmp_path / "moe")) as reader:
        said = reader.common["upcycling"]
        assert (said["expansion"], said["granularity"], said["shared_shards"]) == (2, 4, 1)
        for name in reader.tensors:
            reader.read(name)  # checksums


def test_a_run_with_nothing_left_to_train_is_refused(
    dense: Path, tmp_path: Path, command: Command
) -> None:
    """The dense run was at its end: whoever goes on from there must say how far, before any work;
    a warm-up that does not fit is another thing, and is called so.
    """
    assert command(dense, tmp_path / "moe", "--experts 2 --granularity 4 --topk 4") == 0
    line = ["--load", str(tmp_path / "moe"), f"run_dir={tmp_path / 'run'}"]
    warm_up = "optimizer.lr_warmup_samples=4"
    for more in ([], [warm_up, "optimizer.lr_decay_samples=8"]):
        with pytest.raises(UserError, match=r"nothing is left.* 4 samples, and training.train_ite"):
            open_run(load_config([*line, *more]), 1)
    longer = "training.train_iters=2"
    with pytest.raises(ConfigError, match=r"warm-up, 128 tokens .* 128 tokens \(the run, from"):
        open_run(load_config([*line, longer, warm_up]), 1)
    _, _, start = open_run(load_config([*line, longer]), 1)
    assert start.data.steps.samples == 8
    _, _, start = open_run(load_config([*line, "checkpoint.finetune=true"]), 1)
    assert start.origin.weights_only


def test_threads_change_nothing(dense: Path, tmp_path: Path) -> None:
    """One thread or five: the same tensors, with channels drawn anew and noise in the router."""
    found = []
    for threads in (1, 5):
        save = tmp_path / str(threads)
        _, folder = upcycle(
            dense, save, Request(3, 4, 4), threads=threads, reinit_fraction=0.5, router_noise=0.1
        )
        with CheckpointReader(folder) as reader:
            found.append({name: reader.read(name) for name in reader.tensors})
    assert found[0].keys() == found[1].keys()
    assert all((found[0][name] == found[1][name]).all() for name in found[0])


def upcycle_and_die(dense: Path, save: Path, at: float | str) -> None:
    """On a rank: upcycle, and be killed when so much is written, or in a step of publishing."""
    source = find_checkpoint(dense)
    with CheckpointReader(source) as reader:
        config = source_config(reader, None)
    moe = upcycled_config(config, Request(2, 4, 4), save, [])
    Upcycling(source, config, moe, UpcyclingConfig()).write(save, dying(at))


@pytest.mark.parametrize("at", [0.0, 0.2, 0.5, 0.9, 1.0, "publish", "tracker"])
def test_killed_it_leaves_nothing_that_loads(at: float | str, dense: Path, tmp_path: Path) -> None:
    """Killed at any moment there is no checkpoint to load; the next try is none the worse."""
    save = tmp_path / "moe"
    with pytest.raises(RankError, match="SIGKILL"):
        run_distributed(upcycle_and_die, 1, dense, save, at)
    if at == "tracker":  # whole, and named by nothing: --save is not empty any more
        with pytest.raises(UserError, match="holds iter_0000001, and no latest_checkpointed"):
            files.latest_checkpoint(save)
        return
    assert files.latest_checkpoint(save) is None
    upcycle(dense, save, Request(2, 4, 4))
    assert sorted(path.name for path in save.iterdir()) == [
        "iter_0000001", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip


def test_a_damaged_source_is_refused(dense: Path, tmp_path: Path, command: Command) -> None:
    """A flipped bit in an MLP's matrix: nothing that loads comes of it."""
    copy = tmp_path / "dense"
    shutil.copytree(dense, copy)
    folder = find_checkpoint(copy)
    with CheckpointReader(folder) as reader:
        (chunk,) = reader.tensors["decoder.layers.1.mlp.linear_fc1.weight"].chunks
    path = folder / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.start + chunk.length // 2] ^= 1
    path.write_bytes(data)
    typed = "--experts 2 --granularity 4 --topk 4"
    assert command(copy, tmp_path / "moe", typed) == 1
    assert "hash mismatch" in command.errors
    assert not (tmp_path / "moe").exists()
    assert command(copy, tmp_path / "moe", f"{typed} checkpoint.verify_integrity=false") == 1
    assert "checksum" in command.errors
    assert not (tmp_path / "moe").exists()
