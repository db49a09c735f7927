"""Record the steps that a config names, on the ranks that it names: `run_dir/profile`."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.training.callbacks.base import Callback, Step
from megatron_hybrid.training.profile import Recording, as_text, write_trace

if TYPE_CHECKING:
    from megatron_hybrid.training.trainer import Trainer

FOLDER = "profile"


class Profile(Callback):
    """A trace and a table of time by layer kind, of steps `profile_step_start` + 1 to `_end`."""

    def __init__(self, config: RunConfig) -> None:
        training = config.training
        self._first = training.profile_step_start + 1
        self._last = training.profile_step_end
        self._here = dist.get_rank() in training.profile_ranks
        self._recording: Recording | None = None
        self._batches: Iterator[Batch] | None = None  # the run's, while they are timed
        self._steps: list[int] = []  # the first and the last of this start
        self._recorded = False

    def before_step(self, run: "Trainer") -> None:
        iteration = run.progress.iteration + 1
        self._steps = [*self._steps[:1], iteration]
        if iteration != self._first:
            return
        self._recorded = bool(run.config.training.profile_ranks)
        if self._here:
            self._recording = Recording(run.config, run.stepper)
            self._batches, run.batches = run.batches, self._recording.timed(run.batches)

    def after_step(self, run: "Trainer", step: Step) -> None:
        if self._recording is not None and run.progress.iteration >= self._last:
            self._write(run)

    def on_run_end(self, run: "Trainer", reason: str | None) -> None:
        """Steps that were recorded are not lost; that none was is said."""
        if reason is None:
            return
        if self._recording is not None:
            self._write(run)
        if not self._recorded and self._steps:
            training = run.config.training
            ranks = ", ".join(map(str, training.profile_ranks)) or "no rank"
            run.event(
                run.progress.iteration, "profile",
                f"no step was profiled: training.profile_step_start={self._first - 1} begins with "
                f"step {self._first}, training.profile_ranks are {ranks}, and this start did steps "
                f"{self._steps[0]} to {self._steps[-1]}",
            )  # fmt: skip

    def _write(self, run: "Trainer") -> None:
        recording, self._recording = self._recording, None
        assert recording is not None and self._batches is not None
        run.batches = self._batches
        iteration = run.progress.iteration
        table = recording.stop(iteration - self._first + 1)
        from megatron_hybrid.training.plot_profile import draw_profile  # and matplotlib, slow

        name = f"steps_{self._first}_{iteration}_rank_{dist.get_rank():05d}"
        folder = run.config.run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_trace(recording.profiler, folder / f"{name}.trace.json.gz")
        write_atomic(folder / f"{name}.json", json.dumps(table, indent=1))
        draw_profile(table, folder / f"{name}.png", run.config.run_dir.resolve().name)
        run.event(
            iteration, "profile",
            f"{as_text(table)}\nprofile: {folder / name}.json, .png, .trace.json.gz",
        )  # fmt: skip
