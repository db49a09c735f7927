"""Adam and AdamW for the CPU that keep their state the way Transformer Engine's FusedAdam does.

megatron-core's distributed optimizer reshards checkpoints of FusedAdam's layout: tensors `exp_avg`
and `exp_avg_sq` for each parameter, and one `step` for each parameter group. torch.optim's Adam
keeps a `step` for each parameter, which does not reshard; hence this class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch


def _as_written(method: Any) -> Any:
    """A method of torch's optimizers without what keeps torch's compiler from compiling it.

    To be kept from it imports the compiler, a second of a rank's start; nothing compiles here.
    """
    return inspect.unwrap(method)


class Adam(torch.optim.Optimizer):
    """Adam (or AdamW) over torch's fused CPU kernel; equal inputs give equal bits.

    Args:
        params: fp32 parameters, or groups of them; under megatron-core these are the fp32 main
            parameters. bf16 and fp64 parameters work too, with a state of their own dtype.
        lr: learning rate, read anew from each group at each step.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the second mean.
        weight_decay: with `adam_w_mode` taken off the parameter, otherwise added to the gradient.
        adam_w_mode: decoupled weight decay (AdamW).
        capturable: CUDA graphs; there are none here, so only False.

    State: `exp_avg` and `exp_avg_sq`, each shaped and typed as the parameter; `step` (int, the
    steps done) in each parameter group that has taken one.

    Source: Kingma and Ba 2015 (arXiv:1412.6980), Loshchilov and Hutter 2019 (arXiv:1711.05101).
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable=True needs CUDA graphs; allowed on the CPU: False")
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    add_param_group = _as_written(torch.optim.Optimizer.add_param_group)
    state_dict = _as_written(torch.optim.Optimizer.state_dict)
    load_state_dict = _as_written(torch.optim.Optimizer.load_state_dict)
    zero_grad = _as_written(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return `closure()` if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_dtype.setdefault(param.dtype, []).append(param)
            for params in by_dtype.values():
                self._update(params, group)
        return loss

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        """One step of parameters that share a group and a dtype."""
        for param in params:
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        step = torch.tensor(float(group["step"]))
        beta1, beta2 = group["betas"]
        kernel(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [step] * len(params),
            amsgrad=False,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
