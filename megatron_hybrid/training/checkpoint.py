"""Save and load a run through megatron-core's distributed checkpoints.

Any layout loads any checkpoint: tensors are stored whole, under names that know no ranks.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import (
    load_common_state_dict,
    load_content_metadata,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.carried import Carried, write_carried
from megatron_hybrid.checkpoint.integrity import (
    refuse_other_format,
    verify_integrity,
    write_integrity,
)
from megatron_hybrid.checkpoint.progress import Progress, is_ours, made_of_another, saved_progress
from megatron_hybrid.checkpoint.reader import COMMON_FILE
from megatron_hybrid.checkpoint.saved_config import refuse_other_model, saved_config
from megatron_hybrid.checkpoint.threads import default_threads
from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.tracker import CONFIG_FILE
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.saved_files import DATA_FILES_FILE, files_json
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE, SavedPlan
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.errors import UserError, in_words
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.model.float8 import float8_linears, histories, set_histories
from megatron_hybrid.training.checkpoint_state import (
    clear_padding,
    load_chunk,
    model_state,
    refuse_fewer_words,
    refuse_left_over,
    rng_state,
    same_grid,
    set_rng_state,
    take_out_new,
    tensor_layout,
    without_extra_states,
)
from megatron_hybrid.training.distributed import on_rank_zero
from megatron_hybrid.training.optimizer import (
    gather_parameters,
    load_optimizer_state,
    refuse_other_weights,
)
from megatron_hybrid.training.upcycle import load_upcycled

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes checkpoints of one run, at once or in the background.

    Args:
        model: this rank's pipeline chunks under DDP.
        report: told one line about each checkpoint once it is whole.
        plan: of the data; None where they have none.
        carried: of the Hugging Face folder that the model came from.
        data_files: digests of the files of data that have no plan.
    """

    def __init__(
        self,
        config: RunConfig,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        tokenizer: Tokenizer,
        report: Callable[[int, str], None],
        plan: Plan | None = None,
        carried: Carried | None = None,
        data_files: Mapping[str, str] | None = None,
    ) -> None:
        assert config.checkpoint.save is not None
        self.save_folder = config.checkpoint.save
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.plan = plan
        self.carried = carried or {}
        self.data_files = data_files or {}
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
        gather_parameters(self.config, self.model)
        metadata = tensor_layout()
        state: dict[str, Any] = {
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "progress": vars(progress).copy(),
            "rng_state": rng_state(),
            **model_state(self.model, metadata),
            **histories(float8_linears(self.model)),
        }
        state["optimizer"] = self.optimizer.sharded_state_dict(state, metadata=metadata)
        request = dist_checkpointing.save(
            state,
            str(files.partial_folder(self.save_folder, iteration)),
            async_sharded_save=self.config.checkpoint.async_save,
            async_strategy="mcore",
            content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
        )
        data_plan = None
        if self.plan is not None:
            data_plan = SavedPlan(self.plan, progress.consumed_samples).to_json()
        if request is None:
            self._publish(iteration, data_plan)
            return
        request.add_finalize_fn(lambda: self._publish(iteration, data_plan))
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

    def _publish(self, iteration: int, data_plan: str | None) -> None:
        """Every rank's part is written: complete the folder and give it its name."""
        options = self.config.checkpoint
        notes: list[str] = []  # of rank 0, which reports

        def complete() -> None:
            partial = files.partial_folder(self.save_folder, iteration)
            write_atomic(partial / CONFIG_FILE, self.config.to_yaml())
            self.tokenizer.save_copy(partial)
            write_carried(partial, self.carried)
            if data_plan is not None:
                write_atomic(partial / DATA_PLAN_FILE, data_plan)
            if self.data_files:
                write_atomic(partial / DATA_FILES_FILE, files_json(self.data_files))
            if options.verify_integrity:
                write_integrity(partial, default_threads())
            notes.extend(files.publish(self.save_folder, iteration, keep_last=options.keep_last))

        on_rank_zero(complete)
        for note in notes:
            self.report(iteration, note)
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
            if dist.get_rank() == 0:
                files.discard_partial(self.save_folder, iteration)
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
    upcycle: bool = False,
) -> Progress:
    """Load a checkpoint of any layout into this rank's model and optimizer.

    All ranks call it together.

    Args:
        folder: one checkpoint, `…/iter_0000100`.
        model: this rank's pipeline chunks, under DDP or plain.
        optimizer: None where there is none (for generation).
        weights_only: take the weights alone; the run starts at step 0 with a fresh optimizer.
        upcycle: the checkpoint is a dense model's, whose MLPs become experts; the optimizer is
            fresh.

    Raises:
        UserError: the checkpoint is torn, damaged, or of another model.
    """
    files.refuse_unsafe_index(folder)
    saved = saved_config(folder)
    if saved is not None and not upcycle:
        refuse_other_model(folder, config.model, saved.model)
    options, restart = config.checkpoint, config.optimizer.restart_schedule
    keeps_optimizer = options.load_optim and not (weights_only or upcycle or restart)
    loads_optimizer = optimizer if keeps_optimizer else None
    try:
        on_rank_zero(lambda: _check_files(folder, saved, verify=options.verify_integrity))
        common = _common_state(folder)
        if saved is None and is_ours(common):
            raise UserError(
                f"{CONFIG_FILE} is missing, which the run wrote: nothing says which model, data "
                "and tokenizer these weights are of"
            )
        metadata = tensor_layout() | (load_content_metadata(preloaded_state_dict=common) or {})
        present = load_sharded_metadata(str(folder))
        words = config.model.vocab_size
        assert words is not None, "resolved from the tokenizer before the model is built"
        refuse_fewer_words(present, words)
        has_optimizer = any("optimizer." in key for key in present)
        made = made_of_another(common)
        if loads_optimizer is not None and not has_optimizer and made is not None:
            logger.info("%s is %s: the optimizer is fresh", folder, made)
            loads_optimizer = None
        if loads_optimizer is not None and not has_optimizer:
            raise UserError(
                "it holds no optimizer state; checkpoint.load_optim=false starts with a fresh one, "
                "checkpoint.finetune=true at step 1 as well"
            )
        asked = model_state(model, metadata)
        if saved is None and not upcycle:  # else its config says which model it holds
            refuse_left_over(present, asked)
        state = {name: without_extra_states(chunk) for name, chunk in asked.items()}
        if new := take_out_new(state, present):
            if loads_optimizer is not None:
                raise UserError(
                    f"it holds no {', '.join(new)}, or of another shape, which "
                    f"training.objective={config.training.objective} trains beside the model; "
                    "checkpoint.load_optim=false starts them and the optimizer afresh, "
                    "checkpoint.finetune=true at step 1 as well"
                )
            if dist.get_rank() == 0:
                logger.info("%s holds no %s: they start afresh", folder, ", ".join(new))
        if loads_optimizer is not None:
            state["optimizer"] = loads_optimizer.sharded_state_dict(
                state, is_loading=True, metadata=metadata
            )
        # Megatron-LM's own has states of other generators under the same name.
        loads_rng = options.load_rng and not (weights_only or upcycle)
        if loads_rng and saved is not None and same_grid(present):
            state["rng_state"] = rng_state()
        float8 = float8_linears(model)
        remembered = {key: value for key, value in histories(float8).items() if key in present}
        if keeps_optimizer:
            state |= remembered
        with files.no_code_from_pickles():
            if upcycle:
                loaded = load_upcycled(config, folder, state)
            else:
                loaded = dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:
        # Damaged bytes make any reader stumble in its own way.
        raise UserError(f"{folder} cannot be loaded: {_reason(error)}") from error
    clear_padding(state, loaded, words)
    for index, chunk in enumerate(unwrap_model(model)):
        load_chunk(chunk, loaded["model" if len(model) == 1 else f"model{index}"])
    if loads_optimizer is not None:
        sharding_type = metadata["distrib_optim_sharding_type"]
        if sharding_type == tensor_layout()["distrib_optim_sharding_type"]:
            try:
                refuse_other_weights(loads_optimizer, loaded["optimizer"], model)
            except UserError as error:
                raise UserError(f"{folder} cannot be loaded: {error}") from error
        load_optimizer_state(loads_optimizer, loaded["optimizer"], sharding_type)
    elif optimizer is not None:
        optimizer.reload_model_params()
    set_histories(float8, {key: loaded[key] for key in remembered if key in state})
    if "rng_state" in state:
        set_rng_state(loaded["rng_state"])
    if weights_only:
        return Progress()
    progress = _progress(config, folder, loaded)
    if upcycle:
        progress.loss_average, progress.objective_state = None, {}  # of another model
    if restart:
        progress.schedule_start_samples = progress.consumed_samples
    return progress


