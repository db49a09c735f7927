"""Where a config comes from: a preset, then a YAML file, then what was typed."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from megatron_hybrid.config import rules
from megatron_hybrid.config.check import (
    build_config,
    check_types,
    keep_known,
    section_problem,
)
from megatron_hybrid.config.derive import DERIVED, FOLLOWING
from megatron_hybrid.config.describe import fields, nearest, sections
from megatron_hybrid.config.flags import CommandLine, parse_command_line
from megatron_hybrid.config.partial import Partial, UnreadableError
from megatron_hybrid.config.places import Values, drop_path, get_path, read_place, set_path
from megatron_hybrid.config.rules import REPLACED, REPLACED_INSIDE, Rule
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.tracker import (
    CONFIG_FILE,
    FIRST_FOLDER,
    latest_folder,
    load_problems,
)
from megatron_hybrid.config.yaml_text import parse_yaml
from megatron_hybrid.errors import ConfigError

_BEGINNINGS = (
    "checkpoint.load", "checkpoint.finetune", "checkpoint.load_optim", "checkpoint.load_rng",
    "optimizer.restart_schedule", "upcycling",
)  # fmt: skip

# What can name code, and how a run goes on without.
_NAMED_CODE = {"training.callbacks": "[]", "training.objective": "pretraining"}


@dataclass
class _Layers:
    """Values under what was typed; `whole` is False where they could not be read."""

    values: Values = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    whole: bool = True

    def fail(self, problem: str) -> None:
        self.problems.append(problem)
        self.whole = False


@cache
def presets() -> dict[str, str]:
    """The YAML text of each preset by its name."""
    folder = resources.files("megatron_hybrid") / "presets"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    files.sort(key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in files}


def _no_preset(name: str) -> str:
    guess = nearest(name, presets())
    hint = f"did you mean {guess}? " if guess else ""
    return f"{hint}presets: {', '.join(presets())}"


def _read_yaml(path: Path, layers: _Layers) -> Values:
    """The mapping a YAML file holds; problems go to `layers`."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        layers.fail(f"{path}: cannot be read: {reason}")
        return {}
    except ValueError as error:
        layers.fail(f"{path}: {error}")
        return {}
    if values is None:
        return {}
    if not isinstance(values, dict):
        layers.fail(f"{path}: must hold sections such as `model:`, but holds {values!r:.60}")
        return {}
    for name in [name for name in sections() if name in values]:
        if values[name] is None:
            values[name] = {}
        elif not isinstance(values[name], dict):
            layers.problems.append(f"{path}: {section_problem(name, values.pop(name))}")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """`over` on top of `base`, field by field.

    A field in `over` replaces those in `base` that say the same thing in another way
    (train_iters and train_tokens; data_path and sources), where it says anything.
    """
    merged = copy.deepcopy(dict(base))
    for name, others in REPLACED.items():
        if get_path(over, name) not in (None, [], {}):
            for other in others:
                drop_path(merged, other)
    for name, value in over.items():
        inner = merged.get(name)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            inner.update(copy.deepcopy(dict(value)))
        else:
            merged[name] = copy.deepcopy(value)
    return merged


def _forget_following(values: Values) -> Values:
    """Drop fields that a resolved config only holds because they follow from others.

    So a saved run can be taken up with another pipeline, or in another folder.
    """
    kept, _ = keep_known(values)
    config, broken, _ = check_types(copy.deepcopy(kept))
    readable = cast(RunConfig, Partial(config, frozenset(broken)))
    for path in FOLLOWING:
        value = get_path(values, path)
        try:
            if value is not None and str(DERIVED[path](readable)) == str(value):
                values = merge(values, {})
                drop_path(values, path)
        except UnreadableError:
            continue
    return values


def _add_preset(name: Any, layers: _Layers) -> None:
    """Put a preset under the values there are."""
    text = presets().get(name) if isinstance(name, str) else None
    if text is None:
        layers.fail(f"preset={name!r} is not a preset; {_no_preset(str(name))}")
    else:
        layers.values = merge(parse_yaml(text), merge(layers.values, {"preset": name}))


def _from_checkpoint(load: str, typed: Values, layers: _Layers) -> None:
    """Take the resolved config that the latest checkpoint of a folder holds."""
    if problems := load_problems(Path(load)):
        layers.problems += problems
        layers.whole = False
        return
    stored = latest_folder(Path(load)) / CONFIG_FILE
    if _may_be_there(stored):
        try:
            load_config([str(stored)], which=())
        except ConfigError as error:
            for problem in error.problems:
                layers.fail(problem if str(stored) in problem else f"{stored}: {problem}")
            return
        layers.values = _read_yaml(stored, layers)
        _find_tokenizer(layers.values, stored.parent)
        # How that run began says nothing of how it goes on; nor does an import, which writes no
        # sums of whole files, say that the run shall write none.
        made = ("checkpoint.verify_integrity",) if stored.parent.name == FIRST_FOLDER else ()
        for path in (*_BEGINNINGS, *made):
            drop_path(layers.values, path)
        _refuse_named_code(load, typed, layers)
    elif get_path(typed, "model.hybrid_layer_pattern") is None:
        layers.fail(
            f"checkpoint.load={load}: there is no {stored}; name a preset or a YAML file that "
            "describes the model"
        )


