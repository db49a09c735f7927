"""The good inputs that mutations start from, made once with the project's own commands."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.reader import CheckpointReader, tensor_bytes
from tests.data.tokenizer_files import FAST_KINDS, save_kind
from tests.mutations.outcome import run

VOCAB_SIZE = 1000
CONFIG: dict[str, Any] = {
    "model": {
        "hybrid_layer_pattern": "M*-", "hidden_size": 32, "num_attention_heads": 2,
        "mamba_head_dim": 16, "mamba_state_dim": 8, "mamba_num_groups": 2,
        "vocab_size": VOCAB_SIZE, "make_vocab_size_divisible_by": 8,
    },
    "data": {"tokenizer_type": "huggingface", "seq_length": 32, "num_workers": 0,
             "split": "100,0,0"},
    "precision": {"recipe": "fp32"},
    "training": {"global_batch_size": 2, "train_iters": 1},
    "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
    "logging": {"tensorboard": False},
}  # fmt: skip

UPCYCLED = ["--experts", "2", "--granularity", "2", "--topk", "2"]


@dataclass(frozen=True)
class Good:
    """Good inputs; a case copies what it damages.

    Attributes:
        config: a YAML file of a run of one step.
        text: JSONL.
        tokenizer: folder with a tokenizer.json.
        pair: prefix of the .bin, .idx and facts file of the text.
        run: the run's folder, with a checkpoint of step 1.
        model: a Hugging Face folder of the same model.
        upcycled: folder of checkpoints, with what upcycling makes of it.
    """

    config: Path
    text: Path
    tokenizer: Path
    pair: Path
    run: Path
    model: Path
    upcycled: Path


def make_good(folder: Path) -> Good:
    """Write all of them below `folder`."""
    data = folder / "data"
    good = Good(
        folder / "run.yaml", folder / "text.jsonl", folder / "tokenizer", data / "text",
        folder / "run", folder / "model", folder / "upcycled",
    )  # fmt: skip
    data.mkdir(parents=True)
    save_kind(FAST_KINDS["gpt2"](), good.tokenizer)
    lines = Path(json.__file__).read_text().split("\n\n")
    good.text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    places = {"data_path": str(good.pair), "tokenizer_model": str(good.tokenizer)}
    config = CONFIG | {"data": CONFIG["data"] | places, "run_dir": str(good.run)}
    good.config.write_text(yaml.safe_dump(config))
    for words in (
        ["data", "tokenize", "--input", good.text, "--output", good.pair, "--workers", "1",
         "--tokenizer-type", "huggingface", "--tokenizer-model", good.tokenizer],
        ["pretrain", good.config],
        ["convert", "to-hf", good.run, good.model],
        ["upcycle", *UPCYCLED, "--load", good.run, "--save", good.upcycled],
    ):  # fmt: skip
        found = run(list(map(str, words)), folder)
        assert found.code == 0, found.output
    return good


def copy(source: Path, folder: Path) -> Path:
    """A copy of a file, a folder, or all files of a prefix, in `folder`; where it is now."""
    target = folder / source.name
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copy(source, target)
    else:
        for each in source.parent.glob(f"{source.name}*"):
            shutil.copy(each, folder)
    return target


def same_result(folder: Path, other: Path) -> bool:
    """Whether two model folders, or two folders of checkpoints, hold the same."""
    return _content(folder) == _content(other)


def _content(folder: Path) -> dict[str, bytes]:
    """What is in it, but for the files of a checkpoint that say where it came from."""
    found = {
        path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".safetensors", ".json", ".txt", ".jinja", ".model")
    }
    found.pop("integrity.json", None)  # sums of files that do
    if "latest_checkpointed_iteration.txt" in found:
        with CheckpointReader(find_checkpoint(folder)) as reader:
            for name in reader.tensors:
                found[name] = bytes(tensor_bytes(reader.read(name)))
    return found
