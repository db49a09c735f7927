"""What a model's layers compute of samples, as importance: hooks on the job's ranks.

Of each sample the mean of the absolute values over its tokens, of these the root of the sum of
squares over the samples; over several places (heads, norms) as `scores.py` says. Depth is the mean
of 1 - cosine over tokens. Sources: 2504.11409, section 3; 2407.14679, section 2.2.

Legend: s tokens of this rank, b samples of a micro batch, h hidden size, w a place's channels on
this rank: under tensor parallelism some of them, neighbours.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_hybrid.compression.axes import EXPERTS, FFN, HIDDEN, QUERY_HEADS, SHARED
from megatron_hybrid.compression.request import has_axes
from megatron_hybrid.compression.scores import DEPTH, MAMBA_SCORES, of_layer
from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.config.layers import Layer, layers
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP, MOE
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.evaluation.losses import TokenLosses
from megatron_hybrid.evaluation.windows import INTO, NOWHERE
from megatron_hybrid.model.tensor_names import NORM_NAMES


class ScoredLosses(TokenLosses):
    """Losses of tokens, while `activations` are taken of the samples that are counted."""

    def __init__(self, activations: "Activations", *arguments: Any) -> None:
        super().__init__(*arguments)
        self._activations = activations

    def _forward(self, data: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Any]:
        batch = next(data)
        counted = (batch.extra[INTO] != NOWHERE).any(dim=1)
        done = super()._forward(iter([batch]), model)
        self._activations.end_micro_batch(counted, batch.tokens.shape[1] + self._metas)
        return done


class Activations:
    """Sums over samples of what hooks see on this rank.

    Args:
        config: of the model in its layout.
        chunks: this rank's.
    """

    def __init__(self, config: RunConfig, chunks: Sequence[nn.Module]) -> None:
        self._model, self._layers = config.model, layers(config.model)
        # Of the micro batch: by place, sums over this rank's tokens `[b, w]`.
        self._seen: dict[str, Tensor] = {}
        self._split: set[str] = set()  # of these, whose tokens sequence parallelism divides
        self._whole: set[str] = set()  # whose channels every tensor parallel rank has
        self._sums: dict[str, Tensor] = {}
        self._samples = 0
        for chunk in unwrap_model(list(chunks)):
            decoder = chunk.decoder
            for module in decoder.layers:
                self._watch(module, self._layers[module.layer_number - 1])
            if getattr(decoder, "final_norm", None) is not None:
                place = f"{HIDDEN}.{len(self._layers)}"
                self._after(decoder.final_norm, partial(self._see_norm, place))

    def _watch(self, module: Any, layer: Layer) -> None:
        """Hooks on one layer."""
        number = layer.number
        named = dict(module.named_parameters())
        weight = next(named[name] for name in NORM_NAMES[layer.kind] if name in named)
        eps = self._model.layernorm_epsilon
        kept: list[Tensor] = []

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
            kept[:] = [hidden]
            # What the layer's norm gives; it may be a part of a kernel that shows it to nobody.
            self._see_norm(f"{HIDDEN}.{number - 1}", F.rms_norm(
                hidden.float(), weight.shape, weight.float(), eps
            ))  # fmt: skip

        def after(out: Any) -> None:
            (hidden,) = kept
            kept.clear()
            out = out[0] if isinstance(out, tuple) else out
            change = 1 - F.cosine_similarity(hidden.float(), out.float(), dim=-1)
            name = f"{DEPTH}.{number}"
            self._add(name, change[..., None], split=True, whole=True)

        module.register_forward_pre_hook(before, with_kwargs=True)
        self._after(module, after)
        if not has_axes(layer):
            return
        if layer.kind == MLP:
            self._before(module.mlp.linear_fc2, of_layer(number, FFN))
        elif layer.kind == ATTENTION:
            self._before(module.self_attention.linear_proj, of_layer(number, QUERY_HEADS))
        elif layer.kind == MAMBA:
            self._after(module.mixer.in_proj, self._projected(module.mixer, number))
        elif layer.kind == MOE:
            self._after(module.mlp.router, lambda out: self._add(
                of_layer(number, EXPERTS), out[0].view(*kept[0].shape[:2], -1), split=True,
                whole=True,
            ))  # fmt: skip
            if getattr(module.mlp, "shared_experts", None) is not None:
                self._before(module.mlp.shared_experts.linear_fc2, of_layer(number, SHARED))

    def _projected(self, mixer: Any, number: int) -> Callable[[Any], None]:
        """Of what Mamba-2's first linear gives, the x of the scan."""
        parts = list(mixer.in_proj_parts.values())
        place = list(mixer.in_proj_parts).index("x")
        return lambda out: self._add(
            of_layer(number, MAMBA_SCORES), out[0].split(parts, dim=-1)[place]
        )

    def _before(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, arguments: self._add(name, arguments[0]))

    def _after(self, module: nn.Module, see: Callable[[Any], None]) -> None:
        module.register_forward_hook(lambda _, __, out: see(out))

    def _see_norm(self, name: str, normed: Tensor) -> None:
        self._add(name, normed, split=True, whole=True)

    def _add(self, name: str, values: Tensor, *, split: bool = False, whole: bool = False) -> None:
        """`[s, b, w]` of a place.

        Args:
            split: sequence parallelism divides its tokens.
            whole: every tensor parallel rank has all of its channels.
        """
        self._seen[name] = values.detach().float().abs().sum(dim=0)
        if split:
            self._split.add(name)
        if whole:
            self._whole.add(name)

    def end_micro_batch(self, counted: Tensor, tokens: int) -> None:
        """Take what was seen of a micro batch into the sums.

        Args:
            counted: bool `[b]`, samples that are.
            tokens: of a sample, over all ranks.
        """
        context = parallel_state.get_context_parallel_group()
        both = parallel_state.get_tensor_and_context_parallel_group()
        for group, split in ((context, False), (both, True)):
            names = [name for name in self._seen if (name in self._split) == split]
            if not names:
                continue
            together = torch.cat([self._seen[name] for name in names], dim=1)
            if group.size() > 1:
                dist.all_reduce(together, group=group)
            means = (together.double() / tokens)[counted.to(together.device)]
            widths = [self._seen[name].shape[1] for name in names]
            for name, mean in zip(names, means.split(widths, dim=1), strict=True):
                sums = (mean if name.startswith(DEPTH) else mean.square()).sum(dim=0)
                self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._seen.clear()
        if parallel_state.is_pipeline_first_stage():
            self._samples += int(counted.sum())

    def collect(self) -> tuple[dict[str, Tensor], int]:
        """Scores by name as in the file, of all ranks, and of how many samples: the same on each.

        All ranks call it together.
        """
        device = next(iter(self._sums.values())).device
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        first = parallel_state.get_context_parallel_rank() == 0
        every: dict[str, Tensor] = {}
        for name, width in self._widths().items():
            placed = torch.zeros(width, dtype=torch.float64, device=device)
            mine = self._sums.get(name)
            if mine is not None and first and (tensor_rank == 0 or name not in self._whole):
                start = 0 if name in self._whole else tensor_rank * len(mine)
                placed[start : start + len(mine)] = mine
            every[name] = placed
        counted = self._samples if first and tensor_rank == 0 else 0
        flat = torch.cat([*every.values(), torch.tensor([float(counted)], device=device).double()])
        dist.all_reduce(flat)
        samples = int(flat[-1])
        parts = flat[:-1].split([len(placed) for placed in every.values()])
        return _scores(self._model, dict(zip(every, parts, strict=True)), samples), samples

    def _widths(self) -> dict[str, int]:
        """Channels of every place of the whole model."""
        found = {
            f"{HIDDEN}.{place}": self._model.hidden_size for place in range(len(self._layers) + 1)
        }
        for layer in self._layers:
            model, number = layer.model, layer.number
            found[f"{DEPTH}.{number}"] = 1
            if not has_axes(layer):
                continue
            if layer.kind == MLP:
                found[of_layer(number, FFN)] = model.ffn_hidden_size or 0
            elif layer.kind == ATTENTION:
                found[of_layer(number, QUERY_HEADS)] = (model.num_attention_heads or 0) * (
                    model.kv_channels or 0
                )
            elif layer.kind == MAMBA:
                found[of_layer(number, MAMBA_SCORES)] = (
                    model.mamba_num_heads or 0
                ) * model.mamba_head_dim
            elif layer.kind == MOE:
                found[of_layer(number, EXPERTS)] = model.num_moe_experts or 0
                if model.moe_shared_expert_intermediate_size is not None:
                    found[of_layer(number, SHARED)] = model.moe_shared_expert_intermediate_size
        return found


def _scores(model: ModelConfig, sums: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
    """The file's scores of the sums over samples, on the CPU in fp32."""
    every = layers(model)
    roots = {name: values.sqrt() for name, values in sums.items() if not name.startswith(DEPTH)}
    norms = [roots.pop(f"{HIDDEN}.{place}") for place in range(len(every) + 1)]
    changes = [sums[f"{DEPTH}.{layer.number}"] for layer in every]
    found = {
        HIDDEN: torch.stack(norms).sum(dim=0),
        DEPTH: torch.cat(changes) / samples,
    } | roots
    for layer in every:
        own, number = layer.model, layer.number
        if (name := of_layer(number, QUERY_HEADS)) in found:
            assert own.kv_channels is not None
            found[name] = found[name].view(-1, own.kv_channels).norm(dim=1)
        if (name := of_layer(number, MAMBA_SCORES)) in found:
            found[name] = found[name].view(-1, own.mamba_head_dim)
    return {name: values.float().cpu() for name, values in found.items()}
