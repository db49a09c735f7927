"""What each rank of a config has: its part of the layers, the tokens and the batch."""

from dataclasses import dataclass

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.layers import Sort, sort_of_each
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.config.phases import sequence_lengths
from megatron_hybrid.config.ranks import data_parallel_size, rank_tokens
from megatron_hybrid.config.rules.context_parallel import way_of_states


@dataclass(frozen=True)
class Layout:
    """The sizes that memory and time depend on.

    Attributes:
        tp, pp, vpp, cp, ep, etp, dp: sizes of the parallel dimensions; dp without cp.
        chunks: the pattern text of each pipeline segment, in the order of the layers; segment i is
            chunk i // pp of stage i % pp.
        sequence_parallel: norms and residuals are split over TP.
        micro_batch, micro_batches: samples in a forward pass, and how many of those a step has on a
            rank.
        seq_length: tokens, the longest of the run, and the meta tokens before them.
        tokens: of a micro batch on a rank, where TP ranks see all of them; of the longest samples.
        own_tokens: the same where sequence parallelism splits them.
        passes_states: CP ranks keep their parts of the sequence in layers with a state.
    """

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    chunks: tuple[str, ...]
    sequence_parallel: bool
    micro_batch: int
    micro_batches: int
    seq_length: int
    tokens: int
    own_tokens: int
    passes_states: bool

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def shards(self) -> int:
        """Ranks that share the optimizer state of dense parameters."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks that share the optimizer state of an expert."""
        return self.world_size // (self.pp * self.ep * self.etp)

    def stage_chunks(self, stage: int) -> tuple[str, ...]:
        """The pattern text of each chunk of a stage."""
        return self.chunks[stage :: self.pp]


def chunk_sorts(model: ModelConfig, layout: Layout) -> list[tuple[Sort, ...]]:
    """Of each of `layout.chunks`, what its layers are."""
    rest, found = sort_of_each(model), []
    for chunk in layout.chunks:
        found.append(rest[: len(chunk)])
        rest = rest[len(chunk) :]
    return found


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The layout of a valid config on `world_size` ranks."""
    p, training = config.parallel, config.training
    pp, dp = p.pipeline_model_parallel_size, data_parallel_size(config, world_size)
    chunks = parse_pattern(config.model.hybrid_layer_pattern).chunks(pp)
    longest = max(sequence_lengths(config)) + config.model.num_meta_tokens
    backend = "torch" if config.backend == "torch" else "transformer_engine"
    way = way_of_states(config, backend)
    passes_states = p.context_parallel_size > 1 and way == "state_passing"
    return Layout(
        p.tensor_model_parallel_size, pp, len(chunks) // pp, p.context_parallel_size,
        p.expert_model_parallel_size, p.expert_tensor_parallel_size or 1, dp, chunks,
        p.sequence_parallel, training.micro_batch_size,
        training.global_batch_size // (training.micro_batch_size * dp),
        longest, rank_tokens(config, longest, gathered=True), rank_tokens(config, longest),
        passes_states,
    )  # fmt: skip
