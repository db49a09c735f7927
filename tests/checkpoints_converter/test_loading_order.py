"""Weights that a folder holds twice: we take what transformers takes, or refuse them by name."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.importing import Imported, ImportOptions, import_model
from checkpoints_converter.registry import MODULES, family
from checkpoints_converter.weights import Names
from megatron_hybrid.checkpoint.reader import CheckpointReader, as_matrix
from tests.checkpoints_converter.peer_models import nemotron_h, saved
from tests.checkpoints_converter.test_families import bamba, falcon, granite, mamba2

Tensors = dict[str, Tensor]
OUTPUT = "lm_head.weight"
# A tied one of each family; nemotron_h of transformers ties nothing, and always has both.
TIED: dict[str, Callable[[], Any]] = {
    "nemotron_h": lambda: nemotron_h("M-ME*-"),
    "mamba2": lambda: mamba2(tie_word_embeddings=True, num_hidden_layers=1),
    "bamba": lambda: bamba(tie_word_embeddings=True, num_hidden_layers=2),
    "granitemoehybrid": lambda: granite(
        tie_word_embeddings=True, num_hidden_layers=2, num_local_experts=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "falcon_h1": lambda: falcon(tie_word_embeddings=True, num_hidden_layers=1),
}  # fmt: skip
assert TIED.keys() == {name for name in MODULES if family(name).in_transformers}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tied")
    return {name: saved(make(), folder / name) for name, make in TIED.items()}


def changed(folder: Path, change: Callable[[Tensors], Any], to: Path) -> Path:
    """A copy of a folder with other tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def vocabularies(done: Imported) -> tuple[Tensor, Tensor]:
    """Embedding and output layer of an import, `[V, h]` each."""
    with CheckpointReader(done.folder) as reader:
        names = ["embedding.word_embeddings.weight"]
        if done.config.model.untie_embeddings_and_output_weights:
            names.append("output_layer.weight")
        rows = [reader.read_rows(n, 0, as_matrix(reader.tensors[n].shape)[0]) for n in names]
    return rows[0], rows[-1]


def assert_theirs(done: Imported, folder: Path) -> None:
    """Embedding and output layer are those that transformers loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for ours, their in zip(vocabularies(done), theirs, strict=True):
        torch.testing.assert_close(ours, their.detach(), rtol=0, atol=0)


def _embedding(tensors: Tensors) -> str:
    return next(name for name in tensors if "embed" in name)


def _equal(tensors: Tensors) -> None:
    tensors[OUTPUT] = tensors[_embedding(tensors)].clone()


def _unequal(tensors: Tensors) -> None:
    tensors[OUTPUT] = tensors[_embedding(tensors)] + 1


def _only_the_output(tensors: Tensors) -> None:
    tensors[OUTPUT] = tensors.pop(_embedding(tensors))


@pytest.mark.parametrize("change", [_equal, _unequal, _only_the_output])
@pytest.mark.parametrize("name", [name for name in TIED if name != "nemotron_h"])
def test_tied_embeddings_held_otherwise(
    name: str, change: Callable[[Tensors], Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Twice alike, twice unlike, under the other's name: what transformers makes of the file."""
    folder = changed(folders[name], change, tmp_path / "hf")
    done = import_model(folder, tmp_path / "out", ImportOptions())
    assert_theirs(done, folder)
    unequal = change is _unequal
    assert done.config.model.untie_embeddings_and_output_weights == unequal
    assert any("but their values differ: both are kept" in note for note in done.notes) == unequal


@pytest.mark.parametrize("name", TIED)
def test_whatever_name_is_looked_for_may_be_there_too(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor that goes by several names, under one more of them: taken, or refused by name."""
    asked: set[str] = set()
    has, pick = Names.has, Names.pick

    def recording_has(self: Names, tensor: str) -> bool:
        asked.update([tensor] if self.present is not None else [])
        return has(self, tensor)

    def recording_pick(self: Names, *candidates: str) -> str:
        asked.update(candidates if self.present is not None else [])
        return pick(self, *candidates)

    monkeypatch.setattr(Names, "has", recording_has)
    monkeypatch.setattr(Names, "pick", recording_pick)
    import_model(folders[name], tmp_path / "out", ImportOptions())
    tensors = load_file(folders[name] / "model.safetensors")
    assert asked - tensors.keys()
    for number, other in enumerate(sorted(asked - tensors.keys())):
        for shape in {(1,), tuple(tensors[_embedding(tensors)].shape)}:
            place = tmp_path / f"{number} {len(shape)}"
            folder = changed(
                folders[name], lambda t, n=other, s=shape: t.update({n: torch.ones(s)}), place
            )
            try:
                import_model(folder, place / "out", ImportOptions())
            except ConversionError as error:
                assert other in str(error)


def _sharded(folder: Path) -> Iterator[tuple[str, Tensors]]:
    tensors = load_file(folder / "model.safetensors")
    for number, half in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        yield f"model-{number:05d}-of-00002.safetensors", {name: tensors[name] for name in half}


def _index(folder: Path, add: float = 0.0) -> None:
    """Beside what is there, an index and its files, whose values are others."""
    weight_map = {}
    for file, tensors in _sharded(folder):
        save_file(
            {n: t + add for n, t in tensors.items()}, folder / file, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_one_file_goes_before_the_index(folders: dict[str, Path], tmp_path: Path) -> None:
    """With both, and a variant and a pickle, transformers takes model.safetensors; so do we."""
    folder = shutil.copytree(folders["mamba2"], tmp_path / "hf")
    _index(folder, add=1.0)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model.fp16.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    done = import_model(folder, tmp_path / "out", ImportOptions())
    assert_theirs(done, folder)
    (note,) = (note for note in done.notes if note.startswith("not read"))
    for name in ("index.json", "model-00002-of", "model.fp16.safetensors", "pytorch_model.bin"):
        assert name in note
    (folder / "model.safetensors").unlink()  # and then what the index names
    done = import_model(folder, tmp_path / "again", ImportOptions())
    assert_theirs(done, folder)


def _file_gone(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _held_by_two(folder: Path) -> None:
    file, other = (load_file(folder / file) for file, _ in _sharded(folder))
    save_file(file | other, folder / "model-00002-of-00002.safetensors")


def _named_elsewhere(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_file_gone, "model-00002-of-00002.safetensors is missing"),
        (_held_by_two, "model-00002-of-00002.safetensors is not the file of .* also holds"),
        (_named_elsewhere, "transformers_weights='other.safetensors' must be"),
        (_adapter, "adapter_config.json beside it"),
    ],
)
def test_weights_that_are_not_those_of_the_order(
    change: Callable[[Path], None], named: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """What transformers would take elsewhere, or twice, is refused by name."""
    folder = shutil.copytree(folders["mamba2"], tmp_path / "hf")
    _index(folder)
    if change in (_file_gone, _held_by_two):
        change(folder)
        (folder / "model.safetensors").unlink()
    else:
        change(folder)
    with pytest.raises(ConversionError, match=named):
        import_model(folder, tmp_path / "out", ImportOptions())
