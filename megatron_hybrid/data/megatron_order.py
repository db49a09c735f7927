"""Samples in megatron-core's GPTDataset order: `data.sample_order=megatron`, for parity with its
runs.

The train split holds exactly the samples of the run. The test share of `data.split` is kept out of
training and validation. Rank 0 builds the engine's index files, the others wait and then read them.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_hybrid import platform
from megatron_hybrid.claim import CLAIM_FILE, ClaimedError, claimed
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.index import Index
from megatron_hybrid.data.megatron_blend import MegatronBlend
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.windows import Windows
from megatron_hybrid.fileio import write_atomic

logger = logging.getLogger(__name__)

_COMPLETE_MARK = "complete"
_LOOK_S = 1.0  # between looks for the indices that another run builds


def build_windows(
    config: RunConfig, tokenizer: Tokenizer, sizes: tuple[int, int]
) -> tuple[Windows, Windows | None]:
    """The training and validation windows of a run; all ranks must call this together.

    Args:
        config: `data`, and `run_dir` for the index files.
        tokenizer: the one the files were made with.
        sizes: samples to train and to validate on; 0 of these: none.

    Raises:
        DataError: a file is missing or damaged, or a source has nothing for a split.
    """
    blend = MegatronBlend.open(config, sizes)
    blend.check_documents(config)
    train, valid = (
        _EngineWindows(dataset, size, tokenizer) if dataset is not None else None
        for dataset, size in zip(_build_with_engine(config, tokenizer, blend), sizes, strict=True)
    )
    assert train is not None
    return train, valid


def _build_with_engine(config: RunConfig, tokenizer: Tokenizer, blend: MegatronBlend) -> list[Any]:
    """megatron-core's dataset of each split, or None where empty."""
    platform.initialize()
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError as error:
        raise DataError(
            "megatron-core's compiled dataset helpers (megatron.core.datasets.helpers_cpp) cannot "
            f"be loaded: {error}; install megatron-core from its wheel, or run make in its "
            "megatron/core/datasets folder"
        ) from error
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefixes = [str(source.prefix) for source in blend.sources]
    cache = _cache_folder(config, blend)
    engine_config = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.data.seq_length,
        # The engine takes the only source as it is when it has no weight.
        blend=(prefixes, blend.weights if len(prefixes) > 1 else None),
        split=config.data.split,
        path_to_cache=str(cache),
        tokenizer=_EngineTokenizer(tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint),
        mid_level_dataset_surplus=blend.surplus(),
        # Masks and positions are the loader's: the engine's masks are dense.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # Documents stay in their split whether it is drawn from or not.
    drawn = [
        bounds if size else None for bounds, size in zip(blend.bounds, blend.sizes, strict=True)
    ]
    engine_config.split_matrix = [*drawn, None]
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [*blend.sizes, 0], lambda: True, engine_config
    )
    with _writing(cache):
        try:
            train, valid, _ = builder.build()
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename} is missing though rank 0 wrote it: data.data_cache_path="
                f"{cache.parent} must be on storage that all nodes share"
            ) from error
    return [train, valid]


def _cache_folder(config: RunConfig, blend: MegatronBlend) -> Path:
    """The folder of this blend's index files.

    The engine names index files after the paths of the sources, and takes what it finds; a folder
    named after their contents keeps it from using the indices of data that was made anew.
    """
    base = config.data.data_cache_path or config.run_dir / "data_cache"
    return base / blend.key(config)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """While index files are built: no other run does it, and none of a killed one are taken.

    A run that finds another at it waits for that one's: they are the same.
    """
    mark = folder / _COMPLETE_MARK
    claim = folder.with_name(f".{folder.name}{CLAIM_FILE}")
    with ExitStack() as stack:
        while mine := _is_first_rank() and not mark.exists():
            try:
                stack.enter_context(claimed([claim], "a run that builds indices"))
            except ClaimedError as error:
                logger.info("%s; waiting for it", error)
                time.sleep(_LOOK_S)
            else:
                break
        if mine and not mark.exists():
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
        yield
        if mine:
            write_atomic(mark, "")


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


@dataclass(frozen=True)
class _EngineTokenizer:
    """The little that GPTDataset wants to know of a tokenizer; without a pad token, none is."""

    vocab_size: int
    eod: int
    fingerprint: str

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}


class _EngineWindows:
    """The first `size` samples of one of megatron-core's datasets, as windows."""

    conversations = False

    def __init__(self, dataset: Any, size: int, tokenizer: Tokenizer) -> None:
        assert len(dataset) >= size
        self.eod = tokenizer.eod
        self.vocab_size = tokenizer.vocab_size
        self._dataset = dataset
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.stack([self._window(index) for index in indices])

    def learnt(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        raise NotImplementedError

    def document_ends(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        """By the engine, which puts documents together; see `Windows`."""
        rows = []
        for source, index in map(self._source, indices):
            ids, _, lengths = source._query_document_sample_shuffle_indices(index)
            rows.append(np.zeros(len(ids), dtype=np.bool_))
            # What the last part belongs to may go on; its last token is a label only.
            rows[-1][np.cumsum(lengths[:-1], dtype=np.int64) - 1] = True
        return np.stack(rows)

    def describe(self, index: int, token: int) -> str:
        """Where a window's token comes from: file, document, and byte."""
        source, index = self._source(index)
        _, documents, lengths = source._query_document_sample_shuffle_indices(index)
        part = int(np.searchsorted(np.cumsum(lengths), token, side="right"))
        place = token - sum(lengths[:part])
        if part == 0:
            place += int(source.sample_index[source.shuffle_index[index]][1])
        shard = Index(Path(source.dataset.path_prefix))
        begin = shard.place(int(documents[part]))[0] // shard.dtype.itemsize
        return shard.describe(begin + place)

    def _window(self, index: int) -> NDArray[np.int64]:
        # Not `dataset[index]`, which makes every id of -1, its mark of padding, a 0.
        source, index = self._source(index)
        ids: NDArray[np.int64] = source._query_document_sample_shuffle_indices(index)[0]
        return ids

    def _source(self, index: int) -> tuple[Any, int]:
        """The engine's dataset of the source that a window is of, and the window's number there."""
        if not hasattr(self._dataset, "datasets"):  # no blend
            return self._dataset, index
        number = self._dataset.dataset_index[index]
        return self._dataset.datasets[number], int(self._dataset.dataset_sample_index[index])
