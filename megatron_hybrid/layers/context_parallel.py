"""Context parallelism: each rank holds part of the sequence; attention and Mamba need all of it.

The sequence is cut in zigzag: in 2 * CP chunks, of which rank r holds chunks r and 2 * CP - 1 - r,
so that causal attention costs every rank the same (megatron-core's order).

Legend: l whole sequence, b batch, c CP size; z, x, B, C, dt: the parts of the Mamba projection.
"""

import torch
from megatron.core.ssm.mamba_context_parallel import (
    MambaContextParallel as EngineMambaContextParallel,
)
from megatron.core.ssm.mamba_context_parallel import (
    _all_to_all_cp2hp,
    _all_to_all_hp2cp,
    _redo_attention_load_balancing,
    _undo_attention_load_balancing,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


class MambaContextParallel(EngineMambaContextParallel):
    """megatron-core's sequence-to-head exchange, in one all-to-all instead of five.

    The slices of the mixer's parameters (`get_A_log` and so on) are the engine's own.
    """

    def pre_conv_ssm(self, projected: Tensor, packed_seq_params: object = None) -> Tensor:
        """From a part of the sequence with all heads to the whole sequence with a part of them.

        Args:
            projected: `[l / c, b, z + x + B + C + dt]`, zigzag order.
            packed_seq_params: unused: documents do not change the zigzag over the whole row.

        Returns:
            `[l, b, (z + x + dt) / c + B + C of the groups used here]`, in order of the text. Where
            CP exceeds the groups of a TP rank, a group goes to every rank that has heads of it.
        """
        if self.cp_size == 1:
            return projected
        cp, group_width = self.cp_size, self.ngroups_local_tpcp * self.d_state
        group_parts = cp // self.group_repeat_count
        widths = [self.d_inner_local_tpcp] * (2 * cp)
        widths += [group_width] * (2 * group_parts)
        widths += [self.nheads_local_tpcp] * cp
        parts = torch.split(projected, widths, dim=-1)
        z, x, parts = parts[:cp], parts[cp : 2 * cp], parts[2 * cp :]
        B, C, dt = parts[:group_parts], parts[group_parts : 2 * group_parts], parts[-cp:]
        for_rank = []
        for rank in range(cp):
            group = rank // self.group_repeat_count
            for_rank += [z[rank], x[rank], B[group], C[group], dt[rank]]
        exchanged = _all_to_all_cp2hp(torch.cat(for_rank, dim=-1), self.cp_group)
        return _undo_attention_load_balancing(exchanged, cp)

    def post_conv_ssm(self, y: Tensor, packed_seq_params: object = None) -> Tensor:
        """Back again: `[l, b, x / c]` in order of the text -> `[l / c, b, x]` in zigzag order."""
        return super().post_conv_ssm(y, None)


def to_channels(
    part: Tensor, widths: list[int], cp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """From a part of the sequence with all channels to the whole sequence with a part of them.

    Args:
        part: `[l / c, b, sum of widths]`, zigzag order.
        widths: of the tensors packed in it, each of which is shared out.

    Returns:
        `[l, b, sum of widths / c]`, packed alike, in order of the text.
    """
    cp = cp_group.size()
    if cp == 1:
        return part
    shares = [each.chunk(cp, dim=-1) for each in part.split(widths, dim=-1)]
    for_rank = [share[rank] for rank in range(cp) for share in shares]
    exchanged = _all_to_all_cp2hp(torch.cat(for_rank, dim=-1), cp_group)
    return _undo_attention_load_balancing(exchanged, cp)


def to_sequence(part: Tensor, cp_group: torch.distributed.ProcessGroup) -> Tensor:
    """Back again: `[l, b, w / c]` in order of the text -> `[l / c, b, w]` in zigzag order."""
    if cp_group.size() == 1:
        return part
    zigzag = _redo_attention_load_balancing(part, cp_group.size())
    return _all_to_all_hp2cp(zigzag, cp_group)


def gather_sequence(part: Tensor, cp_group: torch.distributed.ProcessGroup) -> Tensor:
    """All parts of the sequence in order of the text: `[l / c, b, ...]` -> `[l, b, ...]`.

    Backward adds up what every rank's use of the whole sequence contributes to a part.
    """
    if cp_group.size() == 1:
        return part
    gathered = gather_from_sequence_parallel_region(part, group=cp_group)
    return _undo_attention_load_balancing(gathered, cp_group.size())


def local_chunks(length: int, cp_group: torch.distributed.ProcessGroup) -> list[tuple[int, int]]:
    """Where this rank's part lies in the whole sequence: (first, last + 1) of each chunk.

    Args:
        length: of the whole sequence, divisible by 2 * CP.
    """
    cp, rank = cp_group.size(), cp_group.rank()
    if cp == 1:
        return [(0, length)]
    size = length // (2 * cp)
    return [(i * size, (i + 1) * size) for i in (rank, 2 * cp - 1 - rank)]
