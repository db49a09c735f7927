"""What the log shows beside loss and gradient: auxiliary losses of MoE layers, parameter norm."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import MOE
from megatron_hybrid.training.optimizer import optimizer_parts

# megatron-core's names of the losses.
_BALANCE_LOSS = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}
_Z_LOSS = "z_loss"


class MoeLosses:
    """A meter: the auxiliary losses that the engine's routers leave behind in each micro batch."""

    name = "moe_losses"

    def __init__(self, model: ModelConfig) -> None:
        self.names: list[str] = []  # the same on every rank, whether it has MoE layers or not
        modules, ahead = model.mtp_num_layers or 0, model.mtp_hybrid_override_pattern or ""
        self._layers = model.hybrid_layer_pattern.count(MOE) + modules * ahead.count(MOE)
        if self._layers and model.moe_aux_loss_coeff:
            self.names.append(_BALANCE_LOSS[model.moe_router_load_balancing_type])
        if self._layers and model.moe_z_loss_coeff:
            self.names.append(_Z_LOSS)

    def take(self, micro_batches: int, like: Tensor) -> Tensor:
        """This rank's share of each loss of the step, which is forgotten: the next begins at 0.

        Added up over all ranks, they are means over MoE layers, micro batches and data-parallel
        ranks, without the coefficients of the config.

        Args:
            micro_batches: of the step, on one rank.
            like: whose dtype and device the shares `[n]` get.
        """
        tracker = get_moe_metrics_tracker()
        shares = [
            float(tracker.metrics[name].values.double().sum()) / (self._parts(name) * micro_batches)
            if name in tracker.metrics
            else 0.0
            for name in self.names
        ]
        tracker.clear()
        return like.new_tensor(shares)

    def read(self, sums: Sequence[float]) -> dict[str, float]:
        """Each loss by its name."""
        return dict(zip(self.names, sums, strict=True))

    def _parts(self, name: str) -> int:
        """How many values there are in a micro batch for each one that the mean is made of."""
        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        # A balance loss comes in parts to be added over TP and CP; each z-loss is a mean in itself.
        replicas = (
            dist.get_world_size() // pipeline
            if name == _Z_LOSS
            else parallel_state.get_data_parallel_world_size()
        )
        return replicas * self._layers


@torch.no_grad()
def params_norm(optimizer: MegatronOptimizer) -> float:
    """L2 norm of all parameters of the model, in fp32 as the optimizer keeps them.

    All ranks call it together; it takes one reduction: the distributed optimizer has divided the
    parameters among the ranks, all but those that tensor-parallel ranks each have whole.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in optimizer_parts(optimizer):
        own = [
            parameter
            for parameter in part.get_parameters()
            if param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(
                parameter,
                tp_group=getattr(part, "tp_group", None),
                expert_tp_group=getattr(part, "expert_tp_group", None),
            )
        ]
        if own:
            total += torch.stack(torch._foreach_norm(own)).double().square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())
