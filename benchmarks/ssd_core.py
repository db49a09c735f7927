"""The Mamba-2 core (convolution, SSD, gate, norm) against Hugging Face's NemotronH, in one run.

Both get the same projected input, without the projections around the core. They take turns, and the
median of the turns' ratios is given; peak memory is measured in a fresh process each.

    python benchmarks/ssd_core.py --lengths 1024 4096 --threads 2
    python benchmarks/ssd_core.py --against HEAD~1     # this tree's core against a commit's
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from megatron_hybrid.ops.mamba2 import mamba2_split_conv1d_scan

Core = Callable[[Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD_DIM, STATE = 16, 64, 64
CHANNELS = HEADS * HEAD_DIM


@dataclass(frozen=True)
class Case:
    """What varies; the batch is one row."""

    length: int
    dtype: str
    groups: int
    threads: int

    @property
    def conv_channels(self) -> int:
        return CHANNELS + 2 * self.groups * STATE


def peer(case: Case) -> Core:
    """NemotronH's mixer in plain PyTorch, its projections taken away."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    config = NemotronHConfig(
        hidden_size=CHANNELS,
        mamba_num_heads=HEADS,
        mamba_head_dim=HEAD_DIM,
        ssm_state_size=STATE,
        n_groups=case.groups,
        layers_block_type=["mamba"],
    )
    mixer = NemotronHMamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        mixer.A_log.copy_(torch.linspace(1, 16, HEADS).log())
        mixer.dt_bias.fill_(-4.0)
    mixer.in_proj = mixer.out_proj = torch.nn.Identity()
    # eval(): in training it would look for the output projection's weight, for a GPU kernel.
    return mixer.eval().to(DTYPES[case.dtype])


def of_commit(commit: str) -> Callable[..., Tensor]:
    """`mamba2_split_conv1d_scan` as it was in a commit of this repository, beside today's."""
    here = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        words = ["git", "-C", str(here), "archive", commit, "megatron_hybrid"]
        archive = subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        of_today = _forget_package()
        sys.path.insert(0, folder)
        try:
            module = importlib.import_module("megatron_hybrid.ops.mamba2")
            assert Path(module.__file__ or "").is_relative_to(folder)
            return module.mamba2_split_conv1d_scan
        finally:
            sys.path.remove(folder)
            _forget_package()
            sys.modules.update(of_today)


def _forget_package() -> dict[str, ModuleType]:
    """Takes the package's modules out of the imported ones, and returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "megatron_hybrid"]
    return {name: sys.modules.pop(name) for name in names}


def ours(case: Case, commit: str | None = None) -> Core:
    """The same function of the same shapes, parameters included; today's or a commit's."""
    scan = mamba2_split_conv1d_scan if commit is None else of_commit(commit)
    heads = torch.linspace(1, 16, HEADS)
    convolution = torch.randn(case.conv_channels, 4) * 0.3, torch.zeros(case.conv_channels)
    parameters = (*convolution, torch.full_like(heads, -4.0), -heads, torch.ones_like(heads))
    weight = torch.ones(CHANNELS)
    for parameter in (*parameters, weight):
        parameter.requires_grad_()
    return lambda zxbcdt: scan(
        zxbcdt,
        *parameters,
        head_dim=HEAD_DIM,
        num_groups=case.groups,
        norm_weight=weight,
        norm_group_size=CHANNELS // case.groups,
    )


def runs(case: Case, core: Core) -> dict[str, Callable[[], object]]:
    """What is timed: the forward alone, and the forward with its backward."""
    width = CHANNELS + case.conv_channels + HEADS
    zxbcdt = torch.randn(1, case.length, width).to(DTYPES[case.dtype]).requires_grad_()
    grad = torch.randn(1, case.length, CHANNELS).to(zxbcdt.dtype)

    return {
        "forward": torch.no_grad()(lambda: core(zxbcdt)),
        "forward+backward": lambda: core(zxbcdt).backward(grad),
    }


def peak_mib(case: Case, make: Callable[[Case], Core]) -> float:
    """What one forward+backward adds to the process's peak, in MiB."""
    torch.set_num_threads(case.threads)
    # A short case first: what the libraries allocate once is not the core's.
    short = replace(case, length=64)
    runs(short, make(short))["forward+backward"]()
    run = runs(case, make(case))["forward+backward"]
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, _ = peak_resident_mib(), run()
    return peak_resident_mib() - before


def peak_resident_mib() -> float:
    """The most memory that this process held, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def compare(case: Case, rounds: int, other: Callable[[Case], Core]) -> dict[str, object]:
    """Medians of `rounds` turns, of their ratios too, and peaks of fresh processes."""
    torch.set_num_threads(case.threads)
    contenders = {"other": runs(case, other(case)), "ours": runs(case, ours(case))}
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for name, timed in sorted(contenders.items(), reverse=turn % 2 > 0):
            for part, run in timed.items():
                start = time.perf_counter()
                run()
                if turn:
                    seconds.setdefault((name, part), []).append(time.perf_counter() - start)
    row: dict[str, object] = {"length": case.length, "dtype": case.dtype, "groups": case.groups}
    for part in ("forward", "forward+backward"):
        other_s, ours_s = (seconds[name, part] for name in contenders)
        other_ms, ours_ms = (1e3 * statistics.median(each) for each in (other_s, ours_s))
        ratio = statistics.median(a / b for a, b in zip(other_s, ours_s, strict=True))
        row[part] = f"{other_ms:.0f} / {ours_ms:.0f} ms = {ratio:.2f}x"
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        other_mib, ours_mib = (pool.apply(peak_mib, (case, make)) for make in (other, ours))
    row["peak"] = f"{other_mib:.0f} / {ours_mib:.0f} MiB = {ours_mib / other_mib:.0%}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", metavar="COMMIT", help="its core in the place of the peer")
    args = parser.parse_args()
    other = peer if args.against is None else partial(ours, commit=args.against)
    for length, dtype, groups in itertools.product(args.lengths, DTYPES, args.groups):
        case = Case(length, dtype, groups=groups, threads=args.threads)
        print(json.dumps(compare(case, args.rounds, other)), flush=True)


if __name__ == "__main__":
    main()
