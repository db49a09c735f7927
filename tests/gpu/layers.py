"""A model of one layer on either backend: its losses and gradients from given weights."""

import re
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.config import load_config

MOE = [
    "model.num_moe_experts=4", "model.moe_ffn_hidden_size=128", "model.moe_router_topk=2",
    "model.moe_router_score_function=softmax",
]  # fmt: skip
LATENT = [
    "model.moe_latent_size=64", "model.moe_router_num_groups=2", "model.moe_router_group_topk=1",
]  # fmt: skip
ROUTER_SCALE = 20
KINDS = ("M", "M1", "*", "-", "E", "EL", "H", "G")
# bf16 has 8 bits, and gradients pass several products of 256 and more terms.
TOLERANCE = 0.05
EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc\d)\.(weight|bias)")


def line(symbol: str, recipe: str, run_dir: Path) -> list[str]:
    """The command line of a model of one layer, its sizes such as kernels of GPUs take.

    Args:
        symbol: of a pattern, M1 for Mamba-1, or EL for latent experts in groups.
    """
    return [
        f"model.hybrid_layer_pattern={symbol[0]}", "model.hidden_size=256",
        "model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=64",
        "model.ffn_hidden_size=512", "model.mamba_head_dim=64", "model.mamba_state_dim=64",
        "model.mamba_num_groups=2", "model.linear_key_head_dim=64", "model.vocab_size=512",
        "data.mock_data=true", "data.tokenizer_type=null", "data.seq_length=256",
        f"precision.recipe={recipe}", "training.train_iters=1", "optimizer.lr=1e-3",
        f"run_dir={run_dir}",
        *(MOE if symbol[0] == "E" else []),
        *(LATENT if symbol == "EL" else []),
        *(["model.mamba_version=1"] if symbol == "M1" else []),
    ]  # fmt: skip


def common_name(name: str) -> str:
    """A parameter's name on the transformer_engine backend, which groups experts."""
    return EXPERT.sub(r"experts.\2.\3\1", name.removeprefix("module."))


def outcome(words: list[str], backend: str, weights: Path, *, save: bool) -> dict[str, Any]:
    """Losses `[b, s]` and every parameter's gradient, in fp32 on the CPU, by common name.

    Args:
        weights: a file of parameters by common name, which is written (`save`) or read.
    """
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups

    platform = initialize()
    config = load_config(words, world_size=1, has_cuda=platform.has_cuda)
    with model_parallel_groups(config, platform):
        engine_config = transformer_config(config, backend, platform.device)
        (model,) = build_model_chunks(config, engine_config, backend)
        parameters = {common_name(name): p for name, p in model.named_parameters()}
        if save:
            for name, parameter in parameters.items():
                if "router" in name:  # experts are told apart, whatever the rounding
                    parameter.data.mul_(ROUTER_SCALE)
            torch.save({name: p.detach().float().cpu() for name, p in parameters.items()}, weights)
        else:
            saved = torch.load(weights, weights_only=True)
            assert saved.keys() == parameters.keys()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    assert saved[name].shape == parameter.shape, name
                    parameter.copy_(saved[name])
        tokens = torch.randint(512, (2, 257), generator=torch.Generator().manual_seed(7))
        tokens = tokens.to(platform.device)
        positions = torch.arange(256, device=platform.device).expand(2, -1)
        losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
        losses.float().mean().backward()
        found = {name: p.grad.float().cpu() for name, p in parameters.items() if p.grad is not None}
        return {"losses": losses.detach().float().cpu(), **found}


def transformer_engine_error(symbol: str, folder: Path) -> tuple[float, str]:
    """How far losses and gradients of Transformer Engine in bf16 are from fp32 on the CPU."""
    import torch.distributed as dist

    from megatron_hybrid.platform import initialize
    from megatron_hybrid.testing import run_distributed
    from megatron_hybrid.training.distributed import select_device

    weights = folder / f"weights_{ord(symbol)}.pt"
    words = line(symbol, "fp32", folder)
    (exact,) = run_distributed(outcome, 1, words, "torch", weights, save=True)
    select_device()
    backend = initialize().distributed_backend
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        words = line(symbol, "bf16", folder)
        got = outcome(words, "transformer_engine", weights, save=False)
    finally:
        dist.destroy_process_group()
    return largest_error(got, exact)


def largest_error(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, str]:
    """The largest relative distance (2-norm of the difference over that of `other`), and where."""
    assert one.keys() == other.keys()
    return max(
        (float((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12)), name)
        for name in other
    )
