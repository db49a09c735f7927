"""Time by cause: every moment between two marks belongs to one cause, so that all add up."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Cause(NamedTuple):
    """Attributes: `what`, such as a layer's kind; `phase`: forward, backward, recomputed or ""."""

    what: str
    phase: str = ""


OTHER = Cause("other")


class Spans:
    """Marks on the clock of the CPU, or on the stream of a GPU.

    Spans lie in each other: time belongs to the innermost. Below them all lies one cause that can
    be switched: the backward pass has no calls that begin and end, only moments when the next layer
    takes over.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open = [OTHER]
        self._marks: list[tuple[Any, Cause]] = []
        self._labels: list[Any] = []

    def start(self) -> None:
        """From here on time is counted."""
        self._marks = [(self._now(), OTHER)]

    def begin(self, cause: Cause, label: str | None = None) -> None:
        """Enter a span; `label` names it in a trace."""
        self._mark()
        self._open.append(cause)
        labelled = torch.profiler.record_function(label or " ".join(cause).strip())
        labelled.__enter__()
        self._labels.append(labelled)

    def end(self) -> None:
        """Leave the innermost span."""
        self._mark()
        self._open.pop()
        self._labels.pop().__exit__(None, None, None)

    def switch(self, cause: Cause) -> None:
        """What time belongs to while no span is open."""
        self._mark()
        self._open[0] = cause

    @contextmanager
    def span(self, cause: Cause) -> Iterator[None]:
        """A span as long as the block."""
        self.begin(cause)
        try:
            yield
        finally:
            self.end()

    def seconds(self) -> dict[Cause, float]:
        """Up to now, by cause; together all time since the start."""
        self._mark()
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[Cause, float] = defaultdict(float)
        for (before, _), (now, cause) in zip(self._marks, self._marks[1:], strict=False):
            found[cause] += before.elapsed_time(now) / 1e3 if self._on_gpu else now - before
        return dict(found)

    def _mark(self) -> None:
        self._marks.append((self._now(), self._open[-1]))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class EngineTimers:
    """What megatron-core calls as `config.timers`, known by the names that it gives."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        del log_level
        return _Timer(self._spans, _engine_cause(name))


class _Timer:
    def __init__(self, spans: Spans, cause: Cause | None) -> None:
        self._spans, self._cause = spans, cause

    def start(self, barrier: bool = False) -> None:
        del barrier  # nobody waits for the sake of a timer
        if self._cause is not None:
            self._spans.begin(self._cause)

    def stop(self, barrier: bool = False) -> None:
        del barrier
        if self._cause is not None:
            self._spans.end()


def _engine_cause(name: str) -> Cause | None:
    if name.endswith(("-recv", "-send")):
        return Cause("pipeline transfers")
    if "all-reduce" in name or name == "all-grads-sync":
        return Cause("gradients between ranks")
    if name == "params-all-gather":
        return Cause("parameters between ranks")
    return Cause("optimizer") if name.startswith("optimizer-") else None
