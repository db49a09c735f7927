"""Save and load a run through megatron-core's distributed checkpoints.

Any layout loads any checkpoint: tensors are stored whole, under names that know no ranks.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import (
    save_integrity_manifest,
    verify_integrity_manifest,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_hybrid.config import ModelConfig, RunConfig, load_config
from megatron_hybrid.config.tracker import CONFIG_FILE
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.training import checkpoint_files as files

logger = logging.getLogger(__name__)

# The fields of the model that decide which tensors it has, and of which shapes.
SHAPE_FIELDS = (
    "hybrid_layer_pattern", "hidden_size", "ffn_hidden_size", "activation", "add_bias_linear",
    "num_attention_heads", "num_query_groups", "kv_channels",
    "mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups",
    "vocab_size", "make_vocab_size_divisible_by", "untie_embeddings_and_output_weights",
    "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_router_enable_expert_bias",
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands; travels in the checkpoint.

    Attributes:
        iteration: steps done.
        consumed_samples: of the training data.
        loss_average: running mean of the loss that spikes are measured against, None at first.
    """

    iteration: int = 0
    consumed_samples: int = 0
    loss_average: float | None = None


def _metadata() -> dict[str, Any]:
    """How the engine lays out the tensors: an optimizer state that any layout can load."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _rng_state() -> ShardedObject:
    """The generators' states of this pipeline and tensor rank."""
    states = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", states, shape, place, replica_id=replica)


def _model_state(model: list[torch.nn.Module], metadata: dict) -> dict[str, Any]:
    """The sharded state of this rank's chunks, under the keys of the bare model."""
    chunks = unwrap_model(model)
    names = ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]
    return {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, chunks, strict=True)
    }


class Checkpointer:
    """Writes checkpoints of one run, at once or in the background.

    Args:
        model: this rank's pipeline chunks under DDP.
        report: told one line about each checkpoint once it is whole.
    """

    def __init__(
        self,
        config: RunConfig,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        tokenizer: Tokenizer,
        report: Callable[[int, str], None],
    ) -> None:
        assert config.checkpoint.save is not None
        self.save_folder = config.checkpoint.save
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.report = report
        self._queue = AsyncCallsQueue()

    def save(self, progress: Progress, *, wait: bool = False) -> None:
        """Save now; with `checkpoint.async_save` the writing goes on in the background.

        All ranks call it together. Nothing names the checkpoint before it is whole.

        Args:
            wait: return only when the checkpoint is whole.
        """
        self.finish()
        iteration = progress.iteration
        partial = files.partial_folder(self.save_folder, iteration)
        if dist.get_rank() == 0:
            files.make_empty(partial)
        dist.barrier()
        metadata = _metadata()
        state: dict[str, Any] = {
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "progress": vars(progress).copy(),
            "rng_state": _rng_state(),
            **_model_state(self.model, metadata),
        }
        state["optimizer"] = self.optimizer.sharded_state_dict(state, metadata=metadata)
        in_background = self.config.checkpoint.async_save
        request = dist_checkpointing.save(
            state,
            str(partial),
            async_sharded_save=in_background,
            async_strategy="mcore",
            content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
        )
        if request is None:
            self._publish(partial, iteration)
            return
        request.add_finalize_fn(lambda: self._publish(partial, iteration))
        self._queue.schedule_async_request(request)
        if wait:
            self.finish()

    def poll(self) -> None:
        """Publish a background checkpoint if its writing has ended. All ranks call it together."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any. All ranks call it together."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=True)

    def _publish(self, partial: Path, iteration: int) -> None:
        """Every rank's part is written: complete the folder and give it its name."""
        options = self.config.checkpoint
        if dist.get_rank() == 0:
            write_atomic(partial / CONFIG_FILE, self.config.to_yaml())
            self.tokenizer.save_copy(partial)
            if options.verify_integrity:
                save_integrity_manifest(str(partial))
            files.publish(partial, self.save_folder, iteration, options.keep_last)
        dist.barrier()
        self.report(iteration, f"saved {files.iteration_folder(self.save_folder, iteration)}")


