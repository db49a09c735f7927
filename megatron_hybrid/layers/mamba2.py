"""The Mamba-2 mixer under tensor, sequence and context parallelism.

megatron-core's own mixer needs Triton kernels; this one runs on any device with the same parameter
names, shapes and checkpoint keys (`megatron.core.ssm.mamba_mixer.MambaMixer`).

Legend: s sequence of this rank, l whole sequence, b batch, h hidden size, d channels (heads times
head size), w = 2 d + 2 groups * state + heads: the projection, packed [z, x, B, C, dt]; each part
is sharded over TP on its own. Sizes named here are those of one TP rank.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.context_parallel import MambaContextParallel
from megatron_hybrid.layers.mamba import (
    CONV_KERNEL_SIZE,
    MambaMixer,
    MambaMixerSubmodules,
    draw_convolution,
    draw_dt_bias,
)
from megatron_hybrid.layers.norm import GroupedRMSNorm
from megatron_hybrid.layers.state_passing import (
    chunk_documents,
    from_chunks,
    inputs_before,
    states_before,
    to_chunks,
)
from megatron_hybrid.ops.mamba2 import mamba2_split_conv1d_scan
from megatron_hybrid.ops.mamba2_summary import mamba2_chunk_summary
from megatron_hybrid.ops.scaled_parts import scaled_parts
from megatron_hybrid.ops.ssd import SSDBackend

GATED_NORM_EPS = 1e-5
A_INIT_RANGE = (1.0, 16.0)


class Mamba2Mixer(MambaMixer):
    """Projection, causal convolution, state-space scan, gate, grouped norm, projection.

    Forward: `[s, b, h]` -> (`[s, b, h]`, bias or None). Heads and groups are sharded over TP; under
    context parallelism the scan runs over the whole sequence with a part of the heads, or over this
    rank's part of it with all of them.

    Args:
        kernel: "torch" or "mamba_ssm", which kernel of `megatron_hybrid.ops` runs the scan.
        gated_norm: whether a grouped norm follows the gate.
        multipliers: factors on the projected z, x, B, C and dt; empty: none.
        num_meta_tokens: as of MambaMixer.
        state_passing: under context parallelism each rank keeps its part of the sequence.
        d_model: hidden size h.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        kernel: SSDBackend = "torch",
        gated_norm: bool = True,
        multipliers: tuple[float, ...] = (),
        num_meta_tokens: int = 0,
        state_passing: bool = False,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(config, num_meta_tokens)
        assert pg_collection is not None
        self.kernel, self.multipliers = kernel, multipliers
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.state_passing = state_passing and self.cp_group.size() > 1
        tp_size = self.tp_group.size()
        self.head_dim, self.state_dim = config.mamba_head_dim, config.mamba_state_dim
        assert config.mamba_num_heads % tp_size == 0 and config.mamba_num_groups % tp_size == 0
        self.num_heads = config.mamba_num_heads // tp_size
        self.num_groups = config.mamba_num_groups // tp_size
        self.d_inner = self.num_heads * self.head_dim
        groups_width = self.num_groups * self.state_dim
        self.in_proj_parts = {
            "z": self.d_inner, "x": self.d_inner, "B": groups_width, "C": groups_width,
            "dt": self.num_heads,
        }  # fmt: skip
        self.conv_parts = {part: self.in_proj_parts[part] for part in ("x", "B", "C")}

        self._build_in_proj(submodules, d_model, sum(self.in_proj_parts.values()) * tp_size, name)
        self._pack("in_proj.weight", self.in_proj.weight, self.in_proj_parts)
        self._build_scan_parameters()
        self.norm = None
        if gated_norm:
            self.norm = GroupedRMSNorm(
                config, self.d_inner, self.d_inner // self.num_groups, GATED_NORM_EPS, self.tp_group
            )
        self._build_out_proj(submodules, self.d_inner * tp_size, d_model, name)
        if self.state_passing:
            return
        self.cp = MambaContextParallel(
            cp_group=pg_collection.cp,
            d_inner_local_tp=self.d_inner,
            nheads_local_tp=self.num_heads,
            ngroups_local_tp=self.num_groups,
            d_state=self.state_dim,
            conv1d_weight_cp1=self.conv1d_weight,
            conv1d_bias_cp1=self.conv1d_bias,
            conv1d_padding=CONV_KERNEL_SIZE - 1,
            dt_bias_cp1=self.dt_bias,
            A_log_cp1=self.A_log,
            D_cp1=self.D,
            D_has_hdim=False,
        )

    def _build_scan_parameters(self) -> None:
        """conv1d_weight `[channels, 1, 4]`, conv1d_bias `[channels]`; A_log, D, dt_bias `[heads]`.

        Drawn as megatron-core draws them (Mamba-2's own ranges): A uniform, softplus(dt_bias)
        log-uniform.
        """
        channels, dtype = sum(self.conv_parts.values()), self.config.params_dtype
        self.conv1d_weight = self._parameter(channels, 1, CONV_KERNEL_SIZE, dtype=dtype)
        self.conv1d_bias = self._parameter(channels, dtype=dtype)
        self._pack("conv1d_weight", self.conv1d_weight, self.conv_parts)
        self._pack("conv1d_bias", self.conv1d_bias, self.conv_parts)
        self.A_log = self._parameter(self.num_heads)
        self.dt_bias = self._parameter(self.num_heads)
        self.D = self._parameter(self.num_heads)
        if not self.config.perform_initialization:
            return
        with torch.no_grad(), get_cuda_rng_tracker().fork():
            self.D.fill_(1.0)
            draw_convolution(self.conv1d_weight, self.conv1d_bias)
            draw_dt_bias(self.dt_bias)
            self.A_log.uniform_(*A_INIT_RANGE).log_()

    def _scan(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """`[s, b, w]` -> `[s, b, d]`: convolution, scan, gate and norm."""
        if self.multipliers:
            projected = scaled_parts(projected, self.in_proj_parts.values(), self.multipliers)
        if self.state_passing:
            return self._scan_chunks(projected, seq_idx)
        # A group of channels may lie on several context-parallel ranks during the scan.
        norm = self.norm if self.cp.cp_size == 1 else None
        gathered = self.cp.pre_conv_ssm(projected)  # [l, b, w / CP]
        gathered, seq_idx, places = self._each_after_metas(gathered, seq_idx)
        y = mamba2_split_conv1d_scan(
            gathered.transpose(0, 1),
            self.cp.get_conv1d_weight().squeeze(1),
            self.cp.get_conv1d_bias(),
            self.cp.get_dt_bias(),
            -torch.exp(self.cp.get_A_log()),
            self.cp.get_D(),
            head_dim=self.head_dim,
            num_groups=self.cp.ngroups_local_tpcp,
            seq_idx=seq_idx,
            norm_weight=None if norm is None else norm.weight,
            norm_group_size=None if norm is None else norm.group_size,
            norm_eps=GATED_NORM_EPS,
            backend=self.kernel,
        ).transpose(0, 1)
        if places is not None:
            y = y[places]
        if self.cp.cp_size == 1:
            return y
        y = self.cp.post_conv_ssm(y)
        return y if self.norm is None else self.norm(y)

    def _scan_chunks(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """The same of this rank's chunks, after what the chunks before them leave."""
        halo, group = CONV_KERNEL_SIZE - 1, self.cp_group
        documents = None if seq_idx is None else chunk_documents(seq_idx, halo, group)
        rows = to_chunks(projected)
        convolved = rows[..., self.d_inner : -self.num_heads]
        before = inputs_before(convolved, halo, documents, group)
        labels = None if documents is None else documents.seq_idx
        weight, A = self.conv1d_weight.squeeze(1), -torch.exp(self.A_log)
        decay, added = mamba2_chunk_summary(
            rows, weight, self.conv1d_bias, self.dt_bias, A,
            head_dim=self.head_dim, num_groups=self.num_groups, before=before, seq_idx=labels,
        )  # fmt: skip
        y = mamba2_split_conv1d_scan(
            rows, weight, self.conv1d_bias, self.dt_bias, A, self.D,
            head_dim=self.head_dim,
            num_groups=self.num_groups,
            seq_idx=labels,
            norm_weight=None if self.norm is None else self.norm.weight,
            norm_group_size=None if self.norm is None else self.norm.group_size,
            norm_eps=GATED_NORM_EPS,
            before=before,
            initial_states=states_before(decay[..., None, None], added, documents, group),
            backend=self.kernel,
        )  # fmt: skip
        return from_chunks(y)
