"""Linears in float8, emulated: operands are rounded to float8 by a recipe's scaling, on any device.

Each of a linear's three products (output, gradient of the input, gradient of the weight) gets its
operands as the hardware would: scaled, rounded to the nearest float8, and scaled back; the sums are
in fp32. Scaling follows Transformer Engine's recipes (its documentation, "Low precision training"):
Float8CurrentScaling, DelayedScaling, Float8BlockScaling with scales that are powers of two, and
MXFP8BlockScaling.

Legend: m rows (tokens, or channels where a product sums over tokens), k what a product sums over.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_hybrid.config.precision import AMAX_HISTORY, E4M3, E5M2, Float8Recipe

Role = Literal["input", "weight", "gradient"]
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")
DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
TILE, BLOCK = 128, 32
LARGEST_FLOAT = torch.finfo(torch.float32).max


def largest(dtype: torch.dtype) -> float:
    """The largest number of a float8 format: 448 of E4M3, 57344 of E5M2."""
    return torch.finfo(dtype).max


def tensor_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """What a tensor is multiplied by, from its largest absolute value `[]` fp32.

    1 where there is nothing to go by (0, Inf or NaN); no more than the largest fp32 number.
    """
    # Not number / tensor, which torch makes a product with the rounded inverse.
    scale = (torch.full_like(amax, largest(dtype)) / amax).clamp(max=LARGEST_FLOAT)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))


def power_of_two_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor_scale` of each tile `[...]`, rounded down to a power of two."""
    mantissa, exponent = torch.frexp(tensor_scale(amax, dtype))
    return torch.ldexp(torch.full_like(mantissa, 0.5), exponent)


