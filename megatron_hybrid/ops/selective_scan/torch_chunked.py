"""The selective scan by plain torch operations: fast on the CPU, and keeps little for its backward.

Shapes: b batch, l tokens, d channels, n state; a block is Q tokens of r rows and c channels.

Rows and channels do not meet but in the gradients of B and C: the outer loop takes as many of them
as have states enough to be worth a call. Within a block everything is elementwise on [Q, r, n, c],
the recurrence itself one multiplication and addition a token. Nothing is divided by a decay, so
that steps of any size are exact. Kept for the backward: the inputs, and the state before each
block, which is computed anew.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.ops.segments import starts_of_documents

# Both measured.
BLOCK_TOKENS = 32
STATES_A_TOKEN = 32 * 1024
# Below 2^-100 a decay is nothing, and exponentials of denormals are slow.
LOWEST_LOG2 = -100.0
# Above it softplus is taken for its argument: torch's own 20 is not float64's.
EXACT = 40.0


def selective_scan_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan in blocks; arguments as in `selective_scan`. Differentiable once.

    Computes in float64 for float64 `x`, else in float32.
    """
    starts = None if seq_idx is None else starts_of_documents(seq_idx)
    return _SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, initial_state, starts)


class _Place(NamedTuple):
    """Where a block is in tensors [l, b, d]."""

    tokens: slice
    rows: slice
    channels: slice


class _Weights(NamedTuple):
    """Of the channels of a block: A and log2(e) A [n, c]; D and dt's bias [c]."""

    A: Tensor
    A_log2: Tensor
    D: Tensor
    dt_bias: Tensor
    steepest: float


class _Inputs(NamedTuple):
    """Of the tokens of a block: [Q, r, c]; B and C [Q, r, n]; resets, bool [Q, r], if any.

    `raw` is dt with its bias, `dt` the softplus of that, `u` is dt * x.
    """

    x: Tensor
    raw: Tensor
    dt: Tensor
    u: Tensor
    z: Tensor
    B: Tensor
    C: Tensor
    resets: Tensor | None


