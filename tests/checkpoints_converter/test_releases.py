"""One folder is one model: which release of transformers it needs is known, said and checked."""

import json
from pathlib import Path

import pytest

from checkpoints_converter import releases
from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import ImportOptions, import_model
from checkpoints_converter.registry import MODULES, family
from tests.checkpoints_converter.peer_models import saved
from tests.checkpoints_converter.test_families import mamba2
from tests.checkpoints_converter.test_fields import written

GROUPED, ALWAYS = "5.23.0", "5.15.1"


@pytest.mark.parametrize(
    "model_type", sorted(name for name in MODULES if family(name).in_transformers)
)
def test_floor_of_each_family(model_type: str) -> None:
    """Up to 5.22 some families apply the gated norm over the whole width of the groups."""
    several, _ = written(model_type)
    one, _ = written(model_type, mamba_num_groups=1)
    chosen = family(model_type)
    expected = ALWAYS if model_type in ("nemotron_h", "falcon_h1") else GROUPED
    assert str(releases.floor(chosen, several).version) == expected
    assert str(releases.floor(chosen, one).version) == ALWAYS
    assert releases.problem(expected, chosen, several) is None
    assert (releases.problem("5.22.2", chosen, several) is None) is (expected == ALWAYS)
    assert releases.problem("5.22.2", chosen, one) is None
    assert "5.14.1 is installed" in str(releases.problem("5.14.1", chosen, one))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(mamba2(), tmp_path_factory.mktemp("source"))


def test_card_and_note_of_an_export(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card names the floor and why; where an older one is installed, the export says so."""
    imported = import_model(source, tmp_path / "ours", ImportOptions()).folder
    done = export(imported, tmp_path / "new", ExportOptions(family="mamba2"))
    assert "| transformers | 5.23.0 or later: " in (tmp_path / "new" / "README.md").read_text()
    assert not [note for note in done.notes if "transformers" in note]
    monkeypatch.setattr(releases, "version", lambda name: "5.22.2")
    done = export(imported, tmp_path / "old", ExportOptions(family="mamba2"))
    assert [note for note in done.notes if "5.22.2 is installed" in note]


@pytest.mark.parametrize(
    ("wrote", "noted"), [("5.22.2", True), ("4.44.0.dev0", True), ("5.23.0", False), ("?", False)]
)
def test_who_wrote_a_folder(wrote: str, noted: bool, source: Path, tmp_path: Path) -> None:
    """A folder of a release that computed something else is taken with a note."""
    folder = tmp_path / "hf"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"transformers_version": wrote}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    notes = import_model(folder, tmp_path / "out", ImportOptions()).notes
    assert any(f"transformers {wrote}, which wrote it" in note for note in notes) is noted


def test_verify_refuses_an_older_release(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any model is made: what it would compute is another model."""
    from checkpoints_converter import verify, verify_sides

    imported = import_model(source, tmp_path / "ours", ImportOptions()).folder
    export(imported, tmp_path / "hf", ExportOptions(family="mamba2"))
    monkeypatch.setattr(verify_sides, "version", lambda name: "5.22.2")
    with pytest.raises(verify.ConversionError, match=r"5\.22\.2 is installed; this model needs"):
        verify.verify(imported, tmp_path / "hf")
