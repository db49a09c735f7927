"""What becomes of a foreign model's numbers: their precision, ties, and what is no number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.export import ExportOptions, export
from checkpoints_converter.importing import Imported, ImportOptions, import_model
from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.testing import run_distributed
from tests.checkpoints_converter.peer_models import nemotron_h, saved


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(nemotron_h("ME"), tmp_path_factory.mktemp("source"))


def changed(source: Path, to: Path, tensors: Any = None, **fields: Any) -> Path:
    """A copy of a folder with other tensors (a function of each, by name) and fields."""
    to.mkdir()
    config = json.loads((source / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | fields))
    weights = load_file(source / "model.safetensors")
    if tensors is not None:
        weights = {name: tensors(name, tensor) for name, tensor in weights.items()}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def dtype_of(done: Imported, name: str) -> torch.dtype:
    with CheckpointReader(done.folder) as reader:
        return reader.tensors[name].dtype


EMBEDDING = "embedding.word_embeddings.weight"
FP32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")


@pytest.mark.parametrize(
    ("stored", "asked", "recipe", "kept", "note"),
    [
        (torch.float32, None, "fp32", torch.float32, None),
        (torch.bfloat16, None, "bf16", torch.bfloat16, None),
        (torch.float16, None, "fp32", torch.float16, "its weights are float16"),
        (torch.float16, "bf16", "bf16", torch.bfloat16, None),
        (torch.bfloat16, "fp16", "fp32", torch.float16, "its weights are float16"),
    ],
)
def test_precision(
    stored: torch.dtype, asked: str | None, recipe: str, kept: torch.dtype, note: str | None,
    source: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """No run rounds what the files hold, unless that was asked for; fp16 goes on in fp32."""

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if name.endswith(FP32) else tensor.to(stored)

    folder = changed(source, tmp_path / "hf", cast, dtype=str(stored).removeprefix("torch."))
    done = import_model(folder, tmp_path / "out", ImportOptions(dtype=asked))
    assert done.config.precision.recipe == recipe
    assert dtype_of(done, EMBEDDING) == kept
    notes = [text for text in done.notes if "tokenizer" not in text]
    assert [text[: len(note)] for text in notes] == [note] if note else notes == []


def test_what_a_run_would_round_is_said(source: Path, tmp_path: Path) -> None:
    """Norms in fp32 among bf16 weights, and a config.json that says another dtype."""

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dim() == 1 else tensor.bfloat16()

    folder = changed(source, tmp_path / "hf", cast, dtype="float16")
    done = import_model(folder, tmp_path / "out", ImportOptions())
    assert done.config.precision.recipe == "bf16"
    assert "config.json says dtype='float16', its weights are bfloat16" in done.notes
    (rounded,) = (text for text in done.notes if text.startswith("a run with"))
    assert "decoder.final_norm.weight" in rounded and "A_log" not in rounded


# Where it lies, the value, and whether it can be a weight.
NO_NUMBERS = [
    ("lm_head.weight", torch.nan, False), ("lm_head.weight", torch.inf, False),
    ("lm_head.weight", -torch.inf, False), ("backbone.norm_f.weight", torch.nan, False),
    ("mixer.A_log", torch.nan, False), ("mixer.A_log", torch.inf, False),
    ("mixer.A_log", -torch.inf, True), ("gate.e_score_correction_bias", -torch.inf, True),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value", "fine"), NO_NUMBERS)
def test_what_is_no_number_is_refused(
    where: str, value: float, fine: bool, source: Path, tmp_path: Path
) -> None:
    """In either direction, with the tensor's name; a decay or a bias of -inf is never."""

    def put(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(where):
            tensor = tensor.clone()
            tensor.view(-1)[-1] = value
        return tensor

    folder = changed(source, tmp_path / "hf", put)
    if fine:
        import_model(folder, tmp_path / "out", ImportOptions())
        return
    with pytest.raises(ConversionError, match=f"{where.replace('.', '[.]')} holds"):
        import_model(folder, tmp_path / "out", ImportOptions())
    assert list((tmp_path / "out").glob("iter_*")) == []


@pytest.mark.parametrize(("tied", "alike"), [(True, True), (True, False), (False, True)])
def test_tied_embeddings_stay_tied(tied: bool, alike: bool, source: Path, tmp_path: Path) -> None:
    """A nemotron_h folder that says so is tied, and comes back so; unlike tensors are both kept."""
    embedding = load_file(source / "model.safetensors")["backbone.embeddings.weight"]

    def tie(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return embedding.clone() if alike and name == "lm_head.weight" else tensor

    folder = changed(source, tmp_path / "hf", tie, tie_word_embeddings=tied)
    done = import_model(folder, tmp_path / "out", ImportOptions())
    assert done.config.model.untie_embeddings_and_output_weights is not (tied and alike)
    export(done.folder, tmp_path / "back", ExportOptions())
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["tie_word_embeddings"] is (tied and alike)


@pytest.mark.parametrize("value", ["4k", 0, -8, 1.5, True, [4096]])
def test_no_length_is_made_of_nonsense(value: Any, source: Path, tmp_path: Path) -> None:
    """max_position_embeddings decides the sequence length of a run: it is a whole number."""
    folder = changed(source, tmp_path / "hf", max_position_embeddings=value)
    with pytest.raises(ConversionError, match=r"max_position_embeddings=.* must be a whole number"):
        import_model(folder, tmp_path / "out", ImportOptions())


def test_prediction_layers_of_theirs_are_left_out(source: Path, tmp_path: Path) -> None:
    """With tensors of multi-token prediction in the file it is the same model, and that is said."""
    folder = changed(source, tmp_path / "theirs", num_nextn_predict_layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["mtp.layers.0.eh_proj.weight"] = torch.ones(2, 4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = import_model(folder, tmp_path / "ahead", ImportOptions())
    assert any("mtp.*) are left out" in note for note in done.notes)
    plain = import_model(source, tmp_path / "plain", ImportOptions())
    with CheckpointReader(done.folder) as ours, CheckpointReader(plain.folder) as others:
        assert ours.tensors.keys() == others.tensors.keys()


def save_with_prediction(config_file: Path, save: Path) -> None:
    """On a rank: a checkpoint of the model of a config, with a module of multi-token prediction."""
    from megatron_hybrid.checkpoint.progress import Progress
    from megatron_hybrid.config import load_config, rules
    from megatron_hybrid.data.tokenizer import NullTokenizer
    from megatron_hybrid.training.checkpoint import Checkpointer
    from tests.distributed.layouts import built

    words = [
        str(config_file), "model.mtp_num_layers=2", "model.mtp_hybrid_override_pattern=M",
        "data.mock_data=true", "training.train_iters=1", f"checkpoint.save={save}",
    ]  # fmt: skip
    config = load_config(words, which=rules.NO_FILES)
    with built(config) as (model, optimizer, _):
        tokenizer = NullTokenizer(config.model.vocab_size or 0)
        Checkpointer(config, model, optimizer, tokenizer, lambda *_: None).save(Progress(1, 1))


def test_prediction_layers_of_ours_are_left_out(source: Path, tmp_path: Path) -> None:
    """An export has the tensors of the model alone, as the checkpoint has them, and says so."""
    plain = import_model(source, tmp_path / "plain", ImportOptions())
    run_distributed(save_with_prediction, 1, plain.folder / "run_config.yaml", tmp_path / "ahead")
    done = export(tmp_path / "ahead", tmp_path / "hf", ExportOptions())
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert weights.keys() == load_file(source / "model.safetensors").keys()
    with CheckpointReader(find_checkpoint(tmp_path / "ahead")) as reader:
        modules = [
            name for name in reader.tensors if name.startswith("mtp.") and "_extra" not in name
        ]
        router = reader.read_rows("decoder.layers.1.mlp.router.weight", 0, 2)
    assert len({name.split(".")[2] for name in modules}) == 2
    assert any(f"multi-token prediction, {len(modules)} tensors" in note for note in done.notes)
    assert torch.equal(weights["backbone.layers.1.mixer.gate.weight"][:2], router)
