"""A very small run of four phases over three sources, with two sequence lengths."""

from pathlib import Path

import numpy as np

from tests.data.conftest import write_corpus
from tests.training.runs import VOCAB_SIZE, words

TOKENS = 6000  # of a source
# In tokens: 8 steps of 4 samples, then 12, then 4 steps of twice as long samples, twice.
PHASES = (
    "[{name: broad, weights: {web: 5, code: 3, math: 2}},"
    " {name: code, start_tokens: 1100, weights: {web: 1, code: 2}},"
    " {name: long, start_tokens: 2600, weights: {web: 1, code: 1, math: 1}, seq_length: 64},"
    " {name: end, last_tokens: 1000, weights: {math: 1}, seq_length: 64}]"
)
STEPS = 8 + 12 + 4 + 4
TRAIN_TOKENS = 2560 + (4 + 4) * 256


def corpus(prefix: Path, seed: int) -> str:
    """Random documents of up to 60 tokens, in which no two windows are alike."""
    draws, documents = np.random.default_rng(seed), []
    while sum(map(len, documents)) < TOKENS:
        document = draws.integers(0, VOCAB_SIZE - 1, size=draws.integers(1, 60)).tolist()
        documents.append([*document, VOCAB_SIZE - 1])
    return write_corpus(prefix, documents, VOCAB_SIZE)


def corpora(folder: Path, *names: str) -> str:
    """Write sources, each with tokens of its own; gives the text of `data.sources`."""
    paths = {name: corpus(folder / name, sum(map(ord, name))) for name in names}
    return "{" + ", ".join(f"{name}: {{path: {path}}}" for name, path in paths.items()) + "}"


def phased_words(run_dir: Path, sources: str, *more: str) -> list[str]:
    """The command line of the run, with `more` on top."""
    return words(
        run_dir, "data.mock_data=false", f"data.sources={sources}", f"data.phases={PHASES}",
        "data.split=80,20,0", "training.train_iters=null",
        f"training.train_tokens={TRAIN_TOKENS}", "optimizer.lr_decay_style=cosine",
        "optimizer.lr_warmup_fraction=0.1", *more,
    )  # fmt: skip
