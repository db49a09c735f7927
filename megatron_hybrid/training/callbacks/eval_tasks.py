"""Tasks of lm-eval after each evaluation, answered by the model that is being trained."""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_hybrid.checkpoint.carried import ends_of
from megatron_hybrid.config import RunConfig
from megatron_hybrid.training.callbacks.base import Callback, Evaluation
from megatron_hybrid.training.metrics import TASKS

if TYPE_CHECKING:
    from megatron_hybrid.evaluation.tasks import Tasks
    from megatron_hybrid.training.trainer import Trainer

_TEXTS_AT_ONCE = 8


class EvalTasks(Callback):
    """Has the first rank ask, while the others take part; all of them report what came of it.

    The weights are shared, nothing of the run is changed by it.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._tasks: Tasks | None = None  # on the rank that asks

    def on_run_start(self, run: "Trainer") -> None:
        """Load the tasks and their documents.

        Raises:
            UserError: one of them is not known, cannot be had, or asks what cannot be asked.
        """
        if dist.get_rank() == 0:
            from megatron_hybrid.evaluation.tasks import AskedTasks, Tasks

            training = self._config.training
            folder = training.eval_tasks_include_path
            self._tasks = Tasks(
                AskedTasks(
                    training.eval_tasks, () if folder is None else (folder,),
                    training.eval_tasks_limit, training.eval_tasks_num_fewshot,
                )
            )  # fmt: skip
            self._tasks.check(run.tokenizer, self._config.data.seq_length)
            run.progressed()

    def after_evaluation(self, run: "Trainer", evaluation: Evaluation) -> None:
        """Ask, on all ranks.

        Raises:
            UserError: a task asks what the model cannot be asked.
        """
        from megatron_hybrid.evaluation.task_run import limits_for
        from megatron_hybrid.generation import Generator

        max_length = self._config.data.seq_length
        limits = limits_for(max_length, _TEXTS_AT_ONCE)
        found: list[Any] = [None]
        generator = Generator.of_model(
            run.config, run.model, run.tokenizer, limits=limits, ends=ends_of(run.carried)
        )
        with generator:
            if self._tasks is None:
                generator.follow(run.progressed)
            else:
                found = [self._tasks.ask(generator, max_length, lambda *_: run.progressed())]
        dist.broadcast_object_list(found)
        run.record(TASKS, found[0])
