"""What a GPU and its node can do, by data sheet, and which share of it kernels are to reach."""

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
        gpus_per_node: how many there are.
    """

    name: str
    bf16_tflops: float
    fp8_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    gpus_per_node: int


# Peaks and bandwidths: NVIDIA's data sheets of H100 SXM, H200 SXM, B200 (HGX), A100 SXM 80GB, A10
# (the A10G is Amazon's; 70 TFLOP/s dense, by AWS). Sheets print products with sparsity and links in
# both directions together: halved here. Memory: what nvidia-smi shows; the A10G's by the Nemotron
# Nano 2 report (arXiv 2508.14444). Network: DGX H100, H200 and B200 have a 400 Gb/s port a GPU, DGX
# A100 one of 200 Gb/s; the A10G's is a g5.48xlarge's 100 Gb/s among 8.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989.4, 1978.9, 79.6, 3350, 450, 50, 8),
        Gpu("h200", 989.4, 1978.9, 140.4, 4800, 450, 50, 8),
        Gpu("b200", 2250.0, 4500.0, 179.0, 8000, 900, 50, 8),
        Gpu("a100", 312.0, 0.0, 79.3, 2039, 300, 25, 8),
        Gpu("a10g", 70.0, 0.0, 22.06, 600, 25, 1.5, 8),
    )
}

# Shares of the peak that are taken to be reached: assumed, not measured by us. Products of
# large matrices come to about these in cuBLAS; attention and the chunked scan have smaller ones.
MATRIX_SHARE = {"bf16": 0.70, "fp8": 0.55}
ATTENTION_SHARE, SCAN_SHARE = 0.50, 0.25
MEMORY_SHARE, LINK_SHARE, NETWORK_SHARE = 0.80, 0.75, 0.80
# Left for CUDA, NCCL, cuBLAS's workspace and what the allocator cannot use: assumed.
RESERVE_GIB = 4.0
