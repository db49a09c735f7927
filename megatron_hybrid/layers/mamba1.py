"""The Mamba-1 mixer under tensor, sequence and context parallelism.

Parameters are those of mamba-ssm's `Mamba`, drawn as it draws them.

Legend: s sequence of this rank, l whole sequence, b batch, h hidden size, d channels, n state, r
rank of dt; the projection is packed [x, z]. Sizes named here are those of one TP rank.
"""

import math
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import softplus

from megatron_hybrid.layers.context_parallel import to_channels, to_sequence
from megatron_hybrid.layers.mamba import (
    CONV_KERNEL_SIZE,
    MambaMixer,
    MambaMixerSubmodules,
    draw_convolution,
    draw_dt_bias,
)
from megatron_hybrid.layers.norm import WholeRMSNorm
from megatron_hybrid.layers.state_passing import (
    chunk_documents,
    from_chunks,
    inputs_before,
    states_before,
    to_chunks,
)
from megatron_hybrid.ops.causal_conv1d import causal_conv1d, causal_conv1d_after
from megatron_hybrid.ops.linear import linear
from megatron_hybrid.ops.recompute import recomputed
from megatron_hybrid.ops.selective_scan import ScanBackend, selective_scan


class Mamba1Mixer(MambaMixer):
    """Projection, causal convolution, selective scan, gate, projection.

    Forward: `[s, b, h]` -> (`[s, b, h]`, bias or None). Channels are sharded over TP, and under
    context parallelism again over the ranks that share a sequence, or each of those keeps its part
    of the sequence; what all channels say together of dt, B and C is added up.

    Args:
        kernel: "torch" or "mamba_ssm", which kernel of `megatron_hybrid.ops` runs the scan.
        intermediate_size: channels d of all TP ranks.
        dt_rank: r.
        d_model: hidden size h.
        num_meta_tokens, state_passing: as of Mamba2Mixer.
        inner_layernorms: what the steps are made of, B and C are normed, each by itself (Jamba).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        intermediate_size: int,
        dt_rank: int,
        kernel: ScanBackend = "torch",
        inner_layernorms: bool = False,
        num_meta_tokens: int = 0,
        state_passing: bool = False,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(config, num_meta_tokens)
        assert pg_collection is not None
        self.kernel = kernel
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        tp_size = self.tp_group.size()
        self.state_passing = state_passing and self.cp_group.size() > 1
        # Of what a rank computes: channels are shared out over these.
        self.channel_ranks = 1 if self.state_passing else self.cp_group.size()
        assert intermediate_size % (tp_size * self.channel_ranks) == 0
        self.d_inner, self.all_channels = intermediate_size // tp_size, intermediate_size
        self.dt_rank, self.state_dim = dt_rank, config.mamba_state_dim
        self.in_proj_parts = self._parts_of_in_proj()
        width = tp_size * sum(self.in_proj_parts.values())
        self._build_in_proj(submodules, d_model, width, name)
        self._pack("in_proj.weight", self.in_proj.weight, self.in_proj_parts)
        self._build_scan_parameters()
        self.inner_layernorms = inner_layernorms
        if inner_layernorms:
            eps = config.layernorm_epsilon
            self.dt_layernorm = WholeRMSNorm(config, dt_rank, eps)
            self.B_layernorm = WholeRMSNorm(config, self.state_dim, eps)
            self.C_layernorm = WholeRMSNorm(config, self.state_dim, eps)
        self._build_out_proj(submodules, intermediate_size, d_model, name)

    def _parts_of_in_proj(self) -> dict[str, int]:
        """What this TP rank projects to, in order, with widths."""
        return {"x": self.d_inner, "z": self.d_inner}

    def _build_scan_parameters(self) -> None:
        """conv1d_weight `[d, 1, 4]`, conv1d_bias `[d]`; x_proj_weight `[r + 2n, d]`, dt_proj_weight
        `[d, r]`, dt_bias `[d]`; A_log `[d, n]`, D `[d]`.
        """
        d, n, r, dtype = self.d_inner, self.state_dim, self.dt_rank, self.config.params_dtype
        self.conv1d_weight = self._parameter(d, 1, CONV_KERNEL_SIZE, dtype=dtype)
        self.conv1d_bias = self._parameter(d, dtype=dtype)
        self.x_proj_weight = self._parameter(r + 2 * n, d, dtype=dtype, dim=1)
        self.dt_proj_weight = self._parameter(d, r, dtype=dtype)
        self.dt_bias = self._parameter(d)
        self.A_log = self._parameter(d, n)
        self.D = self._parameter(d)
        self.dims["x_proj_weight"] = 1
        self.keys |= {"x_proj_weight": "x_proj.weight", "dt_proj_weight": "dt_proj.weight"}
        if not self.config.perform_initialization:
            return
        with torch.no_grad(), get_cuda_rng_tracker().fork():
            self.D.fill_(1.0)
            draw_convolution(self.conv1d_weight, self.conv1d_bias)
            bound = 1 / math.sqrt(self.all_channels)
            self.x_proj_weight.uniform_(-bound, bound)
            bound = 1 / math.sqrt(r)
            self.dt_proj_weight.uniform_(-bound, bound)
            draw_dt_bias(self.dt_bias)
            rates = torch.arange(1, n + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(rates.log().expand(d, n))

    def _scan(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """`[s, b, 2d]` -> `[s, b, d]`: convolution, scan and gate, of the channels of this rank."""
        if self.state_passing:
            return self._scan_chunks(projected, seq_idx)
        gathered = to_channels(projected, [self.d_inner] * 2, self.cp_group)
        gathered, seq_idx, places = self._each_after_metas(gathered, seq_idx)
        x, z = gathered.transpose(0, 1).chunk(2, dim=-1)  # [b, l, d / CP]
        y, _ = self._scanner(x, z, seq_idx)()
        y = y.transpose(0, 1)
        return to_sequence(y if places is None else y[places], self.cp_group)

    def _scan_chunks(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """The same of this rank's chunks, after what the chunks before them leave."""
        halo, group = CONV_KERNEL_SIZE - 1, self.cp_group
        documents = None if seq_idx is None else chunk_documents(seq_idx, halo, group)
        labels = None if documents is None else documents.seq_idx
        x, z = to_chunks(projected).chunk(2, dim=-1)
        scan = self._scanner(x, z, labels, inputs_before(x, halo, documents, group))
        # What a chunk leaves of a state before it, and what it adds.
        steps = softplus(scan.keywords["dt"] + self.dt_bias).sum(1)
        transfer = torch.exp(steps[..., None] * scan.keywords["A"])
        if labels is not None:
            transfer = transfer * (labels[:, 0] == labels[:, -1])[:, None, None]
        _, added = scan()
        y, _ = scan(initial_state=states_before(transfer, added, documents, group))
        return from_chunks(y)

    def _scanner(
        self, x: Tensor, z: Tensor, seq_idx: Tensor | None, before: Tensor | None = None
    ) -> partial[tuple[Tensor, Tensor]]:
        """The scan, after the convolution, of x and z `[b, l, d / CP]`, which waits for its state.

        Args:
            before: inputs of the convolution before the first token `[b, 3, d / CP]`.
        """
        weight, bias, dt_proj, dt_bias, A_log, D = (
            self._of_cp_rank(each)
            for each in (self.conv1d_weight, self.conv1d_bias, self.dt_proj_weight, self.dt_bias,
                         self.A_log, self.D)
        )  # fmt: skip
        # It keeps several tensors as large as x, and takes little time.
        if before is None:
            x = recomputed(partial(causal_conv1d, seq_idx=seq_idx), x, weight.squeeze(1), bias)
        else:
            convolve = partial(causal_conv1d_after, seq_idx=seq_idx)
            x = recomputed(convolve, x, weight.squeeze(1), bias, before)
        projection = self._of_cp_rank(self.x_proj_weight, dim=1)
        low, B, C = self._of_all_channels(linear(x, projection))
        dt, A = linear(low, dt_proj), -torch.exp(A_log)
        return partial(
            selective_scan, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
            seq_idx=seq_idx, backend=self.kernel,
        )  # fmt: skip

    def _of_all_channels(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the steps are made of, B and C, added up over all ranks with other channels of the
        same tokens, and normed where they are; of gradients, too.

        Gradients of the norms' weights are whole on each TP rank, and of its channels or tokens on
        each of context parallelism, over which the engine adds them up.
        """
        tp_group, cp_group = self.tp_group, self.cp_group
        for group, ranks in ((tp_group, tp_group.size()), (cp_group, self.channel_ranks)):
            if ranks > 1:
                part = reduce_from_tensor_model_parallel_region(part, group=group)
        if self.channel_ranks > 1:
            part = copy_to_tensor_model_parallel_region(part, group=cp_group)
        sizes = [self.dt_rank, self.state_dim, self.state_dim]
        if self.inner_layernorms:
            norms = (self.dt_layernorm, self.B_layernorm, self.C_layernorm)
            normed = (norm(x) for norm, x in zip(norms, part.split(sizes, dim=-1), strict=True))
            part = torch.cat(tuple(normed), dim=-1)
        if tp_group.size() > 1:
            part = copy_to_tensor_model_parallel_region(part, group=tp_group)
        low, B, C = part.split(sizes, dim=-1)
        return low, B, C
