"""The layers of a model as generation runs them: over its modules' own parameters, with states.

A layer takes `[T, h]`, the residual stream of all tokens of a step, and returns it with its own
output added. It may overwrite what it is given.

Legend: T tokens of the step, h hidden size, k key/value heads of r query heads each, d channels of
a head; w = the Mamba projection, packed [z, x, B, C, dt]; E experts. Sizes are this rank's.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.activations import squared_relu as engine_squared_relu
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor

from megatron_hybrid.generation.batch import Batch, Chunk
from megatron_hybrid.generation.cache import MambaSlots, Pages
from megatron_hybrid.generation.linears import Group, Linear, Norm, sum_over
from megatron_hybrid.ops.attention import causal_attention
from megatron_hybrid.ops.mamba2_fused import Norm as NormSizes
from megatron_hybrid.ops.mamba2_states import CoreParameters, Mamba2Step
from megatron_hybrid.ops.mamba2_texts import mamba2_texts
from megatron_hybrid.ops.paged_attention import paged_attention
from megatron_hybrid.ops.squared_relu import squared_relu
from megatron_hybrid.ops.ssd.buffers import Sizes


class MambaLayer:
    """A Mamba-2 mixer; `take` gives it its states before the first call."""

    def __init__(self, layer: Any, group: Group) -> None:
        self._mixer = mixer = layer.mixer
        self.norm = Norm(mixer.in_proj, "layer_norm_weight", mixer.in_proj.eps)
        self.in_proj, self.out_proj = Linear(mixer.in_proj), Linear(mixer.out_proj, group=group)
        self.sizes = Sizes(mixer.num_heads, mixer.head_dim, mixer.num_groups, mixer.state_dim)
        self._steps: dict[int, Mamba2Step] = {}
        self.refresh()

    def take(self, slots: MambaSlots) -> None:
        """The states of sequences to work on."""
        self.slots = slots
        self._steps.clear()

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.norm, self.in_proj, self.out_proj):
            each.refresh()
        mixer = self._mixer
        self.parameters = CoreParameters(
            self.sizes,
            mixer.conv1d_weight.detach().squeeze(1).t().float().contiguous(),
            mixer.conv1d_bias.detach().float(),
            mixer.dt_bias.detach().float(),
            -torch.exp(mixer.A_log.detach().float())[:, None],
            mixer.D.detach().float()[:, None],
            mixer.norm.weight.detach().float(),
            NormSizes(mixer.norm.group_size, mixer.norm.eps),
        )

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        projected = self.in_proj(self.norm(x))
        decoding = batch.decoding
        if not batch.chunks:
            return self.out_proj.add_to(x, self._step(decoding)(projected, self.parameters))
        y = projected.new_empty(len(x), self.sizes.channels)
        if decoding:
            y[:decoding] = self._step(decoding)(projected[:decoding], self.parameters)
        slots, conv, ssm = batch.filling, self.slots.conv, self.slots.ssm
        assert batch.texts is not None
        taps, states = conv[slots], ssm[slots]  # copies
        mamba2_texts(projected[decoding:], self.parameters, batch.texts, taps, states, y[decoding:])
        conv[slots], ssm[slots] = taps, states
        return self.out_proj.add_to(x, y)

    def _step(self, sequences: int) -> Mamba2Step:
        if sequences not in self._steps:
            slots = self.slots
            self._steps[sequences] = Mamba2Step(
                self.sizes,
                slots.conv[:sequences],
                slots.ssm[:sequences],
                self.parameters.norm.eps,
            )
        return self._steps[sequences]


class Rotary:
    """Cosines and sines of RoPE, as many as texts have become long.

    Args:
        embedding: the engine's, which knows base and share of the channels.
    """

    def __init__(self, embedding: Any, dtype: torch.dtype) -> None:
        self._embedding, self._dtype = embedding, dtype
        self._length = 0
        self.cos = self.sin = torch.empty(0)

    def at(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """`[T, 1, 1, rotated channels]` each, of positions below `length`."""
        if length > self._length:
            self._length = max(length, 2 * self._length, 256)
            angles = self._embedding(self._length).flatten(1)
            self.cos, self.sin = (f(angles).to(self._dtype) for f in (torch.cos, torch.sin))
        return self.cos[positions][:, None, None], self.sin[positions][:, None, None]


class AttentionLayer:
    """Self-attention; `pages` is set before the first call."""

    pages: Pages

    def __init__(self, layer: Any, group: Group) -> None:
        attention = layer.self_attention
        self.norm = Norm(attention.linear_qkv, "layer_norm_weight", attention.linear_qkv.eps)
        self.qkv = Linear(attention.linear_qkv)
        self.proj = Linear(attention.linear_proj, group=group)
        self.heads = attention.num_query_groups_per_partition
        self.queries = attention.num_attention_heads_per_partition // self.heads
        self.channels = attention.hidden_size_per_attention_head
        core = attention.core_attention
        scale = getattr(core, "softmax_scale", None)
        self.scale = scale if scale is not None else self.channels**-0.5
        window = attention.config.window_size
        self.window = None if window is None else window[0] + 1

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.norm, self.qkv, self.proj):
            each.refresh()

    def __call__(self, x: Tensor, batch: Batch, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        tokens, queries = len(x), self.queries
        mixed = self.qkv(self.norm(x)).view(tokens, self.heads, queries + 2, self.channels)
        if rotary is not None:
            _rotate(mixed[:, :, : queries + 1], *rotary)
        query, key, value = mixed[:, :, :queries], mixed[:, :, queries], mixed[:, :, queries + 1]
        pool = self.pages
        assert batch.places is not None
        for kept, new in ((pool.keys, key), (pool.values, value)):
            kept.view(-1, self.heads, self.channels).index_copy_(
                0, batch.places, new.to(kept.dtype)
            )
        decoding = batch.decoding
        if not batch.chunks:
            return self.proj.add_to(x, self._paged(query, batch).to(x.dtype))
        y = x.new_empty(tokens, self.heads * queries * self.channels)
        if decoding:
            y[:decoding] = self._paged(query[:decoding], batch)
        for chunk in batch.chunks:
            y[chunk.rows] = self._attend(query, key, value, chunk)
        return self.proj.add_to(x, y)

    def _paged(self, query: Tensor, batch: Batch) -> Tensor:
        table, pool = batch.table, self.pages
        assert table is not None
        pages = len(table.owner)
        return paged_attention(
            query.to(pool.keys.dtype), pool.keys[:pages], pool.values[:pages], table, self.scale
        ).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> Tensor:
        """Of a chunk's queries to its own keys, or to all in its sequence's pages."""
        shape = (len(chunk.sequences), chunk.length)

        def by_token(tensor: Tensor) -> Tensor:  # [length, sequences, heads, d]
            return tensor[chunk.rows].flatten(1, -2).unflatten(0, shape).transpose(0, 1)

        stop = chunk.start + chunk.length
        if chunk.context is None:
            keys, values, first = by_token(key), by_token(value), 0
        else:
            pages, first = chunk.context
            keys, values = (
                pool[pages].flatten(0, 1)[: stop - first, None].to(query.dtype)
                for pool in (self.pages.keys, self.pages.values)
            )
        attended = causal_attention(
            by_token(query), keys, values, chunks=[(chunk.start - first, stop - first)],
            window=self.window, scale=self.scale,
        )  # fmt: skip
        return attended.transpose(0, 1).flatten(0, 1)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the first channels of `heads` `[T, k, any, d]` in place, each with that half further."""
    part = heads[..., : cos.shape[-1]]
    first, second = part.chunk(2, dim=-1)
    low, high = sin.chunk(2, dim=-1)
    turned = part * cos
    into_first, into_second = turned.chunk(2, dim=-1)
    into_first.addcmul_(second, low, value=-1)
    into_second.addcmul_(first, high)
    part.copy_(turned)


