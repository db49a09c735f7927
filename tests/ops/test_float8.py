"""Emulated float8 against the recipes' definitions, written out number by number in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hybrid.config.precision import AMAX_HISTORY, FLOAT8_RECIPES
from megatron_hybrid.ops.float8 import Fit, Float8Linear, block_scale, tensor_scale

MOST = {"e4m3": 448.0, "e5m2": 57344.0}


def all_numbers(name: str) -> np.ndarray:
    """Every finite number >= 0 of a format, from exponent and mantissa bits."""
    exponent_bits, mantissa_bits = {"e4m3": (4, 3), "e5m2": (5, 2)}[name]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    found += [
        (1 + m / steps) * 2.0 ** (e - bias)
        for e in range(1, 2**exponent_bits)
        for m in range(steps)
    ]
    return np.array([number for number in found if number <= MOST[name]])


NUMBERS = {name: all_numbers(name) for name in MOST}


def rounded(value: float, name: str) -> float:
    """The nearest number of a format; of two equally near the one with an even last bit."""
    table = NUMBERS[name]
    size = min(abs(value), MOST[name])
    place = int(np.searchsorted(table, size))
    if place == 0:
        return 0.0
    below, above = table[place - 1], table[min(place, len(table) - 1)]
    nearer_above = size - below > above - size or (
        size - below == above - size and place % 2 == 0  # codes count up: even is even
    )
    return math.copysign(above if nearer_above else below, value)


def plain_scale(values: list[float], kind: str, name: str, history: float | None) -> float:
    """What a group of numbers is multiplied by."""
    amax = max(map(abs, values)) if history is None else history
    if amax == 0 or not math.isfinite(amax):
        return 1.0
    if kind == "blocks":
        return 1 / 2.0 ** math.ceil(math.log2(amax / MOST[name]))
    scale = MOST[name] / amax
    return 2.0 ** math.floor(math.log2(scale)) if kind == "tiles" else scale


def plain_cast(
    matrix: np.ndarray, kind: str, name: str, *, is_weight: bool = False, history: float | None
) -> np.ndarray:
    """A matrix `[m, k]`, summed over k, in float8 and back."""
    m, k = matrix.shape
    rows, columns = {
        "tiles": (128 if is_weight else 1, 128), "blocks": (1, 32),
    }.get(kind, (m, k))  # fmt: skip
    result = np.zeros_like(matrix)
    for top in range(0, m, rows):
        for left in range(0, k, columns):
            group = matrix[top : top + rows, left : left + columns]
            scale = plain_scale(group.flatten().tolist(), kind, name, history)
            held = [[rounded(v * scale, name) / scale for v in row] for row in group.tolist()]
            result[top : top + rows, left : left + columns] = held
    return result


def plain_products(
    x: np.ndarray, w: np.ndarray, g: np.ndarray, recipe_name: str, histories: dict | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output and both gradients of a linear, each from operands cast for its own sum."""
    recipe = FLOAT8_RECIPES[recipe_name]
    kind, gradients = recipe.scaling, recipe.gradients
    past = histories or {"input": None, "weight": None, "gradient": None}

    def cast_x(matrix: np.ndarray) -> np.ndarray:
        return plain_cast(matrix, kind, "e4m3", history=past["input"])

    def cast_w(matrix: np.ndarray) -> np.ndarray:
        return plain_cast(matrix, kind, "e4m3", is_weight=True, history=past["weight"])

    def cast_g(matrix: np.ndarray) -> np.ndarray:
        return plain_cast(matrix, kind, gradients, history=past["gradient"])

    return (
        cast_x(x) @ cast_w(w).T,
        cast_g(g) @ cast_w(w.T).T,
        cast_g(g.T) @ cast_x(x.T).T,
    )


def run(float8: Float8Linear, x: Tensor, w: Tensor, g: Tensor) -> list[np.ndarray]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = float8(x, w)
    y.backward(g)
    assert x.grad is not None and w.grad is not None
    return [t.detach().double().numpy() for t in (y, x.grad, w.grad)]


