"""From a Hugging Face folder to a distributed checkpoint that training goes on from."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_converter.carried_files import carried_from
from checkpoints_converter.errors import ConversionError
from checkpoints_converter.family import Family
from checkpoints_converter.fields import Fields
from checkpoints_converter.import_precision import (
    note_rounded,
    precision_recipe,
    refuse_dtypes,
)
from checkpoints_converter.loading_order import elsewhere, passed_over
from checkpoints_converter.registry import family
from checkpoints_converter.releases import note_writer
from checkpoints_converter.safetensors_files import SafetensorsReader
from checkpoints_converter.streaming import (
    BLOCK_BYTES,
    DTYPES,
    Block,
    blocks,
    make_rows,
    stored_dtype,
    whole,
)
from checkpoints_converter.tokenizer_files import added_beyond
from checkpoints_converter.weights import (
    Mapping,
    Names,
    Recipe,
    Run,
    held_twice,
    recipes_of_ours,
    refuse_other_tensors,
)
from megatron_hybrid.checkpoint import files as checkpoint_files
from megatron_hybrid.checkpoint.carried import write_carried
from megatron_hybrid.checkpoint.reader import as_matrix
from megatron_hybrid.checkpoint.threads import default_threads, in_threads
from megatron_hybrid.checkpoint.writer import CheckpointWriter
from megatron_hybrid.claim import CLAIM_FILE, claim_file, claimed
from megatron_hybrid.config import (
    CONFIG_FILE,
    TRACKER_FILE,
    ModelConfig,
    RunConfig,
    build_config,
    rules,
)
from megatron_hybrid.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_hybrid.fileio import file_errors, restore_folder, write_atomic
from megatron_hybrid.model.tensor_names import extra_states
from megatron_hybrid.small_files import read_json

# A rank reads whole parts of a tensor to take its share of them: not too large; but each one costs
# an entry in the index.
PART_BYTES = 64 << 20
MAX_SEQ_LENGTH = 8192
_VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class ImportOptions:
    """How a model is imported.

    Attributes:
        dtype: of the weights, a key of DTYPES; None as they are stored.
        vocabulary_multiple: the vocabulary is padded to a multiple of it; None for the largest
            power of two up to 128 that needs no padding.
        force: replace what an earlier import left.
        ignored_fields: of config.json, not known here, which change nothing.
    """

    dtype: str | None = None
    vocabulary_multiple: int | None = None
    threads: int | None = None
    force: bool = False
    ignored_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Imported:
    """What came of an import; `notes` hold, but the user should know them."""

    folder: Path
    config: RunConfig
    tensors: int
    nbytes: int
    notes: tuple[str, ...]


def import_model(
    source: Path,
    save: Path,
    options: ImportOptions,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Write a Hugging Face folder as a distributed checkpoint, `save/iter_0000000`.

    Args:
        source: the folder, with config.json and safetensors.
        save: the folder of checkpoints to be.
        advance: told bytes written since the last call, and bytes in all.

    Raises:
        UserError: the model cannot be held exactly, or its files are damaged, incomplete, or not
            those of its config; nothing that loads is left at `save`.
    """
    chosen, fields, values = read_model(source, options.ignored_fields)
    note_writer(chosen, fields, values.get("mamba_num_groups", 1))
    _refuse_to_replace(save, options.force)
    with (
        file_errors(save),
        claimed([claim_file(save)], "from-hf"),
        SafetensorsReader(source) as reader,
    ):
        # What another one has written meanwhile, or a kill has left beside its place.
        restore_folder(checkpoint_files.iteration_folder(save, 0))
        _refuse_to_replace(save, options.force)
        dtypes = {name: entry.dtype for name, entry in reader.tensors.items()}
        refuse_dtypes(source, dtypes)
        if left := passed_over(source):
            fields.notes.append(f"not read, as transformers would not: {', '.join(left)}")
        folder = checkpoint_files.iteration_folder(save, 0)
        tokenizer = _tokenizer(source)
        if tokenizer is None:
            fields.notes.append("it comes without a tokenizer; name one to train it")
        else:
            found = (tokenizer.around_texts(), added_beyond(source, tokenizer))
            fields.notes += [note for note in found if note is not None]
        carried, lost = carried_from(source, tokenizer.files if tokenizer is not None else ())
        if lost:
            fields.notes.append(f"not carried along: {', '.join(lost)}")
        recipe = precision_recipe(reader, options.dtype, fields)
        multiple = options.vocabulary_multiple or math.gcd(
            _VOCABULARY_MULTIPLE, values["vocab_size"]
        )
        values["make_vocab_size_divisible_by"] = multiple
        config = _run_config(values, fields, folder, recipe, tokenizer)
        if tokenizer is not None and (problem := config.vocabulary_problem(tokenizer.vocab_size)):
            fields.notes.append(f"it can be used with another tokenizer only: {problem}")
        table = _table(source, reader, chosen, config.model)
        unlike = next((pair for pair in held_twice(table) if not _alike(reader, *pair)), None)
        if unlike is not None:
            first, second = (run.theirs for run in unlike)
            fields.notes.append(
                f"config.json ties {first} to {second}, but their values differ: both are kept, as "
                "transformers keeps them"
            )
            values["untie_embeddings_and_output_weights"] = True
            config = _run_config(values, fields, folder, recipe, tokenizer)
            table = _table(source, reader, chosen, config.model)
        recipes = recipes_of_ours(table)
        asked = DTYPES[options.dtype] if options.dtype else None
        plan = [(recipe, stored_dtype(recipe, dtypes, asked)) for recipe in recipes]
        note_rounded(plan, config.precision.recipe, fields)
        checkpoint_files.start_partial(save, 0)
        partial = checkpoint_files.partial_folder(save, 0)
        try:
            total = _write(partial, reader, config.model, plan, options, advance)
            reader.verify()
            write_atomic(partial / CONFIG_FILE, config.to_yaml())
            write_carried(partial, carried)
            if tokenizer is not None:
                tokenizer.save_copy(partial)
            checkpoint_files.put_in_place(save, 0)
        except BaseException:
            checkpoint_files.discard_partial(save, 0)
            raise
    return Imported(folder, config, len(plan), total, tuple(fields.notes))


