"""Tiny random models of transformers, in which every parameter matters and none is at its default.

Widths are chosen so that no two of a model are equal where a mix-up could hide.
"""

from pathlib import Path
from typing import Any

import torch

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
VOCAB_SIZE = 61  # no multiple of what vocabularies are padded to
CHUNK_SIZE = 16
# More than two chunks, and not a whole number of them.
LENGTH = 2 * CHUNK_SIZE + 5


def nemotron_h(pattern: str, **fields: Any) -> Any:
    """A NemotronHForCausalLM in fp32, in evaluation mode, the same at every call."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = {
        "layers_block_type": [KINDS[symbol] for symbol in pattern],
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "mamba_num_heads": 8,
        "mamba_head_dim": 6,
        "ssm_state_size": 5,
        "n_groups": 2,
        "vocab_size": VOCAB_SIZE,
        "chunk_size": CHUNK_SIZE,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 28,
        "routed_scaling_factor": 1.7,
        "time_step_min": 1e-30,  # the scan clamps to it and decoding does not
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.02,
    } | fields
    return randomized(NemotronHForCausalLM(NemotronHConfig(**config)))


def randomized(model: Any) -> Any:
    """Every parameter and buffer drawn anew, norms and biases too: nothing can be left out."""
    draws = torch.Generator().manual_seed(0)
    named = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in named:
            leaf = name.rpartition(".")[2]
            if leaf.endswith("inv_freq") or leaf == "mup_vector":
                continue
            noise = torch.randn(tensor.shape, generator=draws)
            if leaf == "A_log":
                tensor.copy_(torch.rand(tensor.shape, generator=draws) * 2)  # A from -1 to -7
            elif leaf == "dt_bias":
                tensor.copy_(noise - 2)  # steps around 0.1
            elif tensor.dim() < 2:
                centre = 0.0 if "bias" in leaf else 1.0  # biases; norms and D
                tensor.copy_(centre + 0.3 * noise)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5 if tensor.dim() == 2 else 0.3 * noise)
    return model.float().eval()


def tokens(length: int = LENGTH, batch: int = 1) -> torch.Tensor:
    """`[batch, length]` int64."""
    draws = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=draws)


def saved(model: Any, folder: Path) -> Path:
    """The folder, with the model as transformers saves it."""
    model.save_pretrained(folder)
    return folder
