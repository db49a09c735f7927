"""One line a training step, with units; on a terminal also a progress bar under the lines."""

import math
import os
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_hybrid.human import human_count, human_duration, say
from megatron_hybrid.training.callbacks.base import Evaluation
from megatron_hybrid.training.step_metrics import StepMetrics


def step_line(metrics: StepMetrics, total_iterations: int) -> str:
    """The console line of a training step."""
    parts = [
        f"step {metrics.iteration}/{total_iterations}",
        f"tokens {human_count(metrics.consumed_tokens)}",
        *([f"phase {metrics.phase}"] if metrics.phase is not None else []),
        f"loss {metrics.loss:.4f}",
        f"lr {metrics.learning_rate:.1e}",
        f"grad norm {metrics.grad_norm:.3f}",
        f"{human_count(metrics.tokens_per_s)} tokens/s",
        f"{metrics.model_tflops_per_rank:.2f} TFLOP/s/rank",
        f"{metrics.step_ms:.0f} ms",
        f"{metrics.peak_memory_gib:.2f} GiB",
        f"ETA {human_duration(metrics.eta_s)}",
    ]
    if metrics.expert_load is not None:
        parts.insert(-1, metrics.expert_load.line())
    if metrics.skipped:
        parts.append("update skipped")
    return " | ".join(parts)


class RunConsole:
    """Prints a run's lines to stdout; draws the bar only where stdout is a terminal.

    Args:
        total_iterations: steps of the whole run.
        completed: steps that were done before this process started.
    """

    def __init__(self, total_iterations: int, completed: int) -> None:
        self._total = total_iterations
        self._bar: Progress | None = None
        if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
            return
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f}% | loss {task.fields[loss]} | elapsed"),
            TimeElapsedColumn(),
            TextColumn("| ETA {task.fields[eta]}"),
            console=Console(file=sys.stdout),
            expand=True,
            auto_refresh=False,  # a refreshing thread would be alive in forks of this process
        )
        self._task = self._bar.add_task(
            "train", total=total_iterations, completed=completed, loss="-", eta="-"
        )
        self._bar.start()

    def step(self, metrics: StepMetrics) -> None:
        """Print a training step and move the bar."""
        self.line(step_line(metrics, self._total))
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=metrics.iteration,
                loss=f"{metrics.loss:.4f}",
                eta=human_duration(metrics.eta_s),
                refresh=True,
            )

    def validation(self, iteration: int, consumed_tokens: int, found: Evaluation) -> None:
        """Print a validation loss, and the perplexity where it means one."""
        loss, perplexity = found.loss, ""
        if found.is_cross_entropy:
            perplexity = f" | perplexity {math.exp(loss) if loss < 700 else math.inf:.2f}"
        self.line(
            f"step {iteration}/{self._total} | tokens {human_count(consumed_tokens)} | "
            f"validation loss {loss:.4f}{perplexity}"
        )

    def line(self, text: str) -> None:
        """Print a line as it is: no markup, no colours, no wrapping."""
        if self._bar is None:
            say(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was, the finished bar on its last line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