def read_model(
    source: Path, ignored: Collection[str] = ()
) -> tuple[Family, Fields, dict[str, Any]]:
    """The family of a folder, its config.json, and the fields of our model section.

    Args:
        ignored: names of fields of config.json that the user says change nothing.

    Raises:
        ConversionError: there is no config.json, or every reason why we cannot hold the model.
    """
    path = source / "config.json"
    raw = read_json(path, ConversionError)
    chosen = family(raw.get("model_type"))
    fields, values = chosen.read(raw, ignored)
    fields.problems += elsewhere(source, raw)
    if fields.problems:
        lines = [f"  - {problem}" for problem in fields.problems]
        raise ConversionError("\n".join([f"{path} cannot be held exactly:", *lines]))
    return chosen, fields, values


def _refuse_to_replace(save: Path, force: bool) -> None:
    if not save.exists():
        return
    if not save.is_dir():
        raise ConversionError(f"{save} is not a folder")
    there = sorted(path.name for path in save.glob("iter_*"))
    if set(there) - {checkpoint_files.iteration_folder(save, 0).name}:
        raise ConversionError(f"{save} holds the checkpoints of a run: {', '.join(there[:3])}")
    if there and not force:
        raise ConversionError(
            f"{save} holds {there[0]} already; give another place, or --force to replace it"
        )
    foreign = sorted(
        path.name
        for path in save.iterdir()
        if path.name not in (*there, TRACKER_FILE, CLAIM_FILE) and not path.name.endswith(".part")
    )
    if foreign:
        raise ConversionError(
            f"{save} also holds {', '.join(foreign[:3])}; give a place of its own"
        )


def _tokenizer(source: Path) -> Tokenizer | None:
    """The folder's tokenizer; None where it has none."""
    kinds = (("huggingface", HuggingFaceTokenizer), ("sentencepiece", SentencePieceTokenizer))
    for kind, cls in kinds:
        if (source / cls.file_name).is_file():
            return build_tokenizer(kind, source / cls.file_name)
    return None


