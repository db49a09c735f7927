"""How OpenMP's threads wait for work; to be decided before torch is imported."""

import os
from pathlib import Path

NVIDIA_DRIVER = Path("/proc/driver/nvidia")


def spin_before_sleeping() -> None:
    """Without GPUs, let waiting threads spin a little longer, unless the user says otherwise.

    A scan is thousands of small operations, between which threads should not fall asleep. GNU's
    OpenMP spins shortest in a process that has more of its threads than cores, which a training
    process seems to be: with the "active" policy a step of `benchmarks/train_step.py` on two
    threads takes a tenth to a fifth less time, and in two idle seconds after it the process used
    0.02 s of CPU, so that threads with nothing to do still sleep.
    """
    if not NVIDIA_DRIVER.exists():
        os.environ.setdefault("OMP_WAIT_POLICY", "active")
