"""`megatron-hybrid convert to-hf` and `from-hf`: streamed, on any machine, without a GPU."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_hybrid.bounds import MOST_BYTES, MOST_COUNT
from megatron_hybrid.commands.options import ModelOption, ThreadsOption
from megatron_hybrid.commands.progress import byte_progress

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Dtype = Literal["bf16", "fp32", "fp16"]
DtypeOption = Annotated[Dtype | None, typer.Option(help="of the weights; by default as stored")]


def _bytes(text: str) -> int:
    """`5GB` -> 5000000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = float(match.group(1)) * _UNITS[match.group(2) or ""] if match else 0.0
    if not 1 <= size <= MOST_BYTES:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return int(size)


def to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="a checkpoint, a folder of them, or a run: its newest")
    ],
    out: Annotated[Path, typer.Argument(help="folder of the model, which must not exist")],
    dtype: DtypeOption = None,
    max_shard_size: Annotated[
        int, typer.Option(parser=_bytes, metavar="SIZE", help="largest file, such as 5GB")
    ] = "5GB",  # type: ignore[assignment]  # typer gives it to the parser
    family: Annotated[
        str | None, typer.Option(help="model_type to write; by default the first that fits")
    ] = None,
    model: ModelOption = None,
    in_place: Annotated[
        bool,
        typer.Option(
            help="write OUT under its own name, shard after shard, for an upload that follows; "
            "config.json comes last"
        ),
    ] = False,
    force: Annotated[bool, typer.Option(help="replace a model folder at OUT")] = False,
    verify_integrity: Annotated[
        bool, typer.Option(help="compare the checkpoint's files with its integrity.json first")
    ] = True,
    threads: ThreadsOption = None,
) -> None:
    """Write a training checkpoint of any layout as a folder that transformers loads."""
    from megatron_hybrid.checkpoint.files import find_checkpoint

    find_checkpoint(checkpoint)  # what is not there is said before torch is loaded
    from checkpoints_converter.export import ExportOptions, export

    options = ExportOptions(
        family, model, dtype, max_shard_size, threads, force, in_place, verify_integrity
    )
    with byte_progress("to-hf") as advance:
        done = export(checkpoint, out, options, advance)
    files = "1 file" if done.shards == 1 else f"{done.shards} files"
    print(
        f"{done.folder}: {done.family}, {done.tensors} tensors, {done.nbytes / 1e9:.2f} GB, {files}"
    )
    for note in done.notes:
        print(f"note: {note}")


def from_hf(
    source: Annotated[Path, typer.Argument(help="folder with config.json and safetensors")],
    checkpoints: Annotated[
        Path, typer.Argument(help="folder of checkpoints to make: what --load takes")
    ],
    dtype: DtypeOption = None,
    make_vocab_size_divisible_by: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_COUNT, help="pad the vocabulary with zeros; by default it is not padded"
        ),
    ] = None,
    ignore_field: Annotated[
        list[str] | None,
        typer.Option(help="of config.json, not known here, that changes nothing; may be repeated"),
    ] = None,
    force: Annotated[bool, typer.Option(help="replace an earlier import")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Write a model of transformers as a checkpoint that `pretrain --load` goes on from."""
    from checkpoints_converter.errors import ConversionError
    from megatron_hybrid.small_files import read_json

    read_json(source / "config.json", ConversionError)  # before torch is loaded
    from checkpoints_converter.importing import ImportOptions, import_model

    options = ImportOptions(
        dtype, make_vocab_size_divisible_by, threads, force, tuple(ignore_field or ())
    )
    with byte_progress("from-hf") as advance:
        done = import_model(source, checkpoints, options, advance)
    print(f"{done.folder}: {done.tensors} tensors, {done.nbytes / 1e9:.2f} GB")
    for note in done.notes:
        print(f"note: {note}")
    print(
        f"go on with: megatron-hybrid pretrain --load {checkpoints} checkpoint.finetune=true "
        "run_dir=... data.data_path=... training.train_tokens=... optimizer.lr=..."
    )
