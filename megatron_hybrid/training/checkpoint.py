"""Save and load a run through megatron-core's distributed checkpoints.

Any layout loads any checkpoint: tensors are stored whole, under names that know no ranks.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hybrid.config import ModelConfig, RunConfig, load_config
from megatron_hybrid.config.tracker import CONFIG_FILE
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.training import checkpoint_files as files
from megatron_hybrid.training.distributed import on_rank_zero
from megatron_hybrid.training.optimizer import load_optimizer_state

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
        self._in_background = 0  # the iteration that is being written there

    def save(self, progress: Progress, *, wait: bool = False) -> None:
        """Save now; with `checkpoint.async_save` the writing goes on in the background.

        All ranks call it together. Nothing names the checkpoint before it is whole.

        Args:
            wait: return only when the checkpoint is whole.
        """
        self.finish()
        iteration = progress.iteration
        with self._as_user_error(iteration):
            on_rank_zero(lambda: files.start_partial(self.save_folder, iteration))
            self._write(progress)
        if wait:
            self.finish()

    def _write(self, progress: Progress) -> None:
        iteration = progress.iteration
        if self.config.parallel.overlap_param_gather:
            for chunk in self.model:
                # Each rank has updated its share; the others' would come with the next forward.
                chunk.start_param_sync(force_sync=True)
        metadata = _metadata()
        state: dict[str, Any] = {
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "progress": vars(progress).copy(),
            "rng_state": _rng_state(),
            **_model_state(self.model, metadata),
        }
        state["optimizer"] = self.optimizer.sharded_state_dict(state, metadata=metadata)
        request = dist_checkpointing.save(
            state,
            str(files.partial_folder(self.save_folder, iteration)),
            async_sharded_save=self.config.checkpoint.async_save,
            async_strategy="mcore",
            content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
        )
        if request is None:
            self._publish(iteration)
            return
        request.add_finalize_fn(lambda: self._publish(iteration))
        self._queue.schedule_async_request(request)
        self._in_background = iteration

    def poll(self) -> None:
        """Publish a background checkpoint if its writing has ended. All ranks call it together."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any. All ranks call it together."""
        self._finalize(blocking=True)

    def _finalize(self, blocking: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with self._as_user_error(self._in_background):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _publish(self, iteration: int) -> None:
        """Every rank's part is written: complete the folder and give it its name."""
        options = self.config.checkpoint

        def complete() -> None:
            partial = files.partial_folder(self.save_folder, iteration)
            write_atomic(partial / CONFIG_FILE, self.config.to_yaml())
            self.tokenizer.save_copy(partial)
            if options.verify_integrity:
                save_integrity_manifest(str(partial))
            files.publish(partial, self.save_folder, iteration, options.keep_last)

        on_rank_zero(complete)
        self.report(iteration, f"saved {files.iteration_folder(self.save_folder, iteration)}")

    @contextmanager
    def _as_user_error(self, iteration: int) -> Iterator[None]:
        """A disk that is full or gone is the user's to mend; what was saved before stays."""
        try:
            yield
        except (OSError, UserError, CheckpointException) as error:
            reason = _reason(error)
            if isinstance(error, CheckpointException):
                # Raised on every rank, but only the first knows why, and hardly: the commonest
                # cause is worth a look.
                there = next(f for f in (self.save_folder, *self.save_folder.parents) if f.exists())
                free_gib = shutil.disk_usage(there).free / 2**30
                reasons = [f"{reason} ({free_gib:.1f} GiB are free there)"]
                dist.broadcast_object_list(reasons, src=0)
                reason = reasons[0]
            partial = files.partial_folder(self.save_folder, iteration)
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"checkpoint.save={self.save_folder}: step {iteration} could not be saved: "
                f"{reason}; earlier checkpoints there are as they were"
            ) from error


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
    saved = _saved_config(folder)
    if saved is not None:
        refuse_other_model(folder, config.model, saved.model)
        if not weights_only:
            refuse_other_batches(folder, config, saved)
    options = config.checkpoint
    loads_optimizer = optimizer if options.load_optim and not weights_only else None
    try:
        if options.verify_integrity and saved is not None and saved.checkpoint.verify_integrity:
            _verify(folder)
        with files.no_code_from_pickles():
            content = dist_checkpointing.load_content_metadata(str(folder)) or {}
        metadata = _metadata() | content
        present = load_sharded_metadata(str(folder))
        if loads_optimizer is not None and not any("optimizer." in key for key in present):
            raise UserError(
                "it holds no optimizer state; checkpoint.load_optim=false starts with a fresh one, "
                "checkpoint.finetune=true at step 1 as well"
            )
        state = _model_state(model, metadata)
        if loads_optimizer is not None:
            state["optimizer"] = loads_optimizer.sharded_state_dict(
                state, is_loading=True, metadata=metadata
            )
        # Megatron-LM's own has states of other generators under the same name.
        if options.load_rng and not weights_only and saved is not None and _same_grid(present):
            state["rng_state"] = _rng_state()
        with files.no_code_from_pickles():
            loaded = dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:
        # Damaged bytes make any reader stumble in its own way.
        raise UserError(f"{folder} cannot be loaded: {_reason(error)}") from error
    for index, chunk in enumerate(unwrap_model(model)):
        chunk.load_state_dict(loaded["model" if len(model) == 1 else f"model{index}"])
    if loads_optimizer is not None:
        sharding_type = metadata["distrib_optim_sharding_type"]
        load_optimizer_state(loads_optimizer, loaded["optimizer"], sharding_type)
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


