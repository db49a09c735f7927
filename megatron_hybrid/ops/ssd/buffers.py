"""Workspaces of a block, allocated once and cut into all the views that its operations take.

Shapes: K chunks of Q tokens are a block of T = K * Q tokens; h heads of p channels in g groups of
r = h / g; n state; c = h*p + 2*g*n channels of [x, B, C] side by side.
"""

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.ops.bf16 import through_fp32
from megatron_hybrid.ops.ssd.steps import BlockShape


@dataclass(frozen=True)
class Sizes:
    """h heads of p channels, g groups of r heads, n state."""

    heads: int
    head_dim: int
    groups: int
    state: int

    @property
    def heads_a_group(self) -> int:
        return self.heads // self.groups

    @property
    def channels(self) -> int:
        """Of x and y: h * p."""
        return self.heads * self.head_dim

    @property
    def all_channels(self) -> int:
        """Of x, B and C together."""
        return self.channels + 2 * self.groups * self.state

    def split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views x [..., h, p], B and C [..., g, n] of [..., c]."""
        projected = self.groups * self.state
        x, B, C = xbc.split([self.channels, projected, projected], dim=-1)
        return (
            x.unflatten(-1, (self.heads, self.head_dim)),
            B.unflatten(-1, (self.groups, self.state)),
            C.unflatten(-1, (self.groups, self.state)),
        )


class Workspace(threading.local):
    """Uninitialised tensors by name, kept from call to call, one set a thread.

    Kept, because faulting in fresh memory took a third of the time of a short sequence. They are
    the caller's until it returns.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def get(
        self, name: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]
    ) -> Tensor:
        """A tensor of `shape`; those of one name and dtype share memory."""
        key, count = (name, dtype, device), math.prod(shape)
        if key not in self._memory or self._memory[key].numel() < count:
            self._memory[key] = torch.empty(count, dtype=dtype, device=device)
        return self._memory[key][:count].view(shape)


WORKSPACE = Workspace()


@dataclass(frozen=True)
class DTypes:
    """`compute` for decays and sums; `operands` for what the GEMMs take and give; `kept` for the
    states before each chunk, which the backward pass needs again."""

    compute: torch.dtype
    operands: torch.dtype
    kept: torch.dtype

    @classmethod
    def of(cls, inputs: Tensor) -> "DTypes":
        """All float64 for float64, else all float32; but for bfloat16 the states are kept in
        bfloat16, which the operands have as well where the processor multiplies it."""
        compute = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        kept = torch.bfloat16 if inputs.dtype == torch.bfloat16 else compute
        return cls(compute, compute if through_fp32(inputs) else kept, kept)


