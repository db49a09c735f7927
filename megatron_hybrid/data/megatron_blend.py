"""What megatron-core's GPTDataset order goes by, worked out from files alone, without the engine.

The order of a source's samples depends on how many of them a run may draw: in passes over its
documents that are shuffled together, the last one apart where little of it is needed.
"""

import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import IndexedFile, open_indexed

logger = logging.getLogger(__name__)

_SPLITS = ("train", "valid")
# Of the samples of a pass: the engine shuffles the last one apart where it needs fewer.
_LAST_PASS_APART = 0.80


@dataclass(frozen=True)
class MegatronBlend:
    """Sources, their weights (summing to 1) and what each split draws.

    Attributes:
        bounds: for each split, where its share of a source's documents begins and ends, in [0, 1].
        sizes: for each split, samples to draw; 0: the split is not built.
    """

    sources: list[IndexedFile]
    weights: list[float]
    bounds: list[tuple[float, float]]
    sizes: tuple[int, int]

    @classmethod
    def open(cls, config: RunConfig, sizes: tuple[int, int]) -> "MegatronBlend":
        """Open the sources of a run.

        Raises:
            DataError: a file is missing or damaged, or the config names none.
        """
        if not config.data.data_path:
            raise DataError("data.data_path is empty; name token files or set data.mock_data=true")
        total = sum(weight for weight, _ in config.data.data_path)
        weights = [weight / total for weight, _ in config.data.data_path]
        sources = [open_indexed(Path(prefix)) for _, prefix in config.data.data_path]
        shares = parse_split(config.data.split)
        ends = np.cumsum(shares).tolist()
        bounds = list(zip([0.0, *ends[:-1]], ends, strict=True))
        return cls(sources, weights, bounds[: len(_SPLITS)], sizes)

    def check_documents(self, config: RunConfig) -> None:
        """Refuse a split without text of some source, which the engine would wait for for ever.

        Raises:
            DataError: with every source and split.
        """
        problems = []
        for split, bounds, size in zip(_SPLITS, self.bounds, self.sizes, strict=True):
            for source, weight in zip(self.sources, self.weights, strict=True):
                documents = _documents_between(source.document_lengths, bounds)
                tokens = int(documents.sum(dtype=np.int64))
                if size and not tokens:
                    problems.append(
                        f"data.split={config.data.split} leaves nothing for {split} of the "
                        f"{len(source.document_lengths)} documents of {source.prefix}"
                    )
                elif size:
                    epochs = size * weight * config.data.seq_length / tokens
                    logger.log(
                        logging.WARNING if split == "valid" and epochs > 1 else logging.INFO,
                        "%s: %d samples of %s, %.2f epochs of its %d tokens",
                        *(split, round(size * weight), source.prefix, epochs, tokens),
                    )
        if problems:
            raise DataError("\n".join(problems))

    def surplus(self) -> float:
        """How much more than its share the engine must index of each source.

        It rounds each source's share up, so that the blend is up to one sample a source too long,
        and its greedy choice runs ahead of a weight by less than two samples.
        """
        extra = [
            (weight * len(self.sources) + 2) / math.ceil(size * weight)
            for size in self.sizes
            if size
            for weight in self.weights
        ]
        return max(0.005, *extra)

    def passes(self, seq_length: int) -> list[tuple[int, bool]]:
        """For each source, over how many passes its training samples are shuffled, and whether the
        last one is apart. Runs that differ in their length alone begin with the same samples where
        these are equal; GPTDataset's `_build_document_sample_shuffle_indices` goes by them.
        """
        found = []
        for source, weight in zip(self.sources, self.weights, strict=True):
            samples = self.sizes[0]
            if len(self.sources) > 1:
                samples = math.ceil(math.ceil(samples * weight) * (1 + self.surplus()))
            documents = _documents_between(source.document_lengths, self.bounds[0])
            tokens = max(int(documents.sum(dtype=np.int64)), 1)
            passes = -(-(samples * seq_length + 1) // tokens)
            left = samples - ((passes - 1) * tokens - 1) // seq_length
            whole = (tokens - 1) // seq_length
            found.append((passes, passes > 1 and left < int(_LAST_PASS_APART * whole)))
        return found

    def key(self, config: RunConfig) -> str:
        """Names everything that decides the index files, the contents of the sources included."""
        facts = {
            "sources": [[str(source.prefix), source.index_sha256] for source in self.sources],
            "weights": self.weights,
            "bounds": self.bounds,
            "sizes": self.sizes,
            "seq_length": config.data.seq_length,
            "seed": config.training.seed,
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def parse_split(split: str) -> list[float]:
    """Shares of train, validation and test, summing to 1."""
    parts = [part.strip() for part in split.split(",")]
    number = re.compile(r"\d+(\.\d*)?|\.\d+")
    if len(parts) > 3 or not all(number.fullmatch(part) for part in parts):
        raise DataError(
            f"data.split={split} must be up to three numbers >= 0 for train, validation and test, "
            "such as 969,30,1"
        )
    shares = [float(part) for part in parts] + [0.0] * (3 - len(parts))
    if not shares[0]:
        raise DataError(f"data.split={split} leaves nothing to train on")
    return [share / sum(shares) for share in shares]


def _documents_between(
    document_lengths: NDArray[np.int32], bounds: tuple[float, float]
) -> NDArray[np.int32]:
    """The documents that the engine, rounding so, gives to a split."""
    begin, end = (round(bound * len(document_lengths)) for bound in bounds)
    return document_lengths[begin:end]
