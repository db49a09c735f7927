"""Stands in for the module that Transformer Engine compiles, with torch's kernels.

Names and arguments are those of its C++ functions (Transformer Engine 2.20), as the Python side
calls them. What training in bf16 and fp32 needs is computed; any other function raises
NotImplementedError by its name when it is called, so that nothing passes that was not computed.

Legend: t tokens, i inputs, o outputs; b batch, h heads, s tokens of queries, k of keys; n experts
(products of a group).
"""

import enum
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# What `from transformer_engine_torch import *` brings to its cpp_extensions.
__all__ = [
    "CommOverlapType", "DType", "FP8BwdTensors", "FP8FwdTensors", "NVTE_Fused_Attn_Backend",
    "generic_gemm", "get_fused_attn_backend", "rmsnorm_bwd", "rmsnorm_fwd", "split_quantize",
    "te_general_grouped_gemm",
]  # fmt: skip


class DType(enum.IntEnum):
    """Its numbers are those of transformer_engine.h."""

    kByte = 0  # noqa: N815
    kInt32 = 2  # noqa: N815
    kFloat32 = 4  # noqa: N815
    kFloat16 = 5  # noqa: N815
    kBFloat16 = 6  # noqa: N815
    kFloat8E4M3 = 7  # noqa: N815
    kFloat8E5M2 = 8  # noqa: N815
    kFloat4E2M1 = 10  # noqa: N815


_TORCH_DTYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}

FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors",
    [f"GEMM{n}_{kind}" for n in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")],
    start=0,
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{kind}{n}" for n in (1, 2, 3) for kind in ("OUTPUT", "INPUT")], start=0
)


class NVTE_Fused_Attn_Backend(enum.IntEnum):  # noqa: N801
    """Of attention fused by cuDNN."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class _Enumeration:
    """One whose members are used as names alone: each that is asked for is a number of its own."""

    def __getattr__(self, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        vars(self)[name] = len(vars(self))
        return vars(self)[name]


class _Class:
    """One of which nothing is made here, but that is named in signatures or inherited from."""


CommOverlapType = _Enumeration()
_ENUMERATIONS = (
    "NVTEQBHistogramMode", "NVTERoutingMapFormat", "NVTEScalingMode", "NVTE_Bias_Type",
    "NVTE_Mask_Type", "NVTE_QKV_Format", "NVTE_QKV_Layout", "NVTE_Softmax_Type",
)  # fmt: skip
_CLASSES = (
    "CommOverlap", "CommOverlapBase", "CommOverlapHelper", "CommOverlapP2P", "CommOverlapP2PBase",
    "FP8TensorMeta",
)  # fmt: skip
# Names of functions that were called, and how often.
CALLS: dict[str, int] = {}


def __getattr__(name: str) -> Any:
    """What is not defined below: enumerations, classes, and functions that are not computed."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _ENUMERATIONS:
        made: Any = _Enumeration()
    elif name in _CLASSES:
        made = type(name, (_Class,), {})
    else:
        made = _not_computed(name)
    globals()[name] = made
    return made


