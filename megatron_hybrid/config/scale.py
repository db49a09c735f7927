"""A run made smaller so that every source is still read as many times: blends are designed small.

A fraction of the tokens of a run, drawn from the same fraction of every source, has the epochs of
the whole run (arXiv 2412.15285).
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import PurePath

from pydantic import BaseModel

from megatron_hybrid.config.check import build_config
from megatron_hybrid.config.data import DataConfig, PhaseConfig, SourceConfig
from megatron_hybrid.config.derive import DERIVED, FOLLOWING
from megatron_hybrid.config.phases import ONLY_PHASE, exact
from megatron_hybrid.config.places import get_path, set_path
from megatron_hybrid.config.rules import NO_FILES
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.errors import ConfigError

_RUN_LENGTHS = ("train_iters", "train_samples", "train_tokens")
_SCHEDULE_LENGTHS = (
    "lr_warmup_samples",
    "lr_warmup_tokens",
    "lr_decay_samples",
    "lr_decay_tokens",
    "lr_wsd_decay_samples",
    "lr_wsd_decay_tokens",
)
_STARTS = ("start_tokens", "last_tokens")


def parse_scale(text: str) -> Fraction:
    """The scale that "1/15" or "0.1" is.

    Raises:
        ConfigError: it is no number above 0 and up to 1.
    """
    try:
        scale = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if not 0 < scale <= 1:
        raise ConfigError(
            [f"--scale={text} must be a number above 0 and of at most 1 such as 1/15 or 0.1"]
        )
    return scale


def scale_config(config: RunConfig, scale: Fraction) -> RunConfig:
    """The same run over a fraction of every source and of all its lengths.

    Steps are as large as before, and intervals (evaluations, checkpoints) as they were. The smaller
    run has folders of its own.

    Args:
        config: valid; a blend of `data_path` becomes sources and a phase.
        scale: above 0, at most 1.

    Raises:
        ConfigError: the smaller run breaks rules, for example with phases of less than a batch.
    """
    training = _scaled(config.training, _RUN_LENGTHS, scale)
    schedule = tuple(
        (_part(tokens, scale), size) for tokens, size in config.training.batch_size_schedule
    )
    name = f"{scale.numerator}_{scale.denominator}"
    smaller = config.model_copy(
        update={
            "run_dir": config.run_dir.with_name(f"{config.run_dir.name}-{name}"),
            "data": _scaled_data(config.data, scale),
            "training": training.model_copy(update={"batch_size_schedule": schedule}),
            "optimizer": _scaled(config.optimizer, _SCHEDULE_LENGTHS, scale),
        }
    )
    values = smaller.model_dump(mode="json")
    for path in FOLLOWING:
        section, _, leaf = path.partition(".")
        if getattr(getattr(config, section), leaf) == DERIVED[path](config):
            set_path(values, path, None)  # it follows the new folder
    if (save := get_path(values, "checkpoint.save")) is not None:
        set_path(values, "checkpoint.save", f"{save}-{name}")
    if not config.checkpoint.finetune:
        set_path(values, "checkpoint.load", None)  # a run cannot go on as another one
    return build_config(values, which=NO_FILES)


def _part(amount: int, scale: Fraction) -> int:
    return max(1, round(amount * scale))


def _scaled[S: BaseModel](section: S, names: tuple[str, ...], scale: Fraction) -> S:
    """A section with some of its amounts, where they are set, made smaller."""
    amounts = {name: getattr(section, name) for name in names}
    return section.model_copy(
        update={
            name: _part(amount, scale) for name, amount in amounts.items() if amount is not None
        }
    )


def _scaled_data(data: DataConfig, scale: Fraction) -> DataConfig:
    sources: Mapping[str, SourceConfig] = data.sources
    phases = data.phases
    if data.data_path:
        names = _source_names([prefix for _, prefix in data.data_path])
        sources = {
            name: SourceConfig(path=(prefix,))
            for name, (_, prefix) in zip(names, data.data_path, strict=True)
        }
        weights = dict(zip(names, (weight for weight, _ in data.data_path), strict=True))
        phases = (PhaseConfig(name=ONLY_PHASE, weights=weights),)
    return data.model_copy(
        update={
            "data_path": (),
            "sources": {
                name: source.model_copy(update={"fraction": float(exact(source.fraction) * scale)})
                for name, source in sources.items()
            },
            "phases": tuple(_scaled(phase, _STARTS, scale) for phase in phases),
        }
    )


def _source_names(prefixes: list[str]) -> list[str]:
    """Names for prefixes, of their last part, told apart by a number where that is the same."""
    names: list[str] = []
    for prefix in prefixes:
        name = re.sub(r"[^\w+-]", "_", PurePath(prefix).name) or "source"
        same = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names)
        names.append(f"{name}-{same + 1}" if same else name)
    return names