def activation(config: Any) -> Callable[[Tensor], Tensor]:
    """What stands between the two linears of an MLP; may overwrite its input."""
    function = config.activation_func
    if config.gated_linear_unit:

        def gated(x: Tensor) -> Tensor:
            gate, linear = x.chunk(2, dim=-1)
            result: Tensor = function(gate)
            return result.mul_(linear)

        return gated
    if function in (squared_relu, engine_squared_relu):
        return lambda x: x.relu_().square_()
    chosen: Callable[[Tensor], Tensor] = function
    return chosen


class MlpLayer:
    """An MLP with the norm before it."""

    def __init__(self, layer: Any, group: Group) -> None:
        mlp = layer.mlp
        self.norm = Norm(mlp.linear_fc1, "layer_norm_weight", mlp.linear_fc1.eps)
        self.up, self.down = Linear(mlp.linear_fc1), Linear(mlp.linear_fc2, group=group)
        self.activation = activation(mlp.config)

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.norm, self.up, self.down):
            each.refresh()

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        return self.down.add_to(x, self.activation(self.up(self.norm(x))))


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
        self.activation = activation(moe.config)
        self.refresh()

    def refresh(self) -> None:
        """Take the parameters up again."""
        self.norm.refresh()
        for pair in (*self.experts, *filter(None, [self.shared])):
            for each in pair:
                each.refresh()
        router = self._router
        self.router_weight = router.weight.detach().float().t()
        self.router_bias = None if router.bias is None else router.bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        normed = self.norm(x)
        shares, experts = self.route(normed)
        if x.device.type == "cpu":
            routed = self.chosen(normed, shares, experts)
        else:
            routed = self.all_tokens(normed, shares, experts)
        x = x.add_(sum_over(routed, self.expert_group))
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
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=router.score_function,
            expert_bias=router.expert_bias,
            router_replay=router.router_replay,
            dense_output=True,
        )
        return shares, experts

    def chosen(self, normed: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """What this rank's experts make of the tokens that go to them; asks which, on the host."""
        topk = experts.shape[1]
        if len(normed) == 1:  # nothing to sort
            routed = torch.zeros_like(normed)
            for number, place in sorted((e, i) for i, e in enumerate(experts[0].tolist())):
                if 0 <= number - self.first < len(self.experts):
                    up, down = self.experts[number - self.first]
                    routed += self._expert(up, down, normed, shares[:, place, None])
            return routed
        chosen = experts.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self._config.num_moe_experts).tolist()
        routed = torch.zeros_like(normed)
        start = sum(counts[: self.first])
        for (up, down), count in zip(
            self.experts, counts[self.first : self.first + len(self.experts)], strict=True
        ):
            if count:
                places = order[start : start + count]
                rows = places // topk
                share = shares.reshape(-1)[places].unsqueeze(1)
                routed.index_add_(0, rows, self._expert(up, down, normed[rows], share))
            start += count
        return routed

    def all_tokens(self, normed: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """The same without asking the device which: every expert here computes all tokens."""
        routed = torch.zeros_like(normed)
        for number, (up, down) in enumerate(self.experts, self.first):
            share = shares.masked_fill(experts != number, 0.0).sum(1, keepdim=True)
            routed += self._expert(up, down, normed, share)
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
