"""What the `gpu` section says reaches the engine's config, and only on its own backend."""

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend, CudaGraphModule

from megatron_hybrid.config import load_config
from megatron_hybrid.config.sections import GpuConfig
from megatron_hybrid.model.transformer_config import GPU_FIELDS, transformer_config
from tests.config import GOOD

TYPED = (
    "model.activation=swiglu", "--cp-comm-type", "a2a", "--attention-backend", "fused",
    "--bias-activation-fusion", "--bias-dropout-fusion",
    "--cross-entropy-loss-fusion", "--cuda-graph-impl", "local",
    "gpu.cuda_graph_modules=[attn, mamba]", "gpu.cuda_graph_warmup_steps=5",
)  # fmt: skip


def test_all_knobs_are_handed_on() -> None:
    """No field of the section is forgotten: each goes to the model's config or the DDP's."""
    elsewhere = {"attention_backend", "cuda_graph_modules", "align_param_gather"}
    assert set(GpuConfig.model_fields) == {*GPU_FIELDS, *elsewhere}


@pytest.mark.filterwarnings("ignore")
def test_the_engine_takes_them() -> None:
    """megatron-core has them under the same names. (Fused RoPE it takes only with TE.)"""
    config = load_config([*GOOD, *TYPED])
    made = transformer_config(config, "transformer_engine", torch.device("meta"))
    for name in GPU_FIELDS:
        assert getattr(made, name) == getattr(config.gpu, name), name
    assert made.attention_backend is AttnBackend.fused
    assert made.cuda_graph_modules == [CudaGraphModule.attn, CudaGraphModule.mamba]


def test_overlapped_messages_are_not_batched() -> None:
    """The engine refuses both at once, so the one that was asked for stands."""
    typed = ["model.hybrid_layer_pattern=M|M|*|E", "--pipeline-model-parallel-size", "2"]
    config = load_config([*GOOD, *typed, "--overlap-p2p-comm"])
    made = transformer_config(config, "transformer_engine", torch.device("cuda"))
    assert made.overlap_p2p_comm and not made.batch_p2p_comm
