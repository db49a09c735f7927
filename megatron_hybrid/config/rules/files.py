"""Rules of what a run reads and writes: data, tokenizer, checkpoint and folders."""

from importlib.util import find_spec
from pathlib import Path

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.config.rules.common import Facts, Problems, Rule, each, values
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.token_files import prefixes, restore
from megatron_hybrid.config.tracker import load_problems
from megatron_hybrid.fileio import refusal, why_not_writable


def data_given(c: RunConfig, _: Facts) -> Problems:
    """Tokens come from files or are made up, not both."""
    given, mock = c.data.data_path, c.data.mock_data
    if not given and not c.data.sources and not c.data.phases and not mock:
        yield (
            "data.data_path is not set; it must be one prefix, or weights and prefixes "
            "(or data.sources with data.phases, or data.mock_data=true for made-up tokens)"
        )
    if given and mock:
        names = [prefix for _, prefix in given]
        yield f"data.mock_data=true excludes data.data_path={names}; allowed: one of them"


def tokenizer_given(c: RunConfig, _: Facts) -> Problems:
    """Something must say how large the vocabulary is."""
    kind, file, vocab_size = c.data.tokenizer_type, c.data.tokenizer_model, c.model.vocab_size
    if kind == "null":
        if vocab_size is None or vocab_size < 2:
            shown = "null" if vocab_size is None else vocab_size
            yield f"data.tokenizer_type=null needs model.vocab_size of at least 2; it is {shown}"
        if file is not None:
            yield f"data.tokenizer_model={file} must be null with data.tokenizer_type=null"
    elif file is None:
        yield (
            f"data.tokenizer_model is not set; data.tokenizer_type={kind} needs its path "
            "(or use data.tokenizer_type=null with model.vocab_size)"
        )


def data_files(c: RunConfig, _: Facts) -> Problems:
    """Each prefix stands for two files."""

    def check(place: str, source: SourceConfig) -> Problems:
        for path in source.path:
            yield from _looked_at(f"{place}.path: {path!r}", of_path(f"{place}.path", path))

    def of_path(name: str, path: str) -> Problems:
        found = prefixes(path)
        if not found:
            yield f"{name}: {path!r} matches no token files (prefix.bin, prefix.idx)"
        for prefix in found:
            yield from _incomplete(name, prefix)

    for _weight, prefix in c.data.data_path:
        yield from _looked_at(f"data.data_path: {prefix!r}", _incomplete("data.data_path", prefix))
    yield from each("data.sources", c.data.sources, check)


def _looked_at(name: str, found: Problems) -> Problems:
    """The problems of a path that a field names; that the system refuses to look there is one."""
    try:
        yield from found
    except OSError as error:
        yield f"{name} cannot be looked at: {refusal(error) or error}"


def _incomplete(name: str, prefix: str) -> Problems:
    restore(prefix)
    missing = [file for file in (f"{prefix}.bin", f"{prefix}.idx") if not Path(file).is_file()]
    if missing:
        yield f"{name}: {prefix!r} is incomplete; no file {' and '.join(missing)}"


def tokenizer_file(c: RunConfig, _: Facts) -> Problems:
    """The tokenizer is on this machine."""
    path, kind = c.data.tokenizer_model, c.data.tokenizer_type
    if path is not None and kind != "null":
        yield from _looked_at(f"data.tokenizer_model={path}", _no_tokenizer(path, kind))


def _no_tokenizer(path: Path, kind: str) -> Problems:
    if not path.exists():
        yield f"data.tokenizer_model={path}: no such file"
    elif kind == "sentencepiece" and not path.is_file():
        yield f"data.tokenizer_model={path} must be a file with data.tokenizer_type=sentencepiece"


def load_folder(c: RunConfig, _: Facts) -> Problems:
    """What the run starts from is a folder of checkpoints with at least one whole checkpoint."""
    if c.checkpoint.load is not None:
        yield from load_problems(c.checkpoint.load)
    dense = getattr(c.upcycling, "from")
    if dense is not None:
        yield from load_problems(dense, "upcycling.from")


def task_folder(c: RunConfig, _: Facts) -> Problems:
    """Tasks of one's own are in a folder."""
    path = c.training.eval_tasks_include_path
    if path is not None and not path.is_dir():
        yield f"training.eval_tasks_include_path={path} is no folder"


def writable(c: RunConfig, _: Facts) -> Problems:
    """The run can write where it must."""
    outputs = {
        "run_dir": c.run_dir,
        "checkpoint.save": c.checkpoint.save,
    }
    if c.data.sample_order == "megatron" and not c.data.mock_data:
        outputs["data.data_cache_path"] = c.data.data_cache_path
    if c.logging.wandb_project is not None:
        outputs["logging.wandb_save_dir"] = c.logging.wandb_save_dir
    for name, path in outputs.items():
        inside = name != "run_dir" and path is not None and path.is_relative_to(c.run_dir)
        if path is not None and not inside and (why := why_not_writable(path)):
            yield f"{name}={path}: {why}"


# By the fields that ask for them: packages, the extras that bring them, and what asks for none.
_PACKAGES = {
    "logging.wandb_project": ("wandb", "wandb", "null"),
    "logging.mlflow_experiment": ("mlflow", "mlflow", "null"),
    "training.eval_tasks": ("lm_eval", "eval", "[]"),
}


def packages(c: RunConfig, _: Facts) -> Problems:
    """The library of a tracker, or of tasks, is installed where the run starts."""
    for path, value in values(c, (*_PACKAGES,)).items():
        module, extra, none = _PACKAGES[path]
        if value not in (None, ()) and find_spec(module) is None:
            said = f"[{', '.join(value)}]" if isinstance(value, tuple) else value
            yield (
                f"{path}={said} needs the package {module}; allowed: {none}, or "
                f"pip install 'megatron-hybrid[{extra}]'"
            )


# Whether inputs are named at all; a config may be looked at before they are.
INPUTS: tuple[Rule, ...] = (data_given, tokenizer_given, packages)
DATA_FILES: tuple[Rule, ...] = (data_files,)
FILES: tuple[Rule, ...] = (*DATA_FILES, tokenizer_file, load_folder, task_folder, writable)
