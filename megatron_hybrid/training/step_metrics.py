"""One training step in numbers: what the metrics file, TensorBoard and the console show of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_hybrid.training.expert_load import ExpertLoad

# The fields that differ between two runs of the same config; all others are reproducible.
TIMING_FIELDS = frozenset(
    {"tokens_per_s", "model_tflops_per_rank", "step_ms", "peak_memory_gib", "eta_s"}
)


@dataclass(frozen=True)
class StepMetrics:
    """One training step, summed or averaged over all ranks unless the name says otherwise.

    Attributes:
        iteration: steps done, this one included.
        consumed_samples, consumed_tokens: since the start of the run, over all data-parallel ranks.
        loss: mean cross-entropy a token, in nats.
        learning_rate: what the optimizer used in this step.
        grad_norm: global L2 norm of the gradient before clipping.
        tokens_per_s: of all ranks together.
        model_tflops_per_rank: model FLOPs (recomputation not counted) a second and rank, in 1e12.
        step_ms: wall time of the step.
        peak_memory_gib: see `peak_memory_gib`; of the rank that reports.
        eta_s: expected seconds until the last step.
        skipped: the step's update was not applied.
        nonfinite: the loss or the gradient norm was NaN or infinite.
        phase: of the data, that the step belonged to; None where there are not several.
        source_tokens: of each source of the plan, consumed since the start of the run.
        source_epochs: passes over each source since the start of the run.
        expert_load: where the tokens went, in numbers of each MoE layer; None without one.
        extra: further values by name, e.g. the auxiliary losses of MoE layers or `params_norm`.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    model_tflops_per_rank: float
    step_ms: float
    peak_memory_gib: float
    eta_s: float
    skipped: bool = False
    nonfinite: bool = False
    phase: str | None = None
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    source_epochs: Mapping[str, float] = field(default_factory=dict)
    expert_load: "ExpertLoad | None" = None
    extra: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The step as `metrics.jsonl` has it."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain = {name: dict(value) for name, value in values.items() if isinstance(value, Mapping)}
        load = None if self.expert_load is None else self.expert_load.summary()
        return {"kind": "train"} | values | plain | {"expert_load": load}
