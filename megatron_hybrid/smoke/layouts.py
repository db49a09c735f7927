"""The model, the steps and the layouts of the smoke test, as words for `pretrain`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.errors import UserError

STEPS, FIRST_SAVED, SECOND_SAVED = 6, 2, 4
ONE_RANK = "one rank"
# The smallest that has every kind of layer, so that starting the processes is most of the time.
MODEL = (
    "model.hidden_size=64", "model.ffn_hidden_size=128", "model.mamba_head_dim=16",
    "model.mamba_state_dim=16", "model.moe_ffn_hidden_size=32",
    "model.moe_shared_expert_intermediate_size=32", "model.vocab_size=128",
    "data.mock_data=true", "data.tokenizer_type=null", "data.seq_length=64", "data.num_workers=0",
    "training.micro_batch_size=1", "training.eval_interval=null", "logging.tensorboard=false",
    f"training.train_iters={STEPS}", f"checkpoint.save_interval={FIRST_SAVED}",
    "checkpoint.keep_last=null", "optimizer.lr_warmup_fraction=0",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the ranks divide the model; what the sizes leave over is data parallel."""

    name: str
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        """The number of ranks must be a multiple of this."""
        return max(self.tensor * self.pipeline * self.context, self.expert)

    def words(self) -> list[str]:
        """Its fields, as `pretrain` reads them."""
        return [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            # MoE layers ask for it.
            f"parallel.sequence_parallel={str(self.tensor > 1).lower()}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            f"parallel.context_parallel_size={self.context}",
            f"parallel.expert_model_parallel_size={self.expert}",
        ]


LAYOUTS = (
    Layout("TP2", tensor=2),
    Layout("PP2", pipeline=2),
    Layout("CP2", context=2),
    Layout("EP2", expert=2),
    Layout("DP"),
    Layout("TP2xPP2", tensor=2, pipeline=2),
)


def choose_layouts(world_size: int, names: Sequence[str] | None) -> list[Layout]:
    """The layouts that are asked for; without names all that fit.

    Raises:
        UserError: a name is unknown, or its layout does not fit the ranks.
    """
    fitting = [each for each in LAYOUTS if world_size > 1 and world_size % each.ranks == 0]
    if names is None:
        return fitting
    by_name = {each.name: each for each in fitting}
    if wrong := [name for name in names if name not in by_name]:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise UserError(
            f"--layouts={','.join(names)}: {', '.join(wrong)} cannot run on {ranks}; "
            f"allowed: {', '.join(by_name) or 'none, the one-rank run is always there'}"
        )
    return [by_name[name] for name in names]


def pretrain_words(run_dir: Path, layout: Layout, world_size: int, has_gpu: bool) -> list[str]:
    """The command line of one run after `pretrain`.

    Args:
        world_size: of the whole test, which decides the size of the batch, also of one rank's run.
    """
    batch = world_size * -(-4 // world_size)
    recipe = "bf16" if has_gpu else "fp32"
    return [
        "tiny", *MODEL, *layout.words(), f"training.global_batch_size={batch}",
        f"precision.recipe={recipe}", f"run_dir={run_dir}",
    ]  # fmt: skip