def operands(m: int, k: int, n: int, *, wild: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x `[m, k]`, w `[n, k]`, g `[m, n]`, of many magnitudes, with zeros and all-zero rows."""
    made = []
    for rows, columns in ((m, k), (n, k), (m, n)):
        values = torch.randn(rows, columns)
        if wild:
            values *= torch.exp(3 * torch.randn(rows, columns))
            values[torch.rand(rows, columns) < 0.1] = 0
            values[rows // 2] = 0
        made.append(values)
    return made[0], made[1], made[2]


RECIPES = list(FLOAT8_RECIPES)
SIZES = [(1, 1, 1), (16, 128, 32), (33, 130, 129), (130, 31, 33)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_products(recipe: str, size: tuple[int, int, int]) -> None:
    """Output and gradients are those of the operands as defined, to fp32's rounding of sums."""
    torch.manual_seed(0)
    x, w, g = operands(*size)
    float8 = Float8Linear(FLOAT8_RECIPES[recipe], x.device)
    wide = [t.double().numpy() for t in (x, w, g)]
    histories = dict.fromkeys(("input", "weight", "gradient"), 0.0) if float8.history else None
    for found, expected in zip(
        run(float8, x, w, g), plain_products(*wide, recipe, histories), strict=True
    ):
        top = max(np.abs(expected).max(), 1e-30)
        np.testing.assert_allclose(found / top, expected / top, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_operands_with_leading_sizes(recipe: str) -> None:
    """`[s, b, k]` in bf16 gives `[s, b, n]` in bf16, the same numbers as `[s * b, k]` in fp32."""
    torch.manual_seed(1)
    x, w, g = (t.bfloat16() for t in operands(24, 64, 48))
    float8 = Float8Linear(FLOAT8_RECIPES[recipe], x.device)
    y, x_grad, w_grad = run(float8, x.view(8, 3, 64), w, g.view(8, 3, 48))
    assert y.shape == (8, 3, 48)
    expected = run(float8, x.float(), w.float(), g.float())
    for found, wide in zip((y, x_grad, w_grad), expected, strict=True):
        narrow = torch.from_numpy(wide).bfloat16().double().numpy()
        np.testing.assert_array_equal(found.reshape(narrow.shape), narrow)


def test_scales_of_nothing_and_of_too_much() -> None:
    """0, Inf and NaN give a scale of 1; a number too small for an fp32 scale the largest one."""
    amax = torch.tensor([0.0, math.inf, math.nan, 1e-45, 448.0, 3.0])
    scale = tensor_scale(amax, torch.float8_e4m3fn)
    assert scale.tolist()[:3] == [1.0, 1.0, 1.0]
    assert scale[3] == torch.finfo(torch.float32).max
    assert scale[4] == 1.0
    assert scale[5] == torch.tensor(448.0) / 3
    blocks = block_scale(torch.tensor([0.0, 448.0, 448.0 * 2, 449.0, 1e-37]), torch.float8_e4m3fn)
    assert blocks.tolist() == [1.0, 1.0, 0.5, 0.5, 2.0**127]


def test_delayed_scaling_goes_by_the_past() -> None:
    """The scale is that of the largest of the last AMAX_HISTORY steps; what exceeds it is cut."""
    float8 = Float8Linear(FLOAT8_RECIPES["fp8_delayed"], torch.device("cpu"))
    past = {"input": 8.0, "weight": 2.0, "gradient": 0.5}
    first = [torch.full((4, 4), value) for value in past.values()]
    run(float8, *first)
    float8.end_step()
    x, w, g = operands(8, 4, 4, wild=False)
    x[0, 0] = 20.0  # beyond what was seen: cut off at 8
    wide = [t.double().numpy() for t in (x, w, g)]
    for found, expected in zip(
        run(float8, x, w, g), plain_products(*wide, "fp8_delayed", past), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    float8.end_step()
    assert float8.history["input"][:3].tolist() == [20.0, 8.0, 0.0]
    for _ in range(AMAX_HISTORY):
        run(float8, *(torch.ones(4, 4) for _ in range(3)))
        float8.end_step()
    assert float8.history["input"].max() == 1.0
    run(float8, torch.full((4, 4), math.inf), torch.ones(4, 4), torch.ones(4, 4))
    float8.end_step()
    assert float8.history["input"].max() == 1.0  # what is no number is not remembered


def test_counts() -> None:
    """Underflow, saturation and the largest number are those counted by hand, once a product."""
    float8 = Float8Linear(FLOAT8_RECIPES["fp8_delayed"], torch.device("cpu"))
    float8.fit = Fit()
    x = torch.tensor([[500.0, 1.0, 1e-6, 0.0]])  # scale 1: cut off, kept, lost, was 0
    run(float8, x, torch.ones(2, 4), torch.full((1, 2), 1e-8))
    fit = float8.fit
    assert (fit.amax["input"], fit.underflow["input"], fit.saturated["input"]) == (500.0, 1, 1)
    assert (fit.total["input"], fit.total["weight"], fit.total["gradient"]) == (4, 8, 2)
    assert fit.underflow["gradient"] == 2
    with torch.no_grad():  # an evaluation, or the first pass of a layer that is computed again
        float8(x, torch.ones(2, 4))
    assert fit.total["input"] == 4


def test_an_expert_without_tokens() -> None:
    """No rows are no reason to stop."""
    for recipe in FLOAT8_RECIPES.values():
        float8 = Float8Linear(recipe, torch.device("cpu"))
        float8.fit = Fit()
        y, x_grad, w_grad = run(float8, torch.zeros(0, 32), torch.ones(8, 32), torch.zeros(0, 8))
        assert y.shape == (0, 8) and x_grad.shape == (0, 32) and not w_grad.any()
