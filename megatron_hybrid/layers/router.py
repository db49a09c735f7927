"""megatron-core's router with ties that go to the lower expert, and a count of where tokens went.

Legend: t tokens of this rank and micro batch, E experts, k experts a token goes to, b samples of
the micro batch.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    get_updated_expert_bias,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter as EngineTopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def _open_groups(scores: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """Which experts are in the groups that a token goes to: bool `[t, E]`.

    Those whose best topk / group_topk scores have the largest sums (DeepSeek-V3, 2412.19437, 2.1.2;
    `group_limited_topk` of megatron-core); of equal groups, those with the lower index.
    """
    grouped = scores.detach().unflatten(1, (num_groups, -1))
    best = grouped.topk(topk // group_topk, dim=2).values.sum(2)
    is_open = _map_of_topk(best, group_topk)
    return is_open.repeat_interleave(grouped.shape[2], dim=1)


def stable_topk(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, and of equal ones those with the lower index.

    torch.topk leaves open which of equal scores it takes. Experts cut from one copy of an MLP begin
    with equal rows in the router (Upcycling LLMs into MoE, 2410.07524, 3.2), so that ties are the
    rule there.

    Args:
        scores: `[t, E]`.

    Returns:
        Scores and int64 indices `[t, k]`, the largest first; differentiable in the scores.
    """
    indices = torch.sort(scores.detach(), dim=1, descending=True, stable=True).indices[:, :topk]
    return scores.gather(1, indices), indices


def _map_of_topk(scores: Tensor, topk: int) -> Tensor:
    """Which experts `stable_topk` takes: bool `[t, E]`."""
    _, indices = stable_topk(scores, topk)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, True)


def move_expert_biases(chunks: Sequence[torch.nn.Module], rate: float) -> None:
    """Move each router's bias by the tokens that its experts got in this global batch.

    As the engine does it, which takes routers of as many experts only: here those go together.
    """
    routers: dict[int, list[TopKRouter]] = {}
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, TopKRouter) and module.expert_bias is not None and module.training:
            routers.setdefault(len(module.expert_bias), []).append(module)
    for _, alike in sorted(routers.items()):
        tokens = torch.stack([router.local_tokens_per_expert for router in alike])
        biases = torch.stack([router.expert_bias for router in alike])
        for router, moved in zip(alike, get_updated_expert_bias(tokens, biases, rate), strict=True):
            router.expert_bias.copy_(moved)
            router.local_tokens_per_expert.zero_()


class _StableTopk:
    """Takes the place in which the engine's router asks for recorded choices of experts."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`stable_topk` of the experts in open groups."""
        if num_groups is None or group_topk is None:
            return stable_topk(scores, topk)
        is_open = _open_groups(scores, topk, num_groups, group_topk)
        _, indices = stable_topk(scores.masked_fill(~is_open, -torch.inf), topk)
        return scores.gather(1, indices), indices


class TopKRouter(EngineTopKRouter):
    """The engine's router; see the module.

    Attributes:
        load: `[E + 1]` int64, counts since `take_load`, in training only: tokens that each expert
            got, and in the last place the pairs of a token and an expert that were asked for,
            dropped ones included.
        samples_in_row: b, where documents are packed and a micro batch is one row of b samples;
            else 1. The engine would take the row for one sequence.
    """

    config: TransformerConfig
    samples_in_row = 1

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.router_replay = _StableTopk()
        self.load: Tensor | None = None
        self._dropping = self.config
        self._dropless = copy.copy(self.config)
        self._dropless.moe_expert_capacity_factor = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The engine's, `[s, b, E]` -> probabilities and bool map `[t, E]`; counted on the way.

        Full experts drop tokens in training only: an answer must not depend on what else is asked.
        """
        self.config = self._dropping if self.training else self._dropless
        probs, routing_map = super().routing(logits, padding_mask)
        # Recomputation runs a layer first without gradients; only the second time counts.
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                asked = routing_map.new_full((1,), len(routing_map) * self.topk, dtype=torch.long)
                load = torch.cat([routing_map.sum(0), asked])
                self.load = load if self.load is None else self.load.add_(load)
        return probs, routing_map

    def _apply_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        """The engine's, for the experts that `stable_topk` takes, of equal ones too."""
        if self.get_aux_loss_coeff("aux_loss"):
            routing_map = _map_of_topk(scores, self.topk)
        result: Tensor = super()._apply_aux_loss(probs, scores, routing_map, *others, **named)
        return result

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        """As `_apply_aux_loss`, for each sample: the mean over the samples, packed or not."""
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if not coefficient:
            return probs
        routing_map = _map_of_topk(scores, self.topk)
        if self.samples_in_row == 1:
            result: Tensor = super()._apply_seq_aux_loss(
                probs, scores, routing_map, *others, **named
            )
            return result
        local, samples = len(scores), self.samples_in_row
        number = self._sample_numbers(local)

        def by_sample(values: Tensor) -> Tensor:
            """`[t, E]` -> sums over the tokens of each sample, `[b * E]`."""
            sums = scores.new_zeros(samples, values.shape[1])
            return sums.index_add(0, number, values.to(scores.dtype)).flatten()

        counts = reduce_from_tensor_model_parallel_region(by_sample(routing_map), self.tp_cp_group)
        loss = switch_load_balancing_loss_func(
            probs=by_sample(scores)[None],
            tokens_per_expert=counts,
            total_num_tokens=local * self.tp_cp_group.size() // samples,
            topk=self.topk,
            num_experts=scores.shape[1],
            moe_aux_loss_coeff=coefficient,
        )
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss / samples, "seq_load_balancing_loss", self.tp_cp_group,
            valid_token_count=local,
        )  # fmt: skip
        return attached

    def _sample_numbers(self, local: int) -> Tensor:
        """The sample that each of this rank's `local` tokens of a row is of: `[t]` int64.

        Context parallel ranks hold two of 2 * CP chunks of the row each, the r-th and the r-th from
        its end; with sequence parallelism, tensor parallel ranks cut those up in their order.
        """
        context = parallel_state.get_context_parallel_world_size()
        tensor = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        row = torch.arange(local * tensor * context, device=self.weight.device)
        row = row // (len(row) // self.samples_in_row)
        if context > 1:
            rank = parallel_state.get_context_parallel_rank()
            row = row.view(2 * context, -1)[[rank, 2 * context - 1 - rank]].flatten()
        return row.view(tensor, -1)[parallel_state.get_tensor_model_parallel_rank() % tensor]

    def take_load(self) -> Tensor | None:
        """`load`, which begins anew; None where nothing was routed."""
        load, self.load = self.load, None
        return load
