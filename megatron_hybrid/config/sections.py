"""The sections of a run beside model and data: layout, precision, training, checkpoints, logs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict, create_model

from megatron_hybrid.config.base import (
    Amount,
    Count,
    Duration,
    FilePath,
    Finite,
    FrozenDict,
    Positive,
    PositiveReal,
    Real,
    Section,
    Text,
    Words,
)


class ParallelConfig(Section):
    """How the ranks divide the model, the sequence and the batch."""

    tensor_model_parallel_size: Positive = Field(
        default=1, description="TP: ranks that share each layer"
    )
    sequence_parallel: bool = Field(
        default=False, description="split norms and residuals over the TP ranks along the sequence"
    )
    pipeline_model_parallel_size: Positive = Field(default=1, description="PP: pipeline stages")
    virtual_pipeline_model_parallel_size: Positive | None = Field(
        default=None, description="VPP: segments a stage holds; null: segments of the pattern / PP"
    )
    context_parallel_size: Positive = Field(
        default=1, description="CP: ranks that share each sequence"
    )
    mamba_cp_comm_type: Literal["all_to_all", "state_passing", "auto"] = Field(
        default="all_to_all",
        description="how CP ranks share the layers with a state: each takes a part of the heads of "
        "the whole sequence, or its part of the sequence, and passes the states on; auto: what "
        "sends fewer bytes",
    )
    expert_model_parallel_size: Positive = Field(
        default=1, description="EP: ranks that share the experts of a MoE layer"
    )
    expert_tensor_parallel_size: Positive | None = Field(
        default=None, description="ETP: ranks that share each expert; null: 1"
    )
    use_distributed_optimizer: bool = Field(
        default=True, description="split the optimizer state over the DP ranks"
    )
    overlap_grad_reduce: bool = Field(
        default=False, description="reduce gradients while the backward pass runs"
    )
    overlap_param_gather: bool = Field(
        default=False, description="gather updated parameters while the forward pass runs"
    )


GraphModules = Annotated[
    tuple[Literal["attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba"], ...],
    Strict(False),
    Words("a list of attn, mlp, moe, moe_router, moe_preprocess and mamba"),
]

RecomputedModules = Annotated[
    tuple[Literal["core_attn", "mlp", "moe", "shared_experts"], ...],
    Strict(False),
    Words("a list of core_attn, mlp, moe and shared_experts"),
]


class GpuConfig(Section):
    """Kernels and overlap that only the transformer_engine backend has."""

    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = Field(
        default=None,
        description="how attention's context parallel ranks exchange keys and values; null: p2p "
        "on GPUs, all_gather on the CPU",
    )
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = Field(
        default="auto", description="Transformer Engine's attention kernel"
    )
    overlap_p2p_comm: bool = Field(
        default=False,
        description="interleaved pipelines: send and receive while layers compute",
    )
    align_param_gather: bool = Field(
        default=False,
        description="all pipeline stages gather updated parameters at the same time",
    )
    gradient_accumulation_fusion: bool = Field(
        default=False,
        description="add weight gradients within the GEMM; needs NVIDIA's apex",
    )
    apply_rope_fusion: bool = Field(default=False, description="RoPE in one kernel")
    bias_activation_fusion: bool = Field(
        default=False, description="bias and activation in one kernel: gelu with bias, swiglu"
    )
    bias_dropout_fusion: bool = Field(
        default=False, description="bias, dropout and residual in one kernel"
    )
    cross_entropy_loss_fusion: bool = Field(
        default=False, description="cross-entropy in one kernel"
    )
    cross_entropy_fusion_impl: Literal["native", "te"] = Field(
        default="native",
        description="whose fused cross-entropy: megatron-core's or Transformer Engine's",
    )
    moe_permute_fusion: bool = Field(
        default=False, description="tokens are brought to their experts by one kernel"
    )
    moe_router_fusion: bool = Field(
        default=False, description="top-k and auxiliary loss of the router in one kernel"
    )
    moe_shared_expert_overlap: bool = Field(
        default=False, description="shared experts compute while tokens are sent to the others"
    )
    cuda_graph_impl: Literal["none", "local"] = Field(
        default="none", description="CUDA graphs of layers: none, or megatron-core's own"
    )
    cuda_graph_modules: GraphModules = Field(
        default=(), description="parts of layers that CUDA graphs hold; []: whole layers"
    )
    cuda_graph_warmup_steps: Count = Field(
        default=3, description="steps before CUDA graphs are made"
    )


class PrecisionConfig(Section):
    """Number formats."""

    recipe: Literal["bf16", "fp32", "fp8_tensorwise", "fp8_blockwise", "fp8_delayed", "mxfp8"] = (
        Field(
            default="bf16",
            description="format of weights and activations; the optimizer is always fp32. In "
            "float8 are the products of linears; their weights are kept in bf16",
        )
    )
    num_layers_at_start_in_bf16: Count | None = Field(
        default=None, description="float8: first layers that stay in bf16; null: the recipe's own"
    )
    num_layers_at_end_in_bf16: Count | None = Field(
        default=None, description="float8: last layers that stay in bf16; null: the recipe's own"
    )
    fp8_param_gather: bool = Field(
        default=False,
        description="float8: keep weights in float8 too, and gather them so after each step",
    )
    emulate: bool = Field(
        default=False, description="float8 on the CPU: the recipe's own numbers, by casting"
    )

    @property
    def weights(self) -> Literal["bf16", "fp32"]:
        """The format in which weights are kept."""
        return "fp32" if self.recipe == "fp32" else "bf16"


BatchSizes = Annotated[
    tuple[Annotated[tuple[Amount, Positive], Strict(False)], ...],
    Strict(False),
    BeforeValidator(lambda value: () if value is None else value),
    Words("pairs of tokens and a global batch size, both at least 1, such as [[1e12, 1536]]"),
]


ClassNames = Annotated[
    tuple[Text, ...], Strict(False), Words("names such as [mypackage.mymodule:MyCallback]")
]

TaskNames = Annotated[
    tuple[Text, ...], Strict(False), Words("names of tasks such as [hellaswag, arc_easy]")
]

Options = Annotated[
    dict[Text, Any], AfterValidator(FrozenDict), Words("options by name such as {mask_token: 7}")
]

Ranks = Annotated[tuple[Count, ...], Strict(False), Words("ranks such as [0, 8]")]


class TrainingConfig(Section):
    """How long, in which steps, and what to do when one goes wrong."""

    micro_batch_size: Positive = Field(
        default=1, description="samples in one forward pass on one rank"
    )
    global_batch_size: Positive = Field(default=1, description="samples in one optimizer step")
    batch_size_schedule: BatchSizes = Field(
        default=(),
        description="other global batch sizes later in the run: pairs of the tokens from which, "
        "and the size",
    )
    train_iters: Amount | None = Field(
        default=None, description="length of the run in optimizer steps"
    )
    train_samples: Amount | None = Field(default=None, description="length of the run in samples")
    train_tokens: Amount | None = Field(default=None, description="length of the run in tokens")
    seed: int = Field(
        default=1234, ge=0, lt=2**32, description="seed of weights, dropout and data order"
    )
    eval_interval: Positive | None = Field(
        default=None, description="iterations between evaluations; null: none"
    )
    eval_iters: Positive = Field(default=10, description="global batches in one evaluation")
    eval_tasks: TaskNames = Field(
        default=(),
        description="tasks, groups and tags of lm-eval, by name, pattern or .yaml, that the model "
        "answers after each evaluation; what each came to is in metrics.jsonl",
    )
    eval_tasks_include_path: FilePath | None = Field(
        default=None, description="a folder of more tasks, whose Python is run"
    )
    eval_tasks_limit: Positive | None = Field(
        default=None, description="only so many documents of each task, its first; null: all"
    )
    eval_tasks_num_fewshot: Count | None = Field(
        default=None, description="examples before each question; null: as each task says"
    )
    log_interval: Positive = Field(default=1, description="iterations between log lines")
    exit_interval: Positive | None = Field(
        default=None, description="save and exit when the iteration divides by this; null: never"
    )
    exit_duration_in_mins: Duration | None = Field(
        default=None, description="save and exit after this many minutes; null: never"
    )
    hang_timeout_s: Duration | None = Field(
        default=1200,
        description="seconds without a step, evaluation or checkpoint after which every rank says "
        "where it is and the run ends; null: never",
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        default=None, description="activations to compute again in the backward pass; null: none"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        default=None,
        description="full recomputation: every layer in groups, or the first layers only",
    )
    recompute_num_layers: Positive | None = Field(
        default=None,
        description="full recomputation: layers in a group (uniform) or in all (block)",
    )
    recompute_modules: RecomputedModules = Field(
        default=(),
        description="selective recomputation: parts of layers; []: the core of attention",
    )
    profile: bool = Field(
        default=False,
        description="record some steps: a trace and a table of time by layer kind in "
        "run_dir/profile",
    )
    profile_step_start: Count = Field(
        default=10, description="steps that are done when recording begins"
    )
    profile_step_end: Positive = Field(default=12, description="steps that are done when it ends")
    profile_ranks: Ranks = Field(default=(0,), description="ranks that are recorded")
    objective: Text = Field(
        default="pretraining",
        description="what a step minimises: pretraining, sft, distillation, sft_distillation, "
        "masked_diffusion, or your own as package.module:Class",
    )
    objective_options: Options = Field(
        default=FrozenDict(), description="the objective's own fields, if it has any"
    )
    callbacks: ClassNames = Field(
        default=(),
        description="your own callbacks, as package.module:Class: what they do around steps, "
        "evaluations and checkpoints",
    )
    nonfinite_action: Literal["stop", "skip"] = Field(
        default="stop", description="what to do at a NaN or Inf in the loss or the gradients"
    )
    loss_spike_factor: Finite | None = Field(
        default=None,
        gt=1,
        description="a loss this many times the recent mean is a spike; null: unwatched",
    )
    loss_spike_action: Literal["stop", "skip"] = Field(
        default="stop", description="what to do at a loss spike"
    )


class OptimizerConfig(Section):
    """AdamW and the learning rate over time."""

    lr: PositiveReal = Field(description="peak learning rate")
    min_lr: Real = Field(default=0.0, description="learning rate at the end of the decay")
    lr_decay_style: Literal["cosine", "WSD", "constant", "linear"] = Field(
        default="cosine", description="shape of the schedule after the warm-up"
    )
    lr_warmup_samples: Amount | None = Field(
        default=None, description="length of the warm-up in samples"
    )
    lr_warmup_tokens: Amount | None = Field(
        default=None, description="length of the warm-up in tokens"
    )
    lr_warmup_fraction: float | None = Field(
        default=None, ge=0, lt=1, description="length of the warm-up as a fraction of the decay's"
    )
    lr_decay_samples: Amount | None = Field(
        default=None, description="samples at which min_lr is reached; null: the whole run"
    )
    lr_decay_tokens: Amount | None = Field(
        default=None, description="tokens at which min_lr is reached; null: the whole run"
    )
    lr_wsd_decay_samples: Amount | None = Field(
        default=None, description="WSD: length of the final decay in samples"
    )
    lr_wsd_decay_tokens: Amount | None = Field(
        default=None, description="WSD: length of the final decay in tokens"
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        default="exponential", description="WSD: shape of the final decay"
    )
    restart_schedule: bool = Field(
        default=False,
        description="where checkpoint.load or upcycling.from is taken up, the schedule begins anew "
        "and the optimizer is fresh; data and counters go on",
    )
    weight_decay: Real = Field(default=0.1, description="decoupled weight decay")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the second moment")
    adam_eps: PositiveReal = Field(
        default=1e-8, description="added to the root of the second moment"
    )
    clip_grad: Real = Field(default=1.0, description="largest gradient norm; 0: no clipping")


class CheckpointConfig(Section):
    """What is saved and what the run starts from."""

    save: FilePath | None = Field(
        default=None, description="folder of the checkpoints; null: run_dir/checkpoints"
    )
    load: FilePath | None = Field(
        default=None, description="folder of the checkpoints to start from"
    )
    save_interval: Positive | None = Field(
        default=None, description="iterations between checkpoints; null: only at the end"
    )
    async_save: bool = Field(default=False, description="write checkpoints while training goes on")
    keep_last: Positive | None = Field(default=None, description="checkpoints to keep; null: all")
    finetune: bool = Field(
        default=False, description="load weights only: fresh optimizer, counters and data"
    )
    load_optim: bool = Field(default=True, description="load the optimizer's state")
    load_rng: bool = Field(default=True, description="load the random number generators' state")
    verify_integrity: bool = Field(
        default=True,
        description="rank 0 writes SHA-256 sums of all files when saving, and checks when loading",
    )


class LoggingConfig(Section):
    """What is recorded beside the console and metrics.jsonl."""

    tensorboard: bool = Field(
        default=True, description="write TensorBoard events to run_dir/tensorboard"
    )
    log_params_norm: bool = Field(default=False, description="log the norm of all parameters")
    float8_interval: Positive | None = Field(
        default=10,
        description="emulated float8: iterations between records of how each linear's operands "
        "fit the format; null: none",
    )
    expert_load_interval: Positive | None = Field(
        default=10,
        description="MoE: iterations between records of each expert's share of tokens; null: none",
    )
    wandb_project: Text | None = Field(
        default=None, description="project of Weights & Biases that gets the metrics; null: none"
    )
    wandb_entity: Text | None = Field(
        default=None, description="user or team of the project; null: the account's own"
    )
    wandb_exp_name: Text | None = Field(
        default=None, description="the run's name there; null: that of run_dir"
    )
    wandb_save_dir: FilePath | None = Field(
        default=None, description="folder for wandb's own files; null: run_dir"
    )
    mlflow_experiment: Text | None = Field(
        default=None, description="experiment of MLflow that gets the metrics; null: none"
    )
    mlflow_run_name: Text | None = Field(
        default=None, description="the run's name there; null: that of run_dir"
    )
    mlflow_tracking_uri: Text | None = Field(
        default=None,
        description="MLflow's server, database or folder; null: MLFLOW_TRACKING_URI, or "
        "run_dir/mlruns",
    )


class _Upcycling(Section):
    router_std: Real | None = Field(
        default=None,
        description="standard deviation of the router's weights, drawn once for all experts that "
        "are cut from one copy of an MLP; null: model.init_method_std",
    )
    router_noise: Real = Field(
        default=0.0,
        description="standard deviation of what is added to the router's weights of each expert",
    )
    reinit_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of each expert's channels that is drawn anew"
    )
    scale_weights: bool = Field(
        default=True,
        description="multiply the experts' weights so that a layer's output stays as large as the "
        "MLP's",
    )

    @property
    def source(self) -> Path | None:
        """The field `from`: a folder of checkpoints of the dense run; None: nothing is upcycled."""
        found: Path | None = getattr(self, "from")
        return found


if TYPE_CHECKING:
    UpcyclingConfig = _Upcycling
else:
    # `from` is a word of Python's, which the body of a class cannot have as a name.
    UpcyclingConfig = create_model(
        "UpcyclingConfig",
        __base__=_Upcycling,
        __doc__="Start from a dense checkpoint: its MLPs become the experts of this model.",
        **{
            "from": (
                FilePath | None,
                Field(
                    default=None,
                    description="folder of a dense run's checkpoints, whose '-' layers become this "
                    "model's 'E' layers; null: no upcycling",
                ),
            )
        },
    )