def _progress(config: RunConfig, folder: Path, loaded: dict[str, Any]) -> Progress:
    """Where the run that saved a checkpoint stood."""
    progress = saved_progress(folder, loaded, config)
    if progress is None:
        raise UserError(
            f"{folder} is Megatron-LM's own and does not say how many samples were read: that is "
            "known of steps of one size, without training.batch_size_schedule and phases of other "
            "lengths; checkpoint.finetune=true starts with fresh counters"
        )
    return progress


def _check_files(folder: Path, saved: RunConfig | None, *, verify: bool) -> None:
    """What is wrong with the files of a checkpoint, named, before the engine stumbles over it."""
    if verify:
        verify_integrity(folder, saved, default_threads())
    refuse_other_format(folder)


def _common_state(folder: Path) -> dict[str, Any]:
    """What belongs to no rank, by megatron-core's reader."""
    path = folder / COMMON_FILE
    try:
        with files.no_code_from_pickles():
            return dict(load_common_state_dict(folder))
    except (Exception, CheckpointException) as error:
        if not path.is_file():
            raise
        raise UserError(f"{path} is damaged: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An error in a line or few; torch's hold every rank's traceback, or every tensor's name.

    Raises:
        KeyboardInterrupt: that is what torch took for one: Ctrl-C is no fault of a checkpoint.
    """
    if isinstance(error, CheckpointException):
        inner = {rank: wrapped[0] for rank, wrapped in error.failures.items()}
        for cause in inner.values():
            if isinstance(cause, KeyboardInterrupt):
                raise cause
        return "; ".join(f"rank {rank}: {_reason(cause)}" for rank, cause in inner.items())
    text = in_words(error)
    return text if len(text) <= 400 else f"{text[:400]} ..."
