"""Models of transformers, converted to ours, and what both sides make of the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import ImportOptions, import_model
from checkpoints_converter.registry import family
from checkpoints_converter.streaming import Block, make_rows
from checkpoints_converter.weights import Names, recipes_of_theirs
from megatron_hybrid.checkpoint.reader import as_matrix
from megatron_hybrid.testing import run_distributed
from tests.checkpoints_converter.our_models import all_logits_and_gradients
from tests.checkpoints_converter.peer_models import CHUNK_SIZE, saved

SEQ_LENGTH = 2 * CHUNK_SIZE + 5
PADDED_TO = 48
# In memory -> in files, where transformers gives a tensor another name.
_NAMES_IN_FILES = {
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}


@dataclass
class Case:
    """A model of transformers, its import, and what both sides make of the same tokens."""

    model_type: str
    hugging_face: Path
    checkpoint: Path
    config: Any
    logits: Tensor
    gradients: dict[str, Tensor]
    our_logits: Tensor
    our_gradients: dict[str, Tensor]


def run_cases(folder: Path, models: Mapping[str, Any]) -> dict[str, Case]:
    """Convert every model, and run both sides of all of them."""
    theirs, imports, inputs = [], [], []
    for number, model in enumerate(models.values()):
        source = folder / f"{number}"
        saved(model, source / "hf")
        # Padded, as TP would have it: neither logits nor gradients may know.
        options = ImportOptions(vocabulary_multiple=PADDED_TO)
        imports.append(import_model(source / "hf", source / "imported", options))
        draws = torch.Generator().manual_seed(3)
        vocab_size = model.config.vocab_size
        inputs.append(torch.randint(0, vocab_size, (2, SEQ_LENGTH + 1), generator=draws))
        theirs.append(_their_logits_and_gradients(model, inputs[-1]))
    tokens = [drawn[:, :-1].contiguous() for drawn in inputs]
    labels = [drawn[:, 1:].contiguous() for drawn in inputs]
    ours = run_distributed(
        all_logits_and_gradients, 1, [done.folder for done in imports], tokens, labels
    )[0]
    types = [model.config.model_type for model in models.values()]
    return {
        name: Case(types[i], folder / f"{i}" / "hf", done.folder, done.config, *their, *our)
        for i, (name, done, their, our) in enumerate(
            zip(models, imports, theirs, ours, strict=True)
        )
    }


def _their_logits_and_gradients(model: Any, drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=drawn[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, 1:].flatten())
    loss.backward()
    gradients = {
        _name_in_files(name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach(), gradients


def _name_in_files(name: str) -> str:
    for ours, theirs in _NAMES_IN_FILES.items():
        name = name.replace(ours, theirs)
    return name


class _Gradients:
    """Gradients by name, as the converter reads rows."""

    def __init__(self, gradients: dict[str, Tensor]) -> None:
        self._gradients = gradients

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._gradients[name]
        return tensor.reshape(as_matrix(tuple(tensor.shape)))[start:stop]


def assert_file_comes_back(case: Case, out: Path) -> None:
    """Imported and exported again, the file is the one that transformers wrote."""
    export(case.checkpoint, out, ExportOptions(family=case.model_type))
    expected = (case.hugging_face / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == expected


def assert_same_logits(case: Case) -> None:
    """To 1e-5 of their deviation."""
    words = case.logits.shape[-1]
    assert case.our_logits.shape[-1] % PADDED_TO == 0 and words % PADDED_TO
    difference = (case.our_logits[..., :words] - case.logits).abs().max()
    assert difference < 1e-5 * case.logits.std()


def assert_same_gradients(case: Case) -> None:
    """Each parameter's gradient, under the map, to 1e-5 of its norm."""
    table = family(case.model_type).table(case.config.model, Names(), Names(case.gradients))
    compared = set()
    for recipe in recipes_of_theirs(table):
        if recipe.spec.name.endswith("e_score_correction_bias"):
            continue  # not trained by gradients
        rows = as_matrix(recipe.spec.shape)[0]
        source = _Gradients(case.our_gradients)
        ours = make_rows(Block(recipe, 0, rows), torch.float32, source).view(recipe.spec.shape)
        theirs = case.gradients[recipe.spec.name]
        relative = (ours - theirs).norm() / theirs.norm()
        assert relative < 1e-5, (recipe.spec.name, relative.item())
        compared.add(recipe.spec.name)
    assert compared == set(case.gradients)
