"""Warnings of the engine that no user can act on, dropped by their text; all others stay."""

import logging
import warnings

# Text that the warning starts with (a regular expression) and where it comes from.
IGNORED_WARNINGS = (
    r"(Transformer Engine|Apex)",  # import: ... not installed; the backend is chosen, and said
    r"full scope is deprecated",  # TransformerConfig: CUDA graphs, which are off
    r"MimoModelConfig is experimental",  # import: a model that nobody here uses
    r"window_size should be",  # generating with Transformer Engine: the engine's, and put right
    r"Relying on pointer-based detection of packed",  # Transformer Engine: of the engine's calls
    r"The next bucket's parameter all-gather",  # Mamba's fp32 parameters, a buffer out of turn
    r"When using (async grad allreduce|sequence parallelism)",  # a CUDA environment variable
    r"`sequence_parallel` is set to `True`, but",  # experts, which one tensor rank holds whole
    r"The \.grad attribute of a Tensor that is not a leaf",  # optimizer: it looks, and knows
    r"`torch\.distributed\.\w+` is deprecated",  # the engine's calls, older than this torch
    r"torch\.distributed is disabled, unavailable or uninitialized",  # loading: on purpose
    r"The argument order of load has been changed",  # loading: torch calling itself
    r"Please use DTensor instead",  # loading: the engine's own tensors are ShardedTensors
)

# The start of a log record's text, by logger.
IGNORED_RECORDS = {
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


class _DropStartingWith(logging.Filter):
    """Lets through all records but those whose text starts so."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def silence() -> None:
    """Ignore the warnings and log records listed above, in this process."""
    silence_warnings()
    for name, start in IGNORED_RECORDS.items():
        logging.getLogger(name).addFilter(_DropStartingWith(start))


def silence_warnings() -> None:
    """Ignore the warnings listed above, whatever modules have asked for since the last call."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
