"""What the mixers of Mamba-1 and Mamba-2 share: how parameters are made, kept in fp32 and saved."""

import math
from dataclasses import dataclass

import torch
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_hybrid.layers.norm import parameter_device

CONV_KERNEL_SIZE = 4
DT_INIT_RANGE = (0.001, 0.1)
DT_INIT_FLOOR = 1e-4
# They decide how fast a state decays: bf16 would round A by up to 0.4%.
FP32_PARAMETERS = ("A_log", "D", "dt_bias")


@dataclass
class MambaMixerSubmodules:
    """The linears around the scan, `in_proj` with the layer's norm in it."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class MambaMixer(MegatronModule):
    """A mixer with parameters of its own, sharded over TP.

    Attributes:
        tp_group: set by the mixer.
        dims: along which parameters of its own are sharded, where it is not the first.
        keys: in a checkpoint, of parameters of its own, where they differ from their names.
    """

    tp_group: ProcessGroup

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.dims: dict[str, int] = {}
        self.keys = {"conv1d_weight": "conv1d.weight", "conv1d_bias": "conv1d.bias"}
        self._packed: dict[str, dict[str, int]] = {}

    def _parameter(
        self, *shape: int, dtype: torch.dtype = torch.float32, dim: int = 0
    ) -> nn.Parameter:
        """This rank's part of a parameter that is sharded along `dim`, not yet drawn."""
        made = nn.Parameter(torch.empty(*shape, dtype=dtype, device=parameter_device(self.config)))
        set_tensor_model_parallel_attributes(made, is_parallel=True, dim=dim, stride=1)
        return made

    def _pack(self, name: str, parameter: Tensor, parts: dict[str, int]) -> None:
        """Have a parameter's rows saved in parts, each sharded on its own."""
        # Tells the engine's resharding that the rows are several blocks, not one.
        parameter.partition_sizes = list(parts.values())  # type: ignore[attr-defined]
        self._packed[name] = parts

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """As nn.Module's, but a cast to 16 bits leaves A_log, D and dt_bias in fp32."""
        kept = {name: getattr(self, name).data for name in FP32_PARAMETERS}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = data.to(parameter.device)
        return self

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """megatron-core's keys: the packed tensors are stored in parts (`in_proj.weight.z`, …)."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(own, 0) | self.dims,
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded.update(
                sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        for name, key in self.keys.items():
            sharded[f"{prefix}{name}"].key = f"{prefix}{key}"
        for name, parts in self._packed.items():
            sharded[f"{prefix}{name}"] = _split_tensor_factory(
                sharded[f"{prefix}{name}"], list(parts.values()), list(parts), 0
            )
        return sharded


def draw_convolution(weight: Tensor, bias: Tensor) -> None:
    """torch's own range for a convolution of one channel each: weight `[c, 1, k]`, bias `[c]`."""
    bound = 1 / math.sqrt(weight.shape[-1])
    weight.uniform_(-bound, bound)
    bias.uniform_(-bound, bound)


def draw_dt_bias(bias: Tensor) -> None:
    """softplus(bias) log-uniform in Mamba's range."""
    log_dt_min, log_dt_max = (math.log(dt) for dt in DT_INIT_RANGE)
    dt = bias.uniform_(log_dt_min, log_dt_max).exp().clamp(min=DT_INIT_FLOOR)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
