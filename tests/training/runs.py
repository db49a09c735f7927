"""Whole runs of a very small model, on the ranks of `run_distributed`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.config import load_config
from megatron_hybrid.errors import UserError
from megatron_hybrid.training.metrics import read_records

SEQ_LENGTH = 32
GLOBAL_BATCH_SIZE = 4
VOCAB_SIZE = 64
MOE = [
    "model.hybrid_layer_pattern=M*E-", "model.num_moe_experts=4", "model.moe_ffn_hidden_size=16",
    "model.moe_router_score_function=sigmoid", "model.moe_router_enable_expert_bias=true",
    "model.moe_aux_loss_coeff=0.01", "model.moe_z_loss_coeff=0.001",
]  # fmt: skip


def words(run_dir: Path, *more: str) -> list[str]:
    """The command line of a run of four steps, with `more` on top."""
    return [
        "model.hybrid_layer_pattern=M*-", "model.hidden_size=32", "model.num_attention_heads=2",
        "model.mamba_head_dim=16", "model.mamba_state_dim=8", "model.mamba_num_groups=2",
        f"model.vocab_size={VOCAB_SIZE}", "model.make_vocab_size_divisible_by=32",
        "data.mock_data=true", "data.tokenizer_type=null", f"data.seq_length={SEQ_LENGTH}",
        "data.num_workers=0", "precision.recipe=fp32",
        f"training.global_batch_size={GLOBAL_BATCH_SIZE}", "training.micro_batch_size=2",
        "training.train_iters=4",
        "optimizer.lr=1e-3", "optimizer.lr_decay_style=constant", "logging.tensorboard=false",
        f"run_dir={run_dir}", *more,
    ]  # fmt: skip


@contextmanager
def trainer(line: Sequence[str], backend: str = "torch") -> Iterator[Any]:
    """On a rank: the Trainer of a command line, as `pretrain` makes it."""
    from megatron_hybrid.data.tokenizer import build_tokenizer
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups
    from megatron_hybrid.training.start import find_start
    from megatron_hybrid.training.trainer import Trainer

    world_size, platform = torch.distributed.get_world_size(), initialize()
    config = load_config(line, world_size=world_size, has_cuda=platform.has_cuda)
    tokenizer = build_tokenizer(
        config.data.tokenizer_type, config.data.tokenizer_model, vocab_size=config.model.vocab_size
    )
    start = find_start(config, tokenizer, world_size)
    with model_parallel_groups(config, platform):
        yield Trainer(config, platform, backend, tokenizer, start, time.monotonic())


def outcomes(lines: Sequence[Sequence[str]], backend: str = "torch") -> list[str]:
    """On a rank: how each of several runs ends: its reason, or the text of a UserError."""
    found = []
    for line in lines:
        try:
            with trainer(line, backend) as each:
                found.append(each.run())
        except UserError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [r for r in read_records(run_dir / "metrics.jsonl") if r["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """On a rank: all tensors of a checkpoint, parameters and optimizer state."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def tensors_of_all(folders: Sequence[Path]) -> list[dict[str, torch.Tensor]]:
    """On a rank: `tensors` of several checkpoints."""
    return [tensors(folder) for folder in folders]


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
