"""Multi-token prediction: losses of modules are megatron-core's, within documents, in training."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    AHEAD,
    ONE_RANK,
    SEQ_LENGTH,
    VOCAB_SIZE,
    built,
    layout_config,
    sample,
)

DOCUMENTS = (23, 1, 2, 38)


def of_engine(model: Any, tokens: Tensor, labels: Tensor) -> list[float]:
    """Mean losses of the modules as megatron-core's own forward finds them."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.multi_token_prediction import (
        MTPLossLoggingHelper,
        MultiTokenPredictionLayer,
    )

    from megatron_hybrid.model.prediction import PredictionLayer

    ours = PredictionLayer._get_embeddings
    PredictionLayer._get_embeddings = MultiTokenPredictionLayer._get_embeddings
    try:
        HybridModel.forward(model, tokens, None, None, labels=labels)
    finally:
        PredictionLayer._get_embeddings = ours
    return MTPLossLoggingHelper.tracker["loss_values"].tolist()  # type: ignore[no-any-return]


def of_objective(chunk: Any, stepper: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses `[3, b, s]` of the model and both modules, and what the objective added."""
    batch = stepper.objective.prepare(batch)
    from megatron_hybrid.training.step import packed_seq_params

    packed = packed_seq_params(batch, "torch", torch.device("cpu"))
    inputs = stepper.objective.inputs(batch)
    losses = chunk(
        batch.tokens, batch.position_ids, None,
        labels=batch.labels, packed_seq_params=packed, **inputs,
    )  # fmt: skip
    return losses, dict(batch.extra)


def check_losses() -> None:
    """On a rank: against the engine's own; of packed documents, against each by itself."""
    from megatron.core.utils import unwrap_model

    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.data.packing import pack_documents
    from megatron_hybrid.training.step import BatchShape

    torch.manual_seed(0)
    with built(layout_config(ONE_RANK, AHEAD, packed=False, recompute=False)) as (ddp, _, stepper):
        chunk = unwrap_model(ddp[0])
        for name, parameter in chunk.named_parameters():
            if "norm" not in name and "mixer" not in name:
                parameter.data.uniform_(-0.2, 0.2)
        batch = sample(0, packed=False)
        losses, extra = of_objective(chunk, stepper, batch)
        masks = [extra[f"mtp_{k}_mask"] for k in (1, 2)]
        assert [int(mask.sum()) for mask in masks] == [SEQ_LENGTH - 1, SEQ_LENGTH - 2]
        means = [
            float(((loss * mask).sum() / mask.sum()).detach())
            for loss, mask in zip(losses[1:], masks, strict=True)
        ]
        assert means == pytest.approx(of_engine(chunk, batch.tokens, batch.labels), rel=1e-6)

        tokens = torch.randint(1, VOCAB_SIZE, (1, SEQ_LENGTH + 1))
        ends = torch.zeros(1, SEQ_LENGTH, dtype=torch.bool)
        ends[0, torch.tensor(DOCUMENTS).cumsum(0) - 1] = True
        found = pack_documents(ends)
        row = Batch(
            tokens[:, :-1], tokens[:, 1:], found.loss_mask, found.position_ids, found.cu_seqlens,
            found.max_seqlen, found.seq_idx,
        )  # fmt: skip
        packed, extra = of_objective(chunk, stepper, row)
        start = 0
        for length in DOCUMENTS:
            span = slice(start, start + length)
            alone = Batch(*(each[:, span] for each in (row.tokens, row.labels, row.loss_mask)),
                          torch.arange(length)[None])  # fmt: skip
            losses, of_alone = of_objective(chunk, stepper, alone)
            for k in (1, 2):
                mask = extra[f"mtp_{k}_mask"][:, span]
                assert int(mask.sum()) == max(length - 1 - k, 0)
                assert torch.equal(mask, of_alone[f"mtp_{k}_mask"])
                torch.testing.assert_close(packed[k][:, span] * mask, losses[k] * mask)
            start += length

        shape = BatchShape(2, SEQ_LENGTH)
        evaluated = stepper.evaluate(iter([sample(0, False), sample(1, False)]), [shape])
        data = iter([sample(0, False), sample(1, False)])
        trained = stepper.train(data, shape, float("inf"), [])
        assert evaluated.extra == {}
        assert set(trained.reports) == {"mtp_1_loss", "mtp_2_loss"}
        assert trained.loss == pytest.approx(evaluated.loss, rel=1e-6)
        # Of the step, of both samples.
        assert trained.reports["mtp_1_loss"] == pytest.approx(means[0], rel=0.2)


def test_losses_of_modules() -> None:
    """They are the engine's, a document's own, no part of the loss, and none in evaluations."""
    run_distributed(check_losses, 1)


def check_gradients(tied: bool) -> None:
    """On a rank: the gradient is that of the loss plus the weighted losses of the modules."""
    from megatron.core.utils import unwrap_model

    from megatron_hybrid.training.step import BatchShape

    config = layout_config(ONE_RANK, AHEAD, packed=False, recompute=False)
    # Losses of the router are attached to what they are of, whatever is asked for.
    changes = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
    model = config.model.model_copy(
        update=changes | {"untie_embeddings_and_output_weights": not tied}
    )
    with built(config.model_copy(update={"model": model})) as (ddp, _, stepper):
        chunk = unwrap_model(ddp[0])
        losses, extra = of_objective(chunk, stepper, sample(0, packed=False))
        total = losses[0].sum() + sum(
            0.3 / 2 * (losses[k] * extra[f"mtp_{k}_mask"]).sum() for k in (1, 2)
        )
        parameters = dict(chunk.named_parameters())
        expected = torch.autograd.grad(total / SEQ_LENGTH, list(parameters.values()))
        stepper.train(iter([sample(0, packed=False)]), BatchShape(1, SEQ_LENGTH), float("inf"), [])
        for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
            torch.testing.assert_close(
                parameter.main_grad.view_as(gradient), gradient, rtol=1e-5, atol=1e-7, msg=name
            )
            assert gradient.any() or "bias" in name, name


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_modules(tied: bool) -> None:
    """The factor, and that every parameter has its gradient; of one matrix of words, from all."""
    run_distributed(check_gradients, 1, tied)
