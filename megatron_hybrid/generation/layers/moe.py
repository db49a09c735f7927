"""A mixture of experts as generation runs it.

Legend: T tokens of the step, h hidden size, l width of an expert's tokens (h, or of latent ones), k
experts that a token goes to.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor

from megatron_hybrid.generation.layers.mlp import activation
from megatron_hybrid.generation.linears import Group, Linear, Norm, sum_over


class MoeLayer:
    """A mixture of experts: every rank routes all tokens; what their experts make is added up.

    Args:
        group: tensor-parallel ranks, of the shared expert.
        expert_group: ranks that hold other experts, or other parts of them.
    """

    def __init__(self, layer: Any, group: Group, expert_group: Group) -> None:
        moe = layer.mlp
        self._router, self._config = moe.router, moe.config
        self.norm = Norm(layer.pre_mlp_layernorm, "weight", moe.config.layernorm_epsilon)
        self.experts = _experts(moe.experts)
        self.first = moe.ep_group.rank() * len(self.experts)
        self.expert_group = expert_group
        shared = getattr(moe, "shared_experts", None)
        self.shared = None
        if shared is not None:
            self.shared = (Linear(shared.linear_fc1), Linear(shared.linear_fc2, group=group))
        self.latent = None
        if moe.config.moe_latent_size is not None:
            self.latent = (Linear(moe.fc1_latent_proj), Linear(moe.fc2_latent_proj))
        self.activation = activation(moe.config)
        self.refresh()

    def refresh(self) -> None:
        """Take the parameters up again."""
        self.norm.refresh()
        for pair in (*self.experts, *filter(None, [self.shared, self.latent])):
            for each in pair:
                each.refresh()
        router = self._router
        self.router_weight = router.weight.detach().float().t()
        self.router_bias = None if router.bias is None else router.bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        normed = self.norm(x)
        shares, experts = self.route(normed)
        tokens = normed if self.latent is None else self.latent[0](normed)
        if x.device.type == "cpu":
            routed = self.chosen(tokens, shares, experts)
        else:
            routed = self.all_tokens(tokens, shares, experts)
        routed = sum_over(routed, self.expert_group)
        x = x.add_(routed) if self.latent is None else self.latent[1].add_to(x, routed)
        if self.shared is None:
            return x
        up, down = self.shared
        return down.add_to(x, self.activation(up(normed)))

    def route(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Shares `[T, k]` fp32 and experts `[T, k]` int64, by the engine's own arithmetic."""
        logits = torch.mm(normed.float(), self.router_weight)
        if self.router_bias is not None:
            logits.add_(self.router_bias)
        config, router = self._config, self._router
        shares, experts = topk_routing_with_score_function(
            logits,
            router.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=router.score_function,
            expert_bias=router.expert_bias,
            router_replay=router.router_replay,
            dense_output=True,
        )
        return shares, experts

    def chosen(self, tokens: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """What this rank's experts make of the tokens that go to them, `[T, l]` both; asks which,
        on the host."""
        topk = experts.shape[1]
        if len(tokens) == 1:  # nothing to sort
            routed = torch.zeros_like(tokens)
            for number, place in sorted((e, i) for i, e in enumerate(experts[0].tolist())):
                if 0 <= number - self.first < len(self.experts):
                    up, down = self.experts[number - self.first]
                    routed += self._expert(up, down, tokens, shares[:, place, None])
            return routed
        chosen = experts.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self._config.num_moe_experts).tolist()
        routed = torch.zeros_like(tokens)
        start = sum(counts[: self.first])
        for (up, down), count in zip(
            self.experts, counts[self.first : self.first + len(self.experts)], strict=True
        ):
            if count:
                places = order[start : start + count]
                rows = places // topk
                share = shares.reshape(-1)[places].unsqueeze(1)
                routed.index_add_(0, rows, self._expert(up, down, tokens[rows], share))
            start += count
        return routed

    def all_tokens(self, tokens: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """The same without asking the device which: every expert here computes all tokens."""
        routed = torch.zeros_like(tokens)
        for number, (up, down) in enumerate(self.experts, self.first):
            share = shares.masked_fill(experts != number, 0.0).sum(1, keepdim=True)
            routed += self._expert(up, down, tokens, share)
        return routed

    def _expert(self, up: Linear, down: Linear, tokens: Tensor, share: Tensor) -> Tensor:
        inner = (self.activation(up(tokens)) * share).to(tokens.dtype)
        output = down.product(inner)
        return output if down.bias is None else output + (down.bias * share).to(output.dtype)


def _experts(experts: Any) -> list[tuple[Linear, Linear]]:
    """The linears of each expert, kept one by one or as numbered weights of one module."""
    if hasattr(experts, "local_experts"):
        return [(Linear(e.linear_fc1), Linear(e.linear_fc2)) for e in experts.local_experts]
    up, down = experts.linear_fc1, experts.linear_fc2
    return [(Linear(up, str(i)), Linear(down, str(i))) for i in range(experts.num_local_experts)]