def _run_config(
    values: dict[str, Any],
    fields: Fields,
    folder: Path,
    recipe: str,
    tokenizer: Tokenizer | None,
) -> RunConfig:
    """A config whose model section is the model's; the rest is for whoever trains it to set.

    Args:
        folder: where the checkpoint will be; its copy of the tokenizer is named.
        recipe: of `precision`.

    Raises:
        ConfigError: our config cannot hold the model.
    """
    data: dict[str, Any] = {
        "seq_length": min(fields["max_position_embeddings"] or MAX_SEQ_LENGTH, MAX_SEQ_LENGTH),
        "tokenizer_type": "null",
    }
    if tokenizer is not None:
        kind = "huggingface" if isinstance(tokenizer, HuggingFaceTokenizer) else "sentencepiece"
        data |= {
            "tokenizer_type": kind,
            "tokenizer_model": str((folder / tokenizer.file_name).absolute()),
        }
    return build_config(
        {
            "model": values,
            "precision": {"recipe": recipe},
            "data": data,
            "training": {"train_iters": 1},
            "optimizer": {"lr": 1e-5, "lr_decay_style": "constant"},
            # Each tensor carries a checksum of its own; sums of whole files would be read again.
            "checkpoint": {"verify_integrity": False},
        },
        which=rules.NO_FILES,
    )


def _table(
    source: Path, reader: SafetensorsReader, chosen: Family, model: ModelConfig
) -> list[Mapping]:
    """Every tensor of the model, ours beside those of the folder.

    Raises:
        ConversionError: the folder's tensors are not those of its config.
    """
    names = [name for name in reader.tensors if not name.startswith(chosen.left_out)]
    table = chosen.table(model, Names(), Names(names))
    refuse_other_tensors(
        f"{source} does not hold the model of its config.json:",
        (spec for mapping in table for spec in mapping.theirs),
        {name: reader.tensors[name].shape for name in names},
    )
    return table


def _alike(reader: SafetensorsReader, one: Run, other: Run) -> bool:
    """Whether two tensors hold the same rows."""
    width = as_matrix(reader.tensors[one.theirs].shape)[1]
    step = max(1, BLOCK_BYTES // (4 * max(1, width)))
    for start in range(0, one.count, step):
        stop = min(start + step, one.count)
        rows, again = (
            reader.read_rows(run.theirs, run.their_row + start, run.their_row + stop)
            for run in (one, other)
        )
        common = torch.promote_types(rows.dtype, again.dtype)
        if not torch.equal(rows.to(common), again.to(common)):
            return False
    return True


def _write(
    folder: Path,
    reader: SafetensorsReader,
    model: ModelConfig,
    plan: list[tuple[Recipe, torch.dtype]],
    options: ImportOptions,
    advance: Callable[[int, int], None],
) -> int:
    """Write all tensors and what goes with them; their bytes."""
    threads = options.threads or default_threads()
    total = sum(torch.Size(recipe.spec.shape).numel() * dtype.itemsize for recipe, dtype in plan)
    advance(0, total)
    writer = CheckpointWriter(folder, threads)

    def parts() -> Iterator[tuple[Block, torch.dtype]]:
        for recipe, dtype in plan:
            writer.declare(recipe.spec.name, recipe.spec.shape, dtype)
            align = _rows_of_an_index(recipe.spec.shape)
            for part in blocks(whole(recipe), PART_BYTES, dtype.itemsize, align):
                yield part, dtype

    def work(item: tuple[Block, torch.dtype], file: int) -> None:
        part, dtype = item
        spec = part.recipe.spec
        align = _rows_of_an_index(spec.shape)
        shape = ((part.stop - part.start) // align, *spec.shape[1:])

        def pieces() -> Iterator[torch.Tensor]:
            for block in blocks(part, BLOCK_BYTES, dtype.itemsize):
                rows = make_rows(block, dtype, reader)
                yield rows
                advance(rows.numel() * rows.element_size(), total)

        writer.write_part(file, spec.name, part.start // align, shape, pieces())

    try:
        in_threads(parts(), work, threads)
        for key in extra_states(model):
            writer.write_object(key, None)
        writer.finish({"checkpoint_version": 3.0, "iteration": 0})
    finally:
        writer.close()
    return total


def _rows_of_an_index(shape: tuple[int, ...]) -> int:
    """Rows (of the tensor as a matrix) that one index of dim 0 holds."""
    return as_matrix(shape)[0] // shape[0]