def _not_computed(name: str) -> Callable[..., None]:
    def call(*arguments: Any, **named: Any) -> None:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in on the CPU")

    return call


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function that computes: note that it was called."""

    def call(*arguments: Any, **named: Any) -> Any:
        CALLS[function.__name__] = CALLS.get(function.__name__, 0) + 1
        return function(*arguments, **named)

    call.__name__ = function.__name__
    return call


def _refuse(function: str, **what: Any) -> None:
    """Raise NotImplementedError where an argument asks for what is not computed."""
    asked = [name for name, value in what.items() if value is not None and value is not False]
    if asked:
        raise NotImplementedError(
            f"transformer_engine_torch.{function} with {', '.join(asked)} has no stand-in"
        )


# What is asked of the device and its libraries.


def get_cudnn_version() -> int:
    return 92000


def get_cublasLt_version() -> int:  # noqa: N802
    return 130100


def get_num_cublas_streams() -> int:
    return 4


def device_supports_multicast(*_: Any) -> bool:
    return False


def ubuf_built_with_mpi() -> bool:
    return False


def get_fused_attn_backend(*_: Any, **__: Any) -> tuple[NVTE_Fused_Attn_Backend, str]:
    """None: attention is computed by Transformer Engine's own composition of torch's operations."""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no cuDNN on the CPU"


# Products of matrices.


@_counted
def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor | None,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """op(B) op(A), summed in fp32: TN `[t, i] [o, i]^T`, NN `[t, o] [o, i]`, NT `[t, o]^T [t, i]`.

    Returns:
        The product, with the bias or added to `out` where that is asked for, in `out` if it is
        given; the gradient of the bias `[o]` with `grad`, else None; and two that are not used.
    """
    _refuse("generic_gemm", quantizer=quantizer, gelu=gelu, comm_overlap=comm_overlap,
            extra_output=extra_output, bulk_overlap=bulk_overlap, alpha=alpha != 1.0,
            a_sum_of_parts=beta not in (None, 0.0, 1.0))  # fmt: skip
    a, b = A.reshape(-1, A.shape[-1]).float(), B.reshape(-1, B.shape[-1]).float()
    product = (b.t() if transb else b) @ (a.t() if transa else a)
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = b.sum(0).to(bias.dtype)
        else:
            product = product + bias.float()
    if out is None:
        shape = product.shape if transb else (*B.shape[:-1], product.shape[-1])
        dtype = A.dtype if out_dtype is None else _TORCH_DTYPES[DType(int(out_dtype))]
        return product.to(dtype).reshape(shape), bias_grad, None, None
    target = out.view(product.shape)
    target.copy_(product + target.float() if accumulate else product)
    return out, bias_grad, None, None


@_counted
def te_general_grouped_gemm(
    A: Sequence[Tensor],
    transa: bool,
    B: Sequence[Tensor],
    transb: bool,
    out: Sequence[Tensor],
    out_dtype: int,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_dtype: int,
    single_output: bool,
    gelu_input: Sequence[Tensor],
    grad: bool,
    workspaces: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Sequence[Tensor]:
    """`generic_gemm` n times; with `single_output` the results are rows of one tensor.

    Returns:
        `bias`, with `grad` filled with its gradients.
    """
    outputs = torch.split(out[0], list(m_splits)) if single_output else out
    for a, b, target, of in zip(A, B, outputs, bias, strict=True):
        if target.numel() and (a.numel() == 0 or b.numel() == 0):
            # An expert without tokens.
            target.copy_(target if accumulate else torch.zeros_like(target))
        elif target.numel():
            _, bias_grad, _, _ = generic_gemm(
                a, transa, b, transb, target, None, out_dtype, of, bias_dtype, False, None, grad,
                None, 0, accumulate, use_split_accumulator,
            )  # fmt: skip
            if bias_grad is not None:
                of.copy_(bias_grad)
    return bias


def split_quantize(
    tensor: Tensor, split_sections: Sequence[int], quantizers: Sequence[Any], **_: Any
) -> list[Tensor]:
    """Rows of a tensor by expert, in its own format."""
    _refuse("split_quantize", quantizers=any(each is not None for each in quantizers))
    return list(torch.split(tensor, list(split_sections)))


# Norms and softmax.


@_counted
def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """Returns: the normed `[t, i]`, None for a mean, and the inverse of the root mean square."""
    _refuse("rmsnorm_fwd", quantizer=quantizer)
    wide = input.float()
    rsigma = (wide.square().mean(-1) + eps).rsqrt()
    normed = wide * rsigma[..., None] * (weight.float() + float(zero_centered_gamma))
    if ln_out is None:
        return normed.to(_TORCH_DTYPES[DType(int(otype))]), None, rsigma
    return ln_out.copy_(normed), None, rsigma


@_counted
def rmsnorm_bwd(
    dz: Tensor,
    x: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor]:
    """Returns: the gradients of the input `[t, i]` and of the weight `[i]`."""
    dz = dz.reshape(x.shape).float()
    scaled, normed = (
        dz * (gamma.float() + float(zero_centered_gamma)),
        x.float() * rsigma[..., None],
    )
    dx = rsigma[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz * normed).flatten(0, -2).sum(0).to(gamma.dtype)


@_counted
def scaled_masked_softmax_forward(input: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Over keys of scale * `[b, h, s, k]` where the mask is 0; 0 for a query that sees no key."""
    scores = (input.float() * scale).masked_fill(mask.bool(), float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0).to(input.dtype)


@_counted
def scaled_masked_softmax_backward(output_grad: Tensor, results: Tensor, scale: float) -> Tensor:
    """The gradient of `[b, h, s, k]` from that of its softmax."""
    p, g = results.float(), output_grad.float()
    return (scale * p * (g - (g * p).sum(-1, keepdim=True))).to(output_grad.dtype)


# Documents in a row `[t, ...]` to rows of their own and back.


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    out = tensor.new_zeros(batch, longest, *tensor.shape[1:])
    for row, (start, end) in enumerate(pairwise(cu_seqlens)):
        out[row, : end - start] = tensor[start:end]
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    out = tensor.new_zeros(tokens, *tensor.shape[2:])
    for row, (start, end) in enumerate(pairwise(cu_seqlens)):
        out[start:end] = tensor[row, : end - start]
    return out


# What an optimizer does to lists of tensors; `chunk_size` and `noop_flag` are of the kernels.


@_counted
def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """From the first list, scaled, to the second."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source.float() * scale)


@_counted
def multi_tensor_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    per_tensor: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns: the norm of all together `[1]`, and of each with `per_tensor`."""
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


@_counted
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """A step of lists of gradients, parameters, first and second moments, and main parameters if
    the parameters are of 16 bits; `mode` 1 is AdamW.
    """
    correct1 = 1 - beta1**step if bias_correction else 1.0
    correct2 = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, first, second, *main in zip(*tensor_lists, strict=True):
        weight = main[0] if main else parameter
        wide = gradient.float() if mode else gradient.float() + weight_decay * weight.float()
        first.copy_(beta1 * first.float() + (1 - beta1) * wide)
        second.copy_(beta2 * second.float() + (1 - beta2) * wide * wide)
        update = first.float() / correct1 / ((second.float() / correct2).sqrt() + epsilon)
        if mode:
            update = update + weight_decay * weight.float()
        weight.copy_(weight.float() - lr * update)
        if main:
            parameter.copy_(weight)
