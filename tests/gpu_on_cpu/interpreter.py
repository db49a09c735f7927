"""mamba-ssm's kernels on tensors of the CPU, by Triton's interpreter; import nothing of it before.

Triton 3.7's interpreter keeps bf16 as whole numbers of 16 bits, and its `dot` multiplies those:
here it multiplies what they stand for. Of a list to choose the fastest from (`triton.autotune`),
the first is taken. causal-conv1d has no Triton: its three functions are in torch, with the checks
of its C++ on dtypes and strides.

Legend: b batch, c channels, l tokens, k taps.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install(folder: Path) -> None:
    """Let `backend="mamba_ssm"` run here, from the packages in a folder. Once a process."""
    assert "triton" not in sys.modules, "triton has been imported, and compiles"
    os.environ["TRITON_INTERPRET"] = "1"
    _patch_triton()
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        multi_processor_count=132, name="interpreted", major=9, minor=0, gcnArchName=""
    )
    sys.path.insert(0, str(folder))
    convolution = ModuleType("causal_conv1d_cuda")
    convolution.causal_conv1d_fwd = causal_conv1d_fwd  # type: ignore[attr-defined]
    convolution.causal_conv1d_bwd = causal_conv1d_bwd  # type: ignore[attr-defined]
    sys.modules["causal_conv1d_cuda"] = convolution
    # Its own __init__ imports Mamba-1, whose kernels are compiled.
    package = sys.modules["mamba_ssm"] = ModuleType("mamba_ssm")
    package.__path__ = [str(folder / "mamba_ssm")]


def _patch_triton() -> None:
    import numpy as np
    import triton
    from triton.runtime import interpreter

    def as_numbers(handle: Any) -> Any:
        if handle.dtype.scalar == triton.language.bfloat16 and handle.data.dtype == np.uint16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        product = np.matmul(as_numbers(a), as_numbers(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    autotune = triton.autotune

    def take_the_first(configs: Sequence[Any], key: Sequence[str], **named: Any) -> Callable:
        return autotune(configs[:1], key, **named)

    triton.autotune = take_the_first


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    out: Tensor,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> None:
    """`x` and `out` `[b, c, l]`, `weight` `[c, k]`, `bias` `[c]`, `seq_idx` `[b, l]`."""
    _check(x, weight, bias, seq_idx)
    assert initial_states is None and final_states_out is None
    made = _convolve(x, weight, bias, seq_idx)
    out.copy_(F.silu(made) if silu_activation else made)


def causal_conv1d_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dinitial_states: Tensor | None,
    silu_activation: bool,
) -> None:
    """Fills `dx`, and adds to `dweight` and `dbias`."""
    _check(x, weight, bias, seq_idx)
    if dout.stride(1) == 1:
        _require(dout.stride(2) % 8 == 0 and dout.stride(0) % 8 == 0, f"strides {dout.stride()}")
    assert initial_states is None and dfinal_states is None
    gradient = dout.float()
    if silu_activation:
        made = _convolve(x, weight, bias, seq_idx)
        gate = torch.sigmoid(made)
        gradient = gradient * gate * (1 + made * (1 - gate))
    # By hand: within an operator of torch nothing is recorded for autograd.
    total = torch.zeros_like(x, dtype=torch.float32)
    for tap, (source, target, same) in enumerate(_taps(x, weight, seq_idx)):
        of_tap = gradient[..., target] * same
        total[..., source] += of_tap * weight[:, tap, None].float()
        dweight[:, tap] += (of_tap * x[..., source].float()).sum((0, 2))
    dx.copy_(total)
    if dbias is not None:
        dbias += gradient.sum((0, 2))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """`[b, c, l]` in fp32; taps on another document count nothing."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for tap, (source, target, same) in enumerate(_taps(x, weight, seq_idx)):
        out[..., target] += x[..., source].float() * same * weight[:, tap, None].float()
    return out if bias is None else out + bias.float()[:, None]


def _taps(
    x: Tensor, weight: Tensor, seq_idx: Tensor | None
) -> list[tuple[slice, slice, Tensor | float]]:
    """For each tap: which tokens it reads, for which, and 0 where these are of two documents."""
    length, taps, found = x.shape[-1], weight.shape[-1], []
    for shift in range(taps - 1, -1, -1):
        source, target = slice(0, max(length - shift, 0)), slice(min(shift, length), length)
        same: Tensor | float = 1.0
        if seq_idx is not None:
            same = (seq_idx[:, target] == seq_idx[:, source])[:, None].float()
        found.append((source, target, same))
    return found


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> None:
    """As causal-conv1d 1.7 does before it launches a kernel."""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    batch, channels, length = x.shape
    _require(x.dtype in floats and weight.dtype in floats, f"dtypes {x.dtype}, {weight.dtype}")
    _require(weight.shape[0] == channels and 2 <= weight.shape[1] <= 4, f"{weight.shape=}")
    _require(1 in (x.stride(1), x.stride(2)), f"strides {x.stride()}")
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    if channels_last:
        _require(channels % 8 == 0, f"{channels} channels")
        _require(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, f"strides {x.stride()}")
        _require(x.data_ptr() % 16 == 0, "x is not aligned to 16 bytes")
    if bias is not None:
        _require(bias.dtype == weight.dtype and bias.shape == (channels,), f"{bias.shape=}")
        _require(bias.stride(0) == 1, "the bias is not contiguous")
    if seq_idx is not None:
        _require(channels_last, "seq_idx with channels that are not last")
        _require(seq_idx.dtype == torch.int32, f"seq_idx of {seq_idx.dtype}")
        _require(seq_idx.is_contiguous() and seq_idx.shape == (batch, length), "seq_idx")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"causal_conv1d_cuda would refuse: {what}")
