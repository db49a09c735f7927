"""Parameters of one rank, by layer kind: the formulas of `model.counts`, cut by TP, EP and ETP."""

from dataclasses import dataclass

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP, MOE
from megatron_hybrid.model.counts import CONV_KERNEL
from megatron_hybrid.planner.layout import Layout


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        dense: in the run's format, shared out by the optimizer over DP and CP.
        fp32: always in fp32 (A_log, D and dt_bias of Mamba-2), else the same.
        expert: of experts, shared out over the ranks that hold the same ones.
        buffers_bytes: tensors beside parameters (an expert bias and its counts).
    """

    dense: int = 0
    fp32: int = 0
    expert: int = 0
    buffers_bytes: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(*(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """The four in order."""
        return self.dense, self.fp32, self.expert, self.buffers_bytes

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.fp32 + self.expert


def layer_parameters(model: ModelConfig, kind: str, layout: Layout) -> Parameters:
    """Of one layer on one rank."""
    d, tp = model.hidden_size, layout.tp
    if kind == MAMBA:
        assert model.mamba_num_heads is not None
        inner = model.mamba_num_heads * model.mamba_head_dim
        states = model.mamba_num_groups * model.mamba_state_dim
        width, conv = 2 * inner + 2 * states + model.mamba_num_heads, inner + 2 * states
        split = d * width + conv * (CONV_KERNEL + 1) + inner + inner * d
        return Parameters(dense=split // tp + d, fp32=3 * model.mamba_num_heads // tp)
    if kind == ATTENTION:
        heads, groups, channels = (
            model.num_attention_heads, model.num_query_groups, model.kv_channels,
        )  # fmt: skip
        assert heads is not None and groups is not None and channels is not None
        projected = (heads + 2 * groups) * channels
        biases = projected // tp + d if model.add_bias_linear else 0
        return Parameters(dense=d * (projected + heads * channels) // tp + biases + d)
    if kind == MLP:
        assert model.ffn_hidden_size is not None
        return Parameters(dense=_mlp(model, model.ffn_hidden_size, tp) + d)
    assert kind == MOE and model.num_moe_experts is not None
    assert model.moe_ffn_hidden_size is not None
    shared = model.moe_shared_expert_intermediate_size
    dense = model.num_moe_experts * d + d
    if shared is not None:
        dense += _mlp(model, shared, tp)
    here = model.num_moe_experts // layout.ep
    expert = here * _mlp(model, model.moe_ffn_hidden_size, layout.etp)
    buffers = 8 * model.num_moe_experts if model.moe_router_enable_expert_bias else 0
    return Parameters(dense=dense, expert=expert, buffers_bytes=buffers)


def _mlp(model: ModelConfig, inner: int, tp: int) -> int:
    """Matrices of an MLP on a rank, and biases: fc1's are split, fc2's are not."""
    matrices = 3 if model.activation == "swiglu" else 2
    biases = (matrices - 1) * inner // tp + model.hidden_size if model.add_bias_linear else 0
    return matrices * model.hidden_size * inner // tp + biases


def stage_parameters(model: ModelConfig, layout: Layout, stage: int) -> Parameters:
    """Of all that a pipeline stage has on one rank."""
    found = Parameters()
    for chunk in layout.stage_chunks(stage):
        for kind in chunk:
            found += layer_parameters(model, kind, layout)
    assert model.padded_vocab_size is not None
    words = model.padded_vocab_size * model.hidden_size // layout.tp
    last = stage == layout.pp - 1
    if stage == 0:
        found += Parameters(dense=words)
    if last:
        found += Parameters(dense=model.hidden_size)
        # A tied output layer is the embedding, but on another stage it needs a copy.
        if model.untie_embeddings_and_output_weights or layout.pp > 1:
            found += Parameters(dense=words)
    return found
