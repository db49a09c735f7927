"""Layer by layer, what Transformer Engine's Python and torch's kernels compute is what the torch
backend does: losses and all gradients, from the same weights.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.gpu.layers import largest_error, line, outcome
from tests.gpu_on_cpu.ranks import run_on_gpus

KINDS = ("M", "M1", "*", "-", "E", "EL", "H", "G")
TOLERANCES = {
    "fp32": 1e-5,
    # 8 bits, and gradients pass products of 256 terms and more.
    "bf16": 0.02,
}


class Compared(NamedTuple):
    """Attributes: `error`: the largest relative one, and of what; `tensors`: how many there are;
    `called`: functions of Transformer Engine's compiled module that computed.
    """

    error: tuple[float, str]
    tensors: int
    called: set[str]


def compare(folder: Path) -> dict[tuple[str, str], Compared]:
    """On a rank of pretended GPUs: by kind of layer and recipe, against torch in fp32."""
    from tests.gpu_on_cpu import transformer_engine_torch as compiled

    found = {}
    for symbol in KINDS:
        weights = folder / "weights.pt"
        exact = outcome(line(symbol, "fp32", folder), "torch", weights, save=True)
        for recipe in TOLERANCES:
            compiled.CALLS.clear()
            words = line(symbol, recipe, folder)
            got = outcome(words, "transformer_engine", weights, save=False)
            found[symbol, recipe] = Compared(
                largest_error(got, exact), len(exact), set(compiled.CALLS)
            )
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compared]:
    return run_on_gpus(compare, 1, tmp_path_factory.mktemp("layers"))[0]


@pytest.mark.parametrize("recipe", TOLERANCES)
@pytest.mark.parametrize("symbol", KINDS)
def test_backends_compute_the_same(
    symbol: str, recipe: str, compared: dict[tuple[str, str], Compared]
) -> None:
    """Losses of 512 tokens and the gradients of all parameters."""
    found = compared[symbol, recipe]
    assert found.error < (TOLERANCES[recipe], "")
    # Embedding and output, the last norm, and the layer's own.
    assert found.tensors > 4
    products = {"te_general_grouped_gemm"} if symbol == "E" else {"generic_gemm"}
    assert found.called >= {*products, "rmsnorm_fwd", "rmsnorm_bwd"}