def _refuse_named_code(load: str, typed: Values, layers: _Layers) -> None:
    """Code of the user's own is not run because a checkpoint names it: it must be typed again."""
    for path, without in _NAMED_CODE.items():
        value = get_path(layers.values, path)
        names = ", ".join(value) if isinstance(value, list) else str(value)
        if ":" not in names or get_path(typed, path) is not None:
            continue
        text = f"{path}=[{names}]" if isinstance(value, list) else f"{path}={names}"
        layers.problems.append(
            f"checkpoint.load={load} is of a run with {text}, which a checkpoint does not bring, "
            f"as it is code; type {text} to go on so, or {path}={without}"
        )
        drop_path(layers.values, path)


def _may_be_there(path: Path) -> bool:
    """Whether a file is to be opened: also where the system does not let it be looked for, which is
    then said of it."""
    try:
        return path.exists()
    except OSError:
        return True


def _find_tokenizer(values: Values, checkpoint: Path) -> None:
    """Where the run's tokenizer is not, on another machine, take the copy in the checkpoint."""
    model = get_path(values, "data.tokenizer_model")
    if not isinstance(model, str) or os.path.exists(model):  # noqa: PTH110 (nowhere it may look)
        return
    for copy_ in (checkpoint / "tokenizer.model", checkpoint / "tokenizer.json"):
        if copy_.is_file():
            set_path(values, "data.tokenizer_model", str(copy_))


def _layers_below(line: CommandLine, typed: Values) -> _Layers:
    """The values that what was typed goes on top of."""
    layers = _Layers()
    preset, load = typed.get("preset"), get_path(typed, "checkpoint.load")
    if line.source is not None and line.source not in presets():
        path = Path(line.source)
        if _may_be_there(path) or path.suffix in (".yaml", ".yml"):
            layers.values = _read_yaml(path, layers)
            preset = preset or layers.values.get("preset")
        else:
            hint = _no_preset(line.source)
            layers.fail(f"{line.source!r} is neither a file nor a preset; {hint}")
    elif line.source is not None:
        if preset not in (None, line.source):
            layers.problems.append(
                f"preset={preset} beside {line.source}, which is one too; allowed: one of them"
            )
        preset = line.source
    elif preset is None and load is not None:
        _from_checkpoint(os.path.expanduser(load), typed, layers)  # noqa: PTH111 (text, as typed)
    elif preset is None and get_path(typed, "model.hybrid_layer_pattern") is None:
        layers.fail(f"no preset or YAML file is given; presets: {', '.join(presets())}")
    if preset is not None:
        _add_preset(preset, layers)
    return layers


def _sort_typed(line: CommandLine) -> tuple[Values, dict[str, Any]]:
    """What was typed: whole fields, nested, and by path the places inside fields.

    The latter change what the file says, so they wait until it is there; a whole field that was
    typed after them takes them back.
    """
    typed: Values = {}
    inside: dict[str, Any] = {}
    for path, value in line.values:
        if path in fields():
            set_path(typed, path, value)
            inside = {
                place: old
                for place, old in inside.items()
                if not place.startswith((f"{path}.", f"{path}["))
            }
        else:
            inside.pop(path, None)  # the later one comes last
            inside[path] = value
    return typed, inside


def _where_unset(stand_in: Mapping[str, Any], values: Values) -> Values:
    """Those of which nothing is set that stands in their place, as another length of the run."""
    kept: Values = {}
    for section, names in stand_in.items():
        for name, value in names.items():
            others = REPLACED.get(f"{section}.{name}", ())
            if all(get_path(values, read_place(other)) is None for other in others):
                kept.setdefault(section, {})[name] = value
    return kept


def load_config(
    args: Sequence[str],
    *,
    which: tuple[Rule, ...] = rules.ALL,
    world_size: int | None = None,
    has_cuda: bool | None = None,
    base: Values | None = None,
    stand_in: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Make a config from command-line words.

    Args:
        args: `[preset | file.yaml] [section.field=value | --megatron-flag [value]] ...`. What is
            typed wins over the YAML file, and that over the preset it names (`preset: tiny`).
            With `--load DIR` and no other source, the config in DIR's latest checkpoint is taken.
        which: rules to apply, as in `build_config`.
        world_size: ranks that will run, if known.
        has_cuda: whether they have GPUs, if known.
        base: what the words change, in place of a preset or file that they would name.
        stand_in: values of required fields that the command does not go by, where nothing sets
            them.

    Raises:
        ConfigError: every problem in what was typed, read and made of it.
    """
    line = parse_command_line(args)
    typed, inside = _sort_typed(line)
    layers = _layers_below(line, typed) if base is None else _Layers(base)
    if base is not None and line.source is not None:
        layers.problems.append(f"{line.source!r} is no section.field=value")
    if base is not None and "preset" in typed:
        layers.problems.append(f"preset={typed['preset']} is not for this command to change")
    problems = (*line.problems, *layers.problems)
    if not layers.whole:
        # Half a config breaks rules that the whole one keeps: only what was typed can be judged.
        _, broken, found = check_types(copy.deepcopy(typed))
        unset = tuple(f"{path} is not set" for path in broken)
        raise ConfigError([*problems, *(text for text in found if not text.startswith(unset))])
    typed.pop("preset", None)
    values = merge(_forget_following(layers.values), typed)
    if stand_in is not None:
        values = merge(_where_unset(stand_in, values), values)
    for path, value in inside.items():
        *outer, last = read_place(path)
        for other in REPLACED_INSIDE.get(last, ()) if value is not None else ():
            drop_path(values, (*outer, other))
        if problem := set_path(values, path, value):
            problems = (*problems, problem)
    return build_config(
        values, which=which, world_size=world_size, has_cuda=has_cuda, problems=problems
    )
