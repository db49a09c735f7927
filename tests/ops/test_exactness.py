"""Gradients of the Mamba-2 core in float32: how far from float64, beside transformers' own."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from megatron_hybrid.layers.mamba import DT_INIT_RANGE
from megatron_hybrid.layers.mamba2 import A_INIT_RANGE
from megatron_hybrid.ops.mamba2 import mamba2_split_conv1d_scan

MODELS = 20
HEADS, HEAD_DIM, STATE, EPS = 32, 8, 16, 1e-5
CHANNELS = HEADS * HEAD_DIM
LENGTHS, GROUPS = (64, 100, 256, 400), (1, 2, 8)
# Between which the means of 20 ratios vary by chance, for parameters whose sums do not cancel.
AS_EXACT = 1.25


def mixers() -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Random mixers of transformers without their projections; what goes in, its gradient out.

    Decays and steps are drawn as training starts with them: A in 1 to 16, dt from 1e-3 to 0.1.
    """
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    for seed in range(MODELS):
        draws, groups = torch.Generator().manual_seed(seed), GROUPS[seed % len(GROUPS)]
        config = NemotronHConfig(
            hidden_size=CHANNELS,
            mamba_num_heads=HEADS,
            mamba_head_dim=HEAD_DIM,
            ssm_state_size=STATE,
            n_groups=groups,
            layers_block_type=["mamba"],
            layer_norm_epsilon=EPS,
            time_step_min=1e-30,  # a lower limit that ours has not
            chunk_size=64,
        )
        mixer = NemotronHMamba2Mixer(config, layer_idx=0).eval()
        mixer.in_proj = mixer.out_proj = nn.Identity()
        low, high = (math.log(dt) for dt in DT_INIT_RANGE)
        dt = torch.empty(HEADS).uniform_(low, high, generator=draws).exp()
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                parameter.uniform_(-0.5, 0.5, generator=draws)
                if name in ("D", "norm.weight"):
                    parameter.add_(1)
            mixer.A_log.uniform_(*A_INIT_RANGE, generator=draws).log_()
            mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        length = LENGTHS[seed % len(LENGTHS)]
        width = 2 * CHANNELS + 2 * groups * STATE + HEADS
        yield (
            mixer,
            torch.randn(1, length, width, generator=draws),
            torch.randn(1, length, CHANNELS, generator=draws),
        )


def ours(mixer: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Copies of the mixer's parameters in `dtype`, and the core that reads them."""
    copies = {
        name: parameter.detach().to(dtype, copy=True).requires_grad_()
        for name, parameter in mixer.named_parameters()
    }

    def core(zxbcdt: Tensor) -> Tensor:
        return mamba2_split_conv1d_scan(
            zxbcdt.to(dtype),
            copies["conv1d.weight"].squeeze(1),
            copies["conv1d.bias"],
            copies["dt_bias"],
            -torch.exp(copies["A_log"]),
            copies["D"],
            head_dim=HEAD_DIM,
            num_groups=mixer.n_groups,
            norm_weight=copies["norm.weight"],
            norm_group_size=CHANNELS // mixer.n_groups,
            norm_eps=EPS,
        )

    return copies, core


def gradients(
    parameters: dict[str, Tensor], core: Callable[..., Tensor], zxbcdt: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """The gradient of every parameter and of the input, in float64."""
    zxbcdt = zxbcdt.clone().requires_grad_()
    y = core(zxbcdt)
    found = torch.autograd.grad(y, [zxbcdt, *parameters.values()], grad.to(y.dtype))
    return {name: t.double() for name, t in zip(("zxbcdt", *parameters), found, strict=True)}


@pytest.fixture(scope="module")
def ratios() -> dict[str, float]:
    """By name: our distance from float64 over transformers', its geometric mean over the models.

    float64 is the same function, which test_mamba2 holds against the plain recurrence to 1e-12.
    """
    logs: dict[str, list[float]] = {}
    for mixer, zxbcdt, grad in mixers():
        exact = gradients(*ours(mixer, torch.float64), zxbcdt, grad)
        own = gradients(*ours(mixer, torch.float32), zxbcdt, grad)
        theirs = gradients(dict(mixer.named_parameters()), mixer, zxbcdt, grad)
        for name, want in exact.items():
            ratio = (own[name] - want).norm() / (theirs[name] - want).norm()
            logs.setdefault(name, []).append(ratio.log().item())
    return {name: math.exp(sum(each) / MODELS) for name, each in logs.items()}


def test_gradients_are_as_exact_as_transformers(ratios: dict[str, float]) -> None:
    """Of every parameter of the mixer and of its input, on 20 random models."""
    assert {"A_log", "dt_bias"} < ratios.keys()
    further = {name: f"{ratio:.2f}" for name, ratio in ratios.items() if ratio > AS_EXACT}
    assert not further, f"times farther from float64 than transformers: {further}"


@pytest.mark.parametrize("name", ["A_log", "dt_bias"])
def test_decays_are_no_farther_from_float64_than_transformers(
    ratios: dict[str, float], name: str
) -> None:
    """Where a sum over pairs of tokens remains after all others have cancelled."""
    assert ratios[name] <= 1, f"{ratios[name]:.2f} times transformers' distance from float64"
