"""How OpenMP's threads wait for work; to be decided before torch is imported."""

import os
from pathlib import Path

NVIDIA_DRIVER = Path("/proc/driver/nvidia")


def spin_before_sleeping() -> None:
    """Without GPUs, let waiting threads spin for 10 µs, unless the user says otherwise.

    A process group that moves large tensors computes in threads of its own, so a training process
    has more OpenMP threads than cores, and GNU's OpenMP then lets them spin for 1 µs only: shorter
    than the pause between two of the thousands of small operations of a scan. With the "active"
    policy it is 10 µs, which takes a tenth to a fifth off a step of `benchmarks/train_step.py` on
    two threads; threads that have nothing to do still sleep.
    """
    if not NVIDIA_DRIVER.exists():
        os.environ.setdefault("OMP_WAIT_POLICY", "active")
