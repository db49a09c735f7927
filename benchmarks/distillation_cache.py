"""The cached teacher's part of `distillation.py`: a step from kept answers, and how fast they are
read; and what both parts build and how they time. Run it there."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from megatron_hybrid.config import RunConfig
    from megatron_hybrid.training.step import Stepper

SAMPLES = 4  # of a step


def write_text(prefix: Path, tokens: int, vocabulary: int) -> None:
    """An indexed file of random ids, one document."""
    from megatron_hybrid.data.indexed import IndexedFileWriter, token_dtype

    ids = np.random.default_rng(0).integers(0, vocabulary, tokens).astype(token_dtype(vocabulary))
    writer = IndexedFileWriter(prefix, vocabulary)
    writer.add_documents(ids.tobytes(), np.array([tokens], dtype=np.int32))
    writer.finish()
    writer.publish()


def medians(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of sides that take turns; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in found.items()}


def train_once(config: "RunConfig") -> None:
    """A run of a config on made-up tokens, by whose checkpoint another one can be taught."""
    from megatron_hybrid.data.tokenizer import build_tokenizer
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups
    from megatron_hybrid.training.start import find_start
    from megatron_hybrid.training.trainer import Trainer

    platform = initialize()
    tokenizer = build_tokenizer("null", None, vocab_size=config.model.vocab_size)
    with model_parallel_groups(config, platform):
        start = find_start(config, tokenizer, 1)
        Trainer(config, platform, "torch", tokenizer, start, time.monotonic()).run()


def build_stepper(config: "RunConfig", sources: Sequence[str] = ()) -> "Stepper":
    """Model, optimizer and objective of a config, in its process groups."""
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_hybrid.training.step import Stepper

    device = initialize().device
    engine_config = transformer_config(config, "torch", device)
    chunks = build_model_chunks(config, engine_config, "torch")
    model = wrap_data_parallel(config, engine_config, chunks)
    optimizer = build_optimizer(config, engine_config, model)
    return Stepper(config, model, optimizer, "torch", device, sources)


def compare_cached(
    folder: Path, teacher: Sequence[str], student: Sequence[str], rounds: int, threads: int
) -> dict[str, float]:
    """On a rank: seconds of a step of pre-training and of one from cached top-64 logits, each on
    its next samples; and of reading as many samples of the data, and of their answers."""
    from megatron_hybrid.config import load_config
    from megatron_hybrid.data.datasets import RunData, open_windows
    from megatron_hybrid.data.loader import Replica, build_iterator, read_batch
    from megatron_hybrid.data.tokenizer import build_tokenizer
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.teachers.cache_open import Asked, open_caching
    from megatron_hybrid.teachers.cache_write import work
    from megatron_hybrid.teachers.cached import CacheReader
    from megatron_hybrid.training.distributed import model_parallel_groups
    from megatron_hybrid.training.start import find_start
    from megatron_hybrid.training.step import BatchShape

    torch.set_num_threads(threads)
    platform, answers, config = initialize(), folder / "answers", load_config(teacher)
    words, length = config.model.vocab_size, config.data.seq_length
    assert words is not None
    steps = rounds + 1
    write_text(folder / "text", (steps + 1) * SAMPLES * length * 2, words)
    tokenizer = build_tokenizer("null", None, vocab_size=words)
    train_once(config)
    line = [
        *student, "data.mock_data=false", f"data.data_path={folder / 'text'}", "data.split=1,0,0",
        f"training.train_iters={steps}", f"training.global_batch_size={SAMPLES}",
        "training.eval_interval=null",
    ]  # fmt: skip
    opened = open_caching(line, Asked(config.run_dir, answers, dtype="bf16"), 1)
    with model_parallel_groups(opened.config, platform):
        work(opened, "torch", platform.device)
    options = f"training.objective_options.cache={answers}"
    plain, learner = (
        load_config(line),
        load_config([*line, "training.objective=distillation", options]),
    )

    with model_parallel_groups(plain, platform):

        def stepper(config: "RunConfig", data: RunData) -> Callable[[], object]:
            made = build_stepper(config, data.source_names)
            windows, _ = open_windows(config, tokenizer, data)
            batches = build_iterator(
                windows, data.steps, config, consumed_samples=0, replica=Replica()
            )
            assert data.plan is not None
            plan = data.plan
            located = (data.located(plan, batch) for batch in batches)
            shape = BatchShape(SAMPLES, length)
            return lambda: made.train(located, shape, float("inf"), [])

        data = find_start(learner, tokenizer, 1).data
        windows, _ = open_windows(plain, tokenizer, data)
        reader, samples = CacheReader(opened.cache), range(SAMPLES)
        return medians(
            {
                "pre-training": stepper(plain, data),
                "cached": stepper(learner, data),
                "fetch": lambda: [read_batch(windows, [each], plain) for each in samples],
                "read": lambda: [reader.read(each) for each in samples],
            },
            rounds,
        )
