"""What a GPU and its node can do, by data sheet, and which share of it kernels reach."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in its usual node.

    Attributes:
        bf16_tflops, fp8_tflops: dense matrix products at their peak; 0: the format is missing.
        memory_gib: what a program can have.
        memory_gb_per_s: of the GPU's own memory.
        link_gb_per_s: to the GPUs of its node, in each direction.
        network_gb_per_s: to other nodes, for each GPU, in each direction.
        gpus_per_node: how many there are, or are linked as if they were in one.
        generation: of its matrix units, as `Shares` has them.
        compute_capability: major and minor.
    """

    name: str
    bf16_tflops: float
    fp8_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    gpus_per_node: int
    generation: str
    compute_capability: tuple[int, int]


# Peaks and bandwidths: NVIDIA's data sheets of H100 SXM, H200 SXM, B200 and B300 (HGX), GB200 and
# GB300 NVL72 (72 GPUs whose links are one node's), A100 SXM 80GB, A10
# (the A10G is Amazon's; 70 TFLOP/s dense, by AWS). Sheets print products with sparsity and links in
# both directions together: halved here. Memory: what nvidia-smi shows; the A10G's by the Nemotron
# Nano 2 report (arXiv 2508.14444). Network: DGX H100, H200 and B200 have a 400 Gb/s port a GPU, DGX
# A100 one of 200 Gb/s; the A10G's is a g5.48xlarge's 100 Gb/s among 8.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989.4, 1978.9, 79.6, 3350, 450, 50, 8, "hopper", (9, 0)),
        Gpu("h200", 989.4, 1978.9, 140.4, 4800, 450, 50, 8, "hopper", (9, 0)),
        Gpu("b200", 2250.0, 4500.0, 179.0, 8000, 900, 50, 8, "blackwell", (10, 0)),
        Gpu("b300", 2250.0, 4500.0, 268.6, 8000, 900, 100, 8, "blackwell ultra", (10, 3)),
        Gpu("gb200", 2500.0, 5000.0, 185.0, 8000, 900, 50, 72, "blackwell", (10, 0)),
        Gpu("gb300", 2500.0, 5000.0, 277.5, 8000, 900, 100, 72, "blackwell ultra", (10, 3)),
        Gpu("a100", 312.0, 0.0, 79.3, 2039, 300, 25, 8, "ampere", (8, 0)),
        Gpu("a10g", 70.0, 0.0, 22.06, 600, 25, 1.5, 8, "ampere", (8, 6)),
    )
}


def gpu_called(device: str) -> Gpu | None:
    """The kind of a device by the name that CUDA gives it, such as "NVIDIA H100 80GB HBM3".

    None for others, and for cards of a kind that have less than those of its usual node.
    """
    words = device.lower().replace("-", " ").split()
    if {"pcie", "nvl", "40gb"} & set(words):
        return None
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


@dataclass(frozen=True)
class Shares:
    """Which share of a peak kernels reach, and what each kernel costs beside that.

    Attributes:
        products: by generation and format.
        attention: of the peak in BF16, by generation; forward and backward alike.
        scan: of the same, of mamba-ssm's chunked scan.
        memory, link, network: of the bandwidths.
        hidden: of transfers that run beside products.
        kernel_us: microseconds a kernel takes to begin and to run out.
        launch_us: microseconds that the host takes to launch one.
        sync_us: microseconds lost in a MoE layer, whose host waits for the counts of tokens.
    """

    products: Mapping[tuple[str, str], float]
    attention: Mapping[str, float]
    scan: Mapping[str, float]
    memory: float
    link: float
    network: float
    hidden: float
    kernel_us: float
    launch_us: float
    sync_us: float


# Calibrated on every second row of `published.yaml`. None is of Ampere, whose shares are Hopper's,
# nor in BF16, whose products are assumed; FP8 is any of its recipes, whose casts are counted apart.
SHARES = Shares(
    products={
        ("ampere", "bf16"): 0.75,
        ("hopper", "bf16"): 0.75, ("hopper", "fp8"): 0.70,
        ("blackwell", "bf16"): 0.75, ("blackwell", "fp8"): 0.53,
        ("blackwell ultra", "bf16"): 0.80, ("blackwell ultra", "fp8"): 0.71,
    },
    attention={"ampere": 0.35, "hopper": 0.35, "blackwell": 0.50, "blackwell ultra": 0.50},
    scan={"ampere": 0.25, "hopper": 0.25, "blackwell": 0.035, "blackwell ultra": 0.035},
    memory=0.75,
    link=0.75,
    network=0.80,
    hidden=0.80,
    kernel_us=4.0,
    launch_us=22.0,
    sync_us=2000.0,
)  # fmt: skip
# Left for CUDA, NCCL, cuBLAS's workspace and what the allocator cannot use: assumed.
RESERVE_GIB = 4.0
