"""Document boundaries inside a micro-batch equal a plain loop over the tokens."""

import pytest
import torch

from megatron_hybrid.data.packing import pack_documents

EOD = 9


def loop(tokens: torch.Tensor) -> tuple[list[int], list[int], list[int], list[float]]:
    """cu_seqlens, position_ids, seq_idx and loss_mask, one token after the other."""
    starts, positions, numbers, mask = [0], [], [], []
    for row in tokens.tolist():
        for column, token in enumerate(row):
            positions.append(len(positions) - starts[-1])
            numbers.append(len(starts) - 1)
            mask.append(0.0 if token == EOD else 1.0)
            if token == EOD or column == len(row) - 1:
                starts.append(len(positions))
    return starts, positions, numbers, mask


CASES = {
    "no_end": torch.ones(2, 5),
    "only_ends": torch.full((2, 3), EOD),
    "end_at_the_edges": torch.tensor([[EOD, 1, 1, EOD], [1, EOD, EOD, 1]]),
    "one_token": torch.tensor([[1]]),
    **{
        f"random_{seed}": torch.randint(
            0, EOD + 1, (3, 17 * seed), generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(1, 6)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop(name: str) -> None:
    """Every output, with its shape and dtype, for ends in every kind of place."""
    tokens = CASES[name].long()
    packing = pack_documents(tokens == EOD)
    cu_seqlens, positions, numbers, mask = loop(tokens)
    assert packing.cu_seqlens.tolist() == cu_seqlens
    assert packing.position_ids.tolist() == [positions]
    assert packing.seq_idx.tolist() == [numbers]
    assert packing.loss_mask.tolist() == [mask]
    assert packing.max_seqlen == max(positions) + 1
    assert packing.cu_seqlens.dtype == packing.seq_idx.dtype == torch.int32
    assert packing.position_ids.dtype == torch.int64
    assert packing.loss_mask.dtype == torch.float32
