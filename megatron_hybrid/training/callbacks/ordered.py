"""The callbacks of a run, in their order: ours first, then those that its config names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from launchers.place import log_folder
from megatron_hybrid.config import RunConfig
from megatron_hybrid.errors import UserError
from megatron_hybrid.extensions import load_class
from megatron_hybrid.training.callbacks.attempts import Attempts
from megatron_hybrid.training.callbacks.base import Callback, Evaluation, Step
from megatron_hybrid.training.callbacks.console import Console
from megatron_hybrid.training.callbacks.eval_tasks import EvalTasks
from megatron_hybrid.training.callbacks.expert_load import ExpertLoadRecords
from megatron_hybrid.training.callbacks.figures import Figures
from megatron_hybrid.training.callbacks.float8_fit import Float8Fit
from megatron_hybrid.training.callbacks.metrics_file import MetricsFile
from megatron_hybrid.training.callbacks.params_norm import ParamsNorm
from megatron_hybrid.training.callbacks.profile import Profile
from megatron_hybrid.training.callbacks.tensorboard import TensorBoard
from megatron_hybrid.training.callbacks.trackers import Trackers
from megatron_hybrid.training.callbacks.watchdog import Watchdog
from megatron_hybrid.training.metrics import STEP_NAMES
from megatron_hybrid.training.trackers.targets import targets

if TYPE_CHECKING:
    from megatron_hybrid.training.step_metrics import StepMetrics
    from megatron_hybrid.training.trainer import Trainer

FIELD = "training.callbacks"


class CallbackError(RuntimeError):
    """A callback of the user's raised what it should not have; the cause has the place."""


def reporters(config: RunConfig) -> list[Callback]:
    """Those that write down what a run reports, on the one rank that does."""
    board = [TensorBoard()] if config.logging.tensorboard else []
    return [MetricsFile(), *board, *([Trackers()] if targets(config) else []), Console()]


def built_in(config: RunConfig, *, reports: bool) -> list[Callback]:
    """Ours, as far as a config asks for them.

    Args:
        reports: whether this rank is the one that writes down what the run reports.
    """
    logging, training = config.logging, config.training
    found: list[Callback | None] = [
        Attempts() if reports else None,
        *(reporters(config) if reports else ()),
        Watchdog(log_folder(config.run_dir), training.hang_timeout_s),
        ParamsNorm() if logging.log_params_norm else None,
        Figures(),
        Float8Fit(logging.float8_interval) if logging.float8_interval else None,
        ExpertLoadRecords(logging.expert_load_interval) if logging.expert_load_interval else None,
        Profile(config) if training.profile else None,
        EvalTasks(config) if training.eval_tasks else None,
    ]
    return [callback for callback in found if callback is not None]


class Callbacks:
    """Calls the hooks of all callbacks in order; a hook that nobody has costs nothing.

    Args:
        ours: callbacks whose errors are as good as any of ours.
        named: the user's, by what the config calls them. An error of theirs names them.
    """

    def __init__(self, ours: Sequence[Callback], named: Sequence[tuple[str, Callback]]) -> None:
        self._names = {id(callback): name for name, callback in named}
        self._all = [*ours, *(callback for _, callback in named)]
        hooks = [name for name in vars(Callback) if not name.startswith("_")]
        self._having = {
            hook: [each for each in self._all if _has(each, hook)] for hook in hooks
        }  # fmt: skip

    @contextmanager
    def running(self, run: "Trainer") -> Iterator[None]:
        """Within it the run goes on; `run.reason` then says why it ended."""
        with ExitStack() as ends:
            for callback in self._all:
                self._call(callback, "on_run_start", run)
                ends.callback(self._end, callback, run)
            yield

    def before_step(self, run: "Trainer") -> None:
        self._tell("before_step", run)

    def after_step(self, run: "Trainer", step: Step) -> None:
        self._tell("after_step", run, step)
        if step.result.refusal is not None:
            self._tell("on_bad_step", run, step)

    def after_evaluation(self, run: "Trainer", evaluation: Evaluation) -> None:
        self._tell("after_evaluation", run, evaluation)

    def on_progress(self, run: "Trainer") -> None:
        self._tell("on_progress", run)

    def after_save(self, run: "Trainer", seconds: float) -> None:
        self._tell("after_save", run, seconds)

    def metrics(
        self, run: "Trainer", step: Step, known: Mapping[str, Mapping[str, float]]
    ) -> dict[str, float]:
        """A step's figures: those that are known, and what all add to them.

        Args:
            known: by what they are from.

        Raises:
            UserError: one is no number, or has the name of another.
        """
        found: dict[str, float] = {}
        for source, figures in known.items():
            _add(found, source, figures)
        for callback in self._having["metrics"]:
            figures = self._call(callback, "metrics", run, step)
            name = self._names.get(id(callback), type(callback).__name__)
            try:
                own = {str(each): float(value) for each, value in figures.items()}
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{FIELD}: metrics of {name} must be numbers by name; they are {figures!r:.200}"
                ) from error
            _add(found, f"{FIELD}: {name}", own)
        return found

    def on_metrics(self, run: "Trainer", metrics: "StepMetrics") -> None:
        self._tell("on_metrics", run, metrics)

    def on_record(self, run: "Trainer", kind: str, record: Mapping[str, Any]) -> None:
        self._tell("on_record", run, kind, record)

    def on_event(self, run: "Trainer", iteration: int, name: str, message: str) -> None:
        self._tell("on_event", run, iteration, name, message)

    def _tell(self, hook: str, run: "Trainer", *arguments: Any) -> None:
        for callback in self._having[hook]:
            self._call(callback, hook, run, *arguments)

    def _end(self, callback: Callback, run: "Trainer") -> None:
        self._call(callback, "on_run_end", run, run.reason)

    def _call(self, callback: Callback, hook: str, run: "Trainer", *arguments: Any) -> Any:
        method: Callable[..., Any] = getattr(callback, hook)
        name = self._names.get(id(callback))
        if name is None:
            return method(run, *arguments)
        try:
            with _own_random_numbers():
                return method(run, *arguments)
        except Exception as error:
            place = f"{FIELD}: {name} failed in {hook} after step {run.progress.iteration}"
            if isinstance(error, UserError):
                raise UserError(f"{place}: {error}") from error
            raise CallbackError(f"{place}: {type(error).__name__}: {error}") from error


def _add(found: dict[str, float], source: str, figures: Mapping[str, float]) -> None:
    others = [*STEP_NAMES, *found]
    if taken := [name for name in figures if name in others]:
        raise UserError(
            f"{source} has a figure {taken[0]!r}, which is another's already; allowed: names that "
            f"are not {', '.join(sorted(others))}"
        )
    found |= figures


def _has(callback: Callback, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(Callback, hook)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """What is drawn within leaves the run's generators as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def build_callbacks(config: RunConfig, *, reports: bool) -> Callbacks:
    """All callbacks of a run, made anew.

    Raises:
        UserError: one that the config names cannot be had.
    """
    named: list[tuple[str, Callback]] = []
    for word in config.training.callbacks:
        kind = load_class(FIELD, word, Callback)
        try:
            named.append((word, kind()))
        except Exception as error:
            raise CallbackError(
                f"{FIELD}: {word} cannot be made: {type(error).__name__}: {error}"
            ) from error
    return Callbacks(built_in(config, reports=reports), named)
