"""Damaged, mixed-up and malicious inputs are refused, and leave nothing that loads."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import ImportOptions, import_model
from megatron_hybrid.checkpoint.integrity import write_integrity
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.errors import UserError
from tests.checkpoints_converter.peer_models import nemotron_h, saved

SHARD_BYTES = 40_000


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in several shards of Hugging Face's format, and the checkpoint that it came from."""
    folder = tmp_path_factory.mktemp("pair")
    source = saved(nemotron_h("M-M*-"), folder / "source")
    imported = import_model(source, folder / "checkpoints", ImportOptions()).folder
    export(imported, folder / "shards", ExportOptions(max_shard_bytes=SHARD_BYTES))
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    return folder / "shards", imported


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def _truncate(folder: Path) -> None:
    path = _shard(folder)
    path.write_bytes(path.read_bytes()[:-8])


def _other_header(folder: Path) -> None:
    path = _shard(folder)
    path.write_bytes((1 << 50).to_bytes(8, "little") + path.read_bytes()[8:])


def _missing_shard(folder: Path) -> None:
    _shard(folder).unlink()


def _mixed_up(folder: Path) -> None:
    """One shard under another's name."""
    other, *_ = (path for path in sorted(folder.glob("*.safetensors")) if path != _shard(folder))
    shutil.copy(other, _shard(folder))


def _other_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def _other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, "safetensors"),
        (_other_header, "safetensors"),
        (_missing_shard, "safetensors"),
        (_mixed_up, "safetensors"),
        (_other_family, "llama"),
        (_other_sizes, "shape"),
    ],
)
def test_bad_folders(
    damage: Callable[[Path], None], named: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """An import names what is wrong, and leaves no checkpoint."""
    shutil.copytree(pair[0], tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(UserError, match=named):
        import_model(tmp_path / "bad", tmp_path / "out", ImportOptions())
    assert list((tmp_path / "out").glob("iter_*")) == []


def test_shards_of_two_models(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A shard of another model with the same names and shapes is noticed."""
    other = nemotron_h("M-M*-")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    imported = import_model(saved(other, tmp_path / "hf"), tmp_path / "ours", ImportOptions())
    export(imported.folder, tmp_path / "other", ExportOptions(max_shard_bytes=SHARD_BYTES))
    mixed = shutil.copytree(pair[0], tmp_path / "mixed")
    shutil.copy(_shard(tmp_path / "other"), _shard(mixed))
    with pytest.raises(UserError, match=_shard(mixed).name):
        import_model(mixed, tmp_path / "out", ImportOptions())
    assert list((tmp_path / "out").glob("iter_*")) == []


class _Malicious:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path.touch, (self.trap,)  # type: ignore[return-value]


def test_a_pickle_runs_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A checkpoint's metadata that would run code when unpickled is refused without running it."""
    checkpoint = shutil.copytree(pair[1], tmp_path / "iter_0000000")
    trap = tmp_path / "trap"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Malicious(trap)))
    with pytest.raises(UserError, match="metadata"):
        export(checkpoint, tmp_path / "out", ExportOptions())
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert trap.exists()  # it would have


@pytest.mark.parametrize("where", ["cut", "flipped", "gone"])
def test_damaged_checkpoints(where: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An export of a damaged checkpoint is refused, and no folder is left."""
    checkpoint = shutil.copytree(pair[1], tmp_path / "iter_0000000")
    with CheckpointReader(checkpoint) as reader:
        (chunk,) = reader.tensors["embedding.word_embeddings.weight"].chunks
    path = checkpoint / chunk.file
    content = bytearray(path.read_bytes())
    if where == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif where == "flipped":
        content[chunk.start + chunk.length // 2] ^= 1  # of the tensor, not what is around it
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(UserError, match="distcp"):
        export(checkpoint, tmp_path / "out", ExportOptions())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["iter_0000000"]


def test_weights_of_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Whole files of another model pass every checksum of their own; the manifest knows better."""
    model = nemotron_h("M-M*-")
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    other = saved(model, tmp_path / "source")
    other_files = import_model(other, tmp_path / "other", ImportOptions(threads=1)).folder
    checkpoint = import_model(pair[0], tmp_path / "one", ImportOptions(threads=1)).folder
    write_integrity(checkpoint, 1)
    export(checkpoint, tmp_path / "right", ExportOptions())
    for path in other_files.glob("*.distcp"):
        shutil.copy(path, checkpoint / path.name)
    with pytest.raises(UserError, match=r"distcp: hash mismatch"):
        export(checkpoint, tmp_path / "out", ExportOptions())
    assert not (tmp_path / "out").exists()
    export(checkpoint, tmp_path / "out", ExportOptions(verify_integrity=False))


@pytest.mark.parametrize("in_place", [False, True])
def test_interrupted(in_place: bool, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An export or an import that ends in the middle leaves nothing."""

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    options = ExportOptions(max_shard_bytes=SHARD_BYTES, in_place=in_place)
    with pytest.raises(KeyboardInterrupt):
        export(pair[1], tmp_path / "out", options, interrupt)
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyboardInterrupt):
        import_model(pair[0], tmp_path / "checkpoints", ImportOptions(), interrupt)
    assert list((tmp_path / "checkpoints").rglob("*.distcp")) == []


def test_force(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder that is there stays; --force replaces a model folder, and nothing else."""
    shutil.copytree(pair[0], tmp_path / "out")
    with pytest.raises(UserError, match="--force"):
        export(pair[1], tmp_path / "out", ExportOptions())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    export(pair[1], tmp_path / "out", ExportOptions(force=True))
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        export(pair[1], tmp_path / "out", ExportOptions(force=True))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
