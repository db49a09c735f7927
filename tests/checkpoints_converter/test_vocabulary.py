"""A tokenizer with more ids than the model has embeddings: each command says it in one sentence."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import Imported, ImportOptions, import_model
from checkpoints_converter.verify import verify
from megatron_hybrid.config import UpcyclingConfig, load_config
from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import Generator
from megatron_hybrid.preflight.files import check_files
from megatron_hybrid.training.start import open_run
from megatron_hybrid.upcycling.request import Request, upcycled_config
from megatron_hybrid.upcycling.write import Upcycling
from tests.checkpoints_converter.conftest import ROOT
from tests.checkpoints_converter.peer_models import VOCAB_SIZE, nemotron_h, saved

SENTENCE = f"model.vocab_size={VOCAB_SIZE} must hold the tokenizer's {VOCAB_SIZE + 3} tokens"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    folder = tmp_path_factory.mktemp("vocabulary")
    saved(nemotron_h("M-*-"), folder / "hf")
    ids = {f"w{number}": number for number in range(VOCAB_SIZE + 2)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="w0"))
    words.add_special_tokens(["</s>"])
    words.save(str(folder / "hf" / "tokenizer.json"))
    return import_model(folder / "hf", folder / "imported", ImportOptions())


def test_conversions_note_it(imported: Imported, tmp_path: Path) -> None:
    """The model can be had with another tokenizer: both directions convert it, and say so."""
    exported = export(imported.folder, tmp_path / "out", ExportOptions())
    for notes in (imported.notes, exported.notes):
        assert [note for note in notes if SENTENCE in note]


def test_whatever_gives_the_model_ids_refuses_it(imported: Imported, tmp_path: Path) -> None:
    """generate, verify, upcycle, pretrain and preflight, before any work."""
    folder, config = imported.folder, imported.config
    with pytest.raises(UserError, match=SENTENCE), Generator(folder):
        pass
    export(folder, tmp_path / "out", ExportOptions())
    with pytest.raises(UserError, match=SENTENCE):
        verify(folder, tmp_path / "out")
    moe = upcycled_config(config, Request(2, 4, 4), tmp_path / "moe", [])
    with pytest.raises(UserError, match=SENTENCE):
        Upcycling(folder, config, moe, UpcyclingConfig())
    words = [str(folder / "run_config.yaml"), "data.mock_data=true", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=SENTENCE):
        open_run(load_config(words), 1)
    checks = {check.name: check for check in check_files(words, 1, 0)[1]}
    assert SENTENCE in checks["tokenizer"].problems[0]
    assert checks["run folder"].problems == ()


# Modules that open a tokenizer, and no model.
WITHOUT_MODEL = {
    "megatron_hybrid/commands/data_inspect.py",
    "megatron_hybrid/commands/data_plan.py",
    "megatron_hybrid/data/inspection/show.py",
    "megatron_hybrid/data/tokenizing/settings.py",
    "megatron_hybrid/checkpoint/carried.py",  # compares two tokenizers, neither of them a model's
    "megatron_hybrid/teachers/config.py",  # the same
    "megatron_hybrid/teachers/cache_config.py",  # compares a fingerprint
    "checkpoints_converter/verify.py",  # its model is `Generator`'s
}


def _calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield getattr(function, "id", None) or getattr(function, "attr", "")


def test_no_command_opens_a_tokenizer_without_holding_it_against_the_model() -> None:
    """Every module that opens a tokenizer also asks whether the model holds its ids."""
    opens = set()
    for package in ("megatron_hybrid", "checkpoints_converter", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            calls = set(_calls(ast.parse(path.read_text())))
            if calls & {"build_tokenizer", "load_tokenizer"}:
                name = str(path.relative_to(ROOT))
                opens.add(name)
                asks = calls & {"with_vocab_size", "vocabulary_problem"}
                assert bool(asks) != (name in WITHOUT_MODEL), name
    assert opens >= WITHOUT_MODEL
