"""How OpenMP's threads wait for work; to be decided before torch is imported."""

import os
from pathlib import Path

NVIDIA_DRIVER = Path("/proc/driver/nvidia")


# Turns of waiting, some 3 ms: what GNU's OpenMP does in a process with no more threads than cores.
SPIN_COUNT = "300000"


def spin_before_sleeping() -> None:
    """Without GPUs, let waiting threads spin a little longer, unless the user says otherwise.

    A scan is thousands of small operations, between which threads should not fall asleep. GNU's
    OpenMP spins shortest in a process that has more of its threads than cores, which a training
    process may be: with the "active" policy a step of `benchmarks/train_step.py` on two threads
    takes a tenth to a fifth less time there. In a process with a core for each thread that policy
    alone would have them spin for minutes, beside the next step's data, other ranks or a written
    checkpoint, which need the cores; so the longest spin stays what it is without it.
    """
    if not NVIDIA_DRIVER.exists() and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "active"
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
