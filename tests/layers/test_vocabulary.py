"""Rows of the vocabulary that stand for no word: neutral in every loss on logits."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.layers.vocabulary import (
    BLOCK_ROWS,
    PADDING_LOGIT,
    draw_vocabulary,
    leave_out_padding,
)
from megatron_hybrid.testing import run_distributed

RANKS, ROWS, HIDDEN = 3, 12, 8
SEQUENCE, BATCH = 5, 2


def inputs(words: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states `[s, b, h]`, weight `[ROWS, h]`, labels and a gradient `[s, b]`.

    The words' logits are mostly far below 0; the padding's rows hold what a checkpoint had there.
    """
    draws = torch.Generator().manual_seed(words)
    hidden = torch.rand(SEQUENCE, BATCH, HIDDEN, generator=draws) + 1.0
    weight = torch.randn(ROWS, HIDDEN, generator=draws)
    weight[:words] -= 0.5
    labels = torch.randint(0, words, (SEQUENCE, BATCH), generator=draws)
    return hidden, weight, labels, torch.rand(SEQUENCE, BATCH, generator=draws)


def losses_by_name() -> dict[str, Callable[[Tensor, Tensor, Any], Tensor]]:
    """Every cross-entropy that a model may end in on some backend, but Transformer Engine's."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    from megatron_hybrid.model.served import served

    engine = served("cross_entropy", "transformer_engine")
    return {
        "torch": served("cross_entropy", "torch"),
        "engine": lambda logits, labels, group: engine(logits, labels, tp_group=group),
        "engine fused": fused_vocab_parallel_cross_entropy,
    }


def sharded_losses(dtype: torch.dtype) -> dict[tuple[int, str, str], tuple[Tensor, ...]]:
    """On a rank: losses, gradients of hidden states and of this rank's rows, by words, product
    and loss.
    """
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_hybrid.layers.linear import parallel_linear
    from megatron_hybrid.platform import initialize

    initialize()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    group = parallel_state.get_tensor_model_parallel_group()
    config = ModelParallelConfig(
        tensor_model_parallel_size=RANKS, params_dtype=dtype, perform_initialization=False
    )
    found = {}
    for words in range(1, ROWS + 1):
        hidden, weight, labels, grad = inputs(words)
        for product in ("torch", "engine"):
            layer = ColumnParallelLinear(
                HIDDEN, ROWS, config=config, init_method=lambda _: None, bias=False,
                gather_output=False, skip_bias_add=False, tp_group=group,
            )  # fmt: skip
            if product == "torch":
                layer._forward_impl = parallel_linear
            layer.weight.data.copy_(weight.chunk(RANKS)[group.rank()])
            leave_out_padding(layer, words)
            for name, loss in losses_by_name().items():
                layer.weight.grad = None
                x = hidden.to(dtype, copy=True).requires_grad_()
                logits, _ = layer(x)
                losses = loss(logits, labels, group)
                losses.backward(grad.to(losses.dtype))
                found[words, product, name] = (losses.detach(), x.grad, layer.weight.grad)
            whole, _ = layer(hidden.to(dtype), runtime_gather_output=True)
            assert (whole[..., words:] == PADDING_LOGIT).all() and (
                whole[..., :words] > PADDING_LOGIT / 2
            ).all()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_loss_knows_of_padding(dtype: torch.dtype) -> None:
    """Padding of some of a rank's rows, of a whole rank, of several: losses and gradients of both
    backends' cross-entropies are those of the words alone in float64, and 0 in the padding.
    """
    ranks = run_distributed(sharded_losses, RANKS, dtype)
    assert len(ranks[0]) == ROWS * 2 * len(losses_by_name())
    for words, product, name in ranks[0]:
        hidden, weight, labels, grad = inputs(words)
        x = hidden.to(dtype).double().requires_grad_()
        true = weight[:words].to(dtype).double().requires_grad_()
        expected = F.cross_entropy(
            (x @ true.t()).flatten(0, 1), labels.flatten(), reduction="none"
        ).view_as(labels)
        expected.backward(grad.double())
        assert x.grad is not None and true.grad is not None
        case = (words, product, name)
        # The fused one returns gradients in bf16 whatever the logits are.
        rounding = 2e-6 if dtype == torch.float32 else 2**-5
        of_gradients = 2**-5 if name == "engine fused" else rounding
        for losses, of_hidden, _ in (rank[case] for rank in ranks):
            close(losses, expected, rounding, case)
            close(of_hidden, x.grad, of_gradients, case)
        of_weight = torch.cat([rank[case][2] for rank in ranks])
        close(of_weight[:words], true.grad, of_gradients, case)
        assert (of_weight[words:] == 0).all(), case


def close(found: Tensor, expected: Tensor, tolerance: float, case: object) -> None:
    """To a share of the largest expected."""
    error = (found.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max() + 1e-12, (case, error)


class Layer(torch.nn.Module):
    """An output layer of one rank, of identity: what comes in are the logits."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.output_size = self.output_size_per_partition = rows
        self.tp_group = SimpleNamespace(rank=lambda: 0)

    def forward(self, logits: Tensor) -> tuple[Tensor, None]:
        return logits * 1.0, None


