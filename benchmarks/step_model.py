"""The one model that `train_step.py` trains on both sides, and its weights under either's names.

Shapes: q query heads and g key/value groups of d channels each, h hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.config import RunConfig, build_config

PATTERN = "M-M-M*-M-M*-M-M-"
VOCAB_SIZE = 8192
QUERY_HEADS, KEY_VALUE_GROUPS, HEAD_DIM = 8, 2, 64
LEARNING_RATE, WEIGHT_DECAY, BETAS, ADAM_EPS, CLIP_GRAD = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
SEED = 1234
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NORMED = {"M": "mixer.in_proj", "*": "self_attention.linear_qkv", "-": "mlp.linear_fc1"}


@dataclass(frozen=True)
class Case:
    """One comparison: one sequence of `length` tokens a step, in "fp32" or "bf16"."""

    length: int
    dtype: str
    threads: int


def our_config(case: Case) -> RunConfig:
    """The run config of our side."""
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


def peer_config() -> Any:
    """The same model as a NemotronHConfig; its cache is off, as it is of no use in training."""
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
        use_cache=False,
    )


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """Tokens and labels `[1, length]`, the same at each step and on both sides."""
    draws = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, VOCAB_SIZE, (1, case.length + 1), generator=draws)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def to_our_names(peer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The peer's state dict as one of ours: megatron-core's names, one QKV matrix by groups."""
    ours = {
        "embedding.word_embeddings.weight": peer["model.embeddings.weight"],
        "decoder.final_norm.weight": peer["model.norm_f.weight"],
        "output_layer.weight": peer["lm_head.weight"],
    }
    for index, symbol in enumerate(PATTERN):
        prefix, layer = f"model.layers.{index}.", f"decoder.layers.{index}."
        ours[f"{layer}{NORMED[symbol]}.layer_norm_weight"] = peer[f"{prefix}norm.weight"]
        mixer = {
            name.removeprefix(f"{prefix}mixer."): tensor
            for name, tensor in peer.items()
            if name.startswith(f"{prefix}mixer.")
        }
        if symbol == "M":
            for name, tensor in mixer.items():
                ours[f"{layer}mixer.{name.replace('conv1d.', 'conv1d_')}"] = tensor
        elif symbol == "-":
            ours[f"{layer}mlp.linear_fc1.weight"] = mixer["up_proj.weight"]
            ours[f"{layer}mlp.linear_fc2.weight"] = mixer["down_proj.weight"]
        else:
            parts = [mixer[f"{name}_proj.weight"] for name in ("q", "k", "v")]
            # Ours holds, group after group, the group's queries, its key and its value.
            by_group = [part.unflatten(0, (KEY_VALUE_GROUPS, -1)) for part in parts]
            ours[f"{layer}self_attention.linear_qkv.weight"] = torch.cat(by_group, 1).flatten(0, 1)
            ours[f"{layer}self_attention.linear_proj.weight"] = mixer["o_proj.weight"]
    return ours
