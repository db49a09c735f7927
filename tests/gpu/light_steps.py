"""Steps without torch, for the tests of the check itself."""

import os
import time

from tests.gpu.findings import Findings, NeedsGpuError


def whole(findings: Findings) -> None:
    """Two parts with figures, and one that this device has not."""
    for number in (1, 2):
        with findings.part(f"part {number}") as found:
            found["figure"] = number / 2
    findings.skip("mxfp8", "needs another GPU")


def broken(findings: Findings) -> None:
    """One part fails, the next does not."""
    with findings.part("wrong") as found:
        found["error"] = float("nan")
        raise AssertionError("y is off by 0.1")
    with findings.part("right"):
        pass


def dies(findings: Findings) -> None:
    """The process ends after its first part, as by a crash of a kernel."""
    with findings.part("before"):
        pass
    print("last words", flush=True)
    os._exit(7)


def hangs(findings: Findings) -> None:
    """The second part never ends."""
    with findings.part("before") as found:
        found["pid"] = os.getpid()
    time.sleep(3600)


def of_a_gpu(findings: Findings) -> None:
    """Kernels that are not here, of the stand-in and of ours."""
    with findings.part("scan"):
        raise NeedsGpuError("mamba-ssm's scan needs a GPU")
    with findings.part("quantize"):
        raise NotImplementedError("transformer_engine_torch.quantize")
