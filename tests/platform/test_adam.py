"""Adam for the CPU: the numbers of AdamW, and the state layout of FusedAdam."""

import copy

import pytest
import torch

from megatron_hybrid.platform.adam import Adam

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(17, 5), (1,), (64,), (3, 4, 5)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def by_the_paper(params: list[torch.Tensor], steps: int, adam_w_mode: bool) -> list[torch.Tensor]:
    """The update of Kingma and Ba, with Loshchilov and Hutter's decay, written out in float64."""
    params = [param.detach().clone() for param in params]
    beta1, beta2 = OPTIONS["betas"]
    lr, decay = OPTIONS["lr"], OPTIONS["weight_decay"]
    means = [torch.zeros_like(p) for p in params]
    squares = [torch.zeros_like(p) for p in params]
    for step in range(1, steps + 1):
        holders = [torch.nn.Parameter(p) for p in params]
        set_gradients(holders, step)
        for i, holder in enumerate(holders):
            gradient = holder.grad if adam_w_mode else holder.grad + decay * params[i]
            means[i] = beta1 * means[i] + (1 - beta1) * gradient
            squares[i] = beta2 * squares[i] + (1 - beta2) * gradient**2
            mean = means[i] / (1 - beta1**step)
            root = (squares[i] / (1 - beta2**step)).sqrt()
            shrunk = params[i] * (1 - lr * decay) if adam_w_mode else params[i]
            params[i] = shrunk - lr * mean / (root + OPTIONS["eps"])
    return params


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_update_is_the_papers(adam_w_mode: bool, dtype: torch.dtype, rtol: float) -> None:
    """Ten steps equal the formula, with decoupled weight decay and with the other."""
    params = parameters(dtype)
    expected = by_the_paper([p.double() for p in params], 10, adam_w_mode)
    optimizer = Adam(params, **OPTIONS, adam_w_mode=adam_w_mode)
    for step in range(1, 11):
        set_gradients(params, step)
        optimizer.step()
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double(), value, rtol=rtol, atol=rtol)


def test_state_is_laid_out_as_fused_adams() -> None:
    """Two tensors for each parameter, the step in the group: what resharding relies on."""
    params = parameters(torch.float32)
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:], "lr": 1.0}], **OPTIONS)
    assert all("step" not in group for group in optimizer.param_groups)
    set_gradients(params, 1)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    for param in params:
        assert optimizer.state[param].keys() == {"exp_avg", "exp_avg_sq"}
        assert all(value.shape == param.shape for value in optimizer.state[param].values())


def test_resumes_to_the_same_bits() -> None:
    """Loaded from its state dict, it goes on exactly, and so does a second run from the start."""
    straight, resumed = parameters(torch.float32), parameters(torch.float32)
    optimizer = Adam(straight, **OPTIONS)
    other = Adam(resumed, **OPTIONS)
    for step in range(1, 7):
        set_gradients(straight, step)
        optimizer.step()
        if step == 4:
            fresh = Adam(resumed, **OPTIONS)
            fresh.load_state_dict(copy.deepcopy(other.state_dict()))
            other = fresh
        set_gradients(resumed, step)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_parameters_without_gradient_are_left_alone() -> None:
    """A parameter that took no part in the step keeps its value and gets no state."""
    params = parameters(torch.float32)
    before = params[0].clone()
    set_gradients(params[1:], 1)
    optimizer = Adam(params, **OPTIONS)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state


def test_cuda_graphs_are_refused() -> None:
    """A setting that only CUDA has is an error, not ignored."""
    with pytest.raises(ValueError, match="capturable=True"):
        Adam(parameters(torch.float32), capturable=True)
