"""The models that `train_step.py` trains on both sides: transformers' configs, and ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.config import RunConfig, build_config, load_config

PATTERN = "M-M-M*-M-M*-M-M-"
VOCAB_SIZE = 8192
QUERY_HEADS, KEY_VALUE_GROUPS, HEAD_DIM = 8, 2, 64
LEARNING_RATE, WEIGHT_DECAY, BETAS, ADAM_EPS, CLIP_GRAD = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
SEED = 1234
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One comparison: one sequence of `length` tokens a step, in "fp32" or "bf16", of a model."""

    length: int
    dtype: str
    threads: int
    model: str = "nemotron_h"


def our_config(case: Case) -> RunConfig:
    """The run config of NemotronH's 33M parameters, as it would be written from scratch."""
    return build_config(
        {
            "model": {
                "hybrid_layer_pattern": PATTERN,
                "hidden_size": 512,
                "ffn_hidden_size": 1536,
                "num_attention_heads": QUERY_HEADS,
                "num_query_groups": KEY_VALUE_GROUPS,
                "kv_channels": HEAD_DIM,
                "mamba_num_heads": 16,
                "mamba_head_dim": 64,
                "mamba_state_dim": 64,
                "mamba_num_groups": 1,
                "vocab_size": VOCAB_SIZE,
            },
            "precision": {"recipe": case.dtype},
            "data": {"mock_data": True, "tokenizer_type": "null", "seq_length": case.length},
            "training": {"train_iters": 1000, "seed": SEED},
            "optimizer": {
                "lr": LEARNING_RATE,
                "lr_decay_style": "constant",
                "weight_decay": WEIGHT_DECAY,
                "adam_beta1": BETAS[0],
                "adam_beta2": BETAS[1],
                "adam_eps": ADAM_EPS,
                "clip_grad": CLIP_GRAD,
            },
        },
        world_size=1,
        has_cuda=False,
    )


def imported_config(case: Case, checkpoint: Path) -> RunConfig:
    """Our side's run: the model that was imported, trained as the peer trains it.

    Args:
        checkpoint: the folder of the imported checkpoint, with its run_config.yaml.
    """
    return load_config(
        [
            str(checkpoint / "run_config.yaml"),
            f"precision.recipe={case.dtype}",
            "data.mock_data=true", "data.tokenizer_type=null", f"data.seq_length={case.length}",
            "training.train_iters=1000", f"training.seed={SEED}", "training.global_batch_size=1",
            f"optimizer.lr={LEARNING_RATE}", "optimizer.lr_decay_style=constant",
            f"optimizer.weight_decay={WEIGHT_DECAY}", f"optimizer.adam_eps={ADAM_EPS}",
            f"optimizer.adam_beta1={BETAS[0]}", f"optimizer.adam_beta2={BETAS[1]}",
            f"optimizer.clip_grad={CLIP_GRAD}",
        ],
        world_size=1, has_cuda=False,
    )  # fmt: skip


def nemotron_h() -> Any:
    """The 33M parameters of `our_config` as a NemotronHConfig."""
    from transformers import NemotronHConfig

    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    return NemotronHConfig(
        layers_block_type=[kinds[symbol] for symbol in PATTERN],
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KEY_VALUE_GROUPS,
        head_dim=HEAD_DIM,
        mamba_num_heads=16,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=1,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=4096,
    )


def falcon_h1() -> Any:
    """Six blocks of Falcon-H1 0.5B at half its width, with its factors: 26M parameters."""
    from transformers import FalconH1Config

    return FalconH1Config(
        num_hidden_layers=6,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KEY_VALUE_GROUPS,
        head_dim=HEAD_DIM,
        mamba_d_ssm=768,
        mamba_n_heads=12,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_rms_norm=False,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        embedding_multiplier=5.656854249492381,
        lm_head_multiplier=0.0390625,
        key_multiplier=0.39062499999999994,
        attention_out_multiplier=0.9375,
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.23570226039551587,
        ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        mlp_multipliers=[0.8838834764831844, 0.5859375],
    )


# By transformers' `model_type`.
PEERS: dict[str, Callable[[], Any]] = {"nemotron_h": nemotron_h, "falcon_h1": falcon_h1}


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """Tokens and labels `[1, length]`, the same at each step and on both sides."""
    draws = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, VOCAB_SIZE, (1, case.length + 1), generator=draws)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
