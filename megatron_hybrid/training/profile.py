"""A profile of some steps: a trace of torch's profiler, and a table of time by layer kind.

Hooks and timers are there while steps are recorded, and at no other time. What ranks send each
other within a layer (TP, CP, EP) is in the layer's time; the trace tells it apart. Recording slows
steps.
"""

import gzip
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor
from torch.autograd import Variable

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.pattern import KINDS, parse_pattern
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.training.optimizer import optimizer_parts
from megatron_hybrid.training.spans import OTHER, Cause, EngineTimers, Spans
from megatron_hybrid.training.step import Stepper

FORWARD, BACKWARD, RECOMPUTED = "forward", "backward", "recomputed"
EMBEDDING, OUTPUT, DATA = "embedding", "output and loss", "data"


class Recording:
    """Hooks, timers and torch's profiler, from its making to `stop`."""

    def __init__(self, config: RunConfig, stepper: Stepper) -> None:
        self._layers = parse_pattern(config.model.hybrid_layer_pattern).layers
        self.spans = Spans(stepper.device)
        self._handles: list[Any] = []
        for chunk in stepper.model:
            for module in chunk.modules():
                if isinstance(module, HybridModel):
                    self._hook_model(module)
        timers = EngineTimers(self.spans)
        self._configs: list[Any] = [chunk.config for chunk in stepper.model]
        self._configs += [part.config for part in optimizer_parts(stepper.optimizer)]
        for each in self._configs:
            each.timers = timers
        self.profiler = torch.profiler.profile()
        self.profiler.start()
        self.spans.start()

    def stop(self, steps: int) -> dict[str, Any]:
        """Take everything off; the table."""
        seconds = self.spans.seconds()
        self.profiler.stop()
        for handle in self._handles:
            handle.remove()
        for each in self._configs:
            each.timers = None
        return summary(seconds, steps, self._layers)

    def timed(self, data: Iterator[Batch]) -> Iterator[Batch]:
        """The same micro batches; waiting for them is a cause of its own."""
        while True:
            with self.spans.span(Cause(DATA)):
                try:
                    batch = next(data)
                except StopIteration:
                    return
            yield batch

    def _hook_model(self, model: HybridModel) -> None:
        own = Cause(OUTPUT if model.post_process else "other", FORWARD)
        after = Cause(OUTPUT, BACKWARD) if model.post_process else OTHER
        self._hook(model, own, None)
        # Where there is a loss, its backward pass is what comes next.
        self._handles.append(
            model.register_forward_hook(
                lambda *_: self.spans.switch(after if model.training else OTHER)
            )
        )
        if model.pre_process:
            self._hook(model.embedding, Cause(EMBEDDING, FORWARD), Cause(EMBEDDING, BACKWARD))
        for stack in model.modules():
            if isinstance(stack, HybridStack):
                for layer in stack.layers:
                    kind = self._layers[layer.layer_number - 1]
                    self._hook(layer, Cause(kind, FORWARD), Cause(kind, BACKWARD))

    def _hook(self, module: Any, forward: Cause, backward: Cause | None) -> None:
        """Time a module's forward pass, and its backward pass from the gradient of its output."""
        number = getattr(module, "layer_number", "")

        def begin(*_: Any) -> None:
            if not module.training:  # an evaluation
                return
            again = torch._C._current_graph_task_id() != -1
            cause = Cause(forward.what, RECOMPUTED) if again else forward
            self.spans.begin(cause, f"{' '.join(cause)} {number}".strip())

        def end(_module: Any, _inputs: Any, output: Any) -> None:
            if not module.training:
                return
            self.spans.end()
            tensor = output[0] if isinstance(output, tuple) else output
            if backward is not None and isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._begin_backward, backward))

        self._handles += [
            module.register_forward_pre_hook(begin), module.register_forward_hook(end),
        ]  # fmt: skip

    def _begin_backward(self, cause: Cause, _grad: Tensor) -> None:
        self.spans.switch(cause)
        # When this backward pass is over, what comes is no layer's.
        Variable._execution_engine.queue_callback(lambda: self.spans.switch(OTHER))


def summary(seconds: dict[Cause, float], steps: int, layers: str) -> dict[str, Any]:
    """Milliseconds of an average step by cause, the layers' kinds first."""
    names = [EMBEDDING, *dict.fromkeys(layers), OUTPUT]
    others = sorted({cause.what for cause in seconds} - {*names, "other"})
    rows = []
    for what in (*names, *others, "other"):
        found = {cause.phase: 1e3 * s / steps for cause, s in seconds.items() if cause.what == what}
        if not found:
            continue
        row: dict[str, Any] = {
            "what": KINDS.get(what, what),
            "layers": layers.count(what) if what in KINDS else None,
        }
        for phase in (FORWARD, BACKWARD, RECOMPUTED):
            row[f"{phase}_ms"] = found.get(phase, 0.0)
        rows.append(row | {"total_ms": sum(found.values())})
    return {
        "steps": steps, "step_ms": sum(row["total_ms"] for row in rows), "rows": rows,
        "rank": dist.get_rank(), "world_size": dist.get_world_size(),
    }  # fmt: skip


def as_text(table: dict[str, Any]) -> str:
    """The table for the console."""
    lines = [
        f"{'ms a step':26}{'layers':>7}{'forward':>10}{'backward':>10}{'again':>10}"
        f"{'in all':>10}{'share':>8}"
    ]
    for row in table["rows"]:
        passes: Sequence[float] = [row[f"{phase}_ms"] for phase in (FORWARD, BACKWARD, RECOMPUTED)]
        numbers = "".join(f"{value:10.2f}" if value else f"{'':10}" for value in passes)
        share = row["total_ms"] / table["step_ms"]
        lines.append(
            f"{row['what']:26}{row['layers'] or '':>7}{numbers}{row['total_ms']:10.2f}{share:8.1%}"
        )
    return "\n".join([*lines, f"{'a step':63}{table['step_ms']:10.2f}"])


def write_trace(profiler: Any, path: Path) -> None:
    """The trace, whole or not at all, for Perfetto or chrome://tracing."""
    plain = path.with_name(f".{path.name}.plain")
    try:
        profiler.export_chrome_trace(str(plain))
        write_atomic(path, gzip.compress(plain.read_bytes(), compresslevel=4))
    finally:
        plain.unlink(missing_ok=True)
