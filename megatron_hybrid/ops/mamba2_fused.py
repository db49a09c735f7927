"""The Mamba-2 core as one autograd function over cache-sized blocks: little kept, the rest redone.

Shapes: b batch, l tokens, T tokens of a block, h heads, p head_dim, d = h*p, g groups, n state, k
taps, c = d + 2*g*n. Kept for the backward: the inputs and the state before each chunk. Everything
between is made again block by block, in workspaces, so that no temporary is as long as the sequence
except those with one number a token and head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd.block import Block, BlockScan
from megatron_hybrid.ops.ssd.buffers import Buffers, DTypes, Sizes
from megatron_hybrid.ops.ssd.steps import BlockGrads, BlockShape, StepGrads

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


@dataclass(frozen=True)
class Norm:
    """What the grouped RMSNorm needs besides its weight."""

    group_size: int
    eps: float


class Inputs(NamedTuple):
    """Of the core, as `mamba2_split_conv1d_scan` takes them; `documents` are numbered."""

    zxbcdt: Tensor
    conv1d_weight: Tensor
    conv1d_bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor | None
    documents: Tensor | None


def fused_core(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    sizes: Sizes,
    norm: Norm | None,
    seq_idx: Tensor | None,
    before: Tensor | None = None,
    initial_states: Tensor | None = None,
) -> Tensor:
    """y [b, l, d] in zxbcdt's dtype and memory layout.

    Arguments as in `megatron_hybrid.ops.mamba2.mamba2_split_conv1d_scan`.
    """
    documents = None if seq_idx is None else number_documents(seq_idx)
    inputs = (zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, norm_weight)
    starts = (before, initial_states)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*inputs, *starts)
    )
    return _FusedCore.apply(*inputs, documents, *starts, sizes, norm, keep)


class _FusedCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        norm_weight: Tensor | None,
        documents: Tensor | None,
        before: Tensor | None,
        initial_states: Tensor | None,
        sizes: Sizes,
        norm: Norm | None,
        keep: bool,
    ) -> Tensor:
        inputs = Inputs(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, norm_weight, documents)
        core = Core(inputs, sizes, norm, before)
        scan, batch = core.scan, zxbcdt.shape[0]
        carry = zxbcdt.new_empty(scan.states_shape[2:], dtype=scan.dtypes.compute)
        kept_shape = scan.states_shape if keep else (batch, 0)
        states = zxbcdt.new_empty(kept_shape, dtype=scan.dtypes.kept)
        y = _empty_in_layout_of(zxbcdt, sizes.channels)
        for row in range(batch):
            if initial_states is None:
                carry.zero_()
            else:
                carry.copy_(initial_states[row])
            for block in scan.blocks(row):
                kept = states[row, block.chunks] if keep else block.buffers.states
                core.forward(block, carry, kept, y[row, block.tokens])
        if keep:
            ctx.save_for_backward(*inputs, before, states)
            ctx.sizes, ctx.norm = sizes, norm
            ctx.of_initial = None if initial_states is None else torch.empty_like(initial_states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, before, states = ctx.saved_tensors
        core = Core(Inputs(*tensors), ctx.sizes, ctx.norm, before)
        gradients = _Gradients(core)
        of_before = None if before is None else torch.empty_like(before)
        of_initial = ctx.of_initial
        for row in range(grad.shape[0]):
            gradients.start_row()
            for block, block_grads in core.scan.blocks_back(row, gradients.of_steps):
                kept = states[row, block.chunks]
                gradients.add(block, grad[row, block.tokens], kept, block_grads)
            if of_before is not None:
                of_before[row] = gradients.of_inputs_before(row)
            if of_initial is not None:
                of_initial[row] = gradients.of_carry
        return (*gradients.finish(), None, of_before, of_initial, None, None, None)


def _empty_in_layout_of(zxbcdt: Tensor, channels: int) -> Tensor:
    """[b, l, channels], uninitialised; tokens outermost in memory if they are in `zxbcdt`."""
    batch, length, _ = zxbcdt.shape
    if zxbcdt.stride(0) < zxbcdt.stride(1):
        return zxbcdt.new_empty(length, batch, channels).transpose(0, 1)
    return zxbcdt.new_empty(batch, length, channels)


class _CoreBuffers:
    """The workspaces of one block besides those of the scan, whose `xbc` is silu(conv) here."""

    def __init__(self, at: Buffers, shape: BlockShape, sizes: Sizes, taps: int) -> None:
        tokens, channels = shape.all_tokens, sizes.all_channels
        # The inputs of the convolution, after those of the k - 1 tokens before the block; lag i
        # is the inputs i tokens back.
        self.raw = at.compute("raw", tokens + taps - 1, channels)
        self.lags = [self.raw[taps - 1 - lag :][:tokens] for lag in range(taps)]
        self.conv, self.masked = (at.compute(name, tokens, channels) for name in ("conv", "masked"))
        # Gradient of `conv`, before that of the k - 1 tokens after the block.
        self.grad_conv = at.compute("grad_conv", tokens + taps - 1, channels)
        self.grad_leads = [self.grad_conv[lead:][:tokens] for lead in range(taps)]
        self.y, self.grad_y, self.product = (
            t.view(tokens, sizes.channels) for t in (at.y, at.grad_y, at.product)
        )
        self.z, self.gate, self.gated = (
            at.compute(name, tokens, sizes.channels) for name in ("z", "gate", "gated")
        )


class Core:
    """Blocks of the core: convolution before the scan, gate and norm after it.

    Args:
        before: the inputs of the convolution before the first token `[b, k - 1, c]`; None: zeros.
        shapes: as `BlockScan` takes them.
    """

    def __init__(
        self,
        inputs: Inputs,
        sizes: Sizes,
        norm: Norm | None,
        before: Tensor | None = None,
        shapes: list[BlockShape] | None = None,
    ) -> None:
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, norm_weight, documents = inputs
        dtypes = DTypes.of(zxbcdt)
        compute = dtypes.compute
        self.inputs, self.sizes, self.norm, self.documents = inputs, sizes, norm, documents
        self.before = before
        self.taps = conv1d_weight.shape[1]
        # By lag: row i weighs the input i tokens back.
        self.weight_of_lag = conv1d_weight.to(compute).t().flip(0).contiguous().unbind()
        self.conv_bias = conv1d_bias.to(compute)
        self.norm_weight = None if norm_weight is None else norm_weight.to(compute)
        self.z, self.xbc, dt = zxbcdt.split([sizes.channels, sizes.all_channels, sizes.heads], -1)
        self.dt_before_softplus = dt.to(compute) + dt_bias.to(compute)
        dt = F.softplus(self.dt_before_softplus)
        self.scan = BlockScan(sizes, dt, A, D, documents, dtypes, shapes)
        self._document_numbers = [] if documents is None else documents.tolist()
        self._buffers: dict[BlockShape, _CoreBuffers] = {}

    def buffers(self, block: Block) -> _CoreBuffers:
        """The block's workspaces besides those of the scan."""
        if block.shape not in self._buffers:
            self._buffers[block.shape] = _CoreBuffers(
                block.buffers, block.shape, self.sizes, self.taps
            )
        return self._buffers[block.shape]

    def forward(self, block: Block, carry: Tensor, states: Tensor, out: Tensor) -> None:
        """Writes y of a block to `out` [T, d]; `carry` and `states` as in `BlockScan.scan`."""
        at = self.buffers(block)
        y, z = self.scan_and_gate(block, carry, states)
        y.mul_(_silu(z, out=at.gate))
        if self.norm is not None and self.norm_weight is not None:
            y.view(*y.shape[:1], -1, self.norm.group_size).mul_(self.inverse_rms(y))
            y.mul_(self.norm_weight)
        out.copy_(y)

    def scan_and_gate(
        self, block: Block, carry: Tensor | None, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y before the gate and z: [T, d] in the computing dtype."""
        self.convolve(block)
        self.scan.scan(block, carry, states)
        block.buffers.y.addcmul_(block.buffers.x, self.scan.own_term(block))
        at, z = self.buffers(block), self.z[block.row, block.tokens]
        return at.y, z if z.dtype == at.z.dtype else at.z.copy_(z)

    def convolve(self, block: Block) -> None:
        """Fills `raw`, `conv` and `xbc` = silu(conv)."""
        at, before, start = self.buffers(block), self.taps - 1, block.tokens.start
        first = max(start - before, 0)
        missing = before - (start - first)
        if self.before is None:
            at.raw[:missing].zero_()
        else:
            at.raw[:missing] = self.before[block.row, before - missing :]
        at.raw[missing:].copy_(self.xbc[block.row, first : block.tokens.stop])
        torch.addcmul(self.conv_bias, at.lags[0], self.weight_of_lag[0], out=at.conv)
        for lag in range(1, self.taps):
            at.conv.addcmul_(self.lagged(block, lag), self.weight_of_lag[lag])
        _silu(at.conv, out=block.buffers.xbc)

    def lagged(self, block: Block, lag: int) -> Tensor:
        """The inputs `lag` tokens back [T, c], zero where those are of another document."""
        at, same = self.buffers(block), self.same_document(block, -lag)
        return at.lags[lag] if same is None else torch.mul(at.lags[lag], same, out=at.masked)

    def same_document(self, block: Block, offset: int) -> Tensor | None:
        """[T, 1]: 1 where the token `offset` further on is of the same document; None: all are."""
        if self.documents is None or offset == 0:
            return None
        start, stop = block.tokens.start, block.tokens.stop
        last = self.documents.shape[1] - 1
        numbers = self._document_numbers[block.row]
        if numbers[max(start - self.taps, 0)] == numbers[min(stop - 1 + self.taps, last)]:
            return None
        documents = self.documents[block.row]
        places = torch.arange(start, stop, device=documents.device).add_(offset).clamp_(0, last)
        same = documents[places] == documents[start:stop]
        return same[:, None].to(self.scan.dtypes.compute)

    def inverse_rms(self, gated: Tensor) -> Tensor:
        """1 / root mean square of each group of [T, d], with eps in it: [T, d / group_size, 1]."""
        assert self.norm is not None
        grouped = gated.view(gated.shape[0], -1, self.norm.group_size)
        norm = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
        return norm.square_().div_(self.norm.group_size).add_(self.norm.eps).rsqrt_()


class _Gradients:
    """Goes through the blocks of `core` backwards and gathers the gradients of all inputs."""

    def __init__(self, core: Core) -> None:
        self.core, sizes, taps = core, core.sizes, core.taps
        self.of_zxbcdt = torch.empty_like(core.inputs.zxbcdt)
        self.of_z, self.of_xbc, self.of_dt = self.of_zxbcdt.split(
            [sizes.channels, sizes.all_channels, sizes.heads], -1
        )
        self.of_steps = StepGrads(core.scan.steps, sizes.groups)
        # float64: the sums over the blocks of a long sequence.
        self.of_conv_bias = torch.zeros_like(core.conv_bias, dtype=torch.float64)
        self.of_weight_of_lag = [torch.zeros_like(self.of_conv_bias) for _ in range(taps)]
        self.of_norm_weight = self.of_conv_bias.new_zeros(sizes.channels)
        self.of_carry = core.conv_bias.new_empty(core.scan.states_shape[2:])
        # Of the convolution's first k - 1 outputs in the block after this one.
        self.of_later_conv = core.conv_bias.new_empty(taps - 1, sizes.all_channels)

    def start_row(self) -> None:
        """Nothing comes after a row's last token."""
        self.of_carry.zero_()
        self.of_later_conv.zero_()

    def add(self, block: Block, grad: Tensor, states: Tensor, grads: BlockGrads) -> None:
        """One block: `grad` [T, d] of y, `states` [K, h, p, n] before its chunks."""
        core, at = self.core, self.core.buffers(block)
        y, z = core.scan_and_gate(block, None, states)
        _silu(z, out=at.gate)
        at.grad_y.copy_(grad)
        if core.norm is not None:
            self._through_norm(at, torch.mul(y, at.gate, out=at.gated))
        grad_z = _silu_backward(y.mul_(at.grad_y), z, grad_input=y)
        self.of_z[block.row, block.tokens] = grad_z
        at.grad_y.mul_(at.gate)
        core.scan.backward(block, self.of_carry, states, grads)
        self._through_convolution(block)

    def _through_norm(self, at: _CoreBuffers, gated: Tensor) -> None:
        """`grad_y`, of the norm's output, becomes that of its input `gated`."""
        norm, weight = self.core.norm, self.core.norm_weight
        assert norm is not None
        assert weight is not None
        inverse = self.core.inverse_rms(gated)
        grouped = (len(gated), -1, norm.group_size)
        product = torch.mul(at.grad_y, gated, out=at.product).view(grouped).mul_(inverse)
        # Not by a GEMM of one row, which adds up its tokens one after the other.
        self.of_norm_weight += product.sum(0).view(-1)
        at.grad_y.mul_(weight)
        product = product.mul_(weight.view(-1, norm.group_size))
        mean = product.sum(-1, keepdim=True).mul_(inverse.square()).div_(-norm.group_size)
        at.grad_y.view(grouped).mul_(inverse).addcmul_(gated.view(grouped), mean)

    def _through_convolution(self, block: Block) -> None:
        """From the gradient of `xbc` to those of the convolution's inputs, weights and bias."""
        core, at, after = self.core, self.core.buffers(block), self.core.taps - 1
        grad = _silu_backward(block.buffers.grad_xbc, at.conv, grad_input=at.grad_leads[0])
        at.grad_conv[len(grad) :] = self.of_later_conv
        self.of_later_conv.copy_(at.grad_conv[:after])

        self.of_conv_bias += grad.sum(0)
        product = block.buffers.xbc
        for lag, of_weight in enumerate(self.of_weight_of_lag):
            of_weight += torch.mul(grad, core.lagged(block, lag), out=product).sum(0)

        grad_raw = torch.mul(grad, core.weight_of_lag[0], out=block.buffers.grad_xbc)
        for lead in range(1, core.taps):
            later, same = at.grad_leads[lead], core.same_document(block, lead)
            if same is not None:
                later = torch.mul(later, same, out=product)
            grad_raw.addcmul_(later, core.weight_of_lag[lead])
        self.of_xbc[block.row, block.tokens] = grad_raw

    def of_inputs_before(self, row: int) -> Tensor:
        """Of the convolution's inputs before a row `[k - 1, c]`, after all its blocks."""
        core, kept = self.core, self.core.taps - 1
        grad = self.of_later_conv
        if core.documents is not None:
            # Those inputs are of the first document, and so are only some of the outputs.
            numbers = core.documents[row, :kept]
            same = torch.nn.functional.pad(numbers == numbers[0], (0, kept - len(numbers)))
            grad = grad * same[:, None]
        found = torch.zeros_like(grad)
        for lag in range(1, core.taps):
            found[kept - lag :].addcmul_(grad[:lag], core.weight_of_lag[lag])
        return found

    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients of zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D and norm_weight."""
        core = self.core
        grad_dt, grad_A, grad_D = self.of_steps.finish(core.inputs.A)
        grad_dt.mul_(torch.sigmoid(core.dt_before_softplus))
        self.of_dt.copy_(grad_dt)
        of_parameters = (
            torch.stack(self.of_weight_of_lag[::-1], dim=1),
            self.of_conv_bias,
            grad_dt.sum((0, 1), dtype=torch.float64),
            grad_A,
            grad_D,
            self.of_norm_weight,
        )
        return self.of_zxbcdt, *(
            None if parameter is None else gradient.to(parameter.dtype)
            for gradient, parameter in zip(of_parameters, core.inputs[1:7], strict=True)
        )
