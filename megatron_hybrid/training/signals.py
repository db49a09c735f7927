"""Signals that ask a run to save and end: SIGTERM, SIGUSR1, SIGHUP and SIGINT (Ctrl-C)."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class ExitSignals:
    """While active, an exit signal sets a flag which the training loop reads between steps.

    A scheduler sends SIGTERM or SIGUSR1, often to some of the ranks only and often twice. The
    handler therefore does nothing but remember: the ranks agree on what they saw in a reduction
    of their own, and repeated signals do not disturb a checkpoint that is being written. A second
    SIGINT is a person who does not want to wait: it raises KeyboardInterrupt.

    Use it as a context manager, in the main thread (Python allows handlers nowhere else); the
    handlers that were installed before are back when it ends.
    """

    def __init__(self) -> None:
        self._requested: str | None = None
        self._interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def requested(self) -> str | None:
        """The name of the first exit signal that this rank received, or None."""
        return self._requested

    def __enter__(self) -> Self:
        for number in EXIT_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self._requested is None:
            self._requested = signal.Signals(number).name
