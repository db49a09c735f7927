"""Whether a config goes on with the samples that a checkpoint has counted."""

from pathlib import Path

from megatron_hybrid.checkpoint.saved_config import (
    refuse_other_data,
    refuse_other_files,
    refuse_other_passes,
)
from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.datasets import other_passes
from megatron_hybrid.data.saved_files import file_digests, read_saved_files
from megatron_hybrid.data.shard import open_shard


def refuse_other_samples(
    folder: Path, config: RunConfig, saved: RunConfig, *, has_plan: bool
) -> None:
    """Refuse data, or an order of them, in which sample N is not the one that was counted as N.

    Args:
        folder: the checkpoint.
        saved: its config.
        has_plan: a plan travels in it, which itself judges what is edited.

    Raises:
        UserError: with what differs.
    """
    refuse_other_data(folder, config, saved, has_plan=has_plan)
    if config.data.sample_order == "megatron" and not config.data.mock_data:
        refuse_other_passes(folder, config, saved, other_passes(config, saved))
        shards = [open_shard(Path(prefix)) for _, prefix in config.data.data_path]
        refuse_other_files(folder, file_digests(shards), read_saved_files(folder))