class _Scan:
    """The tensors of one call, cut into blocks; [l, b, .], computed in `compute`.

    Args:
        inputs: x, dt, B, C, z as of `selective_scan`.
        weights: A, D, dt_bias.
        starts: bool [b, l]: where documents start; None: nowhere.
    """

    def __init__(
        self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], starts: Tensor | None
    ) -> None:
        self.x, self.dt, self.B, self.C, self.z = (each.transpose(0, 1) for each in inputs)
        self.compute = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        self.length, self.batch, self.channels = self.x.shape
        self._A, self._D, self._dt_bias = (each.to(self.compute) for each in weights)
        self.state = self._A.shape[1]
        self._starts = None if starts is None else starts.t()
        self.blocks = [
            slice(first, min(first + BLOCK_TOKENS, self.length))
            for first in range(0, self.length, BLOCK_TOKENS)
        ]

    def parts(self) -> Iterator[tuple[slice, slice, _Weights]]:
        """Rows and channels that are scanned together, with the weights of these channels."""
        width = min(self.channels, max(1, STATES_A_TOKEN // self.state))
        height = max(1, STATES_A_TOKEN // (self.state * width))
        for first in range(0, self.channels, width):
            channels = slice(first, min(first + width, self.channels))
            A = self._A[channels].t().contiguous()
            A_log2 = A * math.log2(math.e)
            steepest = -float(A_log2.min())
            weights = _Weights(A, A_log2, self._D[channels], self._dt_bias[channels], steepest)
            for row in range(0, self.batch, height):
                yield slice(row, min(row + height, self.batch)), channels, weights

    def load(self, place: _Place, weights: _Weights) -> _Inputs:
        """A block's inputs."""
        x, raw, z = (each[place].to(self.compute) for each in (self.x, self.dt, self.z))
        B, C = (each[place[:2]].to(self.compute) for each in (self.B, self.C))
        raw = raw + weights.dt_bias
        dt = F.softplus(raw, threshold=EXACT)
        resets = None if self._starts is None else self._starts[place[:2]]
        if resets is not None and not resets.any():
            resets = None
        return _Inputs(x, raw, dt, dt * x, z, B, C, resets)


class _Workspace:
    """Decays and states of a block, reused for the next.

    Attributes:
        decay: [Q, r, n, c].
        states: [Q + 1, r, n, c]: the one before the block, and those after each token.
    """

    def __init__(self, scan: _Scan, state: Tensor) -> None:
        tokens = min(BLOCK_TOKENS, scan.length)
        self.decay = state.new_empty(tokens, *state.shape)
        self.states = state.new_empty(tokens + 1, *state.shape)
        self._decay_of, self._state_of = self.decay.unbind(), self.states.unbind()

    def scan(self, at: _Inputs, weights: _Weights, before: Tensor) -> Tensor:
        """Fill the workspace after the state [r, n, c] before the block.

        Returns:
            S C: [Q, r, c].
        """
        size = len(at.x)
        decay, states = self.decay[:size], self.states[1 : size + 1]
        torch.mul(at.dt[:, :, None], weights.A_log2, out=decay)
        if weights.steepest * float(at.dt.max()) > -LOWEST_LOG2:
            decay.clamp_(min=LOWEST_LOG2)
        decay.exp2_()
        if at.resets is not None:
            decay[at.resets] = 0.0
        torch.mul(at.u[:, :, None], at.B[..., None], out=states)
        self._state_of[0].copy_(before)
        for t in range(size):
            self._state_of[t + 1].addcmul_(self._state_of[t], self._decay_of[t])
        return _over_states(at.C, states)

    def scan_back(self, grads: Tensor, after: Tensor) -> None:
        """From what a token's y says of its state's gradient to the whole, [Q, r, n, c], in place.

        Args:
            after: gradient [r, n, c] of the state after the block; becomes that before it.
        """
        of_token = grads.unbind()
        of_token[-1].add_(after)
        for t in range(len(of_token) - 1, 0, -1):
            of_token[t - 1].addcmul_(of_token[t], self._decay_of[t])
        torch.mul(of_token[0], self._decay_of[0], out=after)


def _over_states(weights: Tensor, states: Tensor) -> Tensor:
    """Sum over n of [Q, r, n] times [Q, r, n, c]: [Q, r, c]."""
    tokens, rows, state, channels = states.shape
    flat = states.view(tokens * rows, state, channels)
    return torch.bmm(weights.reshape(-1, 1, state), flat).view(tokens, rows, channels)


class _Grads:
    """Gradients of all inputs: [b, l, .]; of A [d, n], D and dt_bias [d] in float64, being sums of
    many small numbers."""

    def __init__(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, scan: _Scan) -> None:
        self.x, self.dt, self.z = (torch.empty_like(each) for each in (x, dt, z))
        self.B, self.C = (torch.zeros_like(each, dtype=scan.compute) for each in (B, C))
        self.A = x.new_zeros(scan.channels, scan.state, dtype=torch.float64)
        self.D, self.dt_bias = (self.A.new_zeros(scan.channels) for _ in range(2))

    def add_block(
        self,
        place: _Place,
        at: _Inputs,
        weights: _Weights,
        workspace: _Workspace,
        y: Tensor,
        grad_out: Tensor,
        grads: Tensor,
        after: Tensor,
    ) -> None:
        """One block's part, right after its `scan`, whose workspace it uses up.

        Args:
            y: S C [Q, r, c]. grad_out: gradient of what the whole returned, [Q, r, c].
            grads: a workspace [Q, r, n, c].
            after: as of `scan_back`.
        """
        tokens, rows, channels = place
        decay, states = workspace.decay[: len(y)], workspace.states[: len(y) + 1]
        gate = torch.sigmoid(at.z)
        slope = (1 + at.z * (1 - gate)).mul_(gate)
        self.z.transpose(0, 1)[place] = slope.mul_(grad_out).mul_(y.addcmul_(at.x, weights.D))
        grad_y = gate.mul_(at.z).mul_(grad_out)
        self.D[channels] += (grad_y * at.x).sum((0, 1))

        torch.mul(states[1:], grad_y[:, :, None], out=grads)
        self.C.transpose(0, 1)[tokens, rows] += grads.sum(-1)
        torch.mul(at.C[..., None], grad_y[:, :, None], out=grads)
        workspace.scan_back(grads, after)

        of_logs, products = decay.mul_(states[:-1]).mul_(grads), states[:-1]
        torch.mul(grads, at.u[:, :, None], out=products)
        self.B.transpose(0, 1)[tokens, rows] += products.sum(-1)
        torch.mul(of_logs, at.dt[:, :, None], out=products)
        self.A[channels] += products.sum((0, 1)).t()
        of_u = _over_states(at.B, grads)
        of_raw = of_logs.mul_(weights.A).sum(2).addcmul_(of_u, at.x).mul_(torch.sigmoid(at.raw))
        self.dt_bias[channels] += of_raw.sum((0, 1))
        self.dt.transpose(0, 1)[place] = of_raw
        self.x.transpose(0, 1)[place] = of_u.mul_(at.dt).addcmul_(grad_y, weights.D)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        initial_state: Tensor | None,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scan = _Scan((x, dt, B, C, z), (A, D, dt_bias), starts)
        y, needed = torch.empty_like(x), any(ctx.needs_input_grad)
        state = x.new_zeros(scan.batch, scan.state, scan.channels, dtype=scan.compute)
        if initial_state is not None:
            state.copy_(initial_state.transpose(1, 2))
        befores = state.new_empty(len(scan.blocks) if needed else 0, *state.shape)
        for rows, channels, weights in scan.parts():
            before = state[rows, :, channels].contiguous()
            workspace = _Workspace(scan, before)
            for number, tokens in enumerate(scan.blocks):
                place = _Place(tokens, rows, channels)
                if needed:
                    befores[number, rows, :, channels] = before
                at = scan.load(place, weights)
                out = workspace.scan(at, weights, before)
                out.addcmul_(at.x, weights.D).mul_(F.silu(at.z))
                y.transpose(0, 1)[place] = out
                before.copy_(workspace.states[len(out)])
            state[rows, :, channels] = before
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_state, starts, befores)
        return y, state.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial_state, starts, befores = ctx.saved_tensors
        scan = _Scan((x, dt, B, C, z), (A, D, dt_bias), starts)
        found = _Grads(x, dt, B, C, z, scan)
        state = grad_state.transpose(1, 2).to(scan.compute, copy=True)
        for rows, channels, weights in scan.parts():
            after = state[rows, :, channels].contiguous()
            workspace = _Workspace(scan, after)
            grads = torch.empty_like(workspace.decay)
            for number, tokens in reversed(list(enumerate(scan.blocks))):
                place = _Place(tokens, rows, channels)
                at = scan.load(place, weights)
                y = workspace.scan(at, weights, befores[number, rows, :, channels])
                out = grad_out.transpose(0, 1)[place].to(scan.compute)
                found.add_block(place, at, weights, workspace, y, out, grads[: len(y)], after)
            state[rows, :, channels] = after
        of_initial = None
        if initial_state is not None:
            of_initial = state.transpose(1, 2).to(initial_state.dtype)
        return (
            found.x, found.dt, found.A.to(A.dtype), found.B.to(B.dtype), found.C.to(C.dtype),
            found.D.to(D.dtype), found.z, found.dt_bias.to(dt_bias.dtype), of_initial, None,
        )  # fmt: skip


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
) -> Tensor:
    """One token a row; no gradients.

    Args:
        state: [b, n, d], computing dtype; becomes the one after the token.
        x, dt, z: [b, d]. B, C: [b, n]. A: [n, d], and D, dt_bias: [d], computing dtype.

    Returns:
        [b, d] in x's dtype.
    """
    wide = state.dtype
    steps = F.softplus(dt.to(wide) + dt_bias, threshold=EXACT)
    values = x.to(wide)
    state.mul_(torch.mul(steps[:, None], A).exp_())
    state.addcmul_(B.to(wide)[..., None], (steps * values)[:, None])
    y = torch.bmm(C.to(wide)[:, None], state)[:, 0].addcmul_(values, D)
    return y.mul_(F.silu(z.to(wide))).to(x.dtype)