def kl(logits: Tensor) -> Tensor:
    """Of a teacher, at a low temperature, summed over all columns as distillation does."""
    teacher, _ = padded_layer(logits.shape[-1])(torch.arange(logits.shape[-1]).repeat(3, 1) / 5)
    of_teacher, student = (F.log_softmax(each.float() / 0.1, -1) for each in (teacher, logits))
    return F.kl_div(student, of_teacher, log_target=True, reduction="sum")


def reverse_kl_of_entropy(logits: Tensor) -> Tensor:
    probabilities = logits.float().softmax(-1)
    return (probabilities * logits.float().log_softmax(-1)).sum()


def mse(logits: Tensor) -> Tensor:
    teacher, _ = padded_layer(logits.shape[-1])(torch.zeros(3, logits.shape[-1]))
    return (logits - teacher).square().sum()


def padded_layer(rows: int) -> Layer:
    layer = Layer(rows)
    leave_out_padding(layer, 7)  # type: ignore[arg-type]
    return layer


@pytest.mark.parametrize(
    "loss", [kl, reverse_kl_of_entropy, mse, Tensor.logsumexp, Tensor.sum], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_to_come(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Other losses on logits: the gradient is the same with and without padding, and 0 in it; also
    one that is a single number in many places.
    """
    gradients = []
    for rows in (7, 16):
        draws = torch.Generator().manual_seed(1)
        words = torch.randn(3, 7, generator=draws)
        logits = F.pad(words, (0, rows - 7), value=9.0).to(dtype).requires_grad_()
        of_logits, _ = padded_layer(rows)(logits)
        total = loss(of_logits, -1) if loss is Tensor.logsumexp else loss(of_logits)
        total.sum().backward()
        assert logits.grad is not None
        assert (logits.grad[:, 7:] == 0).all()
        gradients.append(logits.grad[:, :7])
    assert gradients[0].isfinite().all() and gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_logits_are_written_in_place() -> None:
    """No second tensor of logits, forward or backward."""
    layer = padded_layer(16)
    seen: list[Tensor] = []
    before = torch.zeros(3, 16, requires_grad=True) * 1.0
    before.register_hook(seen.append)
    layer.forward = lambda logits: (logits, None)  # type: ignore[assignment]
    after, _ = layer(before)
    assert after.data_ptr() == before.data_ptr()
    grad = torch.ones(3, 16)
    after.backward(grad)
    assert seen[0].data_ptr() == grad.data_ptr()


def test_a_row_is_drawn_by_its_word_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither TP nor padding changes what a word starts from; the padding starts at 0."""
    words, width = 2 * BLOCK_ROWS + 77, 6

    def drawn(tp: int, rows: int, seed: int = 1, matrix: str = "embedding") -> Tensor:
        parts = []
        for rank in range(tp):
            monkeypatch.setattr(
                "megatron.core.parallel_state.get_tensor_model_parallel_rank", lambda r=rank: r
            )
            parts.append(torch.full((rows // tp, width), torch.nan))
            state = torch.get_rng_state()
            draw_vocabulary(seed, matrix, words, 0.3)(parts[-1])
            assert torch.equal(torch.get_rng_state(), state)
        return torch.cat(parts)

    expected = drawn(1, words)
    assert expected.std().item() == pytest.approx(0.3, rel=0.05)
    assert expected.flatten().unique().numel() > 0.999 * expected.numel()
    for tp, rows in ((1, words + 1), (2, 640), (2, 2000), (3, 600), (4, 800), (8, 8 * 512)):
        padded = drawn(tp, rows)
        assert torch.equal(padded[:words], expected), (tp, rows)
        assert (padded[words:] == 0).all()
    for other in (drawn(1, words, seed=2), drawn(1, words, matrix="output_layer")):
        assert not torch.isclose(other, expected).any(dim=1).all()
