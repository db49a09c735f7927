"""The checkpoints that `convert.py` and `upcycle.py` read: billions of random parameters.

python benchmarks/convert_checkpoint.py FOLDER --gigabytes 4
"""

import argparse
from pathlib import Path

from megatron_hybrid.config import RunConfig, build_config

VOCAB_SIZE = 65536
BLOCK = "M-M*-ME"  # about 230 million parameters
GIGABYTES_A_BLOCK, GIGABYTES_OF_EMBEDDINGS = 0.47, 0.54


def model_config(gigabytes: float) -> RunConfig:
    """A bf16 model whose weights take about so many GB (10^9 bytes): as many blocks as fit."""
    blocks = max(1, round((gigabytes - GIGABYTES_OF_EMBEDDINGS) / GIGABYTES_A_BLOCK))
    return build_config(
        {
            "model": {
                "hybrid_layer_pattern": BLOCK * blocks,
                "hidden_size": 2048,
                "ffn_hidden_size": 8192,
                "num_attention_heads": 32,
                "num_query_groups": 8,
                "kv_channels": 64,
                "mamba_num_heads": 64,
                "mamba_head_dim": 64,
                "mamba_state_dim": 128,
                "mamba_num_groups": 8,
                "vocab_size": VOCAB_SIZE,
                "num_moe_experts": 16,
                "moe_ffn_hidden_size": 1024,
                "moe_shared_expert_intermediate_size": 1024,
                "moe_router_score_function": "sigmoid",
                "moe_router_enable_expert_bias": True,
            },
            "precision": {"recipe": "bf16"},
            "data": {"mock_data": True, "tokenizer_type": "null"},
            "training": {"train_iters": 1},
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
        },
        world_size=1,
        has_cuda=False,
    )


def make_checkpoint(save: Path, config: RunConfig) -> Path:
    """Write a checkpoint of the drawn weights, without an optimizer's states; its folder."""
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from megatron_hybrid.checkpoint import files
    from megatron_hybrid.checkpoint.integrity import write_integrity
    from megatron_hybrid.checkpoint.threads import default_threads
    from megatron_hybrid.config.tracker import CONFIG_FILE
    from megatron_hybrid.data.tokenizer import NullTokenizer
    from megatron_hybrid.fileio import write_atomic
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import process_groups

    platform, iteration = initialize(), 1
    files.start_partial(save, iteration)
    partial = files.partial_folder(save, iteration)
    with process_groups(config, platform, alone=True):
        engine_config = transformer_config(config, "torch", platform.device)
        (model,) = unwrap_model(build_model_chunks(config, engine_config, "torch"))
        state = {"iteration": iteration, "model": model.sharded_state_dict()}
        dist_checkpointing.save(state, str(partial))
    write_atomic(partial / CONFIG_FILE, config.to_yaml())
    assert config.model.vocab_size is not None
    NullTokenizer(config.model.vocab_size).save_copy(partial)
    write_integrity(partial, default_threads())
    files.put_in_place(save, iteration)
    return files.iteration_folder(save, iteration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    args = parser.parse_args()
    print(make_checkpoint(args.folder, model_config(args.gigabytes)))


if __name__ == "__main__":
    main()
