"""The half of a preflight that needs no ranks: config, tokenizer, data, checkpoint, disk."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.config.notes import notes
from megatron_hybrid.config.phases import sources
from megatron_hybrid.config.token_files import prefixes
from megatron_hybrid.data.facts import facts_path
from megatron_hybrid.data.indexed import indexed_paths
from megatron_hybrid.data.inspection.verify import Expected, verify
from megatron_hybrid.data.tokenizer import Tokenizer, build_tokenizer
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.preflight.checks import Check
from megatron_hybrid.training.named import NAMED
from megatron_hybrid.training.start import Start, open_run

# Of a checkpoint: weights, and the optimizer's fp32 weight and two moments, bytes a parameter.
CHECKPOINT_BYTES = {"bf16": 2 + 12, "fp32": 4 + 12}
_GIB = 2**30


def check_files(
    words: Sequence[str], world_size: int | None, hash_s: float, *, has_cuda: bool | None = None
) -> tuple[RunConfig | None, list[Check]]:
    """Look at everything that files tell; every problem of all of them.

    Args:
        words: as `pretrain` takes them.
        world_size: ranks of the run to be; None: not known.
        hash_s: for how long checksums of data may be compared; 0: not at all.
        has_cuda: whether the ranks have GPUs; None: not known.

    Returns:
        The config, None if it is wrong, and the checks.
    """
    try:
        which = (*rules.ALL, *NAMED)
        config = load_config(words, which=which, world_size=world_size, has_cuda=has_cuda)
    except ConfigError as error:
        rest = ("tokenizer", "data files", "plan and checkpoint", "disk space", "run folder")
        skipped = [Check(name, "not checked: the config is wrong", skipped=True) for name in rest]
        return None, [Check("config", "wrong", tuple(error.problems)), *skipped]
    unknown = "every rule holds but those about the number of ranks: --world-size tells it"
    known = f"every rule holds, for {world_size} ranks"
    found = unknown if world_size is None else known
    checks = [Check("config", found, notes=tuple(notes(config, world_size)))]
    tokenizer, named = _tokenizer(config)
    checks += [named, *_data(config, tokenizer, hash_s)]
    if tokenizer is None:
        checks.append(
            Check(
                "plan and checkpoint", "not checked: there is no tokenizer that fits", skipped=True
            )
        )
        checks.append(Check("disk space", "not checked: the model's size is open", skipped=True))
    else:
        start, named = _start(config, world_size)
        config = config.with_vocab_size(tokenizer.vocab_size)
        checks += [named, _disk(config, start)]
    checks.append(_folder(config.run_dir))
    return config, checks


def _tokenizer(config: RunConfig) -> tuple[Tokenizer | None, Check]:
    data = config.data
    try:
        tokenizer = build_tokenizer(
            data.tokenizer_type, data.tokenizer_model, vocab_size=config.model.vocab_size
        )
    except UserError as error:
        return None, Check("tokenizer", "cannot be used", (str(error),))
    problem = config.vocabulary_problem(tokenizer.vocab_size)
    if problem is not None:
        return None, Check("tokenizer", "does not fit the model", (problem,))
    return tokenizer, Check("tokenizer", f"{data.tokenizer_type}, {tokenizer.vocab_size:,} ids")


class _OutOfTimeError(Exception):
    """Raised through the reader of a file when its time is over."""


def _data(config: RunConfig, tokenizer: Tokenizer | None, hash_s: float) -> list[Check]:
    """Whether the files are there, and as far as time allows, whether they are unchanged."""
    if config.data.mock_data:
        return [Check("data files", "none: made-up tokens")]
    pairs = [
        Path(prefix) for source in sources(config).values() for each in _paths(source.path)
        for prefix in prefixes(each)
    ]  # fmt: skip
    files = [path for prefix in pairs for path in indexed_paths(prefix)]
    missing = tuple(f"{path} does not exist" for path in files if not path.is_file())
    size = sum(path.stat().st_size for path in files if path.is_file())
    without = [prefix for prefix in pairs if not facts_path(prefix).is_file()]
    there = Check("data files", f"{len(pairs)} pairs, {size / 1e9:.3f} GB", missing)
    if missing or not hash_s:
        why = "files are missing" if missing else "not asked for"
        return [there, Check("data checksums", f"not checked: {why}", skipped=True)]
    return [there, _checksums(pairs, without, tokenizer, size, hash_s)]


def _paths(path: str | Sequence[str]) -> list[str]:
    return [path] if isinstance(path, str) else list(path)


def _checksums(
    pairs: list[Path], without: list[Path], tokenizer: Tokenizer | None, size: int, hash_s: float
) -> Check:
    deadline, read, whole = time.monotonic() + hash_s, 0, 0
    problems: list[str] = []

    def on_bytes(count: int) -> None:
        nonlocal read
        read += count
        if time.monotonic() > deadline:
            raise _OutOfTimeError

    # Small ones first: the most pairs in the time there is.
    order = sorted(pairs, key=lambda prefix: indexed_paths(prefix)[0].stat().st_size)
    try:
        for prefix in order:
            problems += verify(prefix, Expected(tokenizer, None), on_bytes).problems
            whole += 1
    except _OutOfTimeError:
        pass
    found = f"{whole} of {len(pairs)} pairs ({read / 1e9:.3f} of {size / 1e9:.3f} GB) compared"
    if whole < len(pairs):
        found += f" in {hash_s:g} s; `data verify` reads all"
    if without:
        found += f"; {len(without)} have no checksums (.meta.json)"
    return Check("data checksums", found, tuple(problems))


def _start(config: RunConfig, world_size: int | None) -> tuple[Start | None, Check]:
    try:
        _, _, start = open_run(config, world_size)
    except UserError as error:
        return None, Check("plan and checkpoint", "cannot be used", (str(error),))
    folder = start.origin.folder
    begins = "starts from nothing" if folder is None else f"goes on from {folder}"
    found = f"{begins}; {start.data.steps.samples:,} samples in all"
    return start, Check("plan and checkpoint", found)


def _most_checkpoints(config: RunConfig, start: Start | None) -> tuple[int, str]:
    """How many checkpoints there must be room for at once, and why; at least one is written."""
    keep_last, interval = config.checkpoint.keep_last, config.checkpoint.save_interval
    if keep_last is not None:
        return keep_last + 1, f"checkpoint.keep_last={keep_last} and the one that is written"
    why = f"checkpoint.keep_last=null keeps all, checkpoint.save_interval={interval or 'null'}"
    if interval is None or start is None or start.consumed_samples is None:
        return 1, why
    steps = start.data.steps.steps_from(start.consumed_samples)
    return max(1, -(-steps // interval)), why


def _disk(config: RunConfig, start: Start | None) -> Check:
    """Room for the checkpoints that are kept and the one that is being written.

    Args:
        start: None: it could not be found.
    """
    save = config.checkpoint.save
    assert save is not None
    one = count_parameters(config.model).total * CHECKPOINT_BYTES[config.precision.weights]
    kept, why = _most_checkpoints(config, start)
    free = shutil.disk_usage(_existing(save)).free
    found = f"{free / _GIB:.1f} GiB free, a checkpoint has {one / _GIB:.2f} GiB"
    if kept * one <= free:
        return Check("disk space", found)
    if config.checkpoint.keep_last is None and one <= free:
        note = (
            f"checkpoint.save={save} has {free / _GIB:.1f} GiB free, room for {free // one} of the "
            f"{kept} checkpoints that are to be kept ({why}): some must be moved away in time"
        )
        return Check("disk space", found, notes=(note,))
    problem = (
        f"checkpoint.save={save} has {free / _GIB:.1f} GiB free, and {kept} checkpoints ({why}) "
        f"need {kept * one / _GIB:.1f} GiB; allowed: another folder, or fewer checkpoints"
    )
    return Check("disk space", found, (problem,))


def _folder(run_dir: Path) -> Check:
    folder = _existing(run_dir)
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return Check("run folder", f"{run_dir} can be written")
    problem = f"run_dir={run_dir}: {folder} cannot be written by this user"
    return Check("run folder", "cannot be written", (problem,))


def _existing(path: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    absolute = path.absolute()
    return next(each for each in (absolute, *absolute.parents) if each.exists())
