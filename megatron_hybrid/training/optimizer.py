"""Data-parallel wrapping, megatron-core's optimizer over it, and the learning-rate schedule."""

import math
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.layers import layers_of
from megatron_hybrid.config.lengths import lengths
from megatron_hybrid.config.pattern import MOE
from megatron_hybrid.errors import UserError
from megatron_hybrid.layers.router import move_expert_biases
from megatron_hybrid.objectives.registry import build_objective

_COMPARED_AT_ONCE = 2**24  # numbers, for the sake of memory


def wrap_data_parallel(
    config: RunConfig, engine_config: TransformerConfig, chunks: list[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Each pipeline chunk, with what the objective trains beside it, under the engine's DDP,
    gradients in fp32; hooks go into the config."""
    add_parameters(config, chunks)
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=config.gpu.align_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        fp8_param_gather=config.precision.fp8_param_gather,
    )
    wrapped = [
        DistributedDataParallel(
            config=engine_config,
            ddp_config=ddp_config,
            module=chunk,
            # Only the first chunk's backward comes last, with nothing left to overlap with. One
            # bucket holds what has several formats; gloo takes all for the first one's, in silence.
            disable_bucketing=index > 0 and next(chunk.parameters()).is_cuda,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        count_padding(chunk)
    engine_config.finalize_model_grads_func = finalize_model_grads
    counts = {layer.model.num_moe_experts for layer in layers_of(config.model, MOE)}
    if config.model.moe_router_enable_expert_bias and len(counts) > 1:
        # Layers have configs of their own: this one's says what the engine does with their biases.
        engine_config.moe_router_enable_expert_bias = False
        rate = config.model.moe_router_bias_update_rate

        def finalize(model: list[torch.nn.Module], *arguments: Any, **named: Any) -> None:
            finalize_model_grads(model, *arguments, **named)
            move_expert_biases(model, rate)

        engine_config.finalize_model_grads_func = finalize
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        engine_config.no_sync_func = no_sync[0] if len(wrapped) == 1 else no_sync
        if len(wrapped) > 1:
            engine_config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    if parallel.overlap_param_gather and len(wrapped) > 1:
        engine_config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
    return wrapped


def add_parameters(config: RunConfig, chunks: list[torch.nn.Module]) -> None:
    """Give chunks what the objective trains beside their weights, in the model's own format."""
    objective = build_objective(config)
    for chunk in chunks:
        made = objective.parameters(unwrap_model(chunk))
        if made is not None:
            like = next(chunk.parameters())
            precise = config.precision.weights != "bf16"
            made = made.to(like.device, torch.float32 if precise else torch.bfloat16)
            unwrap_model(chunk).objective = made


def count_padding(chunk: DistributedDataParallel) -> None:
    """Have the padding of all buckets but the last counted among what a buffer holds.

    Of several buckets the engine saves what they hold one after the other, without the padding at
    their ends, and then looks for each parameter's state where it is with that padding: behind the
    first bucket that has some, states would be saved of other parameters, and the last ones' as
    zeros (megatron-core 0.19, `sharded_param_state_fully_reshardable`).
    """
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        for bucket in buffer.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


def build_optimizer(
    config: RunConfig, engine_config: TransformerConfig, model: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """AdamW with fp32 main parameters; no weight decay on vectors (norms, biases, D) and A_log."""
    options = config.optimizer
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=engine_config.bf16,
        params_dtype=engine_config.params_dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_recipe=engine_config.fp8_recipe if engine_config.fp8 else None,
    )
    overrides = get_standard_config_overrides(optimizer_config)
    overrides[ParamKey(name="*.A_log")] = {"wd_mult": 0.0}  # of Mamba-1 a matrix
    if engine_config.bf16:
        # fp32 parameters among bf16 ones need a group of their own: within a group the engine
        # puts them first, and then stores each one's state under another's name. A rate of its
        # own, though the same, makes it one.
        is_fp32 = ParamPredicate(name="fp32", fn=lambda p: p.dtype == torch.float32)
        overrides[ParamKey(predicate=is_fp32)] = {"max_lr": options.lr}
    optimizer = get_megatron_optimizer(
        optimizer_config, model, config_overrides=overrides, use_gloo_process_groups=False
    )
    for part in optimizer_parts(optimizer):
        if part.init_state_fn is not None and not part.is_stub_optimizer:
            # From the start, so that a run can be saved before its first update.
            part.init_state_fn(part.optimizer, optimizer_config)
    engine_config.grad_scale_func = optimizer.scale_loss
    return optimizer


def gather_parameters(config: RunConfig, model: list[DistributedDataParallel]) -> None:
    """Bring the parameters that other ranks have updated; see `Trainer.gather_parameters`."""
    if config.parallel.overlap_param_gather:
        for chunk in model:
            chunk.start_param_sync(force_sync=True)


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The engine chains one optimizer for dense and one for expert parameters, or has just one."""
    chained = isinstance(optimizer, ChainedOptimizer)
    return optimizer.chained_optimizers if chained else [optimizer]


class LearningRate:
    """The engine's schedule of the learning rate over the tokens that a run has consumed.

    A function of the config and that number, without a state of its own: editing the schedule of a
    run takes effect when it resumes.

    Args:
        start_tokens: consumed when the schedule began; it knows nothing of what was before.
    """

    def __init__(
        self, config: RunConfig, optimizer: MegatronOptimizer, start_tokens: int = 0
    ) -> None:
        options = config.optimizer
        self._start_tokens = start_tokens
        schedule = lengths(config, start_tokens)
        # The engine's steps are ours of `unit_tokens`: samples, as long as all are equally long.
        self._unit_tokens = unit = schedule.unit_tokens
        wsd_decay = schedule.wsd_decay_tokens
        self._optimizer = optimizer
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=options.lr,
            min_lr=options.min_lr,
            lr_warmup_steps=schedule.warmup_tokens // unit,
            lr_decay_steps=schedule.decay_tokens // unit,
            lr_decay_style=options.lr_decay_style,
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            wsd_decay_steps=None if wsd_decay is None else wsd_decay // unit,
            lr_wsd_decay_style=options.lr_wsd_decay_style,
        )

    def set(self, consumed_tokens: int) -> None:
        """Give the optimizer the rate of the step that begins after so many tokens."""
        self._scheduler.num_steps = (consumed_tokens - self._start_tokens) // self._unit_tokens
        self._scheduler.step(0)

    def current(self) -> float:
        """The rate of the next step."""
        return float(self._scheduler.get_lr(self._optimizer.param_groups[0]))


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Make the reduced gradients ready for the optimizer; their global L2 norm, on every rank."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, clip_grad: float, grad_norm: float) -> None:
    """Clip the gradients that `gradient_norm` made ready, and step.

    `optimizer.step()` in two halves, so that a caller may look at the norm before it steps.
    """
    if clip_grad > 0.0:
        for part in optimizer_parts(optimizer):
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def refuse_other_weights(
    optimizer: MegatronOptimizer, loaded: dict[Any, Any], model: list[torch.nn.Module]
) -> None:
    """Refuse an optimizer's state that has other weights than the model beside it.

    They would take the model's place. Where `count_padding` was not yet, runs saved such states.
    All ranks call it together.

    Args:
        loaded: the optimizer's part of a checkpoint.
        model: this rank's chunks, with the checkpoint's weights.

    Raises:
        UserError: naming some.
    """
    names = {id(p): name for chunk in unwrap_model(model) for name, p in chunk.named_parameters()}
    parts = optimizer_parts(optimizer)
    found = []
    for index, part in enumerate(parts):
        if not isinstance(part, DistributedOptimizer) or not part.get_parameters():
            continue
        states = (loaded[index] if len(parts) > 1 else loaded)["param_state"]
        held = (parameter for buffer in part.buffers for parameter in buffer.param_index_map)
        for number, parameter in enumerate(held):
            # Weights in float8 are made of their main ones when the run goes on.
            if is_float8tensor(parameter):
                continue
            if _apart(states[number]["param"], parameter.detach()):
                found.append(names[id(parameter)])
    everywhere: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, found)
    if other := sorted({name for of_rank in everywhere for name in of_rank}):
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(
            f"its optimizer's state is of other weights than its model's: {', '.join(other[:3])}"
            f"{more}; checkpoint.load_optim=false goes on with the model's and a fresh optimizer"
        )


def _apart(main: Tensor, weight: Tensor) -> bool:
    """Whether some weight is far beyond what rounding makes of its main one, in fp32: those of a
    checkpoint may have been in float8."""
    largest = torch.linalg.vector_norm(main, math.inf)
    pieces = zip(*(each.flatten().split(_COMPARED_AT_ONCE) for each in (main, weight)), strict=True)
    for one, other in pieces:
        distance = (one - other.to(one.device, torch.float32)).abs_()
        if bool((distance > one.abs().mul_(0.25).add_(largest / 64)).any()):
            return True
    return False


def load_optimizer_state(
    optimizer: MegatronOptimizer, loaded: dict[Any, Any], sharding_type: str
) -> None:
    """Take the loaded tensors and the count of steps; all else follows from the config.

    The engine chains one optimizer for dense and one for expert parameters, or has one for both,
    as the layout asks; its untyped part of a checkpoint has the shape of the layout that saved.
    """
    steps = {
        group["step"]
        for part in (loaded, *loaded.values())
        if isinstance(part, dict) and "optimizer" in part
        for group in part["optimizer"]["param_groups"]
        if "step" in group
    }
    parts = optimizer_parts(optimizer)
    for index, part in enumerate(parts):
        if len(parts) > 1 and not part.get_parameters():
            continue  # a pipeline stage without experts: nothing of this part was saved or loaded
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = max(steps, default=0)
        tensors = loaded[index] if len(parts) > 1 else loaded
        state["param_state"] = tensors["param_state"]
        state["param_state_sharding_type"] = sharding_type
        part.load_state_dict(state)
