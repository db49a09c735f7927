"""Exit signals: the flag they set, what a second one does, what is left behind."""

import os
import signal

import pytest

from megatron_hybrid.training.signals import EXIT_SIGNALS, ExitSignals


@pytest.mark.parametrize("number", EXIT_SIGNALS)
def test_signal_sets_the_flag_and_the_program_goes_on(number: signal.Signals) -> None:
    """A real signal to this process is remembered by its name."""
    with ExitSignals() as signals:
        assert signals.requested() is None
        os.kill(os.getpid(), number)
        assert signals.requested() == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_repeated_signal_does_not_disturb_a_save(number: signal.Signals) -> None:
    """Schedulers repeat themselves: the second signal changes nothing, nor does another kind."""
    with ExitSignals() as signals:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested() == number.name


def test_second_interrupt_aborts() -> None:
    """Ctrl-C twice is a person who wants to leave now."""
    with ExitSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupts_are_counted_apart_from_the_scheduler_s_signals() -> None:
    """After a SIGTERM it still takes two Ctrl-C to abort, and two are enough."""
    with ExitSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested() == "SIGTERM"


def test_earlier_handlers_come_back() -> None:
    """After the block, and after an error in it, the process handles signals as before."""
    before = [signal.getsignal(number) for number in EXIT_SIGNALS]
    with pytest.raises(RuntimeError, match="in the loop"), ExitSignals():
        assert signal.getsignal(signal.SIGTERM) not in before
        raise RuntimeError("in the loop")
    assert [signal.getsignal(number) for number in EXIT_SIGNALS] == before
