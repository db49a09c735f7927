"""`megatron-hybrid pretrain` on one rank: from a config to a finished run."""

import time

from megatron_hybrid.config import RunConfig, validate
from megatron_hybrid.data.tokenizer import build_tokenizer
from megatron_hybrid.platform import initialize
from megatron_hybrid.platform.backend import resolve_backend
from megatron_hybrid.training.distributed import (
    is_rank_zero,
    launched_world_size,
    process_groups,
    select_device,
)


def pretrain(config: RunConfig) -> str:
    """Run the config on this rank; every rank of the launcher calls it.

    Args:
        config: as `load_config` returns it.

    Returns:
        Why the run ended: "finished", or what ended it early.

    Raises:
        UserError: the config does not fit these ranks, or a file is missing or damaged.
    """
    started = time.monotonic()
    select_device()
    platform = initialize()
    backend = resolve_backend(config.backend)
    validate(config, world_size=launched_world_size(), has_cuda=platform.has_cuda)
    tokenizer = build_tokenizer(
        config.data.tokenizer_type, config.data.tokenizer_model, vocab_size=config.model.vocab_size
    )
    config = config.with_vocab_size(tokenizer.vocab_size)
    if is_rank_zero():
        print(f"{launched_world_size()} ranks on {platform.device}, backend {backend}", flush=True)
    with process_groups(config, platform):
        from megatron_hybrid.training.trainer import Trainer

        return Trainer(config, platform, backend, tokenizer, started).run()
