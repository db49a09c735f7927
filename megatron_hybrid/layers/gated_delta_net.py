"""The gated delta net under tensor, sequence and context parallelism.

Parameters are those of megatron-core's `GatedDeltaNet`, named and drawn as there; A_log and dt_bias
are kept in fp32.

Legend: s sequence of this rank, l whole sequence, b batch, h hidden size, k key heads of n
channels, v value heads of p channels, c = 2kn + vp channels of the convolution. Sizes named here
are those of one TP rank. The projection is packed [query, key, value, z, beta, alpha].
"""

from functools import partial

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_hybrid.layers.context_parallel import to_channels, to_sequence
from megatron_hybrid.layers.mamba import (
    CONV_KERNEL_SIZE,
    MambaMixer,
    MambaMixerSubmodules,
    draw_convolution,
)
from megatron_hybrid.layers.norm import parameter_device
from megatron_hybrid.layers.state_passing import (
    chunk_documents,
    from_chunks,
    inputs_before,
    states_before,
    to_chunks,
)
from megatron_hybrid.ops.causal_conv1d import causal_conv1d, causal_conv1d_after
from megatron_hybrid.ops.gated_delta import gated_delta_rule, gated_delta_summary
from megatron_hybrid.ops.gated_delta.gates import decays_and_rates, gated_norm
from megatron_hybrid.ops.recompute import recomputed

A_INIT_RANGE = (1.0, 16.0)


