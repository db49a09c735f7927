"""Core attention of the torch backend: causal or not, grouped queries, windows, documents, CP.

Legend: s sequence of this rank, l whole sequence (keys), b batch, n query heads and k key/value
heads of this TP rank, d head size.
"""

from contextlib import nullcontext

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_hybrid.layers.context_parallel import gather_sequence, local_chunks
from megatron_hybrid.ops.attention import causal_attention, full_attention


class DotProductAttention(MegatronModule):
    """What TEDotProductAttention is for the Transformer Engine backend, on torch's SDPA.

    Keys and values are gathered over the context-parallel ranks (megatron-core's `all_gather`
    communication); queries stay where they are. Has no parameters.

    Args:
        num_meta_tokens: at the beginning of each row, seen from all of it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        num_meta_tokens: int = 0,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self"
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask)
        self.causal = attn_mask_type == AttnMaskType.causal
        assert pg_collection is not None
        self.cp_group = pg_collection.cp
        self.num_meta_tokens = num_meta_tokens
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # megatron-core counts the tokens to the left, without the token itself.
        self.window = None if config.window_size is None else config.window_size[0] + 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend to all tokens up to one's own, or to all.

        Args:
            query: `[s, b, n, d]`.
            key: `[s, b, k, d]`; when generating, the whole cache `[l, b, k, d]`, of which the
                queries are the last s tokens.
            value: as the key.
            attention_mask: not used, as `attn_mask_type` and `attention_bias`: the layer's own.
            packed_seq_params: its `seq_idx [b, l]` numbers the documents; none sees another.

        Returns:
            `[s, b, n * d]`, dtype of the query.
        """
        seq_idx = None if packed_seq_params is None else packed_seq_params.seq_idx
        key = gather_sequence(key, self.cp_group)
        value = gather_sequence(value, self.cp_group)
        length = key.shape[0]
        if self.cp_group.size() > 1:
            chunks = local_chunks(length, self.cp_group)
        else:
            chunks = [(length - query.shape[0], length)]
        dropout = self.dropout if self.training else 0.0
        # Each TP rank has other heads, and draws for them from a generator of its own.
        own_draws = get_cuda_rng_tracker().fork() if dropout else nullcontext()
        with own_draws:
            if not self.causal:
                return full_attention(
                    query, key, value, chunks=chunks, seq_idx=seq_idx, dropout=dropout,
                    scale=self.softmax_scale,
                )  # fmt: skip
            return causal_attention(
                query,
                key,
                value,
                chunks=chunks,
                window=self.window,
                seq_idx=seq_idx,
                num_meta_tokens=self.num_meta_tokens,
                dropout=dropout,
                scale=self.softmax_scale,
            )
