"""Layouts of a model on a cluster that fit, the fastest first, by predicted tokens a second."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

from megatron_hybrid.config import RunConfig, build_config, rules
from megatron_hybrid.config.layers import layers_of, sort_of_each, sorts
from megatron_hybrid.config.pattern import MOE, parse_pattern
from megatron_hybrid.config.phases import sequence_lengths
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.planner.balance import Balancer
from megatron_hybrid.planner.costs import EMBEDDING, OUTPUT, Cost, Costs
from megatron_hybrid.planner.hardware import RESERVE_GIB, Gpu
from megatron_hybrid.planner.layer_time import Rank
from megatron_hybrid.planner.layout import layout_of
from megatron_hybrid.planner.memory import StageMemory, rank_memory
from megatron_hybrid.planner.step_time import StepTime, recomputed_seconds, step_time

GIB = 2**30
# What it tries, whatever a config says of them.
SEARCHED = (
    "parallel.tensor_model_parallel_size", "parallel.sequence_parallel",
    "parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size", "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size", "training.micro_batch_size",
    "training.recompute_granularity", "training.recompute_method",
    "training.recompute_num_layers", "training.recompute_modules",
)  # fmt: skip
PIPELINES, CHUNKS, MICRO_BATCHES = (1, 2, 4, 8, 16), (1, 2, 3, 4), (1, 2, 4)
# Up to so many tokens a sequence, CP is left at 1 or 2: TP and smaller batches come first.
SHORT_TOKENS = 8192
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": (),
    },
    {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "recompute_modules": (),
    },
)


@dataclass(frozen=True)
class Offer:
    """A layout that fits.

    Attributes:
        config: the run in this layout.
        memory: of each stage; `time`: of a step.
    """

    config: RunConfig
    memory: tuple[StageMemory, ...]
    time: StepTime

    @property
    def peak_gib(self) -> float:
        """Of the fullest stage."""
        return max(stage.total for stage in self.memory) / GIB

    @property
    def reason(self) -> str:
        """What its time is lost to most."""
        lost = {
            name: share
            for name, seconds in self.time.parts.items()
            if name not in ("matrix products", "attention and scan")
            and (share := seconds / self.time.seconds) >= 0.02
        }
        worst = sorted(lost.items(), key=lambda item: -item[1])[:3]
        return ", ".join(f"{name} {share:.0%}" for name, share in worst) or "nothing much is lost"


def search(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Offer]:
    """The fastest layouts of a run, all of which its rules allow.

    Model, data and global batch size stay as they are. Pipeline stages are balanced.

    Args:
        count: how many at most.
        progress: told how many candidates are looked at, and of how many.

    Raises:
        UserError: none fits.
    """
    found: list[tuple[StepTime, RunConfig, tuple[StageMemory, ...]]] = []
    splits: dict[tuple[Any, ...], str] = {}
    least = float("inf")
    candidates = list(_candidates(config, world_size, gpu))
    for number, (sizes, micro_batch, recompute) in enumerate(candidates):
        progress(number, len(candidates))
        changed = _changed(config, sizes, micro_batch, recompute)
        pp, chunks = sizes["pipeline_model_parallel_size"], sizes["chunks"]
        if pp > 1:
            key = tuple(sizes.values())
            if key not in splits:
                splits[key] = _balanced(changed, world_size, gpu, pp, chunks)
            model = changed.model.model_copy(update={"hybrid_layer_pattern": splits[key]})
            changed = changed.model_copy(update={"model": model})
        try:
            memory = rank_memory(changed, world_size, fused=True)
        except ConfigError:
            continue  # a frozen model cannot be in this layout
        peak = max(stage.total for stage in memory) / GIB
        least = min(least, peak)
        if peak <= gpu.memory_gib - RESERVE_GIB:
            found.append((step_time(changed, world_size, gpu), changed, memory))
    found.sort(key=lambda each: -each[0].tokens_per_s)
    offers: list[Offer] = []
    refused: ConfigError | None = None
    for time, changed, memory in found:
        if len(offers) == count:
            break
        try:
            offers.append(Offer(_valid(changed, world_size), memory, time))
        except ConfigError as error:
            refused = refused or error
    if not offers and refused is not None:
        raise UserError(f"--gpus={world_size}: no layout is a valid run; the fastest: {refused}")
    if not offers:
        allowed = f"{gpu.memory_gib:g} GiB of a {gpu.name} less {RESERVE_GIB:g} GiB"
        wanted = "no layout divides the model" if least == float("inf") else (
            f"the smallest layout takes {least:.1f} GiB a GPU, of {allowed}"
        )  # fmt: skip
        raise UserError(f"--gpus={world_size}: no layout of this run fits: {wanted}")
    return offers


def _powers(limit: int) -> Iterator[int]:
    """1, 2, 4, ... up to `limit`."""
    size = 1
    while size <= limit:
        yield size
        size *= 2


def _candidates(
    config: RunConfig, world_size: int, gpu: Gpu
) -> Iterator[tuple[dict[str, int], int, dict[str, Any]]]:
    """Sizes of the layout, micro batch and recomputation, as far as simple divisions allow."""
    model, batch = config.model, config.training.global_batch_size
    layers = parse_pattern(model.hybrid_layer_pattern).num_layers
    experts = min((layer.model.num_moe_experts or 1 for layer in layers_of(model, MOE)), default=1)
    cps = _powers(16 if max(sequence_lengths(config)) > SHORT_TOKENS else 2)
    for tp, cp, pp in product(_powers(gpu.gpus_per_node), list(cps), PIPELINES):
        if world_size % (tp * cp * pp) or pp > layers:
            continue
        dp = world_size // (tp * cp * pp)
        for ep, chunks, micro in product(_powers(experts), CHUNKS, MICRO_BATCHES):
            count, rest = divmod(batch, micro * dp)
            if rest or pp * chunks > layers or (pp == 1 and chunks > 1):
                continue
            if (chunks > 1 and count % pp) or (world_size // pp) % ep:
                continue
            sizes = {
                "tensor_model_parallel_size": tp, "context_parallel_size": cp,
                "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep,
                "chunks": chunks,
            }  # fmt: skip
            for recompute in RECOMPUTE:
                yield sizes, micro, recompute


def _changed(
    config: RunConfig, sizes: dict[str, int], micro_batch: int, recompute: dict[str, Any]
) -> RunConfig:
    layout = {name: size for name, size in sizes.items() if name != "chunks"} | {
        "sequence_parallel": sizes["tensor_model_parallel_size"] > 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_tensor_parallel_size": 1,
    }
    layers = parse_pattern(config.model.hybrid_layer_pattern).layers
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=layout),
            "gpu": config.gpu.model_copy(
                update={"overlap_p2p_comm": config.gpu.overlap_p2p_comm and sizes["chunks"] > 1}
            ),
            "training": config.training.model_copy(
                update={"micro_batch_size": micro_batch} | recompute
            ),
            "model": config.model.model_copy(update={"hybrid_layer_pattern": layers}),
        }
    )


def predicted_costs(config: RunConfig, world_size: int, gpu: Gpu) -> Costs:
    """What each sort of layer is predicted to cost on a rank of a layout, as for balancing."""
    rank = Rank(config, layout_of(config, world_size), gpu)
    found = {}
    for sort in sorts(config.model):
        own = rank.of_sizes(sort.model)
        forward, backward = own.layer(sort.kind, fp8=rank.fp8)
        again = recomputed_seconds(own, sort.kind, 0, forward, fp8=rank.fp8)
        found[sort.name] = Cost(1e3 * forward.seconds, 1e3 * (backward.seconds + again))
    ends = [1e3 * work.seconds for work in rank.ends()]
    found |= {EMBEDDING: Cost(*ends[:2]), OUTPUT: Cost(*ends[2:])}
    return Costs(MappingProxyType(found))


def _balanced(config: RunConfig, world_size: int, gpu: Gpu, stages: int, chunks: int) -> str:
    costs = predicted_costs(config, world_size, gpu)
    layers = [sort.name for sort in sort_of_each(config.model)]
    return Balancer(layers, costs, stages, chunks, 1).quick().pattern


def _valid(config: RunConfig, world_size: int) -> RunConfig:
    """The config as a run would get it.

    Raises:
        ConfigError: a rule does not hold.
    """
    values = config.model_dump(mode="json")
    return build_config(values, which=rules.NO_FILES, world_size=world_size, has_cuda=True)
