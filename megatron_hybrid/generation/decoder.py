"""A model as generation runs it: this rank's layers over the parameters of its modules.

The modules' own forward is for whole texts of training. This one takes a token each of many texts,
and parts of others', and has no object or layout to make anew for a token.

Legend: T tokens of a step, h hidden size, V vocabulary, v that of this TP rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_hybrid.config.layers import layers_of
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import (
    ATTENTION,
    GDN,
    MAMBA,
    MLP,
    MOE,
    PARALLEL,
    parse_pattern,
)
from megatron_hybrid.errors import UserError
from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.cache import Pages, States
from megatron_hybrid.generation.layers.attention import Attention, AttentionLayer, Rotary
from megatron_hybrid.generation.layers.gated_delta_net import GatedDeltaNet
from megatron_hybrid.generation.layers.mamba import MambaLayer, MambaMixer
from megatron_hybrid.generation.layers.mamba1 import mamba_mixer
from megatron_hybrid.generation.layers.mlp import MlpLayer
from megatron_hybrid.generation.layers.moe import MoeLayer
from megatron_hybrid.generation.layers.parallel_heads import parallel_heads
from megatron_hybrid.generation.linears import Group, Linear, Norm, sum_over
from megatron_hybrid.generation.params import Limits
from megatron_hybrid.ops.bf16 import through_fp32


def _unless_alone(group: dist.ProcessGroup) -> Group:
    return group if group.size() > 1 else None


class Decoder:
    """This rank's pipeline chunks, as `build_model_chunks` returns them or wrapped for training.

    Args:
        chunks: in the order of their virtual stages.
        model: the whole one, of every rank.

    Raises:
        UserError: a model that it does not know how to run token by token.
    """

    def __init__(self, chunks: list[torch.nn.Module], model: ModelConfig) -> None:
        self._wrapped, self._model = chunks, model
        self.chunks: list[Any] = [_unwrapped(chunk) for chunk in chunks]
        _refuse_unknown(self.chunks)
        self._tp = _unless_alone(parallel_state.get_tensor_model_parallel_group())
        self._pp = parallel_state.get_pipeline_model_parallel_group()
        experts = _unless_alone(parallel_state.get_expert_tensor_and_model_parallel_group())
        self.stages: list[list[Any]] = []
        symbols = parse_pattern(model.hybrid_layer_pattern).layers
        for chunk in self.chunks:
            kinds: dict[str, Callable[[Any], Any]] = {
                MAMBA: lambda layer: MambaLayer(mamba_mixer(layer, self._tp), layer.mixer.in_proj),
                ATTENTION: lambda layer: AttentionLayer(layer, self._tp),
                MLP: lambda layer: MlpLayer(layer, self._tp, model.mlp_multipliers[1]),
                MOE: lambda layer: MoeLayer(layer, self._tp, experts),
                GDN: lambda layer: _gated_delta_net(layer, self._tp),
            }
            stage: list[Any] = []
            kinds[PARALLEL] = partial(parallel_heads, group=self._tp, before=stage)
            for layer in chunk.decoder.layers:
                stage.append(kinds[symbols[layer.layer_number - 1]](layer))
            self.stages.append(stage)
        first, last = self.chunks[0], self.chunks[-1]
        self.first, self.last = bool(first.pre_process), bool(last.post_process)
        self.device: torch.device = next(first.parameters()).device
        self.dtype: torch.dtype = first.config.params_dtype
        self.hidden_size: int = first.config.hidden_size
        # By the channels that rotate, where layers are unlike.
        self.rotaries: dict[int | None, Rotary] = {}
        if getattr(first, "position_embedding_type", "none") == "rope":
            for layer in self._of(Attention):
                if layer.rotates and layer.rotated not in self.rotaries:
                    made = layer.rotary(first.rotary_pos_emb, self.dtype)
                    self.rotaries[layer.rotated] = made
        if self.last:
            norm = last.decoder.final_norm
            self.final_norm = Norm(norm, "weight", first.config.layernorm_epsilon)
            self.output = Linear(_OutputWeight(last))
        self.states: States | None = None

    def make_states(self, limits: Limits) -> States:
        """Allocate what the layers of this rank keep of sequences."""
        mamba, every = self._of(MambaMixer), self._of(Attention)
        attention = [layer for layer in every if layer.producer is None]
        metas = self._model.num_meta_tokens
        for mixer in mamba:
            mixer.take(mixer.new_slots(limits.max_sequences + bool(metas)))
        pages = -(-limits.max_tokens // limits.page_tokens)
        if metas:  # beside the texts: once, and before each of them
            pages += (limits.max_sequences + 1) * -(-metas // limits.page_tokens)
        dtype = torch.float32 if through_fp32(torch.empty(0, dtype=self.dtype)) else self.dtype
        for layer in attention:
            layer.pages = Pages(
                pages, limits.page_tokens, layer.heads, (layer.channels, layer.value_channels),
                dtype, self.device,
            )  # fmt: skip
        for layer in every:
            if layer.producer is not None:
                layer.pages = layer.producer.pages
        # By the whole model's pattern, so that the pages are given out alike on every rank.
        windows = [layer.model.window_size for layer in layers_of(self._model, ATTENTION)]
        seen = dict.fromkeys(None if window is None else window[0] + 1 for window in windows)
        self.states = States(
            limits, [mixer.slots for mixer in mamba], [layer.pages for layer in attention],
            tuple(seen) or (None,), pages=pages,
            paged=self._any_rank(bool(attention)), num_meta_tokens=metas,
        )  # fmt: skip
        self.kept_dtype = dtype
        return self.states

    def _of[T](self, kind: type[T]) -> list[T]:
        """This rank's layers of one kind, and the parts of layers that are of it."""
        layers = [layer for stage in self.stages for layer in stage]
        parts = [part for layer in layers for part in (layer, *vars(layer).values())]
        return [part for part in parts if isinstance(part, kind)]

    def refresh(self) -> None:
        """Take the parameters up again, as after steps of training."""
        for chunk in self._wrapped:
            ddp_config = getattr(chunk, "ddp_config", None)
            if ddp_config is not None and ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
        for layer in (layer for stage in self.stages for layer in stage):
            layer.refresh()
        if self.last:
            self.final_norm.refresh()
            self.output.refresh()

    @torch.no_grad()  # not inference_mode: training shares workspaces with it
    def forward(self, batch: Batch, longest: int) -> Tensor | None:
        """One step.

        Args:
            longest: no position is as large.

        Returns:
            `[wanted or T, V]` fp32 on the ranks of the last stage, else None.
        """
        hidden: Tensor | None = None
        rotaries = {
            channels: rotary.at(batch.positions, longest)
            for channels, rotary in self.rotaries.items()
        }
        for index, (chunk, stage) in enumerate(zip(self.chunks, self.stages, strict=True)):
            if self.first and index == 0:
                hidden = self._embed(chunk, batch)
            else:
                hidden = self._receive(len(batch.tokens))
            for layer in stage:
                if isinstance(layer, MambaLayer):
                    hidden = layer(hidden, batch)
                elif (heads := getattr(layer, "attention", None)) is not None:
                    rotary = rotaries.get(heads.rotated) if heads.rotates else None
                    hidden = layer(hidden, batch, rotary)
                else:
                    hidden = layer(hidden)
            if not (self.last and index == len(self.chunks) - 1):
                self._send(hidden)
        if not self.last:
            return None
        assert hidden is not None
        if batch.wanted is not None:
            hidden = hidden[batch.wanted]
        logits = self.output(self.final_norm(hidden))
        if self._model.lm_head_multiplier != 1:
            logits = logits.mul_(self._model.lm_head_multiplier)
        return self._gathered(logits).float()

    def _embed(self, chunk: Any, batch: Batch) -> Tensor:
        """`[T]` -> `[T, h]`."""
        if batch.of_metas:
            metas: Tensor = chunk.embedding.meta_tokens.detach()
            return metas.index_select(0, batch.tokens)
        hidden = self._embed_words(chunk, batch.tokens)
        if self._model.embedding_multiplier != 1:
            hidden = hidden.mul_(self._model.embedding_multiplier)
        return hidden

    def _embed_words(self, chunk: Any, tokens: Tensor) -> Tensor:
        """`[T]` -> `[T, h]`; each TP rank has the rows of some ids."""
        weight = chunk.embedding.word_embeddings.weight.detach()
        if self._tp is None:
            return weight.index_select(0, tokens)
        local = tokens - self._tp.rank() * len(weight)
        elsewhere = (local < 0) | (local >= len(weight))
        hidden = weight.index_select(0, local.masked_fill(elsewhere, 0))
        return sum_over(hidden.masked_fill_(elsewhere[:, None], 0.0), self._tp)

    def _gathered(self, logits: Tensor) -> Tensor:
        """`[T, v]` -> `[T, V]`."""
        if self._tp is None:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self._tp.size())]
        dist.all_gather(parts, logits.contiguous(), group=self._tp)
        return torch.cat(parts, dim=-1)

    def _receive(self, tokens: int) -> Tensor:
        hidden = torch.empty(tokens, self.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(hidden, src=parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _send(self, hidden: Tensor) -> None:
        dist.send(hidden.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())

    def _any_rank(self, here: bool) -> bool:
        """Whether it is so on this rank or another stage's."""
        if self._pp.size() == 1:
            return here
        flag = torch.tensor(int(here), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._pp)
        return bool(flag)


def _gated_delta_net(layer: Any, group: Group) -> MambaLayer:
    mixer = layer.self_attention
    return MambaLayer(GatedDeltaNet(mixer, group), mixer.in_proj)


class _OutputWeight:
    """The output layer's weight, its own or the embedding's."""

    bias = None

    def __init__(self, chunk: Any) -> None:
        self._chunk = chunk

    @property
    def weight(self) -> Tensor:
        chunk = self._chunk
        if chunk.share_embeddings_and_output_weights:
            weight: Tensor = chunk.shared_embedding_or_output_weight()
        else:
            weight = chunk.output_layer.weight
        return weight


def _unwrapped(chunk: Any) -> Any:
    """A HybridModel without the wrappers of precision and data parallelism."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _refuse_unknown(chunks: list[Any]) -> None:
    problems = []
    config = chunks[0].config
    if config.context_parallel_size > 1:
        problems.append(
            f"parallel.context_parallel_size={config.context_parallel_size} splits texts over "
            "ranks, and a text is generated token by token; allowed: 1"
        )
    if getattr(config, "fp8_param", False):
        problems.append(
            "precision.fp8_param_gather=true keeps weights in float8, of which generation has no "
            "products; allowed: false"
        )
    if problems:
        raise UserError("\n".join(problems))
