"""How bf16 matrices are multiplied: as they are, or, on a CPU that cannot do that, in fp32.

A product of bf16 values is exact in fp32, so an fp32 product of widened operands, rounded to bf16,
is a bf16 product with fp32 sums. Without instructions for bf16, as on most laptops, it is 3 to 60
times as fast as what torch does otherwise.
"""

import logging
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN, which torch calls for it, has bf16 matrix products on this processor."""
    # The name is missing where torch is built without oneDNN.
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def through_fp32(tensor: Tensor) -> bool:
    """Whether products of `tensor` are to be computed in fp32 and rounded to bf16."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and _choose_fp32()


@cache
def _choose_fp32() -> bool:
    if cpu_multiplies_bf16():
        return False
    logger.info(
        "bf16 matrix products: this processor has no instructions for them, so they are computed "
        "in fp32 and rounded to bf16"
    )
    return True