def refuse_other_batches(folder: Path, config: RunConfig, saved: RunConfig) -> None:
    """Refuse to resume with steps of another size: data are counted in samples, a run in steps.

    Raises:
        UserError: every field that differs, with both values.
    """
    fields = {
        "training.global_batch_size": (
            config.training.global_batch_size,
            saved.training.global_batch_size,
        ),
        "data.seq_length": (config.data.seq_length, saved.data.seq_length),
    }
    differences = [
        f"  - {name}={ours}, in the checkpoint {theirs}"
        for name, (ours, theirs) in fields.items()
        if ours != theirs
    ]
    if differences:
        head = f"{folder} cannot be resumed with steps of another size (checkpoint.finetune can):"
        raise UserError("\n".join([head, *differences]))


def _saved_config(folder: Path) -> RunConfig | None:
    """The config of the run that saved a checkpoint; None for one of Megatron-LM's own."""
    path = folder / CONFIG_FILE
    return load_config([str(path)], which=()) if path.exists() else None


def refuse_other_model(folder: Path, model: ModelConfig, saved: ModelConfig) -> None:
    """Refuse a checkpoint whose own config says that its tensors are not those of this model.

    Raises:
        UserError: every field that differs, with both values.
    """
    differences = [
        f"  - model.{name}={ours!r}, in the checkpoint {theirs!r}"
        for name in SHAPE_FIELDS
        if (ours := _shape_value(model, name)) != (theirs := _shape_value(saved, name))
    ]
    if differences:
        raise UserError("\n".join([f"{folder} holds another model:", *differences]))


def _shape_value(model: ModelConfig, name: str) -> Any:
    value = getattr(model, name)
    # Where a pipeline is cut does not change the model.
    return value.replace("|", "") if name == "hybrid_layer_pattern" else value


def _verify(folder: Path) -> None:
    if not (folder / files.INTEGRITY_FILE).exists():
        raise UserError(
            f"{files.INTEGRITY_FILE} is missing, which the run wrote; "
            "checkpoint.verify_integrity=false loads the checkpoint unchecked"
        )
    verify_integrity_manifest(str(folder))


def _reason(error: BaseException) -> str:
    """An error in a line or few; torch's hold every rank's traceback, or every tensor's name."""
    if isinstance(error, CheckpointException):
        inner = {rank: wrapped[0] for rank, wrapped in error.failures.items()}
        return "; ".join(f"rank {rank}: {_reason(cause)}" for rank, cause in inner.items())
    speaks = isinstance(error, UserError | OSError | RuntimeError | CheckpointingException)
    text = str(error) if speaks else f"{type(error).__name__}: {error}"
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _same_grid(present: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved by as many pipeline and tensor ranks as there are now.

    Generators belong to ranks: in another layout they start from the seed.

    Args:
        present: the checkpoint's sharded metadata.
    """
    shape = _rng_state().global_shape
    same = any(
        isinstance(entry, ShardedObject)
        and entry.key == "rng_state"
        and tuple(entry.global_shape) == shape
        for entry in present.values()
    )
    if not same and dist.get_rank() == 0:
        logger.info("another layout saved it: random generators start from the seed")
    return same


def _set_rng_state(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