class Buffers:
    """The workspaces of `BlockScan` for blocks of one shape.

    A name without ending is the tensor as the elementwise operations see it: by head [K, h, Q, .]
    or by group [K, g, Q, .]. `_mm` is its view as a batch of matrices; `_T` its view by token
    [K, Q, ...]; `_c` its copy in the computing dtype, or itself where it has that already.
    """

    def __init__(
        self, sizes: Sizes, shape: BlockShape, dtypes: DTypes, device: torch.device
    ) -> None:
        self._dtypes, self._device = dtypes, device
        (K, Q), T, h, p = shape, shape.all_tokens, sizes.heads, sizes.head_dim
        g, r, n = sizes.groups, sizes.heads_a_group, sizes.state

        # By token, contiguous: x, B and C side by side and their gradients; y and its gradient.
        self.xbc = self.compute("xbc", T, sizes.all_channels)
        self.x, self.B, self.C = sizes.split(self.xbc)
        self.grad_xbc = self.compute("grad_xbc", T, sizes.all_channels)
        self.grad_x, self.grad_B, self.grad_C = sizes.split(self.grad_xbc)
        self.y, self.grad_y = (self.compute(name, T, h, p) for name in ("y", "grad_y"))
        self.own = self.compute("own", T, g)  # C . B of one token
        self.own_term = self.compute("own_term", T, g, r)
        self.product = self.compute("product", T, h, p)  # for one operation at a time

        # Group by group: B, C, scores of two tokens.
        self.B_g, self.C_g, self.grad_g = (
            self.operand(name, K, g, Q, n) for name in ("B_g", "C_g", "grad_g")
        )
        self.B_mm, self.C_mm, self.grad_mm = (
            t.view(K * g, Q, n) for t in (self.B_g, self.C_g, self.grad_g)
        )
        self.scores = self.operand("scores", K, g, Q, Q)
        self.scores_mm = self.scores.view(K * g, Q, Q)
        self.scores_c = self.computing("scores_c", self.scores)
        self.grad_scores = self.compute("grad_scores", K, g, Q, Q)

        # Head by head: decays, and what y takes from the tokens of its own chunk.
        self.wide = self._get("wide", torch.float64, K, h, Q, Q)  # for one operation at a time
        self.decay = self.compute("decay", K, h, Q, Q)
        self.decay_g = self.decay.view(K, g, r, Q, Q)
        self.mixing = self.operand("mixing", K, g, r, Q, Q)
        self.mixing_mm = self.mixing.view(K * h, Q, Q)
        self.mixing_c = self.computing("mixing_c", self.mixing)
        self.inputs, self.inner, self.grad_inner = (
            self.operand(name, K, h, Q, p) for name in ("inputs", "inner", "grad_inner")
        )
        self.inputs_mm, self.inner_mm, self.grad_inner_mm = (
            t.view(K * h, Q, p) for t in (self.inputs, self.inner, self.grad_inner)
        )

        # Group by group, its heads side by side: what goes into states and comes out of them.
        self.at_end, self.grad_at_start, self.outer = (
            self.operand(name, K, g, Q, r, p) for name in ("at_end", "grad_at_start", "outer")
        )
        self.at_end_mm, self.grad_at_start_mm, self.outer_mm = (
            t.view(K * g, Q, r * p) for t in (self.at_end, self.grad_at_start, self.outer)
        )
        self.outer_c = self.computing("outer_c", self.outer)
        self.outer_T = self.outer_c.transpose(1, 2)
        self.added, self.grad_after = (
            self.operand(name, K, h, p, n) for name in ("added", "grad_after")
        )
        self.added_mm, self.grad_after_mm = (
            t.view(K * g, r * p, n) for t in (self.added, self.grad_after)
        )
        self.added_c = self.computing("added_c", self.added)
        # Where nobody keeps them.
        self.states = self._get("states", dtypes.kept, K, h, p, n)
        self.states_c = self.computing("states_c", self.states)
        self.state_product = self.compute("state_product", h, p, n)
        self._views(K, Q, h, p, g, r, n)

    def _views(self, K: int, Q: int, h: int, p: int, g: int, r: int, n: int) -> None:
        """What is laid out by token, as the operations by head and by group see it."""
        self.x_by_head, self.grad_y_by_head, self.product_by_head = (
            t.view(K, Q, h, p).transpose(1, 2) for t in (self.x, self.grad_y, self.product)
        )
        self.x_by_group, self.grad_y_by_group, self.product_by_group = (
            t.view(K, Q, g, r, p).transpose(1, 2) for t in (self.x, self.grad_y, self.product)
        )
        self.B_by_group, self.C_by_group, self.grad_B_by_group, self.grad_C_by_group = (
            t.view(K, Q, g, n).transpose(1, 2) for t in (self.B, self.C, self.grad_B, self.grad_C)
        )
        self.y_by_head, self.grad_x_by_head = (
            t.view(K, Q, h, p).transpose(1, 2) for t in (self.y, self.grad_x)
        )
        self.y_by_group, self.grad_x_by_group = (
            t.view(K, Q, g, r, p).transpose(1, 2) for t in (self.y, self.grad_x)
        )

    def compute(self, name: str, *shape: int) -> Tensor:
        """A workspace in the computing dtype."""
        return self._get(name, self._dtypes.compute, *shape)

    def operand(self, name: str, *shape: int) -> Tensor:
        """A workspace in the operands' dtype."""
        return self._get(name, self._dtypes.operands, *shape)

    def computing(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` itself, or a workspace like it, if its dtype is not the computing one."""
        if tensor.dtype == self._dtypes.compute:
            return tensor
        return self.compute(name, *tensor.shape)

    def states_as(self, dtype: torch.dtype, states: Tensor) -> Tensor:
        """`states` [K, h, p, n], which are in the kept dtype, in the operands' or the computing
        one: themselves or in `states_c`."""
        return states if states.dtype == dtype else self.states_c.copy_(states)

    def _get(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        return WORKSPACE.get(name, dtype, self._device, shape)
