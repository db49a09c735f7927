"""Rules of what is read: sources, the weights that phases give them, what is held out."""

import os
from collections.abc import Mapping

from megatron_hybrid.config.data import PhaseConfig, SourceConfig
from megatron_hybrid.config.describe import nearest
from megatron_hybrid.config.phases import sequence_lengths
from megatron_hybrid.config.rules.common import Facts, Problems, Rule, each
from megatron_hybrid.config.run import RunConfig


def one_spelling(c: RunConfig, _: Facts) -> Problems:
    """A blend is `data_path`, or phases over sources; made-up tokens have neither."""
    prefixes = [prefix for _, prefix in c.data.data_path]
    named = [name for name in ("sources", "phases") if getattr(c.data, name)]
    shown = " and ".join(f"data.{name}" for name in named)
    if prefixes and named:
        yield f"data.data_path={prefixes} excludes {shown}; allowed: one of the two spellings"
    if c.data.mock_data and named:
        yield f"data.mock_data=true excludes {shown}; allowed: one of them"
    if c.data.sources and not c.data.phases:
        yield (
            f"data.sources has {', '.join(c.data.sources)}, but data.phases is not set; it must "
            "be a list of phases such as [{name: all, weights: {web: 0.6, code: 0.4}}]"
        )
    if c.data.phases and not c.data.sources:
        yield (
            "data.phases is set, but data.sources is not; it must be sources by name such as "
            "{web: {path: data/web}}"
        )


def weights(c: RunConfig, _: Facts) -> Problems:
    """Phases weigh sources that there are. One that no phase weighs waits for an edit to come."""
    sources = c.data.sources

    def check(name: str, phase: PhaseConfig) -> Problems:
        for source in phase.weights if sources else ():
            if source not in sources:
                guess = nearest(source, sources)
                hint = f"did you mean {guess}?" if guess else f"sources: {', '.join(sources)}"
                yield f"{name}.weights.{source} names no source of data.sources; {hint}"
        if not any(phase.weights.values()):
            yield f"{name}.weights={dict(phase.weights)} must have a weight above 0"

    yield from each("data.phases", c.data.phases, check)


def phase_names(c: RunConfig, _: Facts) -> Problems:
    """Logs and pictures name phases."""
    first: dict[str, str] = {}

    def check(place: str, phase: PhaseConfig) -> Problems:
        if phase.name in first:
            yield f"{place}.name={phase.name!r} is the name of {first[phase.name]} already"
        first.setdefault(phase.name, place)

    yield from each("data.phases", c.data.phases, check)


def distinct_paths(c: RunConfig, _: Facts) -> Problems:
    """What is named twice would be read twice."""
    first: dict[str, str] = {}

    def note(place: str, path: str) -> Problems:
        same = os.path.normpath(path)
        if same in first:
            yield f"{place}: {path!r} is in {first[same]} already; its text would be read twice"
        first.setdefault(same, place)

    def check(place: str, source: SourceConfig) -> Problems:
        for path in source.path:
            yield from note(f"{place}.path", path)

    for _weight, prefix in c.data.data_path:
        yield from note("data.data_path", prefix)
    yield from each("data.sources", c.data.sources, check)


def block_tokens(c: RunConfig, _: Facts) -> Problems:
    """A sample lies in one block."""
    block, longest = c.data.block_tokens, max(sequence_lengths(c))
    if block is not None and block < longest:
        yield (
            f"data.block_tokens={block} must hold the longest sample, of {longest} tokens; "
            f"allowed: null, {longest} and more"
        )


def megatron_order(c: RunConfig, _: Facts) -> Problems:
    """megatron-core's order knows one blend, without caps, to the end of the run."""
    if c.data.sample_order != "megatron":
        return
    given: Mapping[str, object] = {
        "data.sources": c.data.sources,
        "data.phases": c.data.phases,
        "data.max_epochs": c.data.max_epochs,
        "data.block_tokens": c.data.block_tokens,
        "training.batch_size_schedule": c.training.batch_size_schedule,
    }
    for name, value in given.items():
        if value:
            instead = "data.data_path" if name in ("data.sources", "data.phases") else "null"
            yield (
                f"data.sample_order=megatron has no {name}; allowed: {instead}, or "
                "data.sample_order=plan"
            )


def has_plan(c: RunConfig, _: Facts) -> Problems:
    """Only where the order is ours is there anything to show."""
    if c.data.mock_data:
        yield "data.mock_data=true has no plan: made-up tokens have no sources; allowed: false"
    elif c.data.sample_order != "plan":
        yield (
            f"data.sample_order={c.data.sample_order} has no plan: megatron-core works its order "
            "out when the run starts; allowed: plan"
        )


def split(c: RunConfig, _: Facts) -> Problems:
    """A split is three shares; what is read of a source, and evaluated, must have one."""
    read = {name for phase in c.data.phases for name, weight in phase.weights.items() if weight}
    # Made-up tokens are not split; nor by this one, where every source that is read has its own.
    shared = not c.data.mock_data and not c.data.sources
    for name, source in c.data.sources.items():
        shared = shared or (name in read and source.split is None)

    def check(place: str, source: SourceConfig) -> Problems:
        if source.split is not None:
            used = place.removeprefix("data.sources.") in read
            yield from _split_problems(c, f"{place}.split", source.split, used=used)

    yield from _split_problems(c, "data.split", c.data.split, used=shared)
    yield from each("data.sources", c.data.sources, check)


def _split_problems(c: RunConfig, name: str, text: str, *, used: bool) -> Problems:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        yield (
            f"{name}={text!r} must be three shares of at least 0, train,validation,test, "
            "such as 969,30,1"
        )
    elif not used:
        return
    elif shares[0] == 0:
        yield f"{name}={text!r} leaves nothing to train on; the first share must be above 0"
    elif shares[1] == 0 and c.training.eval_interval is not None:
        yield (
            f"training.eval_interval={c.training.eval_interval} needs documents to evaluate on, "
            f"but the second share of {name}={text!r} is 0; allowed: null"
        )


DATA: tuple[Rule, ...] = (
    one_spelling,
    weights,
    phase_names,
    distinct_paths,
    block_tokens,
    megatron_order,
    split,
)