def block_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of each MXFP8 block: 1 / 2^e, e being amax / max rounded up to a power of two.

    e has eight bits: -127 to 127.
    """
    mantissa, exponent = torch.frexp(amax / largest(dtype))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    scale = torch.ldexp(torch.ones_like(mantissa), -exponent)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))


def _amax(wide: Tensor) -> Tensor:
    """The largest absolute value `[]`; 0 of nothing, as of an expert without tokens."""
    return wide.abs().max() if wide.numel() else wide.new_zeros(())


@dataclass(frozen=True)
class Cast:
    """A tensor as float8 holds it.

    Attributes:
        values: scaled back to the tensor's own magnitude, in fp32.
        scaled: before it was rounded; beyond the format's largest number it is cut off.
        codes: as rounded, still scaled, in fp32.
    """

    values: Tensor
    scaled: Tensor
    codes: Tensor


def cast(wide: Tensor, scale: Tensor, dtype: torch.dtype) -> Cast:
    """Round `wide * scale` to the nearest float8, ties to even; too large a number saturates.

    Args:
        wide: fp32.
        scale: fp32, of a shape that spreads to wide's.
    """
    scaled, most = wide * scale, largest(dtype)
    codes = scaled.clamp(-most, most).to(dtype).float()
    return Cast(codes / scale, scaled, codes)


def cast_groups(wide: Tensor, rows: int, columns: int, scale_of: Any, dtype: torch.dtype) -> Cast:
    """`cast` of a matrix `[m, k]`, each group of `rows` x `columns` numbers with its own scale.

    Groups at the edges are smaller.

    Args:
        scale_of: `power_of_two_scale` or `block_scale`.
    """
    m, k = wide.shape
    padded = torch.nn.functional.pad(wide, (0, -k % columns, 0, -m % rows))
    groups = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = scale_of(groups.abs().amax(dim=(1, 3), keepdim=True), dtype)
    whole = cast(groups, scale, dtype)
    return Cast(*(part.reshape(padded.shape)[:m, :k] for part in vars(whole).values()))


class Fit:
    """How the operands of one linear fit their format, added up over products.

    Attributes:
        amax: largest absolute value, by role.
        underflow, saturated: how many numbers became 0 without being it; were cut off.
        total: how many there were.
    """

    def __init__(self) -> None:
        self.amax, self.underflow = dict.fromkeys(ROLES, 0.0), dict.fromkeys(ROLES, 0)
        self.saturated, self.total = dict.fromkeys(ROLES, 0), dict.fromkeys(ROLES, 0)

    def add(self, role: Role, wide: Tensor, held: Cast, dtype: torch.dtype) -> None:
        """Count an operand."""
        self.amax[role] = max(self.amax[role], float(_amax(wide)))
        self.underflow[role] += int(((held.codes == 0) & (wide != 0)).sum())
        self.saturated[role] += int((held.scaled.abs() > largest(dtype)).sum())
        self.total[role] += wide.numel()


class Float8Linear:
    """The products of one linear under a recipe, and what it remembers between steps.

    Attributes:
        history: delayed scaling: the largest absolute value of each of the last steps, the latest
            first, by role; `[AMAX_HISTORY]` fp32.
        latest: the same of this step so far, `[]` fp32.
        fit: counts of this step, or None while none are wanted.
    """

    def __init__(self, recipe: Float8Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self._dtypes = dict.fromkeys(ROLES, DTYPES[E4M3])
        self._dtypes["gradient"] = DTYPES[recipe.gradients]
        self.fit: Fit | None = None
        self.history: dict[Role, Tensor] = {}
        if recipe.scaling == "delayed":
            self.history = {role: torch.zeros(AMAX_HISTORY, device=device) for role in ROLES}
        self.latest = {role: torch.zeros((), device=device) for role in ROLES}

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x `[..., k]` @ weight `[n, k]`^T -> `[..., n]` in x's dtype, differentiable."""
        # What runs without gradients is an evaluation, or will be run again: not counted.
        output: Tensor = _Float8Linear.apply(x, weight, self, torch.is_grad_enabled())
        return output

    def operand(self, role: Role, matrix: Tensor, *, count: bool = False) -> Tensor:
        """A matrix `[m, k]` as its product over k sees it, in fp32.

        Args:
            count: this is the first of the role's products in this step's micro batch.
        """
        wide, dtype = matrix.float(), self._dtypes[role]
        held = self._cast(role, wide, dtype)
        if count and self.history:
            self.latest[role] = torch.maximum(self.latest[role], _amax(wide))
        if count and self.fit is not None:
            self.fit.add(role, wide, held, dtype)
        return held.values

    def _cast(self, role: Role, wide: Tensor, dtype: torch.dtype) -> Cast:
        scaling = self.recipe.scaling
        if scaling == "tiles":
            rows = TILE if role == "weight" else 1
            return cast_groups(wide, rows, TILE, power_of_two_scale, dtype)
        if scaling == "blocks":
            return cast_groups(wide, 1, BLOCK, block_scale, dtype)
        amax = self.history[role].max() if self.history else _amax(wide)
        return cast(wide, tensor_scale(amax, dtype), dtype)

    def end_step(self) -> None:
        """Delayed scaling: what this step saw joins the history, if it is a number."""
        for role, history in self.history.items():
            amax = self.latest[role]
            if torch.isfinite(amax):
                self.history[role] = torch.cat([amax[None], history[:-1]])
            self.latest[role] = torch.zeros_like(amax)


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, float8: Float8Linear, count: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.float8 = float8  # type: ignore[attr-defined]
        rows = float8.operand("input", x.flatten(0, -2), count=count)
        output = rows @ float8.operand("weight", weight, count=count).t()
        return output.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x, weight), float8 = ctx.saved_tensors, ctx.float8
        rows_grad, rows_x = grad.flatten(0, -2), x.flatten(0, -2)
        wide_grad = float8.operand("gradient", rows_grad, count=True)
        grad_x = wide_grad @ float8.operand("weight", weight.t()).t()
        # This product is over the tokens: groups of numbers that share a scale lie along them.
        by_channel = float8.operand("gradient", rows_grad.t())
        grad_weight = by_channel @ float8.operand("input", rows_x.t()).t()
        return grad_x.to(x.dtype).view(x.shape), grad_weight.to(weight.dtype), None, None
