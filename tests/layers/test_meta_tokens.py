"""Meta tokens: what sees them, where documents are packed, and where nothing is learnt."""

import pytest
import torch
from torch import Tensor

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.packing import pack_documents
from megatron_hybrid.ops.attention import causal_attention
from megatron_hybrid.ops.segments import after_prefix
from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import HYMBA, ONE_RANK, VOCAB_SIZE, built, layout_config

LENGTHS = (3, 29, 1, 31)


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("lengths", [(300,), (7, 290, 3)], ids=str)
def test_attention_sees_them_from_everywhere(window: int | None, lengths: tuple[int, ...]) -> None:
    """By the mask's own words: no later key, of one's document and window, or a meta token."""
    draws = torch.Generator().manual_seed(0)
    metas, length = 5, 305
    query, key, value = (torch.randn(length, 1, 2, 4, generator=draws) for _ in range(3))
    document = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor((lengths[0] + metas, *lengths[1:]))
    )
    place = torch.arange(length)
    seen = document[:, None] == document
    if window is not None:
        seen &= place[:, None] - place < window
    seen = (seen | (place < metas)) & (place[:, None] >= place)
    if len(lengths) == 1 and window is not None:  # what the paper counts
        beside = (place - window + 1).clamp(0, metas)
        assert seen.sum(1).equal((place + 1).clamp(max=window) + beside)
    found = causal_attention(
        query, key, value, chunks=[(0, 200), (200, length)], window=window,
        seq_idx=document[None], num_meta_tokens=metas,
    )  # fmt: skip
    heads = [t[:, 0].transpose(0, 1) for t in (query, key, value)]
    scores = (heads[0] @ heads[1].mT / 2).masked_fill(~seen, -torch.inf)
    want = (scores.softmax(-1) @ heads[2]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found[:, 0], want)


def test_each_document_comes_after_them() -> None:
    """As a row: its first document has them already."""
    taken, documents, places = after_prefix(torch.tensor([[4, 4, 4, 7, 9, 9]]), 2)
    assert taken.tolist() == [0, 1, 2, 0, 1, 3, 0, 1, 4, 5]
    assert documents.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert taken[places].tolist() == list(range(6))


def losses_of_documents() -> tuple[Tensor, Tensor, Tensor]:
    """On a rank: losses of the documents of a packed row, of each as a row of its own, and as an
    evaluation has them."""
    from megatron_hybrid.evaluation.losses import TokenLosses
    from megatron_hybrid.training.step import local_batch, packed_seq_params

    config = layout_config(ONE_RANK, HYMBA, packed=True, recompute=False)
    draws = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, VOCAB_SIZE, (1, sum(LENGTHS) + 1), generator=draws)
    ends = torch.zeros(1, sum(LENGTHS), dtype=torch.bool)
    ends[0, torch.tensor(LENGTHS).cumsum(0) - 1] = True
    packing = pack_documents(ends)
    device = torch.device("cpu")

    def losses(model: torch.nn.Module, batch: Batch) -> Tensor:
        longer = batch.after(config.model.num_meta_tokens)
        local = local_batch(longer, device)
        assert longer.loss_mask[:, : config.model.num_meta_tokens].sum() == 0
        documents = packed_seq_params(longer, "torch", device)
        found: Tensor = model(
            local.tokens, local.position_ids, None, labels=local.labels,
            packed_seq_params=documents,
        )  # fmt: skip
        return found[:, config.model.num_meta_tokens :].detach()

    with built(config) as (model, _, _):
        for name, parameter in model[0].named_parameters():
            low, high = (0.5, 1.5) if "norm" in name else (-0.3, 0.3)
            parameter.data.uniform_(low, high, generator=draws)
        packed = losses(
            model[0],
            Batch(tokens[:, :-1], tokens[:, 1:], packing.loss_mask, packing.position_ids,
                  packing.cu_seqlens, packing.max_seqlen, packing.seq_idx),
        )  # fmt: skip
        alone, texts = [], []
        for part, labels in zip(
            tokens[:, :-1].split(LENGTHS, 1), tokens[:, 1:].split(LENGTHS, 1), strict=True
        ):
            places, learnt = torch.arange(part.shape[1])[None], torch.ones_like(part).float()
            alone.append(losses(model[0], Batch(part, labels, learnt, places)))
            texts.append(torch.cat((part, labels[:, -1:]), 1)[0].tolist())
        evaluated = TokenLosses(config, [model[0]], "torch", rows=3).of(texts)
    told = [loss for losses in evaluated for loss in losses]
    return packed, torch.cat(alone, 1), torch.tensor([told])


def test_packed_documents_are_as_each_alone() -> None:
    """Attention with and without a window, Mamba-1 and Mamba-2: each document sees them, and
    nothing else before its own first token."""
    ((packed, alone, evaluated),) = run_distributed(losses_of_documents, 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluated, alone, rtol=1e-5, atol=1e-5, check_dtype=False)