def load_checkpoint(
    config: RunConfig,
    folder: Path,
    model: list[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    *,
    weights_only: bool,
) -> Progress:
    """Load a checkpoint of any layout into this rank's model and optimizer.

    All ranks call it together.

    Args:
        folder: one checkpoint, `…/iter_0000100`.
        model: this rank's pipeline chunks, under DDP or plain.
        optimizer: None where there is none (for generation).
        weights_only: take the weights alone; the run starts at step 0 with a fresh optimizer.

    Raises:
        UserError: the checkpoint is torn, damaged, or of another model.
    """
    files.refuse_unsafe_index(folder)
    refuse_other_model(folder, config)
    options = config.checkpoint
    loads_optimizer = optimizer if options.load_optim and not weights_only else None
    try:
        if options.verify_integrity and (folder / files.INTEGRITY_FILE).exists():
            verify_integrity_manifest(str(folder))
        metadata = _metadata() | (dist_checkpointing.load_content_metadata(str(folder)) or {})
        state = _model_state(model, metadata)
        if loads_optimizer is not None:
            state["optimizer"] = loads_optimizer.sharded_state_dict(
                state, is_loading=True, metadata=metadata
            )
        if options.load_rng and not weights_only and _same_grid(folder):
            state["rng_state"] = _rng_state()
        loaded = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error
    for index, chunk in enumerate(unwrap_model(model)):
        chunk.load_state_dict(loaded["model" if len(model) == 1 else f"model{index}"])
    if loads_optimizer is not None:
        sharding_type = metadata["distrib_optim_sharding_type"]
        _load_optimizer(loads_optimizer, loaded["optimizer"], sharding_type)
    elif optimizer is not None:
        optimizer.reload_model_params()
    if "rng_state" in state:
        _set_rng_state(loaded["rng_state"])
    if weights_only:
        return Progress()
    if "progress" in loaded:
        return Progress(**loaded["progress"])
    # Megatron-LM's own checkpoint: it knows its iteration, and its samples if the batch was fixed.
    iteration = int(loaded.get("iteration", 0))
    return Progress(iteration, iteration * config.training.global_batch_size)


def refuse_other_model(folder: Path, config: RunConfig) -> None:
    """Refuse a checkpoint whose own config says that its tensors are not those of this model.

    Raises:
        UserError: every field that differs, with both values.
    """
    path = folder / CONFIG_FILE
    if not path.exists():  # Megatron-LM's own: the engine compares the tensors
        return
    saved = load_config([str(path)], which=()).model
    differences = [
        f"  - model.{name}={ours!r}, in the checkpoint {theirs!r}"
        for name in SHAPE_FIELDS
        if (ours := _shape_value(config.model, name)) != (theirs := _shape_value(saved, name))
    ]
    if differences:
        raise UserError("\n".join([f"{folder} holds another model:", *differences]))


def _shape_value(model: ModelConfig, name: str) -> Any:
    value = getattr(model, name)
    # Where a pipeline is cut does not change the model.
    return value.replace("|", "") if name == "hybrid_layer_pattern" else value


def _load_optimizer(
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
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    for index, part in enumerate(chained):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = max(steps, default=0)
        tensors = loaded[index] if len(chained) > 1 else loaded
        state["param_state"] = tensors["param_state"]
        state["param_state_sharding_type"] = sharding_type
        part.load_state_dict(state)


def _same_grid(folder: Path) -> bool:
    """Whether a checkpoint was saved by as many pipeline and tensor ranks as there are now.

    Generators belong to ranks: in another layout they start from the seed.
    """
    sharded = load_sharded_metadata(str(folder))
    shape = _rng_state().global_shape
    same = any(
        isinstance(entry, ShardedObject)
        and entry.key == "rng_state"
        and tuple(entry.global_shape) == shape
        for entry in sharded.values()
    )
    if not same and dist.get_rank() == 0:
        logger.info("another layout saved %s: random generators start from the seed", folder)
    return same


def _set_rng_state(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