class GatedDeltaNet(MambaMixer):
    """Projection, causal convolution, gated delta rule, norm of each head and gate, projection.

    Forward: `[s, b, h]` -> (`[s, b, h]`, bias or None). Heads are sharded over TP, and under
    context parallelism again over the ranks that share a sequence, or each of those keeps its part
    of the sequence. In the engine's layer it stands in the place of attention.

    Args:
        config: its `linear_...` fields are the sizes.
        num_meta_tokens, state_passing: as of Mamba2Mixer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        cp_comm_type: str | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
        num_meta_tokens: int = 0,
        state_passing: bool = False,
    ) -> None:
        super().__init__(config, num_meta_tokens)
        assert pg_collection is not None
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.state_passing = state_passing and self.cp_group.size() > 1
        # Of what a rank computes: heads are shared out over these.
        self.head_ranks = 1 if self.state_passing else self.cp_group.size()
        tp = self.tp_group.size()
        assert config.linear_num_key_heads is not None
        assert config.linear_num_value_heads is not None
        assert config.linear_num_key_heads % (tp * self.head_ranks) == 0
        self.key_heads = config.linear_num_key_heads // tp
        self.value_heads = config.linear_num_value_heads // tp
        assert config.linear_key_head_dim is not None
        assert config.linear_value_head_dim is not None
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        convolved = {"query": keys, "key": keys, "value": values}
        self.in_proj_parts = convolved | {
            "z": values, "beta": self.value_heads, "alpha": self.value_heads,
        }  # fmt: skip
        width = tp * sum(self.in_proj_parts.values())
        self._build_in_proj(submodules, config.hidden_size, width, name)
        self._pack("in_proj.weight", self.in_proj.weight, self.in_proj_parts)
        self._build_rule_parameters(convolved)
        self._build_out_proj(submodules, tp * values, config.hidden_size, name)

    def _build_rule_parameters(self, convolved: dict[str, int]) -> None:
        """conv1d_weight `[c, 1, 4]`; A_log, dt_bias `[v]`; out_norm_weight `[p]`, of all ranks."""
        dtype, channels = self.config.params_dtype, sum(convolved.values())
        self.conv1d_weight = self._parameter(channels, 1, CONV_KERNEL_SIZE, dtype=dtype)
        self._pack("conv1d_weight", self.conv1d_weight, convolved)
        self.dt_bias = self._parameter(self.value_heads)
        self.A_log = self._parameter(self.value_heads)
        device = parameter_device(self.config)
        self.out_norm_weight = nn.Parameter(torch.ones(self.value_dim, dtype=dtype, device=device))
        self.whole = ("out_norm_weight",)
        self.keys = {
            "conv1d_weight": "conv1d.weight", "out_norm_weight": "out_norm.weight",
        }  # fmt: skip
        if not self.config.perform_initialization:
            return
        with torch.no_grad(), get_cuda_rng_tracker().fork():
            draw_convolution(self.conv1d_weight)
            self.dt_bias.fill_(1.0)
            self.A_log.copy_(self.A_log.uniform_(*A_INIT_RANGE).log())

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As `MambaMixer.forward`.

        Args:
            attention_mask: not used, as nothing comes from later tokens.
            unused: what the engine's layer tells attention beside these.
        """
        return super().forward(
            hidden_states, inference_context, packed_seq_params=packed_seq_params
        )

    def _scan(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """`[s, b, width]` -> `[s, b, vp]`: convolution, rule, norm and gate."""
        if self.state_passing:
            return self._scan_chunks(projected, seq_idx)
        gathered = to_channels(projected, list(self.in_proj_parts.values()), self.cp_group)
        gathered, seq_idx, places = self._each_after_metas(gathered, seq_idx)
        taps, packed = self._taps(), gathered.transpose(0, 1)
        # It keeps several tensors as large as its inputs, and takes little time.
        convolve = partial(causal_conv1d, seq_idx=seq_idx)
        qkv = recomputed(convolve, packed[..., : len(taps)], taps)
        inputs = self._inputs_of_rule(qkv, packed)
        y, _ = gated_delta_rule(*inputs, seq_idx=seq_idx)
        row = self._normed(y, packed).transpose(0, 1)
        return to_sequence(row if places is None else row[places], self.cp_group)

    def _scan_chunks(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """The same of this rank's chunks, after what the chunks before them leave."""
        halo, group = CONV_KERNEL_SIZE - 1, self.cp_group
        documents = None if seq_idx is None else chunk_documents(seq_idx, halo, group)
        labels = None if documents is None else documents.seq_idx
        taps, rows = self._taps(), to_chunks(projected)
        qkv = rows[..., : len(taps)]
        before = inputs_before(qkv, halo, documents, group)
        convolve = partial(causal_conv1d_after, seq_idx=labels)
        qkv = recomputed(convolve, qkv, taps, None, before)
        q, k, v, g, rates = self._inputs_of_rule(qkv, rows)
        transfer, added = gated_delta_summary(q, k, v, g, rates, seq_idx=labels)
        states = states_before(transfer, added, documents, group, matrices=True)
        y, _ = gated_delta_rule(q, k, v, g, rates, seq_idx=labels, initial_state=states)
        return from_chunks(self._normed(y, rows))

    def _taps(self) -> Tensor:
        """Of the convolution `[c / CP, 4]`, of the heads of this rank."""
        convolved = list(self.in_proj_parts.values())[:3]
        taps = [self._of_cp_rank(each) for each in self.conv1d_weight.split(convolved)]
        return torch.cat(taps).squeeze(1)

    def _inputs_of_rule(self, qkv: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, g and beta of the rule, from the convolved and from all that was projected."""
        parts = [part // self.head_ranks for part in self.in_proj_parts.values()]
        q, k, v = qkv.split(parts[:3], dim=-1)
        beta, alpha = packed[..., -sum(parts[4:]) :].split(parts[4:], dim=-1)
        A_log, dt_bias = self._of_cp_rank(self.A_log), self._of_cp_rank(self.dt_bias)
        return (
            q.unflatten(-1, (-1, self.key_dim)),
            k.unflatten(-1, (-1, self.key_dim)),
            v.unflatten(-1, (-1, self.value_dim)),
            *decays_and_rates(alpha, beta, A_log, dt_bias),
        )

    def _normed(self, y: Tensor, packed: Tensor) -> Tensor:
        """`[b, l, heads, p]` and all that was projected -> `[b, l, heads * p]`, normed."""
        parts = [part // self.head_ranks for part in self.in_proj_parts.values()]
        z = packed.split(parts, dim=-1)[3].unflatten(-1, (-1, self.value_dim))
        # Each TP rank has its own heads' part of the gradient.
        weight = copy_to_tensor_model_parallel_region(self.out_norm_weight, group=self.tp_group)
        return recomputed(gated_norm, y, z, weight, self.config.layernorm_epsilon).flatten(-2)
