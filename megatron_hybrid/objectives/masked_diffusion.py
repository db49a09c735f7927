"""Masked diffusion: what is behind masks, told from the tokens on both sides.

As in LLaDA (2502.09992) and MDLM (2406.07524): each sample draws a ratio t, each of its tokens is
masked with probability t, and the loss is the cross-entropy of the masked ones over t, a mean over
all tokens. Its expectation bounds the negative log-likelihood of a token from above.

Legend: b samples of the micro batch, s tokens of a sample; packed documents are a row `[1, b*s]`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_hybrid.config.base import Count, Section
from megatron_hybrid.config.pattern import recurrent_symbols
from megatron_hybrid.data.permutation import derive
from megatron_hybrid.objectives.base import Losses, Objective

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.data.batch import Batch

# Sets these draws apart from the others that the seed makes of samples.
_STREAM = 0x6D61736B


class Options(Section):
    """The options of the objective."""

    mask_token_id: Count = Field(description="the id that stands for a masked token")
    least_ratio: float = Field(
        default=1e-3, gt=0, lt=1, description="the least ratio of masked tokens that is drawn"
    )


class MaskedDiffusion(Objective):
    """Needs attention without a mask, in layers of which none reads from left to right."""

    reports = ("masked_ratio", "masked_loss")
    Options = Options

    @classmethod
    def problems(cls, config: "RunConfig", options: Any) -> Iterator[str]:
        """Causal layers, and an id that is no token."""
        name, model = "training.objective=masked_diffusion", config.model
        if recurrent := recurrent_symbols(model.hybrid_layer_pattern):
            named = " and ".join(map(repr, recurrent))
            yield (
                f"{name} needs a pattern without {named} layers, which read from left to right; "
                f"model.hybrid_layer_pattern={model.hybrid_layer_pattern!r}; "
                "allowed: '*', '-', 'E'"
            )
        elif model.attn_mask_type != "no_mask":
            yield (
                f"{name} needs model.attn_mask_type=no_mask, so that a token sees those on both "
                f"sides; it is {model.attn_mask_type}"
            )
        if model.vocab_size is not None and options.mask_token_id >= model.vocab_size:
            yield (
                f"training.objective_options.mask_token_id={options.mask_token_id} must be an id "
                f"of the vocabulary; allowed: 0 to {model.vocab_size - 1}"
            )

    def prepare(self, batch: "Batch") -> "Batch":
        """Mask tokens, each sample by draws of its own number; labels are what was masked."""
        import torch

        assert batch.samples is not None, "the loader numbers samples"
        shape = batch.tokens.shape
        ratios, masked = draw_masks(
            self.config.training.seed, batch.samples, batch.tokens.numel() // len(batch.samples),
            self.options.least_ratio,
        )  # fmt: skip
        where = torch.from_numpy(masked).view(shape)
        weights = torch.from_numpy((masked / ratios[:, None]).astype(np.float32)).view(shape)
        return replace(
            batch,
            tokens=batch.tokens.masked_fill(where, self.options.mask_token_id),
            labels=batch.tokens,
            loss_mask=where.float(),
            extra={"weights": weights},
        )

    def losses(self, output: "Tensor", batch: "Batch", model: "nn.Module") -> Losses:
        masked = batch.loss_mask
        return Losses(
            output,
            batch.extra["weights"],
            count=batch.labels.new_tensor(batch.labels.numel()),
            sums={"masked_ratio": masked.sum(), "masked_loss": (output.detach() * masked).sum()},
        )

    def report(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """The share of tokens that were masked, and their mean cross-entropy, unweighted."""
        masked, total = sums
        return {"masked_ratio": masked / count, "masked_loss": total / max(masked, 1.0)}


def draw_masks(
    seed: int, samples: Sequence[int], seq_length: int, least_ratio: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What is masked of samples: a function of the seed and each sample's number alone.

    Returns:
        `[b]`, the ratio t of each sample, uniform from `least_ratio` to 1; `[b, s]`, which of its
        tokens are masked.
    """
    key = derive(derive(np.zeros(1, dtype=np.uint64), seed), _STREAM)
    draws = derive(derive(key, samples)[:, None], np.arange(seq_length + 1))
    uniform = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
    ratios = least_ratio + (1 - least_ratio) * uniform[:, 0]
    return ratios, uniform[:, 1:] < ratios[:, None]
